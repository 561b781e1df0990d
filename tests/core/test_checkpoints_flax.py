"""gpt2_core.checkpoints.flax: held to files of transformers 4's Flax classes (tests/peers) and to what they computed.

The tests run without Flax and without the msgpack package. What Flax makes of our files is tested where the environment
variable GPT2_DUET_FLAX names the Python of an environment that has transformers 4.57 and flax; see tests/peers.
"""

from __future__ import annotations

import os
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, detect, flax, msgpack, open_checkpoint, round_to_bfloat16
from gpt2_core.checkpoints.msgpack import Blob, Reader
from gpt2_core.checkpoints.tensors import MappedFile
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.pretrained import open_pretrained
from gpt2_core.reference import ReferenceModel

PEERS = Path(__file__).parent.parent / "peers"
CASES = sorted(path.stem for path in (PEERS / "flax").glob("*.zip"))
CONFIG = GPT2Config(
    vocab_size=13, n_positions=8, n_embd=6, n_layer=2, n_head=2, n_inner=7, bos_token_id=1, eos_token_id=1, num_labels=3
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def unpacked(case: str, folder: Path) -> dict[str, np.ndarray]:
    """The folder that transformers saved, and its answers."""
    with zipfile.ZipFile(PEERS / "flax" / f"{case}.zip") as archive:
        archive.extractall(folder)
    with np.load(folder / "answers.npz") as answers:
        return dict(answers)


def parameters(config: GPT2Config = CONFIG, head: Head | str = Head.LM) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    return {row.name: chance.normal(0.1, 0.4, row.shape).astype(np.float32) for row in parameter_table(config, head)}


@pytest.mark.parametrize("case", CASES)
def test_what_flax_saved_computes_what_flax_computed(case: str, tmp_path: Path) -> None:
    answers = unpacked(case, tmp_path)
    assert detect(tmp_path)[0] == "flax"
    head = Head.NONE if case == "none" else Head.LM
    with open_pretrained(tmp_path, head).checkpoint as opened:
        assert {tensor.dtype for tensor in opened.values()} == {"bfloat16" if "bfloat16" in case else "float32"}
        assert len(opened.files) == (4 if case == "lm-sharded" else 1)
    out = ReferenceModel.from_pretrained(tmp_path, head)(answers["ids"])
    got = out.last_hidden_state if head is Head.NONE else out.logits
    assert np.abs(got - answers["out"]).max() < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_what_flax_wrote_but_for_order(case: str, tmp_path: Path) -> None:
    unpacked(case, tmp_path / "theirs")
    with open_checkpoint(tmp_path / "theirs") as theirs:
        flax.write(tmp_path / "ours", theirs)
        with open_checkpoint(tmp_path / "ours") as ours:
            assert dict(ours.names_in_file) == dict(theirs.names_in_file)
            assert {name: ours.raw(name).tobytes() for name in ours} == {n: theirs.raw(n).tobytes() for n in theirs}
    single = tmp_path / "theirs" / "flax_model.msgpack"
    if single.is_file():
        assert (tmp_path / "ours" / "flax_model.msgpack").stat().st_size == single.stat().st_size


def test_a_kernel_is_turned_and_a_heads_kernel_the_other_way(tmp_path: Path) -> None:
    given = parameters(CONFIG.replace(tie_word_embeddings=False), Head.LM)
    flax.write(tmp_path, given)
    file = MappedFile(tmp_path / "flax_model.msgpack")
    stored = dict(flax._flattened(file, Reader(file, 0, file.size).value()))
    assert np.array_equal(stored["transformer/h/1/mlp/c_fc/kernel"].array(), given["transformer.h.1.mlp.c_fc.weight"].T)
    assert np.array_equal(stored["lm_head/kernel"].array(), given["lm_head.weight"].T)
    assert np.array_equal(stored["transformer/ln_f/scale"].array(), given["transformer.ln_f.weight"])
    file.close()


def test_a_bare_model_has_no_transformer_in_front(tmp_path: Path) -> None:
    given = parameters(head=Head.NONE)
    flax.write(tmp_path, given)
    with open_checkpoint(tmp_path) as opened:
        assert set(opened) == set(given) and opened.names_in_file["h.0.ln_1.weight"] == "h/0/ln_1/scale"
    with pytest.raises(CheckpointError, match="expected all or none"):
        flax.write(tmp_path, given | {"transformer.wte.weight": given["wte.weight"]})


def test_names_that_are_no_parameters_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.msgpack").write_bytes(packed({"transformer": {"odd": array()}, "cache": array()}))
    with open_checkpoint(tmp_path / "x.msgpack") as opened:
        assert opened.names() == ("transformer/odd", "cache") and opened.names_in_file == {}


def test_an_array_in_pieces_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax, "_MOST_ARRAY", 100)
    given = parameters()
    flax.write(tmp_path, given)
    assert b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
    with open_checkpoint(tmp_path) as opened:
        for name, value in given.items():
            assert np.array_equal(opened.array(name), value) and b"".join(opened[name].chunks()) == value.tobytes()


def test_flax_reads_our_arrays_and_writes_the_same_but_for_their_order(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization")
    flax.write(tmp_path / "a.msgpack", parameters())
    data = (tmp_path / "a.msgpack").read_bytes()
    (tmp_path / "b.msgpack").write_bytes(serialization.msgpack_serialize(serialization.msgpack_restore(data)))
    assert (tmp_path / "b.msgpack").stat().st_size == len(data)
    with open_checkpoint(tmp_path / "b.msgpack") as opened:
        assert all(np.array_equal(opened.array(name), value) for name, value in parameters().items())


INTERPRETER = os.environ.get("GPT2_DUET_FLAX", "")


@pytest.mark.skipif(not INTERPRETER, reason="GPT2_DUET_FLAX is not set: see tests/peers/make_flax.py")
@pytest.mark.parametrize("most", [None, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_from_our_files_what_the_reference_does(
    tmp_path: Path, tied: bool, most: int | None
) -> None:
    config = CONFIG.replace(tie_word_embeddings=tied)
    given = parameters(config)
    flax.write(tmp_path / "m", given, max_shard_bytes=most)
    config.save_pretrained(tmp_path / "m")
    script = PEERS / "make_flax.py"
    subprocess.run([INTERPRETER, script, "answer", tmp_path / "m", tmp_path / "a.npz"], check=True, capture_output=True)
    with np.load(tmp_path / "a.npz") as answers:
        expected = ReferenceModel(config, given, Head.LM)(answers["ids"]).logits
        assert np.abs(answers["out"] - expected).max() < 2e-5


# What is refused ------------------------------------------------------------------------------------------------------


def array(shape: list[Any] | None = None, dtype: str = "float32", size: int | None = None, kind: int = 1) -> bytes:
    sizes = [2] if shape is None else shape
    inner = packed([sizes, dtype, bytes(8 if size is None else size)])
    return msgpack.packed_extension(kind, len(inner)) + inner


def packed(value: Any) -> bytes:
    """MessagePack as the package would write it, ``bytes`` of ours inside of maps as they are."""
    if isinstance(value, dict):
        rows = (
            msgpack.packed_text(key) + (item if isinstance(item, bytes) else packed(item))
            for key, item in value.items()
        )
        return msgpack.packed_map(len(value)) + b"".join(rows)
    if isinstance(value, list):
        return msgpack.packed_list(len(value)) + b"".join(map(packed, value))
    if isinstance(value, bytes):
        return msgpack.packed_bytes(len(value)) + value
    if isinstance(value, str):
        return msgpack.packed_text(value)
    return msgpack.packed_integer(value) if value >= 0 else struct.pack(">bq", -45, value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"\xc1", "begins no value"),
        (packed([1]), "expected a map of parameters"),
        (packed({"a": 1}), "a is a int; expected an array"),
        (packed({"a": b"\xc0"}), "a is a NoneType"),
        (packed({"a": array(kind=2)}), "expected an array"),
        (packed({"a/b": array()}), "cannot be a step of a path"),
        (packed({"": array()}), "cannot be a step of a path"),
        (packed({"a": array(dtype="object")}), "of dtype 'object'"),
        (packed({"a": array([-1])}), "has the shape"),
        (packed({"a": array([2**62])}), "has the shape"),
        (packed({"a": array([3])}), "has 8 bytes; expected 12"),
        (packed({"a": array([1] * 40, size=4)}), "has the shape"),
        (packed({"a": array()})[:-1], "truncated"),
        (packed({"a": array()}) + b"\0", "goes on for 1 bytes"),
        (b"\x82" + 2 * (packed("a") + array()), "'a' twice"),
        (b"\xdf\xff\xff\xff\xff", "claims 8589934590 values"),
        (b"\xdd\xff\xff\xff\xff", "claims 4294967295 values"),
        (packed({"a": b"\xc9\xff\xff\xff\xff\x01"}), "claims 4294967295 bytes"),
        (b"\x81\xa1a" * 40, "nested more than 32 deep"),
        (b"\xdb\x00\x10\x00\x00", "a text of 1048576 bytes"),
        (b"\x81\xa1\xff" + array(), "not UTF-8"),
        (b"\x81\x01" + array(), "one that is no text"),
        (packed({"a": {"__msgpack_chunked_array__": b"\xc3"}}), "in pieces without a shape"),
        (
            packed({"a": {"__msgpack_chunked_array__": b"\xc3", "shape": {"0": 2}, "chunks": {}}}),
            "some of them are no arrays",
        ),
        (
            packed({"a": {"__msgpack_chunked_array__": b"\xc3", "shape": {"0": 3}, "chunks": {"0": array()}}}),
            "do not make an",
        ),
        (
            packed({"a": {"__msgpack_chunked_array__": b"\xc3", "shape": {"1": 2}, "chunks": {"0": array()}}}),
            "has the shape",
        ),
    ],
)
def test_a_damaged_file_is_found_out(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(tmp_path / "a.msgpack")


def test_every_value_of_messagepack_is_read(tmp_path: Path) -> None:
    values: list[tuple[bytes, Any]] = [
        (b"\xc0\xc2\xc3", [None, False, True]),
        (b"\x7f\xff\xe0", [127, -1, -32]),
        (b"\xcc\xff\xcd\x01\x00\xce\x00\x01\x00\x00\xcf" + b"\x7f" + b"\xff" * 7, [255, 256, 65536, 2**63 - 1]),
        (b"\xd0\x80\xd1\x80\x00\xd2\x80\x00\x00\x00\xd3\x80" + bytes(7), [-128, -(2**15), -(2**31), -(2**63)]),
        (b"\xca\x3f\x80\x00\x00\xcb\x3f\xf0" + bytes(6), [1.0, 1.0]),
        (b"\xa1a\xd9\x01b\xda\x00\x01c\xdb\x00\x00\x00\x01d", ["a", "b", "c", "d"]),
        (b"\x91\x01\xdc\x00\x01\x02\xdd\x00\x00\x00\x01\x03", [[1], [2], [3]]),
        (b"\x81\xa1a\x01\xde\x00\x01\xa1b\x02\xdf\x00\x00\x00\x01\xa1c\x03", [{"a": 1}, {"b": 2}, {"c": 3}]),
        (b"\xc4\x01x\xc5\x00\x01x\xc6\x00\x00\x00\x01x", [Blob(None, 2, 1), Blob(None, 6, 1), Blob(None, 12, 1)]),
        (b"\xd4\x05x\xc7\x01\xffx\xc8\x00\x01\x02x", [Blob(5, 2, 1), Blob(-1, 6, 1), Blob(2, 11, 1)]),
        (b"\xd5\x01xx\xd6\x01xxxx\xd7\x01" + bytes(8), [Blob(1, 2, 2), Blob(1, 6, 4), Blob(1, 12, 8)]),
        (b"\xd8\x01" + bytes(16) + b"\xc9\x00\x00\x00\x01\x03x", [Blob(1, 2, 16), Blob(3, 24, 1)]),
    ]
    for number, (data, expected) in enumerate(values):
        (tmp_path / str(number)).write_bytes(data)
        file = MappedFile(tmp_path / str(number))
        reader = Reader(file, 0, file.size)
        assert [reader.value() for _ in expected] == expected
        reader.finish()
        file.close()


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 70_000])
def test_what_is_packed_is_unpacked(tmp_path: Path, size: int) -> None:
    def check(data: bytes, look: Callable[[Any], bool]) -> None:
        (tmp_path / "x").write_bytes(data)
        file = MappedFile(tmp_path / "x")
        reader = Reader(file, 0, file.size)
        assert look(reader.value())
        reader.finish()
        file.close()

    check(msgpack.packed_integer(size), lambda value: value == size)
    check(msgpack.packed_bytes(size) + bytes(size), lambda value: value.size == size and value.kind is None)
    check(msgpack.packed_extension(7, size) + bytes(size), lambda value: value.size == size and value.kind == 7)
    check(msgpack.packed_list(size) + b"\x01" * size, lambda value: value == [1] * size)
    names = [f"{index}" for index in range(size)]
    check(packed(dict.fromkeys(names, 1)), lambda value: list(value) == names)
    if size < 1 << 16:
        check(msgpack.packed_text("a" * size), lambda value: value == "a" * size)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    bits = round_to_bfloat16(np.linspace(-3, 3, 78, dtype=np.float32)).reshape(13, 6)
    flax.write(tmp_path, {"wte.weight": Tensor.of(bits, "bfloat16")})
    with open_checkpoint(tmp_path) as opened:
        assert opened.dtype("wte.weight") == "bfloat16" and np.array_equal(opened.raw("wte.weight"), bits)
