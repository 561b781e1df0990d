"""GPT-2's tokenizer in TensorFlow's own operations, so that a SavedModel can hold it.

    strings (B,) → one array of bytes → where pieces begin → known pieces looked up → the others cut finer and merged

What letters are, and which pairs merge, are arrays of `gpt2_core.text_tables`. The rules are those of
`gpt2_core.pretokenize` and `gpt2_core.bpe`, all pieces of all texts at once; why it is so: docs/decisions/0011.

Letters: B texts, N bytes, P pieces, K parts of pieces, M tokens. Places and lengths are in bytes, as int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from gpt2_core.errors import TokenizerError
from gpt2_core.pretokenize import BARRIER, OTHER, SPACE
from gpt2_core.text_tables import BEYOND, KEY_SHIFT, MOST_WORDS, WORD, text_tables
from gpt2_core.tokenizer import GPT2Tokenizer

Tensor = Any

_EDGE = b"\xff"  # before, between and behind texts
_FOUND = b"\xfe"  # where an added token was found
_CLOSE = b"\xfd"  # its end, while it is looked up
_TAIL = 8 * (MOST_WORDS + 1)  # bytes behind the last text, so that looking ahead needs no check
_BLANK, _QUOTE = 0x20, 0x27
_S, _D, _M, _T, _L, _V, _E, _R = b"sdmtlver"
_NOWHERE = 1 << 62
_PLACE_BITS = 40  # of a place, below its pair's rank
_MOST_SIGNS = 8
# Runs without a place to cut are merged in windows, the next one beginning 384 bytes after the last and sharing 128
# bytes with it. 384 = 3 * 128: windows of a run that repeats itself every 1, 2, 3, 4, 6, 8 ... bytes look alike, and
# GPT-2's longest token has 128 bytes.
_STEP, _WINDOW = 384, 512


class Rows(NamedTuple):
    """Rows of different lengths in one array: where each begins, and how long it is."""

    flat: Tensor
    firsts: Tensor
    counts: Tensor

    def joined(self) -> Tensor:
        """One row after the other, in one array."""
        return tf.gather(self.flat, spread(self.firsts, self.counts))


class GraphTokenizer(tf.Module):
    """Strings to ids in TensorFlow's own operations.

    tokenizer: whose vocabulary and added tokens to use. special: as in `GPT2Tokenizer.encode`.
    """

    def __init__(self, tokenizer: GPT2Tokenizer, special: str) -> None:
        super().__init__(name="gpt2_text")
        tables = text_tables(tokenizer._vocabulary)
        self.size = tables.size
        self.never = len(tables.pair_keys)  # the rank of pairs that do not merge
        self.in_order = tables.in_order
        added = [token for token in tokenizer._added.values() if special != "text" or not token.special]
        added.sort(key=lambda token: len(token.content), reverse=True)
        self.pattern = "|".join(_literal(token.content) for token in added)
        _check_pattern(self.pattern, len(added))
        self.signs = sorted({token.content.encode()[:2] for token in added})
        self.forbidden_ids = [token.id for token in added if token.special] if special == "forbid" else []
        with tf.init_scope(), tf.device("CPU:0"):
            self.word_numbers = _lookup(tables.word_keys, tables.word_values, -1)
            self.further_numbers = _lookup(tables.further_keys, tables.further_values, -1)
            self.ranks = _lookup(tables.pair_keys, np.arange(self.never), self.never)
            contents = [token.content.encode() for token in added] or [b""]
            self.added_ids = _lookup(contents, [token.id for token in added] or [-1], -1)
            self.merged = tf.constant(tables.merged, tf.int64)
            self.byte_ids = tf.constant(tables.byte_ids, tf.int64)
            self.byte_classes = tf.constant(tables.byte_classes)
            self.class_table = tf.constant(tables.class_table)
            self.inside = tf.constant(tables.inside)
            self.token_sizes = tf.constant([len(data) for data in tokenizer._token_bytes], tf.int64)
            # What is behind a word's end is 0xFF, in all bits from 8 times its length on.
            self.behind = tf.constant([-1 << 8 * size for size in range(WORD)] + [0], tf.int64)

    # ---- text to ids ---------------------------------------------------------------------------------------------

    def encode(self, texts: Tensor, add_prefix_space: bool) -> tuple[Tensor, Tensor]:
        """The ids of all texts (B,), one text after the other (M,), and where each begins and ends (B + 1,)."""
        texts = _repaired(texts)
        if add_prefix_space:
            bare = (texts != "") & (tf.strings.substr(texts, 0, 1) != " ")
            texts = tf.where(bare, tf.strings.join([" ", texts]), texts)
        texts, found = self._find_added(texts)
        data = _bytes(tf.strings.join([_EDGE, tf.strings.reduce_join(texts, separator=_EDGE), _EDGE * _TAIL]))
        starts = self._piece_starts(data)
        # Of the bytes behind the texts, each a piece, the first is kept: it ends the last text.
        starts, lengths = starts[: 1 - _TAIL], starts[1 : 2 - _TAIL] - starts[: 1 - _TAIL]
        first = tf.gather(data, starts)
        words = _words(data)
        values = self._numbers(words, starts, lengths)
        unknown = tf.where(((values < 0) | (values >= self.size)) & (first < _CLOSE[0]))[:, 0]
        counts = tf.cast(first != _EDGE[0], tf.int64)
        rows = Rows(tf.cast(values, tf.int32), tf.range(tf.size(values, tf.int64)), counts)
        rows = _replaced(rows, unknown, lambda: self._encode_unknown(data, words, starts, lengths, unknown))
        if self.pattern:
            places = tf.where(first == _FOUND[0])
            rows = rows._replace(flat=tf.tensor_scatter_nd_update(rows.flat, places, found))
        begins = tf.cumsum(rows.counts, exclusive=True)
        edges = tf.where(first == _EDGE[0])[: tf.size(texts) + 1, 0]
        return rows.joined(), tf.gather(begins, edges)

    def _find_added(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The texts with one byte 0xFE in place of each added token, and these tokens' ids."""
        nothing = tf.zeros([0], tf.int32)
        if not self.pattern:
            return texts, nothing

        def find() -> tuple[Tensor, Tensor]:
            marked = tf.strings.regex_replace(texts, self.pattern, _FOUND + rb"\0" + _CLOSE)
            parts = tf.strings.split(tf.strings.reduce_join(marked), _FOUND)[1:]
            contents = tf.reshape(tf.strings.split(parts, _CLOSE).flat_values, [-1, 2])[:, 0]
            ids = self.added_ids.lookup(contents)
            with tf.control_dependencies(self._refuse(ids, contents)):
                ids = tf.cast(ids, tf.int32)
            return tf.strings.regex_replace(texts, self.pattern, _FOUND), ids

        with_marks, ids = tf.cond(self._may_have_added(texts), lambda: _apart(find), lambda: (texts, nothing))
        return with_marks, ids

    def _may_have_added(self, texts: Tensor) -> Tensor:
        """Whether two bytes that begin an added token are somewhere: ten times as quick as looking for the token."""
        if len(self.signs) > _MOST_SIGNS:
            return tf.constant(True)
        data = _bytes(tf.strings.reduce_join(texts))
        found = [
            tf.reduce_any((data[:-1] == sign[0]) & (data[1:] == sign[1]) if sign[1:] else data == sign[0])
            for sign in self.signs
        ]
        return tf.reduce_any(found)

    def _refuse(self, ids: Tensor, contents: Tensor) -> list[Tensor]:
        if not self.forbidden_ids:
            return []
        forbidden = tf.reduce_any(ids[:, None] == tf.constant(self.forbidden_ids, tf.int64), axis=1)
        message = (
            "a text has a special token, and special tokens are forbidden in this tokenizer; to have it recognised use "
            'special="allow"; to read it as plain text use special="text"; or take it out of the text first. Found:'
        )
        return [tf.debugging.Assert(~tf.reduce_any(forbidden), [message, tf.boolean_mask(contents, forbidden)])]

    def _piece_starts(self, data: Tensor) -> Tensor:
        """Where each piece begins, in bytes: (P,). All bytes of a character are of its class."""
        classes = tf.gather(self.byte_classes, tf.cast(data, tf.int32))
        return tf.cond(
            tf.reduce_any((data >= 0x80) & (data < BEYOND)),
            lambda: _apart(lambda: self._wide_piece_starts(data, classes)),
            lambda: tf.where(_begins(data, classes))[:, 0],
        )

    def _wide_piece_starts(self, data: Tensor, classes: Tensor) -> Tensor:
        places, sizes, codes = _wide_characters(data)
        kinds = tf.gather(self.class_table, codes)
        classes = tf.tensor_scatter_nd_update(classes, places[:, None], kinds)
        for more in range(1, 4):
            longer = tf.where(sizes > more)
            further = tf.gather_nd(places, longer)[:, None] + more
            classes = tf.tensor_scatter_nd_update(classes, further, tf.gather_nd(kinds, longer))
        begins = _begins(data, classes)
        # The last of several spaces, of which _begins knows the last byte only, begins at its first byte.
        space = tf.where(kinds == SPACE)
        first = tf.gather_nd(places, space)
        last = first + tf.gather_nd(sizes, space) - 1
        moved = tf.gather(begins, first) | tf.gather(begins, last)
        begins = tf.tensor_scatter_nd_update(begins, last[:, None], tf.zeros_like(moved))
        return tf.where(tf.tensor_scatter_nd_update(begins, first[:, None], moved))[:, 0]

    # ---- pieces --------------------------------------------------------------------------------------------------

    def _numbers(self, words: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """The number of each piece, its id if there is such a token; -1 or any other number if not."""
        numbers = self.word_numbers.lookup(self._word(words, starts, lengths))
        which = tf.range(tf.size(starts, tf.int64))
        for size in range(WORD, WORD * MOST_WORDS, WORD):
            longer = tf.where(lengths > WORD)[:, 0]
            which, starts, lengths = (tf.gather(x, longer) for x in (which, starts + WORD, lengths - WORD))
            number = self.word_numbers.lookup(self._word(words, starts, lengths))
            both = self.further_numbers.lookup(_key(tf.gather(numbers, which), number))
            if size + WORD == WORD * MOST_WORDS:
                both = tf.where(lengths > WORD, tf.constant(-1, tf.int64), both)
            numbers = tf.tensor_scatter_nd_update(numbers, which[:, None], both)
        return numbers

    def _word(self, words: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """The first eight bytes of each piece as one integer, with 0xFF behind its end."""
        block = tf.size(words, tf.int64) // WORD
        word = tf.gather(words, (starts & (WORD - 1)) * block + tf.bitwise.right_shift(starts, 3))
        return word | tf.gather(self.behind, tf.minimum(lengths, WORD))

    def _encode_unknown(self, data: Tensor, words: Tensor, starts: Tensor, lengths: Tensor, unknown: Tensor) -> Rows:
        """The ids of some pieces, which are cut further where no merge reaches across; only such parts are merged."""
        starts, lengths = tf.gather(starts, unknown), tf.gather(lengths, unknown)
        places = spread(starts, lengths)
        two = tf.cast(tf.gather(data, places - 1), tf.int32) * 256 + tf.cast(tf.gather(data, places), tf.int32)
        firsts = tf.cumsum(lengths, exclusive=True)
        is_first = tf.scatter_nd(firsts[:, None], tf.ones_like(firsts, tf.bool), tf.shape(places, tf.int64))
        parts = tf.where(is_first | ~tf.gather(self.inside, two))[:, 0]
        part_lengths = tf.concat([parts[1:], tf.size(places, tf.int64)[None]], 0) - parts
        rows = self._encode_parts(data, words, tf.gather(places, parts), part_lengths)
        begins = tf.boolean_mask(tf.cumsum(rows.counts, exclusive=True), tf.gather(is_first, parts))
        flat = rows.joined()
        return Rows(flat, begins, tf.concat([begins[1:], tf.size(flat, tf.int64)[None]], 0) - begins)

    def _encode_parts(self, data: Tensor, words: Tensor, starts: Tensor, lengths: Tensor) -> Rows:
        """The ids of parts of pieces: known ones are looked up, short ones merged once each, long ones one by one."""
        values = self._numbers(words, starts, lengths)
        unknown = (values < 0) | (values >= self.size)
        rows = Rows(tf.cast(values, tf.int32), tf.range(tf.size(values, tf.int64)), tf.ones_like(values))
        is_long = lengths > WORD * MOST_WORDS
        short, long = tf.where(unknown & ~is_long)[:, 0], tf.where(unknown & is_long)[:, 0]
        rows = _replaced(
            rows, short, lambda: self._merge_short(words, tf.gather(starts, short), tf.gather(lengths, short))
        )
        return _replaced(
            rows,
            long,
            lambda: Rows(*_apart(lambda: self._merge_long(data, tf.gather(starts, long), tf.gather(lengths, long)))),
        )

    # ---- merging -------------------------------------------------------------------------------------------------

    def _merge_short(self, words: Tensor, starts: Tensor, lengths: Tensor) -> Rows:
        """The ids of parts of up to four words, of equal ones only once."""
        columns = [
            self._word(words, starts + size, tf.maximum(lengths - size, 0))
            for size in range(0, WORD * MOST_WORDS, WORD)
        ]
        keys, which = tf.raw_ops.UniqueV2(x=tf.stack(columns, 1), axis=[0])
        bytes_ = tf.reshape(tf.bitcast(keys, tf.uint8), [-1, WORD * MOST_WORDS])
        real = tf.where(bytes_ != _EDGE[0])
        tokens = tf.gather(self.byte_ids, tf.cast(tf.gather_nd(bytes_, real), tf.int32))
        tokens, owners = self._merge(tokens, real[:, 0], tf.shape(keys, tf.int64)[0], runs=False)
        rows = _rows(tokens, owners, tf.shape(keys, tf.int64)[0])
        return Rows(rows.flat, tf.gather(rows.firsts, which), tf.gather(rows.counts, which))

    def _merge_long(self, data: Tensor, starts: Tensor, lengths: Tensor) -> Rows:
        """The ids of parts of any length: in windows, if joining the windows' tokens is sure to give the same."""
        size = tf.size(starts, tf.int64)

        def whole() -> tuple[Tensor, Tensor]:
            places = spread(starts, lengths)
            tokens = tf.gather(self.byte_ids, tf.cast(tf.gather(data, places), tf.int32))
            return self._merge(tokens, _owners(lengths), size, runs=self.in_order)

        if not self.in_order:
            return _rows(*whole(), size)
        tokens, owners, is_sure = self._merge_windows(data, starts, lengths)
        tokens, owners = tf.cond(is_sure, lambda: (tokens, owners), whole)
        return _rows(tokens, owners, size)

    def _merge_windows(self, data: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, the part that each belongs to, and whether every two neighbouring windows could be joined.

        Where both have the same token at the same place, the tokens of the first before it and those of the second
        from it on are the tokens of the whole: each stands beside a neighbour that it also has in one of the windows.
        """
        count = 1 + tf.maximum(lengths - _WINDOW + _STEP - 1, 0) // _STEP
        part = _owners(count)
        order = spread(tf.zeros_like(count), count)
        begins = tf.gather(starts, part) + order * _STEP
        ends = tf.minimum(begins + _WINDOW, tf.gather(starts + lengths, part))
        is_last = order == tf.gather(count, part) - 1
        bytes_at = spread(begins, ends - begins)
        tokens = tf.gather(self.byte_ids, tf.cast(tf.gather(data, bytes_at), tf.int32))
        tokens, window = self._merge(tokens, _owners(ends - begins), tf.size(begins, tf.int64), runs=True)
        places = tf.gather(bytes_at, tf.cumsum(tf.gather(self.token_sizes, tokens), exclusive=True))
        in_next = (places >= tf.gather(begins, window) + _STEP) & ~tf.gather(is_last, window)
        in_last = (places < tf.gather(begins, window) + (_WINDOW - _STEP)) & (tf.gather(order, window) > 0)
        earlier = tf.tensor_scatter_nd_update(
            tf.fill(tf.shape(data), tf.constant(-1, tf.int64)),
            tf.boolean_mask(places, in_next)[:, None],
            tf.boolean_mask(tokens, in_next),
        )
        agree = in_last & (tf.gather(earlier, places) == tokens)
        agreed = tf.where(agree | (tf.gather(order, window) == 0), places, _NOWHERE)
        joints = tf.math.unsorted_segment_min(agreed, window, tf.size(begins, tf.int64))
        next_joint = tf.where(is_last, tf.constant(_NOWHERE, tf.int64), _next(joints))
        kept = (places >= tf.gather(joints, window)) & (places < tf.gather(next_joint, window))
        owners = tf.gather(part, window)
        return tf.boolean_mask(tokens, kept), tf.boolean_mask(owners, kept), tf.reduce_max(joints) < _NOWHERE

    def _merge(self, tokens: Tensor, owners: Tensor, count: Tensor, runs: bool) -> tuple[Tensor, Tensor]:
        """Merge the tokens (M,) of `count` rows, each at once: owners says which row each is of, in order.

        Each round makes the merges of the lowest rank in every row: all of them if the vocabulary is in order, else
        the leftmost. Of a run of equal tokens, as "aaaaa", a round makes the first merge, or with `runs` all of them,
        which takes more operations. Returns what is left of both.

        A token of its own ends the last row, so that there always is one and each has a next one. Written for few
        operations: on short texts each costs more than the work it does.
        """
        tokens = tf.concat([tokens, [-1]], 0)
        owners = tf.concat([owners, count[None]], 0)
        never = tf.constant(self.never << _PLACE_BITS if not self.in_order else self.never, tf.int64)

        def order_of(tokens: Tensor, owners: Tensor) -> Tensor:
            ranks = self.ranks.lookup(_key(tokens, _next(tokens)))
            order = ranks if self.in_order else ranks * (1 << _PLACE_BITS) + tf.range(tf.size(ranks, tf.int64))
            return tf.where(owners == _next(owners), order, never)

        def round_(tokens: Tensor, owners: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            best = tf.math.unsorted_segment_min(order, owners, count + 1)
            picked = (order == tf.gather(best, owners)) & (order < never)
            if runs:
                overlap = tf.reduce_any(picked & _last(picked))
                picked = tf.cond(overlap, lambda: _every_other(picked), lambda: picked)
            else:
                picked &= ~_last(picked)
            ranks = order if self.in_order else tf.bitwise.right_shift(order, tf.constant(_PLACE_BITS, tf.int64))
            tokens = tf.where(picked, tf.gather(self.merged, ranks), tokens)
            kept = tf.where(~_last(picked))
            tokens, owners = tf.gather_nd(tokens, kept), tf.gather_nd(owners, kept)
            return tokens, owners, order_of(tokens, owners)

        tokens, owners, _ = tf.while_loop(
            lambda tokens, owners, order: tf.reduce_any(order < never),
            round_,
            (tokens, owners, order_of(tokens, owners)),
            shape_invariants=(tf.TensorShape([None]),) * 3,
        )
        return tokens[:-1], owners[:-1]


# ---- what the graph is made of -----------------------------------------------------------------------------------


def _lookup(keys: Any, values: Any, default: int) -> Any:
    if not len(keys):  # TensorFlow's tables cannot be empty
        keys, values = np.zeros(1, np.int64), [default]
    initializer = tf.lookup.KeyValueTensorInitializer(tf.constant(keys), values, value_dtype=tf.int64)
    return tf.lookup.StaticHashTable(initializer, default)


def _apart(make: Callable[[], Any]) -> Any:
    """What `make` gives, made in a function of its own, which TensorFlow does not unfold into the graph around it.

    For branches that are seldom taken: unfolded, each of their operations costs time also when it is not needed.
    """
    return tf.function(make, autograph=False, experimental_attributes={"_noinline": True})()


def _literal(content: str) -> str:
    """A regular expression of RE2 for this very text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in content)


def _check_pattern(pattern: str, tokens: int) -> None:
    try:
        with tf.init_scope():
            tf.strings.regex_replace("", pattern, "")
    except tf.errors.InvalidArgumentError as cause:
        raise TokenizerError(
            f"the tokenizer has {tokens} added tokens, {len(pattern)} characters as a pattern, which is more than "
            f"TensorFlow looks for at a time; expected some ten thousand at most; use native=False"
        ) from cause


def _repaired(texts: Tensor) -> Tensor:
    """The texts in proper UTF-8: as ``bytes.decode("utf-8", "replace")`` does it, with U+FFFD for what is not.

    TensorFlow's own repair reads and writes every character, so it waits until there is something to repair.
    """
    data = _bytes(tf.strings.join([tf.strings.reduce_join(texts, separator="\n"), "\n" * 4]))
    return tf.cond(
        tf.cond(tf.reduce_any(data >= 0x80), lambda: _apart(lambda: _is_utf8(data)), lambda: tf.constant(True)),
        lambda: texts,
        lambda: tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace"),
    )


def _wide_characters(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each character of several bytes begins, how many it has, and its code point; in proper UTF-8."""
    places = tf.where((data >= 0xC0) & (data < BEYOND))[:, 0]
    one, two, three, four = (tf.cast(tf.gather(data, places + k), tf.int32) for k in range(4))
    sizes = 2 + tf.cast(one >= 0xE0, tf.int64) + tf.cast(one >= 0xF0, tf.int64)
    # 6 bits of each further byte below the 5, 4 or 3 of the first
    of_two = (one & 0x1F) * 64 + (two & 0x3F)
    of_three = (one & 0x0F) * 4096 + (two & 0x3F) * 64 + (three & 0x3F)
    of_four = (one & 0x07) * 262144 + (two & 0x3F) * 4096 + (three & 0x3F) * 64 + (four & 0x3F)
    return places, sizes, tf.where(sizes == 2, of_two, tf.where(sizes == 3, of_three, of_four))


def _is_utf8(data: Tensor) -> Tensor:
    """Whether texts with ASCII between and behind them are proper UTF-8 each (RFC 3629, section 4).

    Each first byte has its further ones behind it, there are no others, and the code points are allowed: none that
    fewer bytes could hold, no surrogates, none beyond U+10FFFF.
    """
    places, sizes, codes = _wide_characters(data)
    second, third, fourth = ((tf.gather(data, places + k) & 0xC0) == 0x80 for k in range(1, 4))
    whole = second & (third | (sizes < 3)) & (fourth | (sizes < 4))
    least = tf.gather(tf.constant([0x80, 0x800, 0x10000]), sizes - 2)
    allowed = (codes >= least) & (codes < 0x110000) & ((codes < 0xD800) | (codes >= 0xE000))
    further = tf.reduce_sum(tf.cast((data & 0xC0) == 0x80, tf.int64))
    no_others = (further == tf.reduce_sum(sizes - 1)) & ~tf.reduce_any(data >= BEYOND)
    return tf.reduce_all(whole & allowed) & no_others


def _bytes(text: Tensor) -> Tensor:
    return tf.io.decode_raw(text, tf.uint8)  # () -> (N,)


def _words(data: Tensor) -> Tensor:
    """The eight bytes from each place on as an integer: those of the places 0, 8, 16 ... first, then 1, 9, 17 ..."""
    size = (tf.size(data) // WORD - 1) * WORD
    blocks = [tf.bitcast(tf.reshape(data[k : k + size], [-1, WORD]), tf.int64) for k in range(WORD)]
    return tf.concat(blocks, 0)


def _key(left: Tensor, right: Tensor) -> Tensor:
    return left * (1 << KEY_SHIFT) + right


def spread(starts: Tensor, counts: Tensor) -> Tensor:
    """start, start + 1, ... start + count - 1 for each, one after the other."""
    return tf.raw_ops.RaggedRange(
        starts=starts, limits=starts + counts, deltas=tf.constant(1, tf.int64)
    ).rt_dense_values


def _owners(counts: Tensor) -> Tensor:
    """0 counts[0] times, 1 counts[1] times, ...; every count is 1 or more."""
    return tf.cumsum(tf.cast(spread(tf.zeros_like(counts), counts) == 0, tf.int64)) - 1


def _rows(flat: Tensor, owners: Tensor, count: Tensor) -> Rows:
    counts = tf.math.unsorted_segment_sum(tf.ones_like(owners), owners, count)
    return Rows(tf.cast(flat, tf.int32), tf.cumsum(counts, exclusive=True), counts)


def _replaced(rows: Rows, places: Tensor, make: Callable[[], Rows]) -> Rows:
    """`rows` with those at the given places, if any, replaced by what `make` gives."""

    def replace() -> Rows:
        more = make()
        firsts = more.firsts + tf.size(rows.flat, tf.int64)
        return Rows(
            tf.concat([rows.flat, more.flat], 0),
            tf.tensor_scatter_nd_update(rows.firsts, places[:, None], firsts),
            tf.tensor_scatter_nd_update(rows.counts, places[:, None], more.counts),
        )

    replaced: Rows = tf.cond(tf.size(places) > 0, replace, lambda: rows)
    return replaced


def _next(values: Tensor) -> Tensor:
    return tf.concat([values[1:], values[:1]], 0)  # tf.roll takes ten times as long on few values


def _last(values: Tensor) -> Tensor:
    return tf.concat([values[-1:], values[:-1]], 0)


def _every_other(picked: Tensor) -> Tensor:
    """Of each run of picked places the first, the third, the fifth ...: in "aaaaa" the pairs (a, a) that merge."""
    first = picked & ~tf.concat([[False], picked[:-1]], 0)
    run = tf.maximum(tf.cumsum(tf.cast(first, tf.int64)) - 1, 0)
    since = tf.range(tf.size(picked, tf.int64)) - tf.gather(tf.where(first)[:, 0], run)
    return picked & (since % 2 == 0)


def _begins(data: Tensor, classes: Tensor) -> Tensor:
    """Whether each byte begins a piece, from its class; both ends are barriers.

    The rules of `gpt2_core.pretokenize.piece_starts`, which says why these are GPT-2's pattern.
    """
    before, here, after = classes[:-2], classes[1:-1], classes[2:]
    change = (here != before) & (data[:-2] != _BLANK)
    last_space = (here == SPACE) & (before == SPACE) & (after < SPACE)
    begins = tf.concat([[True], change | last_space | (here == BARRIER), [True]], 0)
    is_quote = (data[1:-1] == _QUOTE) & (before != OTHER) & (data[:-2] != _BLANK)
    quotes = tf.where(is_quote)[:, 0] + 1
    one, two = tf.gather(data, quotes + 1), tf.gather(data, quotes + 2)
    short = (one == _S) | (one == _D) | (one == _M) | (one == _T)
    long = ((one == _L) & (two == _L)) | (((one == _V) | (one == _R)) & (two == _E))
    within = tf.boolean_mask(quotes + 1, short | long)[:, None]
    behind = tf.concat([tf.boolean_mask(quotes + 2, short), tf.boolean_mask(quotes + 3, long)], 0)[:, None]
    begins = tf.tensor_scatter_nd_update(begins, within, tf.zeros_like(within[:, 0], tf.bool))
    return tf.tensor_scatter_nd_update(begins, behind, tf.ones_like(behind[:, 0], tf.bool))
