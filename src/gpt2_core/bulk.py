"""Long texts: the ids of all pieces of a stretch of text at once, in numpy.

    the text as bytes → where pieces begin → known pieces looked up → the others cut finer, looked up, merged

Nothing here decides what the ids are: that is the pattern (`gpt2_core.pretokenize`) and the merges (`gpt2_core.bpe`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gpt2_core.bpe import MergeArrays, merge_many, merge_piece
from gpt2_core.hash_table import ABSENT
from gpt2_core.piece_cache import LONGEST, PieceCache, hash_words, same_bytes, short_keys, spread, words_of
from gpt2_core.pretokenize import BARRIER_BYTE, PADDING, piece_starts, safe_cut

CHUNK = 1 << 19  # bytes: large enough that the calls of numpy cost little, small enough for the processor's caches

_MERGED_TOGETHER = 64  # bytes: the time for many pieces at once grows with the longest of them


def chunks(data: bytes) -> Iterator[bytes]:
    """The text in parts of about CHUNK bytes, cut where that changes no piece; longer where no such place is."""
    start, size = 0, len(data)
    while size - start > 2 * CHUNK:
        end = start + CHUNK
        while (cut := safe_cut(data, start, end)) == start and end < size:
            end = min(start + 2 * (end - start), size)
        if cut == start:
            break
        yield data[start:cut]
        start = cut
    yield data[start:]


def encode_chunk(data: bytes, cache: PieceCache, merges: MergeArrays) -> NDArray[np.int32]:
    """The ids of UTF-8 text; a barrier byte 0xFF stands between texts and gives -1."""
    starts = piece_starts(data)
    padded = np.frombuffer(data + PADDING, np.uint8)
    lengths = _lengths(starts, len(data))
    values = cache.find(padded, starts, lengths)
    odd = np.flatnonzero(values < 0)
    if not len(odd):
        return values
    absent = values[odd] == ABSENT
    several, unknown = odd[np.flatnonzero(~absent)], odd[np.flatnonzero(absent)]
    unknown = unknown[padded[starts[unknown]] != BARRIER_BYTE]  # barriers stay ABSENT, which is -1
    found, count = cache.ids_of(values[several])
    merged, merged_count = _encode_unknown(padded, starts[unknown], lengths[unknown], cache, merges)
    return _insert(values, [(several, found, count), (unknown, merged, merged_count)])


def _encode_unknown(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    cache: PieceCache,
    merges: MergeArrays,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids of pieces that the cache does not know, one piece after the other, and how many each has.

    A piece is cut further where no merge reaches across: into characters for most scripts but the Latin one, so
    that a few thousand parts, soon known, make up all of a text. Only parts that are new are merged.
    """
    if not len(starts):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    flat = np.append(data[spread(starts, lengths)], _PADDING)
    size = len(flat) - len(_PADDING)
    firsts = np.cumsum(lengths) - lengths
    begins = np.ones(size, bool)
    begins[1:] = ~merges.inside[flat[: size - 1] | flat[1:size].astype(np.intp) << 8]
    begins[firsts] = True
    parts = np.flatnonzero(begins)
    part_lengths = _lengths(parts, size)
    ids, counts = _encode_parts(flat, parts, part_lengths, cache, merges)
    first_part = np.searchsorted(parts, firsts)
    piece_counts = np.add.reduceat(counts, first_part)
    several = np.flatnonzero((_lengths(first_part, len(parts)) > 1) & (lengths <= LONGEST))
    if len(several):
        piece_firsts = np.cumsum(piece_counts) - piece_counts
        known = ids[spread(piece_firsts[several], piece_counts[several])]
        cache.learn(flat, firsts[several], lengths[several], known, piece_counts[several])
    return ids, piece_counts


def _encode_parts(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    cache: PieceCache,
    merges: MergeArrays,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    values = cache.find(data, starts, lengths)
    unknown = np.flatnonzero(values == ABSENT)
    several = np.flatnonzero(values < ABSENT)
    found, count = cache.ids_of(values[several])
    first, which = distinct(data, starts[unknown], lengths[unknown])
    new = unknown[first]
    new_starts, new_lengths = starts[new], lengths[new]
    merged, merged_count = _merge(data, new_starts, new_lengths, merges)
    kept = new_lengths <= LONGEST
    kept_ids = merged[np.repeat(kept, merged_count)]
    cache.learn(data, new_starts[kept], new_lengths[kept], kept_ids, merged_count[kept])
    merged_firsts = np.cumsum(merged_count) - merged_count
    unknown_count = merged_count[which]
    again = merged[spread(merged_firsts[which], unknown_count)]
    counts = np.ones(len(values), np.int64)
    counts[several], counts[unknown] = count, unknown_count
    return _insert(values, [(several, found, count), (unknown, again, unknown_count)]), counts


def _merge(
    data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64], merges: MergeArrays
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    short = np.flatnonzero(lengths <= _MERGED_TOGETHER)
    long = np.flatnonzero(lengths > _MERGED_TOGETHER)
    counts = np.zeros(len(starts), np.int64)
    short_ids = np.zeros(0, np.int64)
    if len(short):
        flat = data[spread(starts[short], lengths[short])]
        short_ids, counts[short] = merge_many(flat, lengths[short], merges)
    long_ids = [
        merge_piece(data[start : start + length].tobytes(), merges.rules)
        for start, length in zip(starts[long].tolist(), lengths[long].tolist(), strict=True)
    ]
    counts[long] = [len(ids) for ids in long_ids]
    firsts = np.cumsum(counts) - counts
    merged = np.empty(counts.sum(), np.int32)
    merged[spread(firsts[short], counts[short])] = short_ids
    merged[spread(firsts[long], counts[long])] = [index for ids in long_ids for index in ids]
    return merged, counts


_PADDING = np.frombuffer(PADDING, np.uint8)


def distinct(
    data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of pieces such that every piece is equal to one of them, and to which: (first, which).

    Hashes propose, bytes decide: a piece that shares its hash with a different one stands for itself.
    """
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    hashes = hash_words(words_of(data, starts, lengths, short_keys(data, starts, lengths)))
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    likely = first[which]
    same = (lengths[likely] == lengths) & (lengths <= LONGEST)
    same[same] = same_bytes(data, starts[likely[same]], data, starts[same], lengths[same])
    alone = np.flatnonzero(~same & (likely != np.arange(len(starts))))
    which[alone] = len(first) + np.arange(len(alone))
    return np.append(first, alone), which


def _lengths(starts: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = end - starts[-1:]
    return lengths


def _insert(
    values: NDArray[np.int32],
    parts: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]],
) -> NDArray[np.int32]:
    """`values` with some places replaced by several ids: (places, their ids one after the other, how many each)."""
    counts = np.ones(len(values), np.int64)
    for places, _, count in parts:
        counts[places] = count
    firsts = np.cumsum(counts) - counts
    ids = np.repeat(values, counts)
    for places, more, count in parts:
        ids[spread(firsts[places], count)] = more
    return ids
