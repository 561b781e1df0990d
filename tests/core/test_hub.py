"""gpt2_core.hub: names to folders, against a hub in this process; what goes wrong, and that it is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import COMMIT, Hub, serve

from gpt2_core import hub
from gpt2_core.checkpoints import open_checkpoint, save_checkpoint
from gpt2_core.errors import CheckpointError, Gpt2Error, HubError
from gpt2_core.hub import EMBEDDED, REPOSITORIES, resolve

# With its constants, which hold what the environment said when they were imported: tests change it.
pytest.importorskip("huggingface_hub.constants")

CONFIG = json.dumps({"model_type": "gpt2", "n_layer": 1}).encode()
TOKENIZER = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n", "tokenizer_config.json": b"{}"}
NUMBERS = {"wte.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "ln_f.bias": np.ones(4, np.float32)}


def files_of(folder: Path, format: str, most: int | None = None) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in save_checkpoint(folder, NUMBERS, format=format, max_shard_bytes=most)
    }


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    single, sharded = files_of(tmp_path / "1", "safetensors"), files_of(tmp_path / "2", "safetensors", 20)
    pickled, pieces = files_of(tmp_path / "3", "bin"), files_of(tmp_path / "4", "bin", 20)
    keras, parts = files_of(tmp_path / "5", "h5"), files_of(tmp_path / "6", "h5", 20)
    both = {"config.json": CONFIG, **TOKENIZER, **single, **pickled, "tf_model.h5": b"x", "README.md": b"x"}
    repositories = {
        "openai-community/gpt2": both,
        "a/sharded": {"config.json": CONFIG, **sharded},
        "a/bin": {"config.json": CONFIG, **pickled},
        "a/bins": {"config.json": CONFIG, **pieces},
        "a/h5": {"config.json": CONFIG, **keras},
        "a/h5s": {"config.json": CONFIG, **parts},
        "a/llama": {"config.json": b'{"model_type": "llama"}', **single},
        "a/bare": {"config.json": CONFIG, "tokenizer.json": b"{}"},
        "a/data": {"README.md": b"x"},
        "a/secret": {"config.json": CONFIG},
    }
    with serve(Hub(files=repositories, gated={"a/secret"})) as running:
        yield running


def get(served: Hub, tmp_path: Path, name: str, **settings: Any) -> Path:
    return resolve(name, cache_dir=tmp_path / "cache", endpoint=served.url, **settings)


# Downloads -----------------------------------------------------------------------------------------------------------


def test_a_model_is_downloaded_with_its_config_and_nothing_else(served: Hub, tmp_path: Path) -> None:
    folder = get(served, tmp_path, "gpt2")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with open_checkpoint(folder) as opened:
        assert all(np.array_equal(opened.array(name), NUMBERS[name]) for name in opened)
    assert not served.asked("pytorch_model.bin") and not served.asked("vocab.json")


@pytest.mark.parametrize("name", ["a/sharded", "a/bin", "a/bins", "a/h5", "a/h5s"])
def test_weights_of_every_layout_are_found_and_open(served: Hub, tmp_path: Path, name: str) -> None:
    """The shards of a snapshot are links to blobs outside of its folder: those are allowed."""
    folder = get(served, tmp_path, name)
    assert {path.name for path in folder.iterdir()} == set(served.files[name])
    with open_checkpoint(folder) as opened:
        assert all(np.array_equal(opened.array(key), NUMBERS[key]) for key in NUMBERS)


def test_a_config_alone_and_a_tokenizer_alone_bring_only_their_files(served: Hub, tmp_path: Path) -> None:
    folder = get(served, tmp_path, "gpt2", kind="config")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert get(served, tmp_path, "gpt2", kind="tokenizer") == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", *TOKENIZER])
    assert sorted(path.name for path in get(served, tmp_path, "a/bare", kind="tokenizer").iterdir()) == [
        "tokenizer.json"
    ]


def test_all_files_of_one_call_are_of_one_commit(served: Hub, tmp_path: Path) -> None:
    get(served, tmp_path, "gpt2")
    assert served.asked("HEAD", "/resolve/main/config.json")
    assert served.asked("HEAD", f"/resolve/{COMMIT}/model.safetensors")
    assert not served.asked("/resolve/main/model.safetensors")


def test_the_second_call_costs_one_request_and_none_for_a_commit(served: Hub, tmp_path: Path) -> None:
    folder = get(served, tmp_path, "gpt2")
    served.requests.clear()
    assert get(served, tmp_path, "gpt2") == folder
    assert served.requests == ["HEAD /openai-community/gpt2/resolve/main/config.json"]
    served.requests.clear()
    assert get(served, tmp_path, "gpt2", revision=COMMIT) == folder
    assert served.requests == []


def test_a_revision_is_its_own_folder(served: Hub, tmp_path: Path) -> None:
    served.revisions["v1"] = "f" * 40
    assert get(served, tmp_path, "gpt2", kind="config", revision="v1").name == "f" * 40
    assert get(served, tmp_path, "gpt2", kind="config").name == COMMIT


def test_an_interrupted_transfer_is_resumed(served: Hub, tmp_path: Path) -> None:
    """The client keeps whole pieces of 10 MB: the rest is asked for from there."""
    big = {"wte.weight": np.arange(3 << 20, dtype=np.float32)}
    (path,) = save_checkpoint(tmp_path / "big", big)
    served.files["a/big"] = {"config.json": CONFIG, path.name: path.read_bytes()}
    served.cut_after = 11 << 20
    with open_checkpoint(get(served, tmp_path, "a/big")) as opened:
        assert np.array_equal(opened.array("wte.weight"), big["wte.weight"])
    assert len(served.asked("GET", "/cdn/")) == 2 and served.asked("GET", "/cdn/", f"bytes={10 << 20}-")


def test_a_transfer_that_ends_early_is_an_error_and_leaves_nothing(served: Hub, tmp_path: Path) -> None:
    served.stop_short = True
    with pytest.raises(HubError, match=r"model.safetensors of openai-community/gpt2 .* ended early.*try again"):
        get(served, tmp_path, "gpt2")
    served.stop_short = False
    assert open_checkpoint(get(served, tmp_path, "gpt2")).names()


def test_a_transfer_that_was_changed_is_an_error_and_leaves_nothing(served: Hub, tmp_path: Path) -> None:
    served.flip = True
    with pytest.raises(HubError, match=r"model.safetensors .* damaged on its way: its SHA-256"):
        get(served, tmp_path, "gpt2")
    served.flip = False
    assert open_checkpoint(get(served, tmp_path, "gpt2")).names()


# Without a network ---------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_served_when_the_hub_is_gone(served: Hub, tmp_path: Path) -> None:
    folders = {kind: get(served, tmp_path, "gpt2", kind=kind) for kind in hub.KINDS}
    gone = Hub(url="http://127.0.0.1:9")
    for kind, folder in folders.items():
        assert get(gone, tmp_path, "gpt2", kind=kind) == folder
        assert get(gone, tmp_path, "gpt2", kind=kind, local_files_only=True) == folder


def test_offline_asks_nobody(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = get(served, tmp_path, "a/sharded")
    served.requests.clear()
    assert get(served, tmp_path, "a/sharded", local_files_only=True) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(served, tmp_path, "a/sharded") == folder
    with pytest.raises(HubError, match="network is not to be used"):
        get(served, tmp_path, "gpt2")
    assert served.requests == []


def test_offline_names_what_the_cache_lacks(served: Hub, tmp_path: Path) -> None:
    get(served, tmp_path, "gpt2", kind="config")
    with pytest.raises(HubError, match=r"none of model.safetensors.* in the cache, and the network is not to be used"):
        get(served, tmp_path, "gpt2", local_files_only=True)
    with pytest.raises(HubError, match=r"neither vocab.json .* in the cache"):
        get(served, tmp_path, "gpt2", kind="tokenizer", local_files_only=True)
    folder = get(served, tmp_path, "a/sharded")
    shard = next(path for path in folder.iterdir() if "00002" in path.name)
    shard.unlink()
    with pytest.raises(HubError, match=f"has no {shard.name} in the cache"):
        get(served, tmp_path, "a/sharded", local_files_only=True)


def test_without_a_network_the_error_comes_at_once_and_says_what_to_do(
    tmp_path: Path, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: the client, which would try again for half a minute, is not asked."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(HubError) as error:
        get(Hub(url="http://127.0.0.1:9"), tmp_path, "distilgpt2")
    for word in (
        "distilbert/distilgpt2",
        "127.0.0.1:9 cannot be reached",
        "give their folder",
        EMBEDDED,
        "HF_ENDPOINT",
    ):
        assert word in str(error.value)
    assert isinstance(error.value, OSError) and isinstance(error.value, Gpt2Error)


@pytest.mark.parametrize(
    ("typed", "meant"), [("gtp2", "gpt2"), ("gpt2-tale", EMBEDDED), ("distilbert/distilgpt", "distilbert/distilgpt2")]
)
@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_too_a_misspelt_name_gets_a_hint(
    served: Hub, tmp_path: Path, typed: str, meant: str, offline: bool
) -> None:
    with pytest.raises(HubError, match=rf"did you mean '{meant}'\?$"):
        get(Hub(url="http://127.0.0.1:9"), tmp_path, typed, local_files_only=offline)
    with pytest.raises(HubError) as error:
        get(Hub(url="http://127.0.0.1:9"), tmp_path, "gpt2", local_files_only=offline)
    assert "did you mean" not in str(error.value)


# What the hub says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt3", {}, r"no model 'gpt3' .*did you mean 'gpt2'\?$"),
        ("gpt2-tale", {}, r"no model 'gpt2-tale' .*did you mean 'gpt2-tales'\?$"),
        ("nobody/nothing", {}, r"no model 'nobody/nothing' .* or it is private"),
        ("gpt2", {"revision": "v9"}, r"has no revision 'v9'"),
        ("a/secret", {}, r"access to a/secret is restricted; ask for it at .*a/secret, then log in"),
        ("a/data", {}, r"a/data has no config.json"),
        ("a/llama", {}, r"a model of type 'llama'; expected 'gpt2'"),
        ("a/llama", {"kind": "config"}, r"a model of type 'llama'; expected 'gpt2'"),
        ("a/bare", {}, r"has none of model.safetensors, .*pytorch_model.bin.index.json"),
        ("a/sharded", {"kind": "tokenizer"}, r"neither vocab.json with merges.txt nor tokenizer.json"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words(
    served: Hub, tmp_path: Path, name: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(HubError, match=message):
        get(served, tmp_path, name, **settings)


def test_another_architecture_is_refused_before_its_weights_are_fetched(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError):
        get(served, tmp_path, "a/llama")
    assert not served.asked("safetensors")


def test_an_index_that_points_outside_its_folder_fetches_nothing(served: Hub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../../../etc/passwd"}}
    served.files["a/evil"] = {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode()}
    with pytest.raises(HubError, match=r"index of shards in a/evil .* not a plain file name"):
        get(served, tmp_path, "a/evil")
    assert not served.asked("passwd")


def test_an_index_that_lists_what_is_not_there_names_it(served: Hub, tmp_path: Path) -> None:
    del served.files["a/sharded"]["model-00002-of-00002.safetensors"]
    with pytest.raises(
        HubError, match=r"has no model-00002-of-00002.safetensors; model.safetensors.index.json lists it"
    ):
        get(served, tmp_path, "a/sharded")


# Names and folders ---------------------------------------------------------------------------------------------------


def test_a_folder_is_given_back_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert resolve("gpt2") == Path("gpt2")


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_a_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(HubError, match="of type 'llama'"):
        resolve(tmp_path)
    assert resolve(tmp_path, kind="tokenizer") == tmp_path
    for text in ("{}", "[]", "{", '{"model_type": "gpt2"}'):  # what else is wrong is for GPT2Config to say
        (tmp_path / "config.json").write_text(text)
        assert resolve(tmp_path) == tmp_path


def test_a_file_is_not_a_folder_and_its_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match=r"is a file.*give its folder.*open_checkpoint"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["./model", "/no/where", "~/no-such-folder", "runs/3/model", "model/", ".", "C:\\model"]
)
def test_what_looks_like_a_folder_is_never_looked_up(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == ".":
        assert resolve(name) == Path()
        return
    with pytest.raises(HubError, match="looks like a folder, but there is none"):
        resolve(name, endpoint="http://127.0.0.1:9")
    with pytest.raises(HubError, match="looks like a folder"):
        resolve(Path("model"), endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "name",
    ["a b", "", "-x", "a/-b", "a--b", "a..b", "x.git", "x.", "ü", "a:b", "a?b", "a%2e", "a\nb", "x" * 97, "a@main"],
)
def test_a_name_that_the_hub_would_not_take_is_refused_here(name: str) -> None:
    with pytest.raises(HubError, match=r"not a model's name|looks like a folder"):
        resolve(name, endpoint="http://127.0.0.1:9")


def test_names_that_no_file_system_takes_are_refused() -> None:
    for name in ("a\0b", "x" * 100_000, "~nobody-of-this-name/x"):
        with pytest.raises(HubError):
            resolve(name, endpoint="http://127.0.0.1:9")


def test_what_may_not_be_looked_at_is_not_taken_for_missing(tmp_path: Path, unreadable: Callable[[Path], None]) -> None:
    (tmp_path / "m" / "inner").mkdir(parents=True)
    unreadable(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m cannot be looked into: Permission denied"):
        resolve(tmp_path / "m")
    for name in ("inner", "missing"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be looked at: Permission denied"):
            resolve(tmp_path / "m" / name)


def test_a_config_that_may_not_be_read_is_for_the_config_to_report(
    tmp_path: Path, unreadable: Callable[[Path], None]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    unreadable(tmp_path / "config.json")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("name", [None, 7, b"gpt2", ["gpt2"]])
def test_what_is_no_text_is_no_name(name: Any) -> None:
    with pytest.raises(HubError, match=r"is not a model's name; expected one such as 'gpt2'"):
        resolve(name)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(HubError, match="did you mean 'model'"):
        resolve("gpt2", kind="models")


def test_the_short_names_are_those_of_the_configs() -> None:
    from gpt2_core.config import PRESETS

    assert {*REPOSITORIES, *REPOSITORIES.values(), EMBEDDED} == set(PRESETS)


def test_the_embedded_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(HubError, match="install the package again"):
        resolve(EMBEDDED)
    (tmp_path / "assets" / EMBEDDED).mkdir(parents=True)
    assert resolve(EMBEDDED) == tmp_path / "assets" / EMBEDDED


def test_a_save_that_was_interrupted_is_finished_before_the_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "config.json").write_text(CONFIG.decode())
    (tmp_path / ".saving.json").write_text('{"place": ["config.json"], "remove": []}')
    assert sorted(path.name for path in resolve(tmp_path).iterdir()) == ["config.json"]


# The environment -----------------------------------------------------------------------------------------------------


def run(script: str, **environment: str) -> str:
    settings = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    return subprocess.run(
        [sys.executable, "-c", script], env=settings | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_environment_of_huggingface_hub_is_honoured(served: Hub, tmp_path: Path) -> None:
    script = "from gpt2_core.hub import resolve; print(resolve('gpt2'))"
    folder = run(script, HF_ENDPOINT=served.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    assert Path(folder).is_relative_to(tmp_path / "home" / "hub")
    served.requests.clear()
    assert run(script, HF_ENDPOINT=served.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1") == folder
    assert served.requests == []


def test_importing_and_folders_need_no_hub_library(tmp_path: Path) -> None:
    script = f"import sys; from gpt2_core.hub import resolve; resolve({str(tmp_path)!r}); "
    assert run(script + "print('huggingface_hub' in sys.modules)") == "False"


def test_a_download_says_nothing_where_nobody_looks(
    served: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    get(served, tmp_path, "gpt2")
    assert capfd.readouterr() == ("", "")


def test_a_download_shows_its_progress_on_a_terminal(
    served: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    get(served, tmp_path, "gpt2")
    assert "%" in capfd.readouterr().err
