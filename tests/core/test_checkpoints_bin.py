"""gpt2_core.checkpoints.bin: torch's files without torch, and no way for a file to run anything."""

from __future__ import annotations

import builtins
import codecs
import os
import pickle
import pickletools
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoints import assert_same, is_view_of_a_file, some_tensors

from gpt2_core.checkpoints import Tensor, bin, open_checkpoint, pickles, zips
from gpt2_core.checkpoints.bin import _KNOWN, Storage, read_tree
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
        for name, data in entries.items():
            file.writestr(f"archive/{name}", data)
    return path


# torch as oracle ------------------------------------------------------------------------------------------------------


def torch_state(torch: Any) -> dict[str, Any]:
    base = torch.arange(60.0).reshape(5, 4, 3)
    linear = torch.nn.Linear(3, 4)
    return OrderedDict(
        base=base,
        transposed=base.transpose(0, 2),
        part=base[1:3, ::2, 1:],
        flipped_order=base.permute(1, 2, 0),
        brain=torch.randn(3, 5).bfloat16(),
        brain_transposed=torch.randn(3, 5).bfloat16().t(),
        half=torch.randn(4).half(),
        double=torch.randn(2, 2, dtype=torch.float64),
        mask=torch.tensor([[True, False], [False, True]]),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        long=torch.arange(-3, 3),
        byte=torch.arange(5, dtype=torch.uint8),
        parameter=linear.weight,
        **{f"linear.{name}": tensor for name, tensor in linear.state_dict().items()},
    )


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_we_read_what_torch_writes_in_every_protocol(tmp_path: Path, zipped: bool, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    state = torch_state(torch)
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with open_checkpoint(tmp_path) as opened:
        assert list(opened) == list(state)
        for name, tensor in state.items():
            assert opened.dtype(name) == str(tensor.dtype).removeprefix("torch.")
            assert opened.shape(name) == tuple(tensor.shape)
            wide = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
            assert np.array_equal(opened.array(name), wide.numpy()), name
            assert opened.array(name).flags.c_contiguous and opened.array(name).flags.aligned


def test_torch_reads_what_we_write_and_runs_nothing_either(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    given = some_tensors()
    bin.write(tmp_path / "a.bin", given)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "a.bin", weights_only=True, mmap=mapped)
        assert list(loaded) == list(given)
        for name, tensor in given.items():
            wanted = torch.from_numpy(tensor.raw().copy())
            wanted = wanted.view(torch.bfloat16) if tensor.dtype == "bfloat16" else wanted
            assert torch.equal(loaded[name], wanted) and loaded[name].dtype == wanted.dtype
            assert loaded[name].is_contiguous()


def test_unsigned_dtypes_that_torch_writes_another_way_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.arange(3).to(torch.uint16)}, tmp_path / "a.bin")
    opened = open_checkpoint(tmp_path / "a.bin")
    assert opened.dtype("a") == "uint16" and opened.array("a").tolist() == [0, 1, 2]


def test_a_tied_tensor_is_one_region_under_two_names(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tokens = torch.randn(4, 2)
    torch.save({"wte": tokens, "lm_head": tokens}, tmp_path / "a.bin")
    opened = open_checkpoint(tmp_path / "a.bin")
    address = opened.array("wte").__array_interface__["data"]
    assert opened.array("lm_head").__array_interface__["data"] == address


def test_other_nestings_are_read_as_a_tree_for_other_formats(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tree = {
        "model": {"a": torch.ones(2)},
        "step": 3,
        "args": {"lr": 1e-3, "betas": (0.9, 0.95), "name": None},
        "l": [True],
    }
    torch.save(tree, tmp_path / "ckpt.pt")
    read, file = read_tree(tmp_path / "ckpt.pt")
    assert isinstance(read["model"].pop("a"), Tensor)
    assert read == {**tree, "model": {}}
    file.close()
    with pytest.raises(CheckpointFormatError, match=r"model \(dict\), step \(int\)"):
        open_checkpoint(tmp_path / "ckpt.pt")


def test_the_optimizers_state_of_torch_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    tree, _ = read_tree(tmp_path / "a.pt")
    moment = tree["optimizer"]["state"][0]["exp_avg"]
    assert np.array_equal(moment.array(), optimizer.state_dict()["state"][0]["exp_avg"].numpy())


def test_big_endian_files_are_read(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=">f4")
    program = bin._Program().complete({"a": Tensor.of(np.zeros((2, 3), np.float32)), "m": Tensor.of(np.zeros(2, bool))})
    path = archive(tmp_path / "a.bin", program, {"0": numbers.tobytes(), "1": b"\1\0"}, byteorder=b"big")
    assert np.array_equal(open_checkpoint(path).array("a"), numbers.reshape(2, 3))
    assert open_checkpoint(path).array("m").tolist() == [True, False]
    path = archive(tmp_path / "b.bin", program, {"0": numbers.tobytes(), "1": b"\1\0"}, byteorder=b"middle")
    with pytest.raises(CheckpointFormatError, match="byte order"):
        open_checkpoint(path)


def test_storages_are_aligned_as_torch_aligns_them(tmp_path: Path) -> None:
    bin.write(tmp_path / "a.bin", some_tensors())
    with zipfile.ZipFile(tmp_path / "a.bin") as file:
        for info in file.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            with (tmp_path / "a.bin").open("rb") as raw:
                raw.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", raw.read(4))
            assert (info.header_offset + 30 + name + extra) % 64 == 0
        assert file.testzip() is None


def test_files_beyond_four_gigabytes_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide fields are used from 4 GB on; here from 100 bytes on, so that the test needs no disk."""
    monkeypatch.setattr(zips, "_WIDE_FROM", 100)
    given = {"a": np.arange(100, dtype=np.float32), "b": np.arange(50, dtype=np.float64), "c": np.ones(1)}
    bin.write(tmp_path / "a.bin", given)
    assert b"PK\6\6" in (tmp_path / "a.bin").read_bytes()
    opened = open_checkpoint(tmp_path / "a.bin")
    assert all(
        np.array_equal(opened.array(name), given[name]) and is_view_of_a_file(opened.raw(name)) for name in given
    )
    torch = pytest.importorskip("torch")
    assert all(np.array_equal(tensor, given[name]) for name, tensor in torch.load(tmp_path / "a.bin").items())


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot hold uint16"):
        bin.write(tmp_path / "a.bin", {"a": np.ones(2, np.uint16)})
    with pytest.raises(CheckpointError, match="no place for metadata"):
        bin.write(tmp_path / "a.bin", {"a": np.ones(2)}, metadata={"format": "pt"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [None, 5000])
def test_transformers_loads_our_bin(tmp_path: Path, most: int | None) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    bin.write(tmp_path, state, max_shard_bytes=most)
    config.save_pretrained(tmp_path)
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# Nothing runs ---------------------------------------------------------------------------------------------------------


class Calls:
    """An object whose pickle calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(target: str) -> dict[str, tuple[object, str]]:
    """What each pickles, and the global that the error must name."""
    make = f"open({target!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, f"touch {target}"), "system"),
        "eval": (Calls(builtins.eval, make), "eval"),
        "exec": (Calls(builtins.exec, make), "exec"),
        "subprocess": (Calls(subprocess.Popen, ["touch", target]), "Popen"),
        "getattr": (Calls(getattr, (Calls(builtins.__import__, "os")), "system"), "getattr"),
        "import": (Calls(builtins.__import__, "os"), "__import__"),
        "open": (Calls(builtins.open, target, "w"), "open"),
        "nested in a dict": ({"a": [1, (Calls(os.system, f"touch {target}"),)]}, "system"),
        "nested in arguments": (Calls(OrderedDict, [("a", Calls(builtins.eval, make))]), "eval"),
        "codecs": (Calls(codecs.encode, "x", "latin1"), "encode"),
        "numpy": (np.ones(2), "numpy"),
        "a class of the caller": (Calls(Calls, print), "Calls"),
        "pathlib": (Path(target), "pathlib"),
        "bytearray": (Calls(bytearray, 1 << 40), "bytearray"),
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("attack", list(attacks("x")))
def test_a_pickle_that_calls_is_refused_by_name_and_runs_nothing(tmp_path: Path, attack: str, protocol: int) -> None:
    target = tmp_path / "it-ran"
    value, named = attacks(str(target))[attack]
    path = archive(tmp_path / "a.bin", pickle.dumps(value, protocol))
    with pytest.raises(UnsafeCheckpointError, match=named) as error:
        open_checkpoint(path)
    assert "nothing was run" in str(error.value) and str(path) in str(error.value)
    assert not target.exists()


def test_a_legacy_pickle_that_calls_is_refused_too(tmp_path: Path) -> None:
    target = tmp_path / "it-ran"
    for place in range(5):
        parts: list[object] = [bin._MAGIC, 1001, {"little_endian": True}, {}, []]
        parts[place] = Calls(os.system, f"touch {target}")
        (tmp_path / "a.bin").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
        with pytest.raises(UnsafeCheckpointError, match="system"):
            open_checkpoint(tmp_path / "a.bin", format="bin")
    assert not target.exists()


def program(*pieces: bytes) -> bytes:
    return b"\x80\x02" + b"".join(pieces) + b"."


def glob(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


HOSTILE: dict[str, tuple[bytes, type[CheckpointError]]] = {
    "INST": (program(b"(ios\nsystem\n"), UnsafeCheckpointError),
    "OBJ": (program(b"(", glob("collections.OrderedDict"), b"o"), UnsafeCheckpointError),
    "NEWOBJ_EX": (program(glob("collections.OrderedDict"), b")}\x92"), UnsafeCheckpointError),
    "EXT1": (program(b"\x82\x01"), UnsafeCheckpointError),
    "EXT4": (program(b"\x84\x01\0\0\0"), UnsafeCheckpointError),
    "a call of a storage class": (program(glob("torch.FloatStorage"), b"M\xff\xff\x85R"), UnsafeCheckpointError),
    "a call of a text": (program(b"X\2\0\0\0os)R"), UnsafeCheckpointError),
    "a call of a dict": (program(b"})R"), UnsafeCheckpointError),
    "attributes of a global": (program(glob("collections.OrderedDict"), b"}X\1\0\0\0aK\1sb"), UnsafeCheckpointError),
    "attributes of a list": (program(b"]}b"), UnsafeCheckpointError),
    "a dotted name": (program(b"\x8c\x0bcollections\x8c\x18OrderedDict.__init__.__x\x93"), UnsafeCheckpointError),
    "a dotted name of ours": (program(glob("gpt2_core.checkpoints.pickles._Machine")), UnsafeCheckpointError),
    "a name that is a number": (program(b"K\1K\2\x93"), UnsafeCheckpointError),
    "torch's own loader": (program(glob("torch.serialization.load")), UnsafeCheckpointError),
    "torch's hub": (program(glob("torch.hub.load")), UnsafeCheckpointError),
    "an empty pickle": (b"", CheckpointFormatError),
    "no end": (b"\x80\x02}", CheckpointFormatError),
    "nothing on the stack": (program(), CheckpointFormatError),
    "too little on the stack": (program(b"K\1\x87"), CheckpointFormatError),
    "no mark": (program(b"u"), CheckpointFormatError),
    "a memo never written": (program(b"h\7"), CheckpointFormatError),
    "a negative memo": (program(b"K\1p-1\n"), CheckpointFormatError),
    "a text beyond the end": (program(b"X\xff\xff\xff\xff"), CheckpointFormatError),
    "bytes beyond the end": (program(b"\x8e" + b"\xff" * 8), CheckpointFormatError),
    "a text that is no UTF-8": (program(b"X\1\0\0\0\xff"), CheckpointFormatError),
    "an integer of a megabyte": (program(b"\x8b\0\0\x10\0" + bytes(1 << 20)), CheckpointFormatError),
    "an integer of negative length": (program(b"\x8b\xff\xff\xff\xff"), CheckpointFormatError),
    "an integer of 4000 digits": (b"I" + b"9" * 4000 + b"\n.", CheckpointFormatError),
    "a line without end": (b"I" + b"9" * 100_000, CheckpointFormatError),
    "a key that is a tuple": (program(b"})K\1s"), CheckpointFormatError),
    "a key that is a float": (program(b"}G" + bytes(8) + b"K\1s"), CheckpointFormatError),
    "a key that is huge": (program(b"}\x8a\x08" + b"\x7f" * 8 + b"K\1s"), CheckpointFormatError),
    "items of a list": (program(b"]K\1K\1s"), CheckpointFormatError),
    "an odd number of items": (program(b"}(K\1u"), CheckpointFormatError),
    "appending to a dict": (program(b"}K\1a"), CheckpointFormatError),
    "a set": (program(b"\x8f"), CheckpointFormatError),
    "a buffer of elsewhere": (program(b"\x97"), CheckpointFormatError),
    "an instruction of no protocol": (program(b"\xff"), CheckpointFormatError),
    "a million instructions": (program(b"0N" * pickles.MOST_INSTRUCTIONS), CheckpointFormatError),
    "a persistent id that is no storage": (program(b"K\1Q"), CheckpointFormatError),
    "a tensor of no storage": (
        program(glob("torch._utils._rebuild_tensor_v2"), b"(K\1K\0))\x89NtR"),
        CheckpointFormatError,
    ),
    "too few arguments": (program(glob("torch._utils._rebuild_tensor_v2"), b")R"), CheckpointFormatError),
    "arguments that are no tuple": (program(glob("collections.OrderedDict"), b"]R"), CheckpointFormatError),
    "a parameter of no tensor": (
        program(glob("torch._utils._rebuild_parameter"), b"K\1\x89N\x87R"),
        CheckpointFormatError,
    ),
    "a list": (program(b"]"), CheckpointFormatError),
    "a number": (program(b"K\1"), CheckpointFormatError),
    "a dict of numbers": (program(b"}X\1\0\0\0aK\1s"), CheckpointFormatError),
    "a dict that holds itself": (program(b"}q\0X\1\0\0\0ah\0s"), CheckpointFormatError),
    "lists a thousand deep": (program(b"]" * 1000, b"a" * 999), CheckpointFormatError),
    "lists that double a hundred times": (program(b"]q\0", b"".join([b"](h\0h\0eq\0"] * 100)), CheckpointFormatError),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_pickle_ends_in_the_right_error(tmp_path: Path, how: str) -> None:
    data, kind = HOSTILE[how]
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(archive(tmp_path / "a.bin", data))
    assert type(error.value) is kind, error.value


@pytest.mark.parametrize("how", [how for how in HOSTILE if how.startswith(("an integer", "a key", "a text", "a memo"))])
def test_the_machine_itself_refuses_what_would_make_it_slow_or_large(how: str) -> None:
    """Not only what is made of the value afterwards."""
    with pytest.raises(CheckpointFormatError, match=r"damaged at byte|ends within|a key of type"):
        pickles.decode(HOSTILE[how][0], 0, _KNOWN)


def test_reading_leaves_the_machines_table_as_it_was(tmp_path: Path) -> None:
    """A pickle can set attributes of what it is given; ours must not be given anything that lasts."""
    before = dict(_KNOWN)
    for data, _ in HOSTILE.values():
        with pytest.raises(CheckpointError):
            open_checkpoint(archive(tmp_path / "a.bin", data))
    assert dict(_KNOWN) == before


def test_every_opcode_of_pythons_own_list_is_either_done_or_refused() -> None:
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin1")
        with pytest.raises(CheckpointError):
            pickles.decode(code + b"\n" * 20 + b"a", 0, _KNOWN)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_in_every_protocol(protocol: int) -> None:
    value = {"a": [1, -1, 255, 65536, -(1 << 40), 1.5, None, True, False, "ü\U0001f600", (), (1,), (1, 2, 3, 4)], 3: {}}
    if protocol == 0:  # texts beyond ASCII come with escapes there, which state dicts do not have
        value["a"].remove("ü\U0001f600")
    decoded, end = pickles.decode(pickle.dumps(value, protocol), 0, {})
    assert decoded == value and end == len(pickle.dumps(value, protocol))
    if protocol >= 3:
        assert pickles.decode(pickle.dumps(b"\0\xff" * 300, protocol), 0, {})[0] == b"\0\xff" * 300


# Tensors that lie -----------------------------------------------------------------------------------------------------


def tensor_program(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], count: int = 6) -> bytes:
    def ints(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(pickle.dumps(number, 2)[2:-1] for number in numbers) + b"t"

    storage = (
        b"(X\7\0\0\0storage" + glob("torch.FloatStorage") + b"X\1\0\0\x000X\3\0\0\0cpu" + ints((count,))[1:-1] + b"tQ"
    )
    rebuild = glob("torch._utils._rebuild_tensor_v2") + b"(" + storage + ints((offset,))[1:-1] + ints(shape)
    return program(b"}X\1\0\0\0a", rebuild, ints(strides), b"\x89NtRs")


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (0, (7,), (1,), "reaches element 6"),
        (1, (6,), (1,), "reaches element 6"),
        (0, (2, 3), (4, 1), "reaches element 6"),
        (0, (2,), (1 << 40,), "reaches element"),
        (0, (1 << 40,), (0,), "it was expanded"),
        (0, (7,), (0,), "it was expanded"),
        (-1, (2,), (1,), "offset or strides"),
        (0, (2,), (-1,), "strides"),
        (0, (-2,), (1,), "shape"),
        (0, (1 << 62,), (1,), "that memory could hold"),
        (0, (2, 3), (1,), "offset or strides"),
        (0, (1,) * 33, (1,) * 33, "at most 32"),
        (1 << 70, (2,), (1,), "reaches element"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(
    tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], message: str
) -> None:
    path = archive(tmp_path / "a.bin", tensor_program(offset, shape, strides), {"0": bytes(24)})
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(path)


def test_the_same_tensor_within_its_storage_is_read(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype="<f4")
    path = archive(tmp_path / "a.bin", tensor_program(1, (2, 2), (2, 1)), {"0": numbers.tobytes()})
    assert open_checkpoint(path).array("a").tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("size", [0, 20, 23, 25, 28])
def test_a_storage_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = archive(tmp_path / "a.bin", tensor_program(0, (6,), (1,)), {"0": bytes(size)})
    with pytest.raises(CheckpointFormatError, match=f"has {size} bytes; expected 24"):
        open_checkpoint(path)
    with pytest.raises(CheckpointFormatError, match="is missing"):
        open_checkpoint(archive(tmp_path / "a.bin", tensor_program(0, (6,), (1,)), {"1": bytes(24)}))


def test_a_persistent_id_is_checked_whole() -> None:
    kind = pickles.Global("torch.FloatStorage", None)
    assert bin._storage(("storage", kind, "0", "cpu", 3)) == Storage("0", "float32", 3)
    wrong: list[Any] = [
        ("module", kind, "0", "cpu", 3),
        ("storage", "torch.FloatStorage", "0", "cpu", 3),
        ("storage", pickles.Global("torch.float32", None), "0", "cpu", 3),
        ("storage", kind, ("0",), "cpu", 3),
        ("storage", kind, "0", "cpu", -3),
        ("storage", kind, "0", "cpu", True),
        ("storage", kind, "0", "cpu", 3, ("k", -1, 2)),
        ("storage", kind, "0", "cpu"),
    ]
    for saved in wrong:
        with pytest.raises(CheckpointFormatError):
            bin._storage(saved)


# Archives that lie ----------------------------------------------------------------------------------------------------


def test_a_compressed_archive_is_refused_and_never_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * (1 << 26))
    with pytest.raises(UnsafeCheckpointError, match=r"is compressed \(\d+ to 67108864 bytes\)"):
        open_checkpoint(tmp_path / "a.bin")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "archive/../../evil", "a\\b", "C:/evil"])
def test_an_archive_with_names_outside_of_it_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as file:
        file.writestr("archive/data.pkl", program(b"}"))
        file.writestr(name, "x")
    with pytest.raises(UnsafeCheckpointError, match="outside of it"):
        open_checkpoint(tmp_path / "a.bin")


def patched(path: Path, find: bytes, change: Callable[[bytearray, int], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data, data.rindex(find))
    path.write_bytes(data)
    return path


def test_encrypted_overlapping_repeated_and_misplaced_entries_are_refused(tmp_path: Path) -> None:
    def fresh() -> Path:
        return archive(tmp_path / "a.bin", tensor_program(0, (6,), (1,)), {"0": bytes(24)}, other=bytes(24))

    def put(layout: str, at: int, value: int) -> Callable[[bytearray, int], None]:
        return lambda data, start: struct.pack_into(layout, data, start + at, value)

    directory, end = b"PK\1\2", b"PK\5\6"
    assert open_checkpoint(fresh()).shape("a") == (6,)
    with pytest.raises(UnsafeCheckpointError, match="encrypted"):
        open_checkpoint(patched(fresh(), directory, put("<H", 8, 1)))
    for field, value, message in (
        (42, 0, "does not agree"),  # the offset of the local header: another entry's
        (42, 1 << 30, "truncated or damaged"),
        (24, 1 << 30, "compressed"),
        (20, 3, "compressed"),
        (28, 1, "does not agree|wrong at"),
        (30, 60000, "directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(patched(fresh(), directory, put("<H" if field in (28, 30) else "<I", field, value)))
    for field, value in ((8, 1), (10, 60000), (12, 1), (16, 1), (20, 5)):
        with pytest.raises(CheckpointFormatError, match="truncated or damaged"):
            open_checkpoint(patched(fresh(), end, put("<H", field, value)))
    with pytest.raises(CheckpointFormatError, match="twice"):
        path = fresh()
        path.write_bytes(
            path.read_bytes().replace(b"archive/other", b"archive/dataX").replace(b"archive/dataX", b"archive/other")
        )
        with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as file:
            file.writestr("archive/other", "again")
        open_checkpoint(path)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    """Two names for one region, as a bomb would have it: the second entry's header lies inside the first's data."""
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("archive/data/1", bytes(8))
    header = inner.read_bytes()[: 30 + len("archive/data/1")]
    path = archive(tmp_path / "a.bin", program(b"}"), {"0": header + bytes(8), "1": bytes(8)})
    raw = bytearray(path.read_bytes())
    inside = raw.index(header)
    assert raw.index(header, inside + 1) > inside
    at = raw.rindex(b"PK\1\2")
    struct.pack_into("<I", raw, at + 42, inside)
    path.write_bytes(raw)
    with pytest.raises(UnsafeCheckpointError, match="overlaps"):
        open_checkpoint(path)


def test_a_program_of_torchscript_and_an_archive_of_something_else_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormatError, match="TorchScript"):
        open_checkpoint(archive(tmp_path / "a.bin", program(b"}"), **{"constants.pkl": b""}))
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as file:
        file.writestr("word/document.xml", "x")
    with pytest.raises(CheckpointFormatError, match="0 entries NAME/data"):
        open_checkpoint(tmp_path / "b.bin")


def test_a_changed_pickle_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    bin.write(tmp_path / "a.bin", {"abcdefgh": np.ones(3)})
    raw = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(raw.replace(b"abcdefgh", b"abcdefgX"))
    with pytest.raises(CheckpointFormatError, match="checksum"):
        open_checkpoint(tmp_path / "a.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_refused(tmp_path: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "a", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "b.bin").write_bytes(whole[:size])
        with pytest.raises(CheckpointFormatError):
            open_checkpoint(tmp_path / "b.bin", format="bin")


def test_a_legacy_file_whose_storages_lie_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.bin").read_bytes()
    for damaged, message in (
        (whole + b"\0", "expected"),
        (whole[:-20] + (1 << 40).to_bytes(8, "little") + whole[-12:], "does not have the size"),
        (whole.replace(b"FloatStorage", b"ShortStorage"), "expected"),
    ):
        (tmp_path / "b.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "b.bin")


def test_files_of_other_kinds_are_told_what_was_expected(tmp_path: Path) -> None:
    for data, message in (
        (b"hello", "neither a zip archive nor a pickle"),
        (pickle.dumps({"a": 1}), "does not start with torch's magic number"),
        (bytes(257) + b"ustar\0" + bytes(1000), "neither a zip archive nor a pickle"),
        (b"", "neither a zip archive nor a pickle"),
    ):
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(CheckpointFormatError, match=message):
            open_checkpoint(tmp_path)


def test_what_torch_writes_is_written_back_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch_state(torch), tmp_path / "a.bin")
    opened = open_checkpoint(tmp_path / "a.bin")
    bin.write(tmp_path / "b.bin", opened)
    assert_same(open_checkpoint(tmp_path / "b.bin"), opened)
