"""gpt2_core.checkpoints.hdf5: of one mind with h5py about sound files, and unmoved by all others."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoints_h5 import tensors_of, unpack

from gpt2_core.checkpoints import Tensor, h5, hdf5, round_to_bfloat16
from gpt2_core.checkpoints.tensors import STORAGE, MappedFile, file_tensor
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError, WriteError
from models import small_config

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def some_arrays(count: int = 3) -> dict[hdf5.Names, Tensor]:
    chance = np.random.default_rng(count)
    arrays = {("g", f"x{n}"): Tensor.of(chance.normal(size=(n % 4, 2)).astype(f"f{2 << n % 3}")) for n in range(count)}
    arrays |= {("integers", name): Tensor.of(np.arange(3).astype(name)) for name in hdf5.TYPES if "int" in name}
    return arrays | {
        ("scalar",): Tensor.of(np.array(3.5)),
        ("Größe", "重み"): Tensor.of(round_to_bfloat16(chance.normal(size=5).astype(np.float32)), "bfloat16"),
    }


def written(path: Path, arrays: dict[hdf5.Names, Tensor], **attributes: Any) -> Path:
    with path.open("wb") as file:
        hdf5.write(file, arrays, {(): {"layer_names": ["g"]} | attributes})
    return path


def read(path: Path) -> dict[hdf5.Names, Tensor]:
    file = MappedFile(path)
    return {each.path: file_tensor(file, each.dtype, each.shape, each.offset) for each in hdf5.contents(file).arrays}


# h5py as oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 8, 9, 256, 257, 2000])
def test_h5py_reads_what_we_write_and_so_do_we(tmp_path: Path, count: int) -> None:
    """Eight members fill a leaf, 256 a tree of the usual kind; more make wider leaves."""
    h5py = pytest.importorskip("h5py")
    arrays = some_arrays(count)
    many = [f"name {n}" for n in range(count)]
    path = written(tmp_path / "a.h5", arrays, backend="tensorflow", script="重み", many=many)
    with h5py.File(path) as file:
        found = []
        file.visititems(lambda name, each: found.append(tuple(name.split("/"))) if hasattr(each, "shape") else None)
        assert sorted(found) == sorted(arrays)
        for names, tensor in arrays.items():
            each = file["/".join(names)]
            assert each.shape == tensor.shape and np.array_equal(each[()], tensor.array()), names
        assert file.attrs["backend"] == b"tensorflow" and list(file.attrs["layer_names"]) == [b"g"]
        encodings = [h5py.check_string_dtype(file.attrs.get_id(name).dtype).encoding for name in ("backend", "script")]
        assert encodings == ["ascii", "utf-8"] and file.attrs["script"] == "重み".encode()
        assert [name.decode() for name in file.attrs["many"]] == many
    again = read(path)
    assert again.keys() == arrays.keys()
    for names, tensor in arrays.items():
        assert (again[names].dtype, again[names].shape) == (tensor.dtype, tensor.shape)
        assert again[names].raw().tobytes() == tensor.raw().tobytes()


@pytest.mark.parametrize("count", [1, 8, 9, 300, 1000])
def test_we_read_what_h5py_writes(tmp_path: Path, count: int) -> None:
    """A thousand members make trees of two levels; names that are not ASCII make groups of the newer kind."""
    h5py = pytest.importorskip("h5py")
    arrays = {names: tensor for names, tensor in some_arrays(count).items() if tensor.dtype != "bfloat16"}
    arrays[("Größe", "重み")] = Tensor.of(np.arange(3))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for names, tensor in arrays.items():
            file.create_dataset("/".join(names), data=tensor.array())
        file.create_group("none/of these")
        for index in range(20):  # more than fits the first block of the header
            file["g"].attrs[f"note {index}"] = "x" * 500
    again = read(tmp_path / "a.h5")
    assert again.keys() == arrays.keys()
    for names, tensor in arrays.items():
        assert (again[names].dtype, again[names].shape) == (tensor.dtype, tensor.shape)
        assert again[names].raw().tobytes() == tensor.raw().tobytes()
    attributes = hdf5.contents(MappedFile(tmp_path / "a.h5")).attributes
    assert attributes[("g",)] == {f"note {index}" for index in range(20)} and attributes[()] == frozenset()
    assert ("none", "of these") in attributes


def test_every_number_of_bfloat16_is_the_one_that_h5py_reads(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    every = Tensor.of(np.arange(1 << 16, dtype=np.uint16), "bfloat16")
    with h5py.File(written(tmp_path / "a.h5", {("x",): every})) as file:
        assert file["x"].dtype == np.float32
        assert np.array_equal(file["x"][()], every.array(), equal_nan=True)


def test_types_are_described_as_h5py_describes_them() -> None:
    h5py = pytest.importorskip("h5py")
    for dtype, message in hdf5.TYPES.items():
        if dtype != "bfloat16":
            theirs = h5py.h5t.py_create(STORAGE[dtype]).encode()[2:]  # two bytes in front say that it is a type
            assert theirs.rstrip(b"\0") == message.rstrip(b"\0"), dtype


def test_what_we_write_is_aligned_and_always_the_same(tmp_path: Path) -> None:
    arrays = some_arrays()
    path = written(tmp_path / "a.h5", arrays)
    found = hdf5.contents(MappedFile(path)).arrays
    assert all(each.offset % 64 == 0 for each in found)
    assert [each.path for each in found if each.end > each.offset] == [
        n for n, tensor in arrays.items() if tensor.nbytes
    ]
    assert path.read_bytes() == written(tmp_path / "b.h5", arrays).read_bytes()
    assert found[-1].end == path.stat().st_size


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/b",), "plain names"),
        (("",), "plain names"),
        ((".",), "plain names"),
        (("x" * 256,), "255 bytes"),
        (("a\0b",), "plain names"),
        (("g",) * 17, "at most 16"),
        (("scalar", "x"), "an array and a group"),
        (("g",), "an array and a group"),
    ],
)
def test_names_that_hdf5_cannot_hold_are_refused(tmp_path: Path, names: hdf5.Names, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "a.h5", some_arrays() | {names: Tensor.of(np.ones(1))})


def test_a_full_disk_is_a_write_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    config = small_config()
    h5.write(tmp_path / "tf_model.h5", tensors_of(config, "lm"))
    before = (tmp_path / "tf_model.h5").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*tf_model\.h5"):
            h5.write(tmp_path / "tf_model.h5", tensors_of(config, "lm", seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "tf_model.h5").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_tensors_are_fetched_one_at_a_time_while_writing(tmp_path: Path) -> None:
    events = []

    def tensor(name: str) -> Tensor:
        def load() -> np.ndarray:
            events.append(f"load {name}")
            return np.zeros(3, np.float32)

        return Tensor("float32", (3,), load, lambda: events.append(f"release {name}"))

    for most in (None, 12):
        h5.write(tmp_path / str(most), {f"h.{n}.ln_1.bias": tensor(str(n)) for n in range(2)}, max_shard_bytes=most)
        assert events == ["load 0", "release 0", "load 1", "release 1"]
        events.clear()


PEAK = """
import sys
import numpy as np
from pathlib import Path
from gpt2_core.checkpoints import h5
from gpt2_core.checkpoints.tensors import Tensor
count = int(sys.argv[2])
block = np.zeros((1024, 2048), np.float32)
given = {f"h.{n}.mlp.c_fc.weight": Tensor("float32", block.shape, lambda: block + 1) for n in range(count)}
h5.write(sys.argv[1], given)
with h5.read(sys.argv[1]) as opened:
    h5.write(sys.argv[1] + "/again", opened)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status, MADV_DONTNEED")
def test_writing_and_reading_hold_a_few_tensors_not_all(tmp_path: Path) -> None:
    """Sixteen tensors of 8 MB; what one takes is taken off."""
    small, large = (
        int(subprocess.check_output([sys.executable, "-c", PEAK, tmp_path / str(count), str(count)]))
        for count in (1, 16)
    )
    assert (large - small) / 1024 < 40, f"held {(large - small) / 1024:.0f} MB of 128"


# Texts of attributes --------------------------------------------------------------------------------------------------


def with_attributes(path: Path, **attributes: Any) -> hdf5.Contents:
    """A file of h5py's whose group /g has these attributes."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        group = file.create_group("g")
        for name, value in attributes.items():
            group.attrs[name] = value
    return hdf5.contents(MappedFile(path))


def test_texts_are_those_that_h5py_wrote_and_nothing_else_is_one(tmp_path: Path) -> None:
    found = with_attributes(
        tmp_path / "a.h5",
        plain="dense_1",
        wide="größer 重み",
        empty="",
        long="x" * 5000,
        fixed=np.bytes_("abc"),
        padded=np.array([b"ab", b"c"]),
        many=["x", "yz"],
        number=3,
        numbers=np.arange(3.0),
        flag=True,
    )
    texts = {name: found.text(("g",), name) for name in found.attributes[("g",)]}
    assert texts == {
        "plain": "dense_1", "wide": "größer 重み", "empty": "", "long": "x" * 5000, "fixed": "abc", "padded": "abc",
        "many": "xyz", "number": None, "numbers": None, "flag": None,
    }  # fmt: skip
    assert found.text(("g",), "other") is found.text(("other",), "plain") is found.text((), "plain") is None


def test_texts_of_ours_are_read_back(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", some_arrays(), one="größer", several=["a", "重み"], none="")
    found = hdf5.contents(MappedFile(path))
    assert [found.text((), name) for name in ("one", "several", "none", "layer_names")] == ["größer", "a重み", "", "g"]


def test_a_text_that_is_longer_than_it_may_be_is_refused_unread(tmp_path: Path) -> None:
    found = with_attributes(tmp_path / "a.h5", any="x" * 300, fixed=np.bytes_("y" * 300), many=["zzzz"] * 100)
    for name in ("any", "fixed", "many"):
        with pytest.raises(CheckpointFormatError, match="longer than 299 bytes"):
            found.text(("g",), name, 299)
    assert found.text(("g",), "any", 300) == "x" * 300


def put(at: Callable[[bytearray], int], layout: str, *values: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(layout, data, at(data), *values)


def changed_text(change: Callable[[bytearray], None]) -> Callable[[Path], str | None]:
    """What the text of a file says that was changed."""

    def read_text(path: Path) -> str | None:
        with_attributes(path, name="x" * 50)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return hdf5.contents(MappedFile(path)).text(("g",), "name")

    return read_text


def attribute(data: bytearray) -> int:
    """Where the body of the attribute `name` stands."""
    return data.index(b"name\0\0\0\0") - 8


BAD_TEXTS: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "a heap beyond the end": (put(lambda d: attribute(d) + 52, "<Q", 1 << 50), "would stand at bytes"),
    "a heap that is none": (put(lambda d: attribute(d) + 52, "<Q", 96), "not where it should be"),
    "a heap without a size": (put(lambda d: d.index(b"GCOL") + 8, "<Q", 3), "not where it should be"),
    "a huge heap": (put(lambda d: d.index(b"GCOL") + 8, "<Q", 1 << 40), "would stand at bytes"),
    "a text longer than its heap": (put(lambda d: d.index(b"GCOL") + 24, "<Q", 1 << 63), "longer than the heap"),
    "a text shorter than it is": (put(lambda d: attribute(d) + 48, "<I", 51), "not where it should be"),
    "a text that is not there": (put(lambda d: attribute(d) + 60, "<I", 9), "not where it should be"),
    "a length beyond all reason": (put(lambda d: attribute(d) + 48, "<I", (1 << 32) - 1), "longer than 16777216"),
    "no text at all": (put(lambda d: d.index(b"GCOL") + 16, "<H", 0), "not where it should be"),
    "another version": (put(attribute, "<B", 4), "of another version"),
    "a shared type": (put(attribute, "<BB", 2, 1), "shares its description"),
    "more texts than bytes": (put(lambda d: attribute(d) + 6, "<H", 24), "is cut short"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_lies_is_refused_when_it_is_asked_for(tmp_path: Path, case: str) -> None:
    change, message = BAD_TEXTS[case]
    with pytest.raises(CheckpointFormatError, match=message):
        changed_text(change)(tmp_path / "a.h5")


def test_what_is_changed_above_is_sound_before(tmp_path: Path) -> None:
    assert changed_text(lambda data: None)(tmp_path / "a.h5") == "x" * 50


def test_two_attributes_of_one_name_are_refused(tmp_path: Path) -> None:
    with_attributes(tmp_path / "a.h5", one="x", two="y")
    data = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(data.replace(b"two\0\0\0\0\0", b"one\0\0\0\0\0"))
    with pytest.raises(CheckpointFormatError, match="two attributes called 'one'"):
        hdf5.contents(MappedFile(tmp_path / "a.h5"))


def test_many_texts_of_one_heap_are_read_once(tmp_path: Path) -> None:
    """As many as GPT-2 XL with its optimizer in bfloat16: the heap must not count again for each."""
    path = tmp_path / "a.h5"
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for number in range(3000):
            file.create_dataset(f"g{number % 30}/{number}", data=np.zeros(1, "V2")).attrs["dtype"] = "bfloat16"
    found = hdf5.contents(MappedFile(path))
    assert len(found.arrays) == 3000 and {each.dtype for each in found.arrays} == {"bfloat16"}


# bfloat16 as Keras 3 stores it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "said", "message"),
    [
        (np.arange(6, dtype="u2").reshape(2, 3).view("V2"), "bfloat16", ""),
        (np.arange(6, dtype="u2").view("V2"), "float16", "holds opaque bytes"),
        (np.arange(6, dtype="u2").view("V2"), None, "holds opaque bytes"),
        (np.arange(6, dtype="u4").view("V4"), "bfloat16", "holds opaque bytes"),
        (np.array([b"ab"]), "bfloat16", "holds strings"),
    ],
)
def test_opaque_bytes_are_bfloat16_where_their_attribute_says_so(
    tmp_path: Path, array: np.ndarray, said: str | None, message: str
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made_array = file.create_dataset("x", data=array)
        if said:
            made_array.attrs["dtype"] = said
    if message:
        with pytest.raises(CheckpointFormatError, match=message):
            read(tmp_path / "a.h5")
        return
    (tensor,) = read(tmp_path / "a.h5").values()
    assert (tensor.dtype, tensor.shape) == ("bfloat16", (2, 3)) and tensor.raw().tobytes() == array.tobytes()


def test_numbers_with_an_attribute_of_that_name_stay_what_they_are(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.ones(2, "f4")).attrs["dtype"] = "bfloat16"
    assert next(iter(read(tmp_path / "a.h5").values())).dtype == "float32"


# Files within files ---------------------------------------------------------------------------------------------------


def test_a_file_within_another_is_read_and_nothing_around_it(tmp_path: Path) -> None:
    arrays = some_arrays()
    inner = written(tmp_path / "a.h5", arrays, note="here").read_bytes()
    (tmp_path / "b").write_bytes(b"x" * 37 + inner + b"y" * 500)
    file = MappedFile(tmp_path / "b")
    window = hdf5.Window(file, 37, len(inner))
    found = hdf5.contents(window)
    assert found.text((), "note") == "here" and {each.path for each in found.arrays} == set(arrays)
    for each in found.arrays:
        tensor = file_tensor(file, each.dtype, each.shape, window.start + each.offset)
        assert tensor.raw().tobytes() == arrays[each.path].raw().tobytes()
    with pytest.raises(CheckpointFormatError, match="truncated"):
        hdf5.contents(hdf5.Window(file, 37, len(inner) - 1))
    assert (
        window.bytes(len(inner), 5) == window.bytes(1 << 60, 5) == b"" and window.bytes(len(inner) - 1, 9) == inner[-1:]
    )


def test_pieces_are_what_is_written_and_as_long_as_said(tmp_path: Path) -> None:
    arrays = some_arrays(9)
    size, pieces = hdf5.pieces(arrays, {(): {"layer_names": ["g"]}})
    data = b"".join(pieces)
    assert len(data) == size and data == written(tmp_path / "a.h5", arrays).read_bytes()


def test_members_are_told_without_looking_further(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", some_arrays() | {("a", "b", "c"): Tensor.of(np.ones(1))})
    data = bytearray(path.read_bytes())
    at = data.index(b"c\0\0\0\0\0\0\0") if data.count(b"c\0\0\0\0\0\0\0") == 1 else None
    file = MappedFile(path)
    assert hdf5.members(file) == {"a", "g", "integers", "scalar", "Größe"} and hdf5.members(file, ("a",)) == {"b"}
    assert hdf5.members(file, ("scalar",)) == hdf5.members(file, ("scalar", "x")) == hdf5.members(file, ("n",)) == set()
    assert at is not None
    data[at] = 0xFF  # a name that is no text, further down
    path.write_bytes(data)
    assert hdf5.members(MappedFile(path), ("a",)) == {"b"}
    with pytest.raises(CheckpointFormatError, match="expected a plain name"):
        hdf5.members(MappedFile(path), ("a", "b"))


# What is refused ------------------------------------------------------------------------------------------------------


def low_level(file: Any, dtype: Any, shape: tuple[int, ...] = (4,), **properties: Any) -> None:
    """A data set /x made with properties that h5py's own functions do not give."""
    import h5py

    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    for name, value in properties.items():
        getattr(made, name)(*value)
    h5py.h5d.create(file.id, b"x", h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape), made)


def virtual(file: Any) -> None:
    import h5py

    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("x", layout)


def linked(name: str, kind: str, *where: str) -> Callable[[Any], None]:
    def make(file: Any) -> None:
        import h5py

        file[name] = getattr(h5py, kind)(*where)

    return make


def loop(file: Any) -> None:
    file["g/back"] = file["g"]


def committed(file: Any) -> None:
    file["kind"] = np.dtype("<f4")
    file.create_dataset("x", (2,), dtype=file["kind"])
    del file["kind"]


def references(file: Any) -> None:
    import h5py

    file.create_dataset("x", data=np.array([file.ref], h5py.ref_dtype), dtype=h5py.ref_dtype)


def odd_float(file: Any) -> None:
    import h5py

    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((2,)))


def with_data(value: Any, **more: Any) -> Callable[[Any], None]:
    return lambda file: file.create_dataset("x", data=value, **more)


UNSAFE: dict[str, tuple[Callable[[Any], None], str]] = {
    "an external link": (linked("x", "ExternalLink", "/etc/passwd", "/"), "'/x' is a link to another file"),
    "an external link in a group": (linked("g/x", "ExternalLink", "o.h5", "/"), "'/g/x' is a link to another file"),
    "a soft link": (linked("x", "SoftLink", "/g/good"), "'/x' is a symbolic link"),
    "a soft link to nothing": (linked("g/x", "SoftLink", "../../x"), "'/g/x' is a symbolic link"),
    "a soft link under a name of the newer kind": (linked("ü", "SoftLink", "/g"), "'/ü' is a symbolic link"),
    "data in another file": (lambda f: low_level(f, "f4", set_external=(b"/etc/passwd", 0, 16)), "data in other files"),
    "a virtual data set": (virtual, "made of pieces of other files"),
}


def crowded(file: Any) -> None:
    for number in range(20):
        file.create_group(f"g/ü{number}")


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "an object under two names": (lambda file: file.__setitem__("again", file["g/good"]), "links to more than once"),
    "a group in itself": (loop, "links to more than once"),
    "chunks": (with_data(np.ones((4, 4)), chunks=(2, 2)), "in chunks"),
    "room to grow": (with_data(np.ones(4), maxshape=(None,)), "in chunks"),
    "compression": (with_data(np.ones(400), compression="gzip"), "compressed or filtered"),
    "a checksum": (with_data(np.ones(400), fletcher32=True), "compressed or filtered"),
    "data in the header": (lambda file: low_level(file, "f4", set_layout=(0,)), "stored in its header"),
    "data that was never written": (lambda file: low_level(file, "f4"), "never written"),
    "references": (references, "holds references"),
    "an enumeration": (with_data(np.array([True])), "holds an enumeration"),
    "strings": (with_data(np.array([b"abc"])), "holds strings"),
    "strings of any length": (with_data("abc"), "holds lists of varying length"),
    "records": (with_data(np.zeros(2, [("a", "f4")])), "holds records"),
    "complex numbers": (with_data(np.ones(2, np.complex64)), "holds records"),
    "opaque bytes": (with_data(np.array([b"ab"], "V2")), "holds opaque bytes"),
    "arrays of arrays": (lambda file: file.create_dataset("x", (2,), dtype=np.dtype(("f4", (3,)))), "holds arrays"),
    "big-endian floats": (with_data(np.ones(2, ">f4")), "big-endian"),
    "big-endian integers": (with_data(np.ones(2, ">i8")), "big-endian"),
    "another kind of float": (odd_float, "another float"),
    "nothing at all": (lambda file: file.create_dataset("x", dtype="f4", shape=None), "empty without sizes"),
    "a type of its own": (committed, "shares its description"),
    "a type alone": (lambda file: file.__setitem__("x", np.dtype("<f4")), "neither a group nor an array"),
    "groups within groups": (lambda file: file.create_group("/".join("abcdefghijklmnopq")), "nested more than 16"),
    "many names that are not ASCII": (crowded, "keeps its members in a heap"),
    "a name with a line end": (lambda file: file.create_group("a\nb"), "expected a plain name"),
    "a long name": (lambda file: file.create_group("a" * 300), "does not end within 255"),
}


def made(path: Path, make: Callable[[Any], None], **options: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w", **options) as file:
        file.attrs["layer_names"] = np.array([b"g"])
        file.create_dataset("g/good", data=np.ones(3, np.float32))
        make(file)
    return path


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_leads_elsewhere_is_unsafe_and_named(tmp_path: Path, kind: str) -> None:
    make, message = UNSAFE[kind]
    path = made(tmp_path / "tf_model.h5", make)
    with pytest.raises(UnsafeCheckpointError, match=message) as caught:
        h5.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_keras_does_not_write_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    path = made(tmp_path / "tf_model.h5", make)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        h5.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("options", [{"libver": "latest"}, {"userblock_size": 512}, {"libver": ("v108", "v108")}])
def test_other_superblocks_are_refused_with_what_to_do(tmp_path: Path, options: dict[str, Any]) -> None:
    path = made(tmp_path / "tf_model.h5", lambda file: None, **options)
    with pytest.raises(CheckpointFormatError, match=r"copy it with h5py into a new file|expected the signature"):
        h5.read(path)


def test_a_file_that_is_not_hdf5_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"version 2\n")
    with pytest.raises(CheckpointFormatError, match=r"starts with b'version '; expected the signature of HDF5"):
        h5.read(tmp_path / "tf_model.h5")
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match="starts with b''"):
        h5.read(tmp_path / "tf_model.h5")


# Lies -----------------------------------------------------------------------------------------------------------------


def patched(tmp_path: Path, change: Callable[[bytearray], None]) -> Path:
    path = written(tmp_path / "tf_model.h5", {("a",): Tensor.of(np.ones((2, 3), "f4")), ("b",): Tensor.of(np.ones(4))})
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def place(data: bytearray, message: int, array: int = 0) -> int:
    """Where the body of the first message of this type stands in the header of an array."""
    at = [n for n in range(0, len(data) - 16, 8) if data[n : n + 4] == b"\1\0\4\0"][array] + 16
    while struct.unpack_from("<H", data, at)[0] != message:
        at += 8 + struct.unpack_from("<H", data, at + 2)[0]
    return at + 8


def overlap(data: bytearray) -> None:
    first, second = (place(data, 8, array) + 2 for array in (0, 1))
    data[second : second + 8] = data[first : first + 8]


def endless(data: bytearray) -> None:
    """A header that is continued by itself."""
    start, at = data.index(b"\1\0\4\0"), place(data, 8)
    struct.pack_into("<H", data, at - 8, 0x10)
    struct.pack_into("<QQ", data, at, start + 16, struct.unpack_from("<I", data, start + 8)[0])


def own_child(data: bytearray) -> None:
    """A tree of two levels whose lower level is itself."""
    at = data.index(b"TREE")
    data[at + 5] = 1
    struct.pack_into("<Q", data, at + 32, at)


LIES: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "a huge size": (put(lambda d: place(d, 1) + 8, "<Q", 1 << 61), "that memory could hold"),
    "sizes whose product overflows": (put(lambda d: place(d, 1) + 8, "<QQ", 1 << 32, 1 << 32), "memory could hold"),
    "a huge size beside zero": (put(lambda d: place(d, 1) + 8, "<QQ", 1 << 62, 0), "that memory could hold"),
    "more numbers than bytes": (put(lambda d: place(d, 1) + 8, "<Q", 3), "has 24 bytes; expected 36"),
    "more dimensions than there are": (put(lambda d: place(d, 1) + 1, "<B", 200), "is cut short"),
    "more bytes than numbers": (put(lambda d: place(d, 8) + 10, "<Q", 32), "has 32 bytes; expected 24"),
    "data beyond the end": (put(lambda d: place(d, 8) + 2, "<Q", 1 << 40), "claims bytes 1099511627776"),
    "data in the superblock": (put(lambda d: place(d, 8) + 2, "<Q", 8), "overlaps what stands before"),
    "data at the end of the address space": (put(lambda d: place(d, 8) + 2, "<Q", (1 << 64) - 8), "claims bytes"),
    "two arrays in one place": (overlap, "overlaps what stands before"),
    "an end beyond the file": (put(lambda d: 40, "<Q", 1 << 40), "but had 1099511627776 when it was written"),
    "a base elsewhere": (put(lambda d: 24, "<Q", 8), "unusual sizes"),
    "a driver's block": (put(lambda d: 48, "<Q", 96), "unusual sizes"),
    "short addresses": (put(lambda d: 13, "<B", 4), "unusual sizes"),
    "a root beyond the end": (put(lambda d: 64, "<Q", 1 << 50), "the header of '/' would stand at bytes"),
    "a root that is an array": (put(lambda d: 64, "<Q", 0), "not of version 1"),
    "a message longer than the header": (put(lambda d: place(d, 1) - 6, "<H", 60_000), "longer than the header"),
    "a header without end": (endless, "takes more than 16777216 bytes"),
    "a tree in itself": (own_child, "no tree where it should be"),
    "more children than there are": (put(lambda d: d.index(b"TREE") + 6, "<H", 65_535), "would stand at bytes"),
    "more members than there are": (put(lambda d: d.index(b"SNOD") + 6, "<H", 65_535), "would stand at bytes"),
    "a heap beyond the end": (put(lambda d: d.index(b"HEAP") + 8, "<Q", 1 << 60), "would stand at bytes"),
    "a name beyond the heap": (put(lambda d: d.index(b"SNOD") + 8, "<Q", 1 << 60), "does not end within"),
    "the same name twice": (
        lambda d: d.__setitem__(slice(d.index(b"b\0\0\0"), d.index(b"b\0\0\0") + 1), b"a"),
        "called 'a'",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_lies_is_refused_with_what_is_wrong(tmp_path: Path, lie: str) -> None:
    change, message = LIES[lie]
    with pytest.raises(CheckpointFormatError, match=message):
        h5.read(patched(tmp_path, change))


def test_what_is_patched_above_is_sound_before(tmp_path: Path) -> None:
    assert len(h5.read(patched(tmp_path, lambda data: None))) == 2


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.h5", {("a",): Tensor.of(np.ones(3))}).read_bytes()
    for size in [*range(0, 400, 3), *range(400, len(whole), 29), len(whole) - 1]:
        (tmp_path / "b.h5").write_bytes(whole[:size])
        with pytest.raises(CheckpointFormatError):
            h5.read(tmp_path / "b.h5")


def test_a_file_of_many_arrays_is_read(tmp_path: Path) -> None:
    """Twenty thousand, thirty times what GPT-2 XL has: nothing may go as their square."""
    arrays = {("g", f"x{n}"): Tensor.of(np.full(1, n)) for n in range(20_000)}
    assert len(read(written(tmp_path / "a.h5", arrays))) == 20_000


# Damage ---------------------------------------------------------------------------------------------------------------


@lru_cache
def sound(folder: Path, kind: str) -> bytes:
    if kind == "ours":
        return h5.write(folder / "ours.h5", tensors_of(small_config(n_layer=1), "double"))[0].read_bytes()
    return (unpack(kind, folder / kind) / "tf_model.h5").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_all(folder: Path, data: bytes) -> None:
    """Read every tensor of a file with these bytes; CheckpointError is as good an end as any."""
    path = folder / f"{os.getpid()}-fuzzed.h5"
    path.write_bytes(data)
    try:
        with h5.read(path) as opened:
            assert opened.bytes_total <= len(data)
            for name in opened:
                assert opened.array(name).shape == opened.shape(name)
    except CheckpointError as error:
        assert len(str(error)) < 5000
    h5.find(path)


@pytest.mark.parametrize("kind", ["ours", "lm", "double"])
def test_flipped_cut_and_spliced_files_end_well(folder: Path, kind: str) -> None:
    whole = sound(folder, kind)
    places = st.integers(0, len(whole) - 1)
    numbers = st.sampled_from([0, 1, 96, 255, 65_535, 1 << 31, 1 << 32, (1 << 62) - 1, 1 << 63, (1 << 64) - 1])

    @bounded
    @given(
        flips=st.lists(st.tuples(places, st.integers(0, 255)), max_size=8),
        words=st.lists(st.tuples(places, st.one_of(numbers, places)), max_size=4),
        cut=st.one_of(st.none(), places),
        splice=st.one_of(st.none(), st.tuples(places, places, places)),
    )
    def run(
        flips: list[tuple[int, int]],
        words: list[tuple[int, int]],
        cut: int | None,
        splice: tuple[int, int, int] | None,
    ) -> None:
        data = bytearray(whole)
        for at, value in flips:
            data[at] = value
        for at, value in words:
            data[at & ~7 : (at & ~7) + 8] = value.to_bytes(8, "little")
        if splice is not None:
            start, end, to = splice
            data[to:to] = data[start:end]
        read_all(folder, bytes(data[:cut]))

    run()


@bounded
@given(rest=st.binary(max_size=300))
def test_any_bytes_end_well(folder: Path, rest: bytes) -> None:
    read_all(folder, rest)
    read_all(folder, hdf5.SIGNATURE + rest)
    head = hdf5._SUPERBLOCK.pack(
        hdf5.SIGNATURE, 0, 0, 0, 0, 0, 8, 8, 0, 4, 16, 0, 0, (1 << 64) - 1, 0, (1 << 64) - 1, 0, 96, 1, 0, 0, 0
    )
    read_all(folder, head + rest)
