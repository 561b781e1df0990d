"""gpt2_core.checkpoints: finding, opening and saving, whatever the format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_core import checkpoints
from gpt2_core.checkpoints import (
    Checkpoint,
    Tensor,
    detect,
    formats,
    open_checkpoint,
    round_to_bfloat16,
    save_checkpoint,
    widen_bfloat16,
)
from gpt2_core.checkpoints.tensors import STORAGE
from gpt2_core.errors import CheckpointError, CheckpointFormatError, ConfigError, UnsafeCheckpointError, WriteError

FORMATS = ["safetensors", "bin"]
SUFFIX = {"safetensors": ".safetensors", "bin": ".bin"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def some_tensors(scale: float = 1.0) -> dict[str, Tensor]:
    chance = np.random.default_rng(0)
    tensors = {
        "wte.weight": Tensor.of((chance.normal(size=(7, 4)) * scale).astype(np.float32)),
        "wide": Tensor.of(chance.normal(size=(2, 3, 1))),
        "half": Tensor.of(np.arange(5, dtype=np.float16)),
        "brain": Tensor.of(round_to_bfloat16(chance.normal(size=(3, 2)).astype(np.float32)), "bfloat16"),
        "scalar": Tensor.of(np.array(3, np.int64)),
        "empty": Tensor.of(np.zeros((0, 4), np.float32)),
        "mask": Tensor.of(np.array([[True, False]])),
        "bytes": Tensor.of(np.arange(3, dtype=np.uint8)),
    }
    return tensors | {f"int{bits}": Tensor.of(np.arange(-2, 2).astype(f"int{bits}")) for bits in (8, 16, 32)}


def assert_same(one: Checkpoint | dict[str, Tensor], other: Checkpoint | dict[str, Tensor]) -> None:
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert tensor.raw().tobytes() == other[name].raw().tobytes(), name


def is_view_of_a_file(array: np.ndarray) -> bool:
    """Whether the numbers stand in a mapping, whatever views lie between."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base is not None


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 1, 60, 10**9])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_saved_is_what_is_opened_bit_for_bit(tmp_path: Path, format: str, most: int | None) -> None:
    given = some_tensors()
    written = save_checkpoint(tmp_path / "m", given, format=format, max_shard_bytes=most)
    assert sorted(path.name for path in written) == listing(tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as opened:
        assert opened.format == format and set(opened.files) == set(written)
        assert opened.bytes_total == sum(tensor.nbytes for tensor in given.values())
        assert_same(opened, given)


@pytest.mark.parametrize("format", FORMATS)
def test_one_format_to_the_other_and_back_changes_nothing(tmp_path: Path, format: str) -> None:
    other = FORMATS[1 - FORMATS.index(format)]
    save_checkpoint(tmp_path / "a", some_tensors(), format=format, max_shard_bytes=100)
    with open_checkpoint(tmp_path / "a") as opened:
        save_checkpoint(tmp_path / "b", opened, format=other)
    with open_checkpoint(tmp_path / "b") as opened:
        save_checkpoint(tmp_path / "c", opened, format=format, max_shard_bytes=50)
    assert_same(open_checkpoint(tmp_path / "c"), some_tensors())


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_may_be_saved_over_itself(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, some_tensors(), format=format)
    save_checkpoint(tmp_path, open_checkpoint(tmp_path), format=format)
    assert_same(open_checkpoint(tmp_path), some_tensors())


def test_names_in_any_script_survive(tmp_path: Path) -> None:
    for format in FORMATS:
        given = {"Größe.重み": np.ones(2, np.float32), 'a"b\\c': np.zeros(1, np.float32)}
        save_checkpoint(tmp_path / format, given, format=format)
        assert open_checkpoint(tmp_path / format).names() == tuple(given)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_hold_at_most_what_was_asked(tmp_path: Path, format: str) -> None:
    given = {f"t{index}": np.full((10,), index, np.float32) for index in range(7)}
    save_checkpoint(tmp_path, given, format=format, max_shard_bytes=100)
    stem, suffix = {"safetensors": ("model", ".safetensors"), "bin": ("pytorch_model", ".bin")}[format]
    shards = [f"{stem}-{number:05d}-of-00004{suffix}" for number in range(1, 5)]
    assert listing(tmp_path) == sorted([*shards, f"{stem}{suffix}.index.json"])
    index = json.loads((tmp_path / f"{stem}{suffix}.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"] == {f"t{number}": shards[number // 2] for number in range(7)}


def test_bfloat16_widens_exactly_and_rounds_to_nearest_even() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = widen_bfloat16(every)
    numbers = ~np.isnan(wide)
    assert np.array_equal(round_to_bfloat16(wide)[numbers], every[numbers])
    assert np.isnan(widen_bfloat16(round_to_bfloat16(wide[~numbers]))).all()
    torch = pytest.importorskip("torch")
    chance = np.random.default_rng(1).integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    halfway = (every.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    for floats in (chance[~np.isnan(chance)], halfway[~np.isnan(halfway)]):
        theirs = torch.from_numpy(floats.copy()).bfloat16().view(torch.uint16).numpy()
        assert np.array_equal(round_to_bfloat16(floats), theirs)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_are_views_of_the_mapped_file_and_read_only(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2))}, format=format)
    opened = open_checkpoint(tmp_path)
    for name in opened:
        array = opened.array(name)
        assert is_view_of_a_file(array) and not array.flags.writeable and array.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("format", FORMATS)
def test_every_tensor_we_write_is_aligned_to_its_own_width(tmp_path: Path, format: str) -> None:
    mixed = {
        "one": np.ones(1, np.int8),
        "wide": np.ones(3),
        "half": np.ones(1, np.float16),
        "long": np.ones(2, np.int64),
    }
    save_checkpoint(tmp_path, mixed, format=format)
    opened = open_checkpoint(tmp_path)
    for name in opened:
        assert is_view_of_a_file(opened.raw(name)), f"{name} had to be copied"


@pytest.mark.parametrize("format", FORMATS)
def test_writable_views_change_this_process_alone(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, {"a": np.zeros(4, np.float32)}, format=format)
    array = open_checkpoint(tmp_path, writable=True).array("a")
    array += 1
    assert array.sum() == 4 and is_view_of_a_file(array)
    assert open_checkpoint(tmp_path).array("a").sum() == 0


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_outlive_the_checkpoint_and_the_file(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, {"a": np.arange(1000, dtype=np.float32)}, format=format, max_shard_bytes=None)
    with open_checkpoint(tmp_path) as opened:
        array = opened.array("a")
    save_checkpoint(tmp_path, {"a": np.zeros(1000, np.float32)}, format=format)
    del opened
    assert np.array_equal(array, np.arange(1000))


@pytest.mark.parametrize("format", FORMATS)
def test_a_closed_checkpoint_says_so(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, {"a": np.zeros(4, np.float32)}, format=format)
    with open_checkpoint(tmp_path) as opened:
        pass
    assert opened.shape("a") == (4,)
    with pytest.raises(CheckpointError, match="has been closed"):
        opened.array("a")


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_are_fetched_one_at_a_time_while_writing(tmp_path: Path, format: str) -> None:
    events = []

    def tensor(name: str) -> Tensor:
        def load() -> np.ndarray:
            events.append(f"load {name}")
            return np.zeros(3, np.float32)

        return Tensor("float32", (3,), load, lambda: events.append(f"release {name}"))

    save_checkpoint(tmp_path, {"a": tensor("a"), "b": tensor("b")}, format=format, max_shard_bytes=12)
    assert events == ["load a", "release a", "load b", "release b"]


PEAK = """
import sys
from pathlib import Path
from gpt2_core.checkpoints import open_checkpoint, save_checkpoint
save_checkpoint(sys.argv[2], open_checkpoint(sys.argv[1]), format=sys.argv[3])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status, MADV_DONTNEED")
def test_converting_keeps_a_few_tensors_in_memory_not_all(tmp_path: Path) -> None:
    """Sixteen tensors of 8 MB; what one with no tensors needs is taken off."""
    chance = np.random.default_rng(0)
    save_checkpoint(tmp_path / "big", {f"t{n}": chance.random((1 << 20,)) for n in range(16)})
    save_checkpoint(tmp_path / "none", {"t": np.zeros(1)})
    for format in FORMATS:
        small, large = (
            int(subprocess.check_output([sys.executable, "-c", PEAK, tmp_path / name, tmp_path / "out", format]))
            for name in ("none", "big")
        )
        assert (large - small) / 1024 < 40, f"{format} held {(large - small) / 1024:.0f} MB of 128"


# Finding --------------------------------------------------------------------------------------------------------------


def test_a_format_is_a_module_with_the_same_verbs() -> None:
    assert [name for name in formats() if name in FORMATS] == FORMATS
    for name, module in formats().items():
        assert name == module.NAME and module.FILES
        assert all(callable(getattr(module, verb)) for verb in ("find", "owns", "read", "write"))
        assert module.owns(module.FILES[0]), "what it writes it owns"


def test_the_preferred_format_is_opened_first(tmp_path: Path) -> None:
    given = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    order = []
    checkpoints.formats()["bin"].write(tmp_path, given)
    checkpoints.formats()["bin"].write(tmp_path / "shards", given, max_shard_bytes=12)
    for file in (tmp_path / "shards").iterdir():
        file.rename(tmp_path / file.name)
    checkpoints.formats()["safetensors"].write(tmp_path, given)
    checkpoints.formats()["safetensors"].write(tmp_path / "more", given, max_shard_bytes=12)
    for file in (tmp_path / "more").iterdir():
        file.rename(tmp_path / file.name)
    for _ in range(4):
        order.append(detect(tmp_path)[1].name)
        detect(tmp_path)[1].unlink()
    assert order == [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_any_name_is_told_by_its_content(tmp_path: Path, format: str) -> None:
    (written,) = save_checkpoint(tmp_path, some_tensors(), format=format)
    odd = written.rename(tmp_path / "odd-name")
    assert detect(odd) == (format, odd)
    assert_same(open_checkpoint(odd), some_tensors())


def test_a_folder_without_a_checkpoint_is_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    for word in (
        "config.json, readme.txt",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "give the file itself",
    ):
        assert word in str(error.value)
    for format in FORMATS:
        with pytest.raises(CheckpointError, match=f"no {format} checkpoint.*readme.txt"):
            open_checkpoint(tmp_path, format=format)


def test_a_path_that_is_not_there_and_a_file_of_no_format_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "no")
    (tmp_path / "text").write_text("hello world, this is text")
    with pytest.raises(CheckpointError, match="no format that is read here"):
        open_checkpoint(tmp_path / "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("format", FORMATS)
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path, format: str) -> None:
    os.mkfifo(tmp_path / f"x{SUFFIX[format]}")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path / f"x{SUFFIX[format]}", format=format)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")

    def refused(self: Path, mode: str = "r") -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    for format in (None, *FORMATS):
        with pytest.raises(CheckpointError, match=r"cannot .*x: Permission denied"):
            open_checkpoint(tmp_path / "x", format=format)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 548105171\n"


@pytest.mark.parametrize("file", sorted({name for each in checkpoints.formats().values() for name in each.FILES}))
def test_what_git_leaves_of_a_large_file_is_told_from_a_damaged_one(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(POINTER)
    for path in (tmp_path, tmp_path / file):
        with pytest.raises((CheckpointFormatError, ConfigError), match=r"is a git-LFS pointer: run `git lfs pull`"):
            open_checkpoint(path)


@pytest.mark.parametrize("format", list(checkpoints.formats()))
def test_a_reader_that_is_asked_for_says_so_too(tmp_path: Path, format: str) -> None:
    file = checkpoints.formats()[format].FILES[0]
    (tmp_path / file).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"git-LFS pointer" if format != "kerashub" else r"config\.json"):
        open_checkpoint(tmp_path / file, format=format)


def test_a_size_may_have_a_unit(tmp_path: Path) -> None:
    tensors = {name: np.zeros(400, np.float32) for name in "abc"}
    assert len(save_checkpoint(tmp_path / "a", tensors, max_shard_bytes="3.2KB")) == 3
    for size in ("lots", "0", -1):
        with pytest.raises(CheckpointError, match=r'max_shard_bytes is .*as 5000000000 or "5GB"'):
            save_checkpoint(tmp_path / "b", tensors, max_shard_bytes=size)
    assert not (tmp_path / "b").exists()


def test_an_unknown_format_lists_the_known(tmp_path: Path) -> None:
    for call in (
        lambda: open_checkpoint(tmp_path, format="safetensor"),
        lambda: save_checkpoint(tmp_path, {}, format="x"),
    ):
        with pytest.raises(CheckpointError, match=r"expected .*safetensors"):
            call()
    with pytest.raises(CheckpointError, match=r"not known; expected one of .*; did you mean 'safetensors'\?$"):
        open_checkpoint(tmp_path, format="safetensor")
    with pytest.raises(CheckpointError, match=r"not known; expected one of .*; did you mean 'bfloat16'\?$"):
        Tensor("bfloat", (1,), lambda: np.zeros(1))


# Saving over what is there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [("safetensors", None), ("safetensors", 60), ("bin", None), ("bin", 60)])
@pytest.mark.parametrize("first", [("safetensors", None), ("safetensors", 60), ("bin", 80), ("bin", None)])
def test_a_folder_never_holds_two_checkpoints(
    tmp_path: Path, first: tuple[str, int | None], second: tuple[str, int | None]
) -> None:
    (tmp_path / "config.json").write_text("mine")
    save_checkpoint(tmp_path, some_tensors(), format=first[0], max_shard_bytes=first[1])
    written = save_checkpoint(tmp_path, some_tensors(2.0), format=second[0], max_shard_bytes=second[1])
    assert listing(tmp_path) == sorted(["config.json", *(path.name for path in written)])
    assert_same(open_checkpoint(tmp_path), some_tensors(2.0))


@pytest.mark.parametrize("format", FORMATS)
def test_a_formats_own_write_replaces_its_own_files_and_leaves_the_others(tmp_path: Path, format: str) -> None:
    other = formats()[FORMATS[1 - FORMATS.index(format)]]
    kept = {path.name for path in other.write(tmp_path, some_tensors())}
    for most in (60, None, 100):
        written = formats()[format].write(tmp_path, some_tensors(), max_shard_bytes=most)
        assert set(listing(tmp_path)) == kept | {path.name for path in written}


@pytest.mark.parametrize("format", FORMATS)
def test_a_tensor_that_fails_to_load_leaves_the_old_checkpoint(tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, some_tensors(), format=format)
    before = listing(tmp_path)

    def broken() -> np.ndarray:
        raise OSError(28, "No space left on device")

    worse = {"wte.weight": np.zeros((7, 4), np.float32), "broken": Tensor("float32", (2,), broken)}
    for most in (None, 10):
        with pytest.raises(WriteError, match="No space left"):
            save_checkpoint(tmp_path, worse, format=format, max_shard_bytes=most)
        with pytest.raises(WriteError, match="No space left"):
            formats()[format].write(tmp_path, worse, max_shard_bytes=most)
    with pytest.raises(WriteError, match="No space left"):
        formats()[format].write(tmp_path / before[0], worse)
    assert listing(tmp_path) == before
    assert_same(open_checkpoint(tmp_path), some_tensors())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": [1.0, 2.0]}, "a is a list; expected a numpy array"),
        ({"a": np.array(["x"])}, "cannot be stored"),
        ({"a": np.ones(2, np.complex64)}, "cannot be stored"),
        ({"": np.ones(2)}, "not a name for a tensor"),
        ({1: np.ones(2)}, "not a name for a tensor"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, format: str, tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "m", tensors, format=format)
    assert listing(tmp_path) == []


def test_a_tensor_of_bits_must_say_which(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not hold the bits of bfloat16"):
        Tensor.of(np.ones(2, np.float32), "bfloat16")
    with pytest.raises(CheckpointError, match="did you mean 'float32'"):
        Tensor("float23", (1,), lambda: np.ones(1))
    wrong = Tensor("float32", (2,), lambda: np.ones(2))
    with pytest.raises(CheckpointError, match="fetched float64, expected float32"):
        wrong.raw()
    with pytest.raises(CheckpointError, match="max_shard_bytes is 0"):
        save_checkpoint(tmp_path / "m", {"a": np.ones(1)}, max_shard_bytes=0)
    for format in FORMATS:
        with pytest.raises(CheckpointError, match="is one file; give a folder"):
            formats()[format].write(tmp_path / f"a{SUFFIX[format]}", {"a": np.ones(1)}, max_shard_bytes=4)


def test_big_endian_arrays_are_stored_as_every_format_stores_them(tmp_path: Path) -> None:
    for format in FORMATS:
        save_checkpoint(tmp_path, {"a": np.arange(3, dtype=">f4")}, format=format)
        assert np.array_equal(open_checkpoint(tmp_path).array("a"), np.arange(3))


# An index and its shards ----------------------------------------------------------------------------------------------


def sharded(folder: Path, format: str) -> tuple[Path, dict[str, dict[str, str]]]:
    """A folder with shards a -> 1, b -> 2, c -> 3; its index and what the index says."""
    save_checkpoint(folder, {name: np.ones(3, np.float32) for name in "abc"}, format=format, max_shard_bytes=12)
    index = next(folder.glob("*.index.json"))
    return index, json.loads(index.read_text())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", "..\\x", "", "..", "C:\\x"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, format: str, name: str) -> None:
    index, said = sharded(tmp_path, format)
    said["weight_map"]["b"] = name
    index.write_text(json.dumps(said))
    with pytest.raises(UnsafeCheckpointError, match="not a plain file name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_missing_shards_are_listed_together(tmp_path: Path, format: str) -> None:
    _, said = sharded(tmp_path, format)
    for name in "ac":
        (tmp_path / said["weight_map"][name]).unlink()
    with pytest.raises(CheckpointFormatError) as error:
        open_checkpoint(tmp_path)
    assert "2 are missing" in str(error.value)
    assert all(said["weight_map"][name] in str(error.value) for name in "ac")


@pytest.mark.parametrize("format", FORMATS)
def test_what_shards_lack_hold_beyond_the_index_or_hold_twice_is_reported_together(tmp_path: Path, format: str) -> None:
    _, said = sharded(tmp_path, format)
    files = said["weight_map"]
    formats()[format].write(tmp_path / files["b"], {"a": np.ones(3, np.float32)})
    with pytest.raises(CheckpointFormatError) as error:
        open_checkpoint(tmp_path)
    message = str(error.value)
    assert f"{files['b']} lacks 1 tensors that the index puts there: b" in message
    assert f"{files['b']} holds 1 tensors that the index does not put there: a" in message
    assert "1 tensors stand in more than one file: a" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an index"),
        ("{}", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": []}', "not an index"),
        ('{"weight_map": {}}', "lists no tensor"),
        ('{"weight_map": {"a": 1}}', "expected a file name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' stands there more than once"),
        ("[" * 100_000, "not an index"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_an_index_that_is_none_is_reported(tmp_path: Path, format: str, text: str, message: str) -> None:
    index, _ = sharded(tmp_path, format)
    index.write_text(text)
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_that_is_no_text_or_too_long_is_reported(tmp_path: Path) -> None:
    index, _ = sharded(tmp_path, "safetensors")
    index.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointFormatError, match="not an index"):
        open_checkpoint(tmp_path)
    with index.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointFormatError, match="expected an index of at most"):
        open_checkpoint(tmp_path)


# Imports --------------------------------------------------------------------------------------------------------------


def test_opening_a_checkpoint_imports_no_framework(tmp_path: Path) -> None:
    for format in FORMATS:
        save_checkpoint(tmp_path / format, some_tensors(), format=format)
    script = (
        "import sys; from gpt2_core.checkpoints import open_checkpoint\n"
        f"for format in {FORMATS!r}: open_checkpoint(sys.argv[1] + '/' + format).array('brain')\n"
        "print(*sorted({'torch', 'tensorflow', 'huggingface_hub', 'h5py', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script, str(tmp_path)], text=True).strip() == ""


def test_every_dtype_has_a_width() -> None:
    assert STORAGE["bfloat16"].itemsize == 2 and all(dtype.itemsize in (1, 2, 4, 8) for dtype in STORAGE.values())
