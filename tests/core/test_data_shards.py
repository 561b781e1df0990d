"""Reading token shards: ours, nanoGPT's, llm.c's and numpy's."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.data import open_data, verify_data
from gpt2_core.errors import InputError

END = 50256


def ids_of(*sizes: int, seed: int = 0) -> np.ndarray:
    """Documents of these sizes, each after the id between documents."""
    generator = np.random.default_rng(seed)
    return np.concatenate([np.append(END, generator.integers(0, END, size)) for size in sizes])


def write_llmc(
    path: Path, ids: np.ndarray, *, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return path


def write_ours(folder: Path, parts: dict[str, list[np.ndarray]], **changes: Any) -> Path:
    folder.mkdir()
    splits = {}
    for name, shards in parts.items():
        rows = []
        for i, ids in enumerate(shards):
            data = ids.astype("<u2").tobytes()
            (folder / f"{name}_{i}.bin").write_bytes(data)
            rows.append({"file": f"{name}_{i}.bin", "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()})
        splits[name] = {"shards": rows}
    manifest = {
        "format": "gpt2-duet tokens 1",
        "dtype": "uint16",
        "tokenizer": {"vocab_size": 50257, "end_of_text": END},
        "splits": splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def test_shards_are_one_row_of_tokens(tmp_path):
    ids = ids_of(5, 7, 11)
    data = open_data(write_ours(tmp_path / "d", {"train": [ids[:3], ids[3:4], ids[4:4], ids[4:]], "val": [ids[:2]]}))
    assert data.split == "train"
    assert len(data) == len(ids) == len(data.tokens)
    for start in range(len(ids) + 1):
        for stop in range(start, len(ids) + 1):
            assert data.tokens[start:stop].tolist() == ids[start:stop].tolist()
    assert data.tokens[-1] == ids[-1]
    assert data.tokens[0] == END
    assert data.tokens[2:].dtype == np.int64
    with pytest.raises(IndexError):
        data.tokens[len(ids)]
    with pytest.raises(InputError, match="steps of 2"):
        data.tokens[::2]


def test_the_parts_of_a_folder_are_told_apart(tmp_path):
    folder = write_ours(tmp_path / "d", {"train": [ids_of(5)], "val": [ids_of(3)]})
    assert len(open_data(folder, "val")) == len(open_data(folder, "validation")) == 4
    with pytest.raises(InputError, match=r"no 'tran' part; it has train, val; make one .*; did you mean 'train'"):
        open_data(folder, "tran")


def test_documents_begin_at_the_id_between_them_and_at_the_start(tmp_path):
    ids = ids_of(5, 7, 11)
    folder = write_ours(tmp_path / "d", {"train": [ids[:9], ids[9:]], "val": [ids[1:]]})
    assert open_data(folder).documents.tolist() == [0, 6, 14]
    assert open_data(folder, "val").documents.tolist() == [0, 5, 13]


def test_nanogpts_files_are_read_as_they_are(tmp_path):
    ids = ids_of(5, 7)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    ids[:4].astype("<u2").tofile(tmp_path / "val.bin")
    data = open_data(tmp_path)
    assert (data.split, data.vocab_size, data.end_of_text) == ("train", 50257, END)
    assert data.tokens[:].tolist() == ids.tolist()
    assert open_data(tmp_path, "val").tokens[:].tolist() == ids[:4].tolist()
    assert open_data(tmp_path / "val.bin").tokens[:].tolist() == ids[:4].tolist()


def test_a_character_vocabulary_of_nanogpt_is_known_by_its_meta_file(tmp_path):
    np.arange(20, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 65, "itos": {0: "a"}, "stoi": {"a": 0}}))
    data = open_data(tmp_path)
    assert (data.vocab_size, data.end_of_text) == (65, None)
    with pytest.raises(InputError, match="no end-of-text id"):
        data.documents  # noqa: B018


def test_a_meta_file_that_would_run_code_is_refused(tmp_path):
    np.arange(20, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Path}))
    with pytest.raises(InputError, match=r"meta\.pkl is not what nanoGPT writes"):
        open_data(tmp_path)


def test_llm_c_shards_are_read_as_they_are(tmp_path):
    ids = ids_of(5, 7, 3)
    write_llmc(tmp_path / "fineweb_train_000001.bin", ids[:6])
    write_llmc(tmp_path / "fineweb_train_000002.bin", ids[6:])
    write_llmc(tmp_path / "fineweb_val_000000.bin", ids[:6])
    assert open_data(tmp_path).tokens[:].tolist() == ids.tolist()
    assert open_data(str(tmp_path / "fineweb_train_*.bin")).tokens[:].tolist() == ids.tolist()
    assert open_data(tmp_path, "val").tokens[:].tolist() == ids[:6].tolist()


def test_a_shard_of_llm_c_that_was_cut_short_is_reported(tmp_path):
    path = write_llmc(tmp_path / "x.bin", ids_of(5), count=60)
    with pytest.raises(InputError, match=r"1036 bytes, but its header speaks of 60 ids, which makes 1144"):
        open_data(path)


@pytest.mark.parametrize(("magic", "words"), [(20240801, "Llama 3"), (20240522, "questions to choose answers to")])
def test_other_files_of_llm_c_are_refused_by_what_they_are(tmp_path, magic, words):
    with pytest.raises(InputError, match=words):
        open_data(write_llmc(tmp_path / "x.bin", ids_of(5), magic=magic, version=7))


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_arrays_of_numpy_are_read(tmp_path, dtype):
    ids = ids_of(5, 6)
    np.save(tmp_path / "edufineweb_train_000001.npy", ids.astype(dtype))
    data = open_data(tmp_path, "train")
    assert data.tokens[3:9].tolist() == ids[3:9].tolist()


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.uint16), np.zeros(4, np.float32), np.zeros(0, np.uint16)])
def test_arrays_that_hold_no_ids_are_refused(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match="expected whole numbers of one axis"):
        open_data(tmp_path / "x.npy")


def test_an_array_that_was_cut_short_is_reported(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(100, np.uint16))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-10])
    with pytest.raises(InputError, match="cut short"):
        open_data(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(InputError, match="no array of numpy's"):
        open_data(tmp_path / "x.npy")


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02"])
def test_a_file_of_no_ids_is_refused(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match="expected some, two for each id"):
        open_data(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"Some text.\n" * 200, "is text"),
        ("b.txt", "xНу вот\u201d ".encode() * 200, "is text"),
        ("model.bin", b"PK\x03\x04" + bytes(96), "maybe a checkpoint"),
    ],
)
def test_texts_and_checkpoints_are_not_taken_for_ids(tmp_path, name, content, words):
    """Any two bytes are an id, so that a model would learn from them without complaint."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_data(tmp_path / name)


def test_what_is_not_there_is_reported_with_what_could_be(tmp_path):
    with pytest.raises(InputError, match=r"is not there; expected a folder with manifest\.json"):
        open_data(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no shards"):
        open_data(tmp_path)


def test_hashes_are_compared_when_asked_for(tmp_path):
    ids = ids_of(500)
    folder = write_ours(tmp_path / "d", {"train": [ids[:100], ids[100:]], "val": [ids]})
    seen: list[tuple[int, int]] = []
    assert verify_data(folder, progress=lambda done, of: seen.append((done, of))) == 2 * 2 * len(ids)
    assert seen[-1] == (2 * 2 * len(ids), 2 * 2 * len(ids))
    data = bytearray((folder / "train_1.bin").read_bytes())
    data[7] ^= 1
    (folder / "train_1.bin").write_bytes(data)
    assert open_data(folder, "val", verify=True)
    assert open_data(folder)
    with pytest.raises(InputError, match=r"train_1\.bin is not what was written"):
        open_data(folder, verify=True)


def test_a_shard_of_another_size_than_the_manifest_says_is_reported(tmp_path):
    folder = write_ours(tmp_path / "d", {"train": [ids_of(9)]})
    (folder / "train_0.bin").write_bytes(b"1234")
    with pytest.raises(InputError, match="4 bytes, expected 20 for 10 tokens"):
        open_data(folder)
    (folder / "train_0.bin").unlink()
    with pytest.raises(InputError, match="cannot be found"):
        open_data(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "x"}, "format 'x'"),
        ({"dtype": "int3"}, "damaged"),
        ({"splits": {"train": {}}}, "damaged"),
        ({"splits": {"train": {"shards": [{"file": "../x", "tokens": 1, "sha256": ""}]}}}, "not a plain file name"),
        ({"tokenizer": None}, "damaged"),
    ],
)
def test_a_damaged_manifest_is_reported(tmp_path, changes, words):
    folder = write_ours(tmp_path / "d", {"train": [ids_of(9)]}, **changes)
    with pytest.raises(ValueError, match=words):
        open_data(folder)


def test_a_manifest_that_is_no_json_is_reported(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        open_data(tmp_path)


def test_data_of_a_larger_vocabulary_does_not_fit_a_model(tmp_path):
    data = open_data(write_ours(tmp_path / "d", {"train": [ids_of(9)]}))
    data.check_vocabulary(50257)
    with pytest.raises(InputError, match="vocabulary of 50257 tokens, and the model has 50000"):
        data.check_vocabulary(50000)


def test_other_data_has_another_fingerprint(tmp_path):
    ids = ids_of(9, 8)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    first = open_data(tmp_path).fingerprint
    assert open_data(tmp_path).fingerprint == first
    ids[3] += 1
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    assert open_data(tmp_path).fingerprint != first


def test_data_goes_to_another_process(tmp_path):
    ids = ids_of(9, 8)
    data = open_data(write_ours(tmp_path / "d", {"train": [ids]}))
    assert data.tokens[2:5].tolist() == ids[2:5].tolist()
    assert len(pickle.dumps(data)) < 4000
    assert pickle.loads(pickle.dumps(data)).tokens[2:5].tolist() == ids[2:5].tolist()
