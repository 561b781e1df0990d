"""The container of OpenAI's files: CRC-32C, messages, sorted tables, and TensorFlow's bundles of tensors.

Each check is seen by a file that fails it. What TensorFlow itself makes of our files is in test_checkpoints_openai.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, protobuf, sstable, tensor_bundle
from gpt2_core.checkpoints.crc32c import MULTIPLE, POLYNOMIAL, Crc32c, crc32c, masked
from gpt2_core.checkpoints.protobuf import to_field, to_varint
from gpt2_core.checkpoints.tensor_bundle import Bundle
from gpt2_core.checkpoints.tensors import MappedFile
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


# The checksum ---------------------------------------------------------------------------------------------------------


def bit_by_bit(data: bytes) -> int:
    """The definition: a register that is shifted for each bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (POLYNOMIAL if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_checksums_are_those_of_the_standard() -> None:
    """RFC 3720, appendix B.4, and the usual check."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


def test_the_multiple_is_one() -> None:
    divisor = 1 << 32 | int(f"{POLYNOMIAL:032b}"[::-1], 2)
    rest = sum(1 << exponent for exponent in MULTIPLE)
    while rest.bit_length() > 32:
        rest ^= divisor << rest.bit_length() - 33
    assert rest == 0


@pytest.mark.parametrize("size", [1, 7, 8, 9, 255, 257, 5685, 90_960, 90_961, 181_921])
def test_checksums_of_all_lengths_are_those_of_the_definition(size: int) -> None:
    """The last ones reach beyond the window that numbers are folded into, by less and by more than it."""
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bit_by_bit(data)


@bounded
@given(cuts=st.lists(st.integers(0, 300_000), max_size=8), more=st.integers(0, 20))
def test_pieces_of_any_length_have_the_checksum_of_the_whole(cuts: list[int], more: int) -> None:
    data = np.random.default_rng(more).bytes(300_000 + more)
    crc = Crc32c()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        crc.update(data[start:end])
        if start % 3 == 0:
            assert crc.value == crc32c(data[:end]), "asking on the way changes nothing"
    assert crc.value == crc32c(data)


def test_one_flipped_bit_changes_the_checksum_wherever_it_is() -> None:
    data = bytearray(np.random.default_rng(0).bytes(200_003))
    before = crc32c(data)
    for at in range(0, len(data), 9973):
        data[at] ^= 1 << at % 8
        assert crc32c(data) != before
        data[at] ^= 1 << at % 8


# Messages -------------------------------------------------------------------------------------------------------------


def test_messages_are_read_as_they_are_written() -> None:
    data = to_field(1, 300) + to_field(2, b"abc") + protobuf.to_short_field(6, 7) + to_field(2, b"", always=True)
    assert list(protobuf.fields(data)) == [(1, 300), (2, b"abc"), (6, 7), (2, b"")]
    assert to_field(1, 150) == bytes.fromhex("089601"), "the example of the specification"
    assert to_field(3, 0) == to_field(3, b"") == b""
    assert protobuf.number(next(protobuf.fields(b"\x08" + b"\xff" * 9 + b"\x01"))[1]) == -1
    assert list(protobuf.fields(b"\x09" + bytes(range(8)))) == [(1, int.from_bytes(bytes(range(8)), "little"))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08", "does not end"),
        (b"\x08\xff", "does not end"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "does not end"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", r"above 2\*\*64"),
        (b"\x12\x05abc", "has 5 bytes, but 3 are left"),
        (b"\x35\x00", "has 4 bytes, but 1 are left"),
        (b"\x0b\x0c", "number 1 and kind 3"),
        (b"\x00\x00", "number 0 and kind 0"),
        (to_varint(1 << 34) + b"\x00", "which none can have"),
    ],
)
def test_what_is_no_message_is_told(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        list(protobuf.fields(data))


def test_a_value_of_another_kind_is_told() -> None:
    with pytest.raises(CheckpointFormatError, match="bytes where a number"):
        protobuf.number(b"")
    with pytest.raises(CheckpointFormatError, match="number where bytes"):
        protobuf.message(1)


# Tables ---------------------------------------------------------------------------------------------------------------


def read_table(path: Path, data: bytes) -> list[sstable.Entry]:
    path.write_bytes(data)
    file = MappedFile(path)
    try:
        return sstable.read(file)
    finally:
        file.close()


def block(entries: bytes, restarts: int = 1, kind: int = 0, crc: int | None = None) -> bytes:
    """A block around bytes that are entries, or are not."""
    body = entries if kind else entries + bytes(4) * restarts + restarts.to_bytes(4, "little")
    body += bytes([kind])
    return body + (masked(crc32c(body)) if crc is None else crc).to_bytes(4, "little")


def entry(key: bytes, value: bytes = b"", shared: int = 0) -> bytes:
    return to_varint(shared) + to_varint(len(key)) + to_varint(len(value)) + key + value


def table(*blocks: bytes, index: bytes | None = None, footer: bytes | None = None) -> bytes:
    """A table of such blocks; the last key of the k-th is at most the letter number k."""
    data, places = b"", b""
    for number, each in enumerate(blocks):
        places += entry(b"%c" % (0x62 + number), to_varint(len(data)) + to_varint(max(0, len(each) - 5)))
        data += each
    index = block(places) if index is None else index
    end = bytes(2) + to_varint(len(data)) + to_varint(len(index) - 5) if footer is None else footer
    return data + index + end.ljust(40, b"\0") + sstable.MAGIC


@bounded
@given(
    entries=st.dictionaries(
        st.one_of(st.binary(max_size=12), st.text("ab/\xff", max_size=30).map(str.encode)),
        st.one_of(st.binary(max_size=20), st.integers(0, 90_000).map(bytes)),
        max_size=60,
    )
)
def test_tables_are_read_as_they_are_written(place: Path, entries: dict[bytes, bytes]) -> None:
    """Values of up to 90 kB make several blocks."""
    assert read_table(place / "table", sstable.to_bytes(sorted(entries.items()))) == sorted(entries.items())


def test_a_table_of_several_blocks_has_short_keys_between_them(tmp_path: Path) -> None:
    entries = [(b"model/h%02d/%d" % (layer, part), bytes(50_000)) for layer in range(8) for part in range(3)]
    data = sstable.to_bytes(entries)
    assert read_table(tmp_path / "t", data) == entries
    _, _, at = sstable._place(data[-sstable.FOOTER :], 0)
    at, size, _ = sstable._place(data[-sstable.FOOTER :], at)
    blocks = sstable._Reader(MappedFile(tmp_path / "t"))._block(at, size, len(data) - sstable.FOOTER)
    assert len(blocks) == 4 and blocks[-1][0] == b"n", "a block is closed when it has 256 kB"
    assert sstable._between(b"model/h01", b"model/h03") == b"model/h02"
    assert sstable._between(b"model/h01", b"model/h02") == b"model/h01"
    assert sstable._between(b"ab", b"abc") == b"ab"
    assert sstable._after(b"model/wte") == b"n" and sstable._after(b"\xff\xff") == b"\xff\xff"


TABLES: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "its 0 bytes do not end as a table does"),
    "short": (sstable.MAGIC, "its 8 bytes do not end"),
    "cut off": (table(block(entry(b"a")))[:-1], "do not end as a table does"),
    "another file": (bytes(100), "do not end as a table does"),
    "a footer of numbers that do not end": (table(footer=b"\xff" * 40), "does not end"),
    "an index outside": (table(footer=bytes(2) + to_varint(99) + b"\x01"), "block at bytes 99 to 105 of "),
    "an index of 2**63 bytes": (table(footer=bytes(2) + b"\0" + to_varint(1 << 63)), "speaks of a block at bytes 0"),
    "a block in the index": (table(index=block(entry(b"z", b"\0\x08"))), "speaks of a block at bytes 0 to 13 of 0"),
    "a block after the index": (
        table(block(entry(b"a")), index=block(entry(b"z", to_varint(25) + b"\x08"))),
        "speaks of a block at bytes 25",
    ),
    "a block twice": (
        table(block(entry(b"a")), index=block(entry(b"b", b"\0\x0c") + entry(b"c", b"\0\x0c"))),
        "at byte 0 overlaps the one up to byte 17",
    ),
    "an index of a block without a place": (table(block(entry(b"a")), index=block(entry(b"b"))), "number at byte 0"),
    "a lying checksum": (table(block(entry(b"a"), crc=1)), "checksum of the block at byte 0 is another"),
    "another method": (table(block(entry(b"a"), kind=2)), "compressed by method 2"),
    "more restarts than bytes": (
        table(b"\xff\xff\xff\xff\0" + masked(crc32c(b"\xff\xff\xff\xff\0")).to_bytes(4, "little")),
        "counts 4294967295 restarts in 4 bytes",
    ),
    "two bytes": (table(b"ab\0" + masked(crc32c(b"ab\0")).to_bytes(4, "little")), "counts 2 restarts in 2 bytes"),
    "a key that shares what was not there": (table(block(entry(b"a", shared=3))), "a key of 3 \\+ 1 bytes"),
    "a key beyond the block": (table(block(b"\0\x40\0a")), "a key of 0 \\+ 64 bytes"),
    "a value beyond the block": (table(block(b"\0\1\x40a")), "a value of 64, where 1 are left"),
    "a long key": (table(block(entry(bytes(256)))), "expected keys of up to 255"),
    "a key twice": (table(block(entry(b"a") + entry(b"a"))), "the key 'a' stands after 'a'"),
    "keys that fall": (table(block(entry(b"b") + entry(b"a"))), "the key 'a' stands after 'b'"),
    "keys that fall from block to block": (table(block(entry(b"b")), block(entry(b"a"))), "'a' stands after 'b'"),
    "a key above its block's": (table(block(entry(b"c"))), "block of keys up to 'b' holds 'c'"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_damaged_table_is_told(tmp_path: Path, case: str) -> None:
    data, message = TABLES[case]
    with pytest.raises(CheckpointFormatError, match=message):
        read_table(tmp_path / "t", data)


def test_the_time_a_table_takes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sstable, "MOST_ENTRIES", 3)
    assert len(read_table(tmp_path / "t", table(block(entry(b"a") + entry(b"aa"))))) == 2
    with pytest.raises(CheckpointFormatError, match="over 3 entries"):
        read_table(tmp_path / "t", table(block(entry(b"a") + entry(b"aa") + entry(b"b"))))
    monkeypatch.setattr(sstable, "MOST_BYTES", 40)
    with pytest.raises(CheckpointFormatError, match="longer than 40 bytes"):
        read_table(tmp_path / "t", table(block(entry(b"a", bytes(30)))))


# Snappy ---------------------------------------------------------------------------------------------------------------


def literal(data: bytes) -> bytes:
    size = len(data) - 1
    if size < 60:
        return bytes([size << 2]) + data
    extra = (size.bit_length() + 7) // 8
    return bytes([59 + extra << 2]) + size.to_bytes(extra, "little") + data


def repeat(back: int, length: int, bytes_of_back: int) -> bytes:
    if bytes_of_back == 1:
        return bytes([1 | length - 4 << 2 | back >> 8 << 5, back & 255])
    return bytes([{2: 2, 4: 3}[bytes_of_back] | length - 1 << 2]) + back.to_bytes(bytes_of_back, "little")


def snapped(data: bytes) -> bytes:
    """Snappy's format with every kind of element: what stood in the last 2047 bytes is named, the rest is literal."""
    made, at, plain = b"", 0, 0
    while at < len(data):
        found = next(
            (
                (back, size)
                for size in (64, 11, 4)
                for back in [at - data.rfind(data[at : at + size], max(0, at - 2047), at + size - 1)]
                if at + size <= len(data) and 0 < back <= min(at, 2047)
            ),
            None,
        )
        if found is None:
            at += 1
            continue
        back, size = found
        made += literal(data[plain:at]) if plain < at else b""
        made += repeat(back, size, 1 if size <= 11 else 2 if at % 2 else 4)
        at += size
        plain = at
    made += literal(data[plain:]) if plain < len(data) else b""
    return to_varint(len(data)) + made


@bounded
@given(
    data=st.lists(
        st.sampled_from([b"a", b"model/h", b"attn/c_attn", bytes(70), np.random.default_rng(0).bytes(300)]), max_size=20
    )
)
def test_what_snappy_compressed_is_read(place: Path, data: list[bytes]) -> None:
    whole = b"".join(data)
    size, start = protobuf.varint(snapped(whole), 0)
    assert sstable.unsnap(snapped(whole)[start:], size) == whole


def test_a_compressed_table_is_read(tmp_path: Path) -> None:
    plain = entry(b"a", b"model/h0/" * 20) + entry(b"b", b"model/h1/" * 20) + bytes(4) + b"\1\0\0\0"
    data = table(block(snapped(plain), kind=1))
    assert len(data) < len(plain)
    assert read_table(tmp_path / "t", data) == [(b"a", b"model/h0/" * 20), (b"b", b"model/h1/" * 20)]


def test_an_element_may_reach_into_itself() -> None:
    assert sstable.unsnap(literal(b"ab") + repeat(2, 7, 1), 9) == b"ababababa"
    assert sstable.unsnap(literal(b"x") + repeat(1, 64, 4), 65) == b"x" * 65


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (literal(b"abc"), 2, "3 bytes where fewer are left"),
        (literal(b"abc")[:-1], 3, "3 bytes where fewer are left"),
        (b"\xfc\xff\xff\xff\xff", 3, "4294967296 bytes where fewer"),
        (literal(b"abc"), 4, "has 3 bytes, expected 4"),
        (repeat(1, 4, 1), 4, "repeats 4 bytes from 1 before 0"),
        (literal(b"a") + repeat(2, 4, 2), 5, "repeats 4 bytes from 2 before 1"),
        (literal(b"a") + repeat(0, 4, 2), 5, "repeats 4 bytes from 0"),
        (literal(b"a") + repeat(1, 64, 2), 5, "repeats 64 bytes"),
        (literal(b"a" * 300) + repeat(256, 4, 2)[:-1], 304, "repeats"),
    ],
)
def test_damaged_snappy_is_told(data: bytes, size: int, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        sstable.unsnap(data, size)


def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    bomb = to_varint(1 << 40) + literal(b"x") + repeat(1, 64, 2) * 1000
    with pytest.raises(CheckpointFormatError, match="longer than"):
        read_table(tmp_path / "t", table(block(bomb, kind=1)))


# Bundles --------------------------------------------------------------------------------------------------------------


def described(
    shape: tuple[int, ...] = (2,),
    *,
    dtype: int = 1,
    shard: int = 0,
    offset: int = 0,
    size: int | None = None,
    crc: int = 0,
    more: bytes = b"",
) -> bytes:
    """An entry; numbers may be negative, as int64 are stored."""

    def number(field: int, value: int) -> bytes:
        return to_field(field, value % (1 << 64))

    dims = b"".join(to_field(2, number(1, each), always=True) for each in shape)
    taken = 4 * int(np.prod(shape, dtype=object)) if size is None else size
    return (
        to_field(1, dtype)
        + to_field(2, dims, always=True)
        + number(3, shard)
        + number(4, offset)
        + number(5, taken)
        + protobuf.to_short_field(6, crc)
        + more
    )


HEADER = to_field(1, 1) + to_field(3, to_field(1, 1))


def bundle(folder: Path, entries: Mapping[str, bytes], data: bytes = bytes(64), header: bytes = HEADER) -> Path:
    rows = [(b"", header), *sorted((name.encode(), value) for name, value in entries.items())]
    (folder / "m.index").write_bytes(sstable.to_bytes(rows))
    (folder / "m.data-00000-of-00001").write_bytes(data)
    return folder / "m"


ZEROS = masked(crc32c(bytes(8)))


def test_what_is_written_is_read_bit_for_bit_in_every_dtype(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    given = {
        f"a/{dtype}": Tensor.of(chance.integers(0, 2, (3, 5)).astype(bits), dtype)
        for dtype, bits in tensor_bundle.STORAGE.items()
    }
    given |= {"z": Tensor.of(np.zeros((0, 4), np.float32)), "scalar": Tensor.of(np.float64(0.1)[()])}
    files = tensor_bundle.write(tmp_path / "m", given)
    opened = Bundle(tmp_path / "m")
    assert opened.files == files and sorted(opened.entries) == sorted(given)
    for name, tensor in given.items():
        back = opened.tensor(name)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert back.raw().tobytes() == b"".join(back.chunks()) == tensor.raw().tobytes()
    assert opened.tensor("a/float32", (1, 15)).raw().shape == (1, 15)


ENTRIES: Mapping[str, tuple[bytes, str]] = {
    "a negative size": (described((-1,), size=4), r"has the shape \[-1\]"),
    "a huge size": (described((1 << 62,), size=8), "non-negative sizes that memory could hold"),
    "a product beyond 64 bits": (described((1 << 40, 1 << 40), size=0), "memory could hold"),
    "too many dimensions": (described((1,) * 33), "at most 32"),
    "bytes for another shape": (described((3,), size=8), "has 8 bytes, which float32 of shape \\(3,\\) does not take"),
    "another dtype": (described(dtype=2, size=8), "which float64 of shape"),
    "a negative length": (described(size=-8), "with -8 bytes"),
    "a negative offset": (described(offset=-8), "at -8"),
    "an offset outside": (described(offset=57), "bytes 57 to 65; it is truncated or damaged"),
    "an offset far outside": (described(offset=(1 << 63) - 9), "truncated or damaged"),
    "another file": (described(shard=1), "to stand in file 1 of 1"),
    "a negative file": (described(shard=-1), "to stand in file -1 of 1"),
    "no shape": (to_field(1, 1) + to_field(2, to_field(3, 1)), "'x' has no shape"),
    "a piece": (described(more=to_field(7, b"", always=True)), "'x' is a partitioned variable"),
    "a number for a shape": (to_field(2, 7), "number where bytes belong"),
    "bytes for an offset": (to_field(4, b"ab"), "bytes where a number belongs"),
    "no message": (b"\xff", "does not end"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_that_lies_is_told(tmp_path: Path, case: str) -> None:
    value, message = ENTRIES[case]
    with pytest.raises(CheckpointFormatError, match=message):
        Bundle(bundle(tmp_path, {"x": value}))


HEADERS: Mapping[str, tuple[bytes, str]] = {
    "no files": (b"", "there are 0 files"),
    "a negative number of files": (to_field(1, 2**64 - 1), "there are -1 files"),
    "many files": (to_field(1, 10**6), "there are 1000000 files"),
    "big-endian": (to_field(1, 1) + to_field(2, 1), "big-endian"),
    "a later version": (to_field(1, 1) + to_field(3, to_field(2, 2)), "asks for readers of version 2"),
    "not this version": (to_field(1, 1) + to_field(3, to_field(3, 1)), r"not \[1\]"),
    "no message": (b"\x0b", "kind 3"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_cannot_be_met_is_told(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    with pytest.raises(CheckpointFormatError, match=message):
        Bundle(bundle(tmp_path, {}, header=header))


def test_a_table_that_is_no_index_is_told(tmp_path: Path) -> None:
    for rows in ([], [(b"x", described())]):
        (tmp_path / "m.index").write_bytes(sstable.to_bytes(rows))
        with pytest.raises(CheckpointFormatError, match="has no header"):
            Bundle(tmp_path / "m")
    (tmp_path / "m.index").write_bytes(sstable.to_bytes([(b"", HEADER), (b"\xff", described())]))
    with pytest.raises(CheckpointFormatError, match="is not UTF-8"):
        Bundle(tmp_path / "m")
    (tmp_path / "m.index").write_bytes(sstable.to_bytes([(b"", HEADER), (b"\0x", described())]))
    with pytest.raises(CheckpointFormatError, match="pieces of partitioned variables"):
        Bundle(tmp_path / "m")


def test_tensors_do_not_overlap_but_empty_ones_may_stand_anywhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match="'y' at byte 4 overlaps 'x', which ends at byte 8"):
        Bundle(bundle(tmp_path, {"x": described(), "y": described(offset=4)}))
    with pytest.raises(CheckpointFormatError, match="overlaps"):
        Bundle(bundle(tmp_path, {"x": described(), "y": described()}))
    empty = described((0,), offset=4)
    assert Bundle(bundle(tmp_path, {"x": described(), "y": empty})).entries["y"].size == 0
    with pytest.raises(CheckpointFormatError, match="truncated"):
        Bundle(bundle(tmp_path, {"y": described((0,), offset=65)}))


def test_a_checksum_that_lies_is_told_when_the_numbers_are_fetched(tmp_path: Path) -> None:
    sound, lying = described(crc=ZEROS), described(offset=8, crc=ZEROS ^ 1)
    opened = Bundle(bundle(tmp_path, {"x": sound, "y": lying}))
    assert opened.tensor("x").array().tolist() == [0, 0]
    for fetch in (Tensor.raw, Tensor.array, Tensor.view, lambda tensor: list(tensor.chunks())):
        with pytest.raises(CheckpointFormatError, match="the numbers of 'y' are not those that were written"):
            fetch(opened.tensor("y"))


def test_a_checksum_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    original = Crc32c.update
    monkeypatch.setattr(Crc32c, "update", lambda self, data: (counted.append(len(data)), original(self, data))[1])
    tensor = Bundle(bundle(tmp_path, {"x": described(crc=ZEROS)})).tensor("x")
    counted.clear()
    for _ in range(3):
        tensor.raw()
        list(tensor.chunks())
    assert counted == [8]


def test_writable_numbers_are_checked_before_they_are_changed(tmp_path: Path) -> None:
    prefix = bundle(tmp_path, {"x": described(crc=ZEROS)})
    tensor = Bundle(prefix, writable=True).tensor("x")
    tensor.array()[0] = 5
    assert tensor.array().tolist() == [5, 0] and b"".join(tensor.chunks()) == np.float32([5, 0]).tobytes()
    assert Bundle(prefix).tensor("x").array().tolist() == [0, 0]


def test_texts_are_listed_and_not_read(tmp_path: Path) -> None:
    opened = Bundle(
        bundle(tmp_path, {"x": described((), dtype=7, size=9), "y": described((), dtype=77, size=9, offset=9)})
    )
    assert opened.entries["x"].dtype is None
    with pytest.raises(CheckpointFormatError, match="'x' is text; expected numbers"):
        opened.tensor("x")
    with pytest.raises(CheckpointFormatError, match="'y' is of the type 77"):
        opened.tensor("y")


def test_numbers_in_several_files_are_read(tmp_path: Path) -> None:
    header = to_field(1, 3)
    prefix = bundle(tmp_path, {"x": described(crc=ZEROS), "y": described(shard=2, crc=ZEROS)}, header=header)
    for number in (0, 2):
        (tmp_path / f"m.data-0000{number}-of-00003").write_bytes(bytes(8))
    opened = Bundle(prefix)
    assert [file.name for file in opened.files] == ["m.index", "m.data-00000-of-00003", "m.data-00002-of-00003"]
    assert opened.tensor("y").array().tolist() == [0, 0]
    (tmp_path / "m.data-00002-of-00003").unlink()
    with pytest.raises(CheckpointError, match=r"m\.data-00002-of-00003 is not there"):
        Bundle(prefix)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    prefix = bundle(tmp_path / "in", {"x": described(crc=ZEROS)})
    (tmp_path / "in" / "m.data-00000-of-00001").rename(tmp_path / "out")
    (tmp_path / "in" / "m.data-00000-of-00001").symlink_to(tmp_path / "out")
    with pytest.raises(UnsafeCheckpointError, match="a symbolic link"):
        Bundle(prefix)


def test_what_git_leaves_of_a_large_file_is_told(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 497759232\n"
    with pytest.raises(CheckpointFormatError, match="git-LFS pointer"):
        Bundle(bundle(tmp_path, {"x": described()}, data=pointer))
    (tmp_path / "m.index").write_bytes(pointer)
    with pytest.raises(CheckpointFormatError, match="git-LFS pointer"):
        Bundle(tmp_path / "m")


def peak(action: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_tensors_pass_through_a_piece_at_a_time(tmp_path: Path) -> None:
    """24 MB in and out again, with less than a tenth of it in memory."""

    def pieces() -> Iterator[np.ndarray]:
        for row in range(24):
            yield np.full(1 << 18, row, np.float32)

    whole = Tensor("float32", (24, 1 << 18), lambda: pytest.fail("fetched whole"), pieces=pieces)
    (tmp_path / "warm").mkdir()
    tensor_bundle.write(tmp_path / "warm" / "m", {"x": Tensor.of(np.zeros(3))})
    assert peak(lambda: tensor_bundle.write(tmp_path / "m", {"x": whole})) < 6 << 20
    tensor = Bundle(tmp_path / "m").tensor("x")
    assert peak(lambda: [None for _ in tensor.chunks()]) < 3 << 20
    assert peak(lambda: tensor.view()[3, :2].tolist()) < 1 << 20


# Anything -------------------------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]))
ANY_ENTRY = st.one_of(
    st.binary(max_size=30),
    st.builds(
        lambda shape, **named: described(tuple(shape), **named),
        st.lists(SIZES, max_size=3),
        dtype=st.one_of(st.sampled_from(sorted(tensor_bundle.DTYPES)), st.integers(0, 130)),
        shard=st.one_of(st.just(0), SIZES),
        offset=SIZES,
        size=st.one_of(st.none(), SIZES),
        crc=st.sampled_from([0, ZEROS, 2**32 - 1]),
        more=st.one_of(st.just(b""), st.binary(max_size=5)),
    ),
)


@bounded
@given(
    entries=st.dictionaries(st.text("ab\0", max_size=3), ANY_ENTRY, max_size=4),
    header=st.one_of(st.just(HEADER), st.binary(max_size=8)),
    data=st.binary(max_size=40),
)
def test_any_entries_end_well(place: Path, entries: dict[str, bytes], header: bytes, data: bytes) -> None:
    entries.pop("", None)
    prefix = bundle(place, entries, data, header)
    try:
        opened = Bundle(prefix)
        assert sum(each.size for each in opened.entries.values()) <= len(data)
        for name in opened.entries:
            tensor = opened.tensor(name)
            assert tensor.array().shape == tensor.shape
    except CheckpointError as error:
        assert len(str(error)) < 2000


@bounded
@given(data=st.one_of(st.binary(max_size=80), st.lists(st.binary(max_size=12), max_size=4).map(lambda b: table(*b))))
def test_any_bytes_as_a_table_end_well(place: Path, data: bytes) -> None:
    for tail in (b"", bytes(40) + sstable.MAGIC, sstable.MAGIC):
        try:
            read_table(place / "any", data + tail)
        except CheckpointFormatError:
            continue


@bounded
@given(
    entries=st.lists(
        st.tuples(st.integers(0, 4), st.binary(max_size=4), st.binary(max_size=4), st.integers(0, 300)), max_size=6
    ),
    restarts=st.integers(0, 3),
    compressed=st.booleans(),
)
def test_any_blocks_end_well(
    place: Path, entries: list[tuple[int, bytes, bytes, int]], restarts: int, compressed: bool
) -> None:
    """Checksums are right, so that what stands in the blocks is looked at."""
    data = b"".join(
        to_varint(shared) + to_varint(len(key)) + to_varint(size if size < 250 else len(value)) + key + value
        for shared, key, value, size in entries
    )
    try:
        found = read_table(place / "any", table(block(data, restarts, kind=int(compressed))))
    except CheckpointFormatError:
        return
    assert [key for key, _ in found] == sorted({key for key, _ in found})
