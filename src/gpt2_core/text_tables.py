"""What a tokenizer without Python needs to know of a vocabulary, as plain arrays: `gpt2_tf.text` runs on them.

A piece of text is looked up by its bytes, eight at a time. The first eight are one 64-bit word, filled up with 0xFF,
which is in no UTF-8; `words` gives its number. If the piece goes on, its number so far and that of its next eight bytes
are one key of `further`, which gives the number of both together. A number below the size of the vocabulary is the id
of the token with exactly these bytes. So no two pieces share a number, and nothing is trusted to a hash:

    " international"  →  words[" interna"] = 50348, words["tional\\xff\\xff"] = 50349  →  further[50348, 50349] = 3230
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt2_core.bpe import merge_many
from gpt2_core.pretokenize import BARRIER, OTHER, class_table
from gpt2_core.text_encoder import merge_arrays
from gpt2_core.vocabulary import Vocabulary

WORD = 8  # bytes
FILL = b"\xff"
BEYOND = 0xF8  # this byte and those above are in no UTF-8
MOST_WORDS = 4  # of a piece that is looked up; GPT-2 has 40 tokens that are longer, all runs of one or two characters
KEY_SHIFT = 32  # a pair of numbers is the one key left << KEY_SHIFT | right


@dataclass(frozen=True, eq=False)
class TextTables:
    """The arrays; keys and values of a lookup stand in the same order.

    word_keys, word_values: 8 bytes as an integer -> their number.
    further_keys, further_values: a number and the next word's number -> the number of both together.
    size: numbers below are ids.
    pair_keys: ids that merge, as one key; the rank of a pair is its place.
    merged: the id that each rank makes, with one more at the end that no rank has.
    in_order: whether no merge can follow a later one: then each round may make all merges of the lowest rank, and
        two encodings of overlapping text may be joined (see docs/decisions/0011).
    byte_ids: (256,) the id of each byte.
    byte_classes: (256,) the class of each ASCII byte and barrier.
    class_table: (0x110000,) the class of each code point.
    inside: (65536,) whether any token has these two bytes side by side, first << 8 | second.
    """

    word_keys: NDArray[np.int64]
    word_values: NDArray[np.int64]
    further_keys: NDArray[np.int64]
    further_values: NDArray[np.int64]
    size: int
    pair_keys: NDArray[np.int64]
    merged: NDArray[np.int32]
    in_order: bool
    byte_ids: NDArray[np.int32]
    byte_classes: NDArray[np.int8]
    class_table: NDArray[np.int8]
    inside: NDArray[np.bool_]


@functools.lru_cache(maxsize=4)
def text_tables(vocabulary: Vocabulary) -> TextTables:
    """The tables of a vocabulary, made once."""
    arrays = merge_arrays(vocabulary)
    numbers, further = _numbers(vocabulary)
    pairs = vocabulary.merge_pairs
    return TextTables(
        word_keys=_words(numbers),
        word_values=np.fromiter(numbers.values(), np.int64, len(numbers)),
        further_keys=np.array([left << KEY_SHIFT | right for left, right in further], np.int64),
        further_values=np.fromiter(further.values(), np.int64, len(further)),
        size=len(vocabulary),
        pair_keys=pairs[:, 0] << KEY_SHIFT | pairs[:, 1],
        merged=np.append(vocabulary.merge_ids, 0).astype(np.int32),
        in_order=_in_order(vocabulary),
        byte_ids=vocabulary.byte_ids.astype(np.int32),
        byte_classes=_byte_classes(),
        class_table=class_table().astype(np.int8),
        inside=arrays.inside.reshape(256, 256).T.reshape(-1),
    )


def known_tokens(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The tokens that are what merging their own bytes gives, and that can be in text, by their bytes."""
    pieces = np.flatnonzero(vocabulary.is_piece)
    if not vocabulary.is_gpt2:  # of GPT-2's a test proves it
        data = [vocabulary.token_bytes[index] for index in pieces.tolist()]
        lengths = np.array([len(piece) for piece in data], np.int64)
        ids, counts = merge_many(np.frombuffer(b"".join(data), np.uint8), lengths, merge_arrays(vocabulary))
        pieces = pieces[(counts == 1) & (ids[np.cumsum(counts) - counts] == pieces)]
    known = {vocabulary.token_bytes[index]: index for index in pieces.tolist()}
    return {data: index for data, index in known.items() if max(data) < BEYOND}


def _numbers(vocabulary: Vocabulary) -> tuple[dict[bytes, int], dict[tuple[int, int], int]]:
    """The number of each word (with 0xFF behind its end), and of each further word after a number."""
    known = known_tokens(vocabulary)
    numbers = {data.ljust(WORD, FILL): index for data, index in known.items() if len(data) <= WORD}
    further: dict[tuple[int, int], int] = {}
    new = len(vocabulary)
    for data in known:
        if not WORD < len(data) <= MOST_WORDS * WORD:
            continue
        so_far = None
        for start in range(0, len(data), WORD):
            word = data[start : start + WORD].ljust(WORD, FILL)
            if word not in numbers:
                numbers[word] = new
                new += 1
            if so_far is None:
                so_far = numbers[word]
                continue
            key = (so_far, numbers[word])
            if key not in further:
                whole = known.get(data[: start + WORD])
                further[key] = new if whole is None else whole
                new += whole is None
            so_far = further[key]
    return numbers, further


def _words(numbers: dict[bytes, int]) -> NDArray[np.int64]:
    return np.frombuffer(b"".join(numbers), np.int64)


def _in_order(vocabulary: Vocabulary) -> bool:
    """Whether every merge comes after all merges that make one of its two sides."""
    last = np.full(len(vocabulary), -1, np.int64)  # the last merge that makes each id
    ranks = np.arange(len(vocabulary.merge_ids))
    np.maximum.at(last, vocabulary.merge_ids, ranks)
    return bool((last[vocabulary.merge_pairs].max(axis=1, initial=-1) < ranks).all())


def _byte_classes() -> NDArray[np.int8]:
    """Bytes within a character, and those that begin one of several bytes, are not asked for: OTHER."""
    table = np.full(256, OTHER, np.int8)
    table[:128] = class_table()[:128]
    table[BEYOND:] = BARRIER
    return table
