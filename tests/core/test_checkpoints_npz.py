"""gpt2_core.checkpoints.npz: what numpy writes and reads, and what it should not have written."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, detect, npz, open_checkpoint, round_to_bfloat16
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def some() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    return {
        "transformer.wte.weight": chance.normal(size=(7, 5)).astype(np.float32),
        "half": chance.normal(size=(3,)).astype(np.float16),
        "wide": chance.normal(size=(2, 3, 4)),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([[True, False]]),
        "bytes": np.arange(3, dtype=np.uint8),
        "words": np.arange(3, dtype=np.uint16),
    }


def archive(path: Path, name: str = "a.npy", data: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr(name, data)
    return path


def array(header: bytes, data: bytes = bytes(8), version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def header(descr: str = "<f4", shape: str = "(2,)", order: str = "False") -> bytes:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def test_numpy_reads_what_we_write(tmp_path: Path) -> None:
    npz.write(tmp_path, some())
    with np.load(tmp_path / "model.npz", allow_pickle=False) as loaded:
        assert list(loaded) == list(some())
        for name, value in some().items():
            assert loaded[name].dtype == value.dtype and np.array_equal(loaded[name], value), name


def test_we_read_what_numpy_writes(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **some())
    assert detect(tmp_path) == ("npz", tmp_path / "model.npz")
    (tmp_path / "model.npz").rename(tmp_path / "odd")
    assert detect(tmp_path / "odd")[0] == "npz", "told by its content, and not taken for a file of torch"
    with open_checkpoint(tmp_path / "odd") as opened:
        assert opened.names() == tuple(some())
        for name, value in some().items():
            assert np.array_equal(opened.array(name), value), name


def test_what_is_written_is_aligned_and_viewed_where_it_stands(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", some())
    with open_checkpoint(tmp_path / "a.npz") as opened:
        for name in opened:
            viewed = opened.array(name)
            assert viewed.flags.aligned and (viewed.base is not None or not viewed.size), name


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", ">i2"])
def test_columns_first_and_the_other_byte_order_are_read(tmp_path: Path, dtype: str, order: str) -> None:
    given = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)  # type: ignore[call-overload]
    np.savez(tmp_path / "a.npz", a=given)
    with open_checkpoint(tmp_path / "a.npz") as opened:
        assert np.array_equal(opened.array("a"), given) and opened.array("a").flags.c_contiguous
        assert b"".join(opened["a"].chunks()) == given.astype(given.dtype.newbyteorder("<")).tobytes("C")


def test_later_headers_are_read_too(tmp_path: Path) -> None:
    archive(tmp_path / "a.npz", data=array(header(), np.float32([1, 2]).tobytes(), version=2))
    with open_checkpoint(tmp_path / "a.npz") as opened:
        assert opened.array("a").tolist() == [1, 2]


def test_bfloat16_is_refused_and_not_disguised(tmp_path: Path) -> None:
    brain = Tensor.of(round_to_bfloat16(np.ones(2, np.float32)), "bfloat16")
    with pytest.raises(CheckpointError, match="which numpy does not have"):
        npz.write(tmp_path, {"a": brain})
    for settings in ({"metadata": {"a": "b"}}, {"max_shard_bytes": 5}):
        with pytest.raises(CheckpointError, match="neither metadata nor shards"):
            npz.write(tmp_path, some(), **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1000))
    with pytest.raises(UnsafeCheckpointError, match=r"compressed .* save it again \(torch\.save, numpy\.savez\)"):
        open_checkpoint(tmp_path / "a.npz")


def test_objects_are_refused_unread(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{"code": print}], dtype=object))
    with pytest.raises(CheckpointFormatError, match="expected an array of numbers"):
        open_checkpoint(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin as an array"),
        (b"\x93NUMPY\x04\0\0\0\0\0", "does not begin as an array"),
        (array(header())[:-1], "has 7 bytes; expected 8"),
        (array(header()) + b"\0", "has 9 bytes; expected 8"),
        (array(header("<f3")), "expected an array of numbers"),
        (array(header("<c8")), "expected an array of numbers"),
        (array(header("<U2")), "expected an array of numbers"),
        (array(header(shape="(-2,)")), "expected an array of numbers"),
        (array(header(shape="(2,,)")), "expected sizes"),
        (array(header(shape="(99999999999999999999,)")), "expected sizes"),
        (array(header(shape="(4611686018427387904,)")), "has the shape"),
        (array(header(shape=f"({'1, ' * 40})")), "has the shape"),
        (array(header(order="__import__('os')")), "expected an array of numbers"),
        (b"\x93NUMPY\x01\0\xff\xff" + header(), "claims 65535 bytes"),
        (b"\x93NUMPY\x02\0\xff\xff\xff\xff" + header(), "claims 4294967295 bytes"),
    ],
)
def test_a_header_that_lies_is_found_out(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        npz.read(archive(tmp_path / "a.npz", data=data))


def test_what_is_no_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match=r"holds 'readme\.txt'; expected arrays"):
        npz.read(archive(tmp_path / "a.npz", "readme.txt"))
    with pytest.raises(UnsafeCheckpointError, match="a name outside of it"):
        npz.read(archive(tmp_path / "b.npz", "../x.npy", array(header())))
