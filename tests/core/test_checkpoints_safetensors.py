"""gpt2_core.checkpoints.safetensors: strict about every byte, and of one mind with the safetensors package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoints import assert_same, some_tensors

from gpt2_core.checkpoints import Tensor, open_checkpoint, safetensors
from gpt2_core.errors import CheckpointError, CheckpointFormatError


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def lay_out(path: Path, header: object, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


# The package as oracle ------------------------------------------------------------------------------------------------


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors")
    safetensors.write(tmp_path / "a.safetensors", some_tensors(), metadata={"format": "pt", "note": "ü"})
    given = some_tensors()
    with theirs.safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ü"}
        assert sorted(opened.keys()) == sorted(given)
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if given[name].dtype != "bfloat16":
                assert np.array_equal(opened.get_tensor(name), given[name].array())
                assert opened.get_tensor(name).dtype == given[name].array().dtype
            assert tuple(opened.get_slice(name).get_shape()) == given[name].shape


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    given = {name: tensor for name, tensor in some_tensors().items() if tensor.dtype != "bfloat16"}
    given["long"] = Tensor.of(np.arange(3, dtype=np.uint64))
    given["words"] = Tensor.of(np.arange(3, dtype=np.uint16))
    numpy.save_file({name: tensor.array() for name, tensor in given.items()}, tmp_path / "a.safetensors", {"k": "v"})
    with open_checkpoint(tmp_path / "a.safetensors") as opened:
        assert opened.metadata == {"k": "v"}
        assert_same(opened, given)


def test_torchs_bfloat16_is_read_and_written(tmp_path: Path) -> None:
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    numbers = torch.randn(5, 3).bfloat16()
    theirs.save_file({"a": numbers}, tmp_path / "a.safetensors")
    opened = open_checkpoint(tmp_path / "a.safetensors")
    assert opened.dtype("a") == "bfloat16"
    assert np.array_equal(opened.array("a"), numbers.float().numpy())
    safetensors.write(tmp_path / "b.safetensors", opened)
    assert torch.equal(theirs.load_file(tmp_path / "b.safetensors")["a"], numbers)


def test_the_data_starts_at_a_cache_line(tmp_path: Path) -> None:
    for count in range(1, 40):
        safetensors.write(tmp_path / "a.safetensors", {"x" * count: np.ones(1, np.float32)})
        length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
        assert (8 + length) % 64 == 0


def test_transformers_asks_for_the_format_pt(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a.safetensors", {"a": np.ones(1)})
    assert open_checkpoint(tmp_path / "a.safetensors").metadata == {"format": "pt"}
    safetensors.write(tmp_path / "a.safetensors", {"a": np.ones(1)}, metadata={})
    assert open_checkpoint(tmp_path / "a.safetensors").metadata == {}


def test_a_file_without_tensors_is_a_checkpoint_of_none(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a.safetensors", {})
    assert open_checkpoint(tmp_path / "a.safetensors").names() == ()


def test_unaligned_tensors_of_others_are_copied_to_where_they_can_be_used(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}
    data = b"\7" + np.array([1.5, -2], "<f4").tobytes()
    opened = open_checkpoint(lay_out(tmp_path / "a.safetensors", header, data))
    assert np.array_equal(opened.array("b"), [1.5, -2]) and opened.array("b").flags.aligned


# Lies -----------------------------------------------------------------------------------------------------------------

GOOD = {"a": entry()}
LIES: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{" * 10, bytes(8), "cannot be read"),
    "not an object": (b"[]", bytes(8), "expected '\\{'"),
    "not UTF-8": (b'{"\xff":1}', bytes(8), "cannot be read"),
    "nested too deep": (b'{"a":' + b"[" * 100_000, bytes(8), "cannot be read"),
    "the same name twice": (
        b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2),
        bytes(8),
        "'a' stands there more",
    ),
    "the same field twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "'dtype'",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **GOOD}, bytes(8), "expected texts by name"),
    "metadata of no kind": ({"__metadata__": 3, **GOOD}, bytes(8), "expected texts by name"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "is described by"),
    "a field too many": ({"a": {**entry(), "code": "x"}}, bytes(8), "is described by"),
    "an unknown dtype": ({"a": entry("F33")}, bytes(8), "dtype 'F33'; expected one of"),
    "a dtype that is no text": ({"a": entry(["F32"])}, bytes(8), "expected one of"),
    "a negative size": ({"a": entry(shape=[-2])}, bytes(8), "shape \\[-2\\]"),
    "two negative sizes": ({"a": entry(shape=[-2, -1])}, bytes(8), "shape"),
    "a size of true": ({"a": entry(shape=[True, 2])}, bytes(8), "shape"),
    "a size of 2.0": ({"a": entry(shape=[2.0])}, bytes(8), "shape"),
    "a huge size": ({"a": entry(shape=[1 << 61, 8])}, bytes(8), "that memory could hold"),
    "a huge size beside zero": ({"a": entry(shape=[1 << 62, 0], offsets=[0, 0])}, b"", "that memory could hold"),
    "huge sizes beside zero": (
        {"a": entry(shape=[1 << 40, 1 << 40, 0], offsets=[0, 0])},
        b"",
        "that memory could hold",
    ),
    "an overflowing product": ({"a": entry(shape=[1 << 32, 1 << 32, 2])}, bytes(8), "that memory could hold"),
    "too many sizes": ({"a": entry(shape=[1] * 33)}, bytes(8), "at most 32"),
    "a shape that is no list": ({"a": entry(shape="2")}, bytes(8), "shape"),
    "an integer of 5000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", bytes(8), "cannot be read"),
    "fewer bytes than the shape": ({"a": entry(offsets=[0, 4])}, bytes(4), "has 4 bytes; expected 8"),
    "more bytes than the shape": ({"a": entry(offsets=[0, 12])}, bytes(12), "has 12 bytes; expected 8"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, bytes(8), "expected 8"),
    "negative offsets": ({"a": entry(offsets=[-8, 0])}, bytes(8), "overlaps"),
    "offsets of text": ({"a": entry(offsets=["0", "8"])}, bytes(8), "expected two integers"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, bytes(8), "expected two integers"),
    "overlapping tensors": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "'b' .* overlaps"),
    "the same region twice": ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
    "a gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "'b' .* leaves a gap"),
    "a gap at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), "leaves a gap"),
    "beyond the end": (GOOD, bytes(7), "end at byte 8 of the data, which has 7; it is truncated"),
    "far beyond the end": ({"a": entry(shape=[1 << 40], offsets=[0, 1 << 42])}, bytes(8), "it is truncated"),
    "bytes of no tensor": (GOOD, bytes(9), "the rest belongs to no tensor"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_what_is_wrong(tmp_path: Path, lie: str) -> None:
    header, data, message = LIES[lie]
    path = lay_out(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointFormatError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie not in ("a field too many", "the same field twice")])
def test_the_package_refuses_it_too(tmp_path: Path, lie: str) -> None:
    """So none of these is a file that somebody has. (It lets an unknown field pass.)"""
    theirs = pytest.importorskip("safetensors")
    header, data, _ = LIES[lie]
    ours_alone = {"the same name twice", "too many sizes", "a huge size beside zero", "huge sizes beside zero"}
    if lie in ours_alone:
        pytest.skip("the package keeps the last of two, and makes no numpy array")
    with pytest.raises(theirs.SafetensorError), theirs.safe_open(lay_out(tmp_path / "a", header, data), "np"):
        pass


@pytest.mark.parametrize("size", range(10))
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}"[:size])
    with pytest.raises(CheckpointFormatError, match="truncated or of another format"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [10_000, 1 << 31, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointFormatError, match=f"its header claims {length}"):
        open_checkpoint(lay_out(tmp_path / "a.safetensors", GOOD, length=length))


def test_a_header_too_long_to_be_true_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = lay_out(tmp_path / "a.safetensors", GOOD, length=1 << 29)
    with path.open("rb+") as file:
        file.truncate(1 << 30)  # a hole: no disk is used
    with pytest.raises(CheckpointFormatError, match="expected at most"):
        open_checkpoint(path)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "a.safetensors", {"a": np.ones(5, np.float32), "b": np.ones(2)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "b.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointFormatError):
            open_checkpoint(tmp_path / "b.safetensors")


def test_a_bool_that_is_neither_is_refused(tmp_path: Path) -> None:
    path = lay_out(tmp_path / "a.safetensors", {"a": entry("BOOL", [3], [0, 3])}, b"\0\1\2")
    with pytest.raises(CheckpointFormatError, match="bytes other than 0 and 1"):
        open_checkpoint(path).array("a")


def test_metadata_and_names_that_the_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    for tensors, metadata in (({"__metadata__": np.ones(1)}, None), ({"a": np.ones(1)}, {"epoch": 3})):
        with pytest.raises(CheckpointError, match=r"itself|texts by name only"):
            safetensors.write(tmp_path / "a.safetensors", tensors, metadata=metadata)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# transformers as oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 5000])
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, most: int | None) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=most or "5GB")
    opened = open_checkpoint(tmp_path / "theirs")
    assert (opened.path.suffix == ".json") == (most is not None)
    state = model.state_dict()
    for name in opened:
        assert np.array_equal(opened.array(name), state[name].numpy())
    safetensors.write(tmp_path / "ours", opened, max_shard_bytes=most)
    config.save_pretrained(tmp_path / "ours")
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
