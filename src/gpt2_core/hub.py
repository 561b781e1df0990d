"""From a model's name to a folder of local files, over huggingface_hub.

`resolve` takes a folder, a name of the hub, one of the short names, or ``gpt2-tales``, the model that ships with the
package. What it downloads goes to huggingface_hub's cache and is shared with every other program that uses it;
``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and proxies mean what they mean there. Its progress bar
is shown where stderr is a terminal, and nothing otherwise.

huggingface_hub checks the size of what it downloads; the SHA-256 of large files, which the hub gives as their ETag,
is checked here, once, after the download. Source of the protocol: huggingface_hub/file_download.py, 0.24 to 2.4.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_core.errors import CheckpointError, HubError, nearest
from gpt2_core.files import existing, finish_interrupted_save

EMBEDDED = "gpt2-tales"

#: Short names, and the repositories that hold them.
REPOSITORIES: Mapping[str, str] = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}

#: Weights, the preferred first; an index leads to its shards.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "tf_model.h5.index.json",
)
_VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
KINDS = ("model", "config", "tokenizer")

# The rules of huggingface_hub.utils.validate_repo_id.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")
_LONGEST_NAME = 96
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONFIG_LIMIT = 1 << 22
# A transfer that broke off, by the exceptions of requests, httpx and httpx2: which of them is there differs by version.
_BROKEN = {"ChunkedEncodingError", "ConnectionError", "ReadTimeout", "ReadError", "RemoteProtocolError"}
_ATTEMPTS = 3
_CONNECT_TIMEOUT = 10.0  # seconds, huggingface_hub's own for a first answer


def resolve(
    name_or_folder: str | os.PathLike[str],
    *,
    kind: str = "model",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The local folder that holds the files of a model: `kind` says which are needed and so downloaded.

    "model" is config.json and the weights (the first of `WEIGHTS` that is there, single or sharded), "config" is
    config.json, "tokenizer" the vocabulary and what stands beside it. A folder that exists is given back as it is,
    whatever it holds, and comes before a name of the hub; `revision` is for the hub alone. `endpoint` defaults to
    HF_ENDPOINT. Every file of one call is of one commit.

    Raises: HubError saying what is wrong and what to do: no such folder, name, revision or file, no access,
    no network, a damaged download, a model that is no GPT-2. CheckpointError for a folder that may not be looked into.
    """
    if kind not in KINDS:
        raise HubError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
    folder = _local(name_or_folder)
    if folder is None:
        offline = local_files_only or _is_true(os.environ.get("HF_HUB_OFFLINE"))
        name = _repository(os.fspath(name_or_folder))
        where = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        folder = _Repository(name, revision, cache_dir, offline, where).fetch(kind)
    if kind == "model":
        _check_is_gpt2(folder, os.fspath(name_or_folder))
    return folder


def embedded_model() -> Path:
    """The folder of `gpt2-tales`, the model that ships with the package. Raises: HubError if it is not there."""
    folder = Path(__file__).parent / "assets" / EMBEDDED
    if not folder.is_dir():
        raise HubError(f"{EMBEDDED} should be at {folder} and is not; install the package again")
    return folder


def _local(name_or_folder: str | os.PathLike[str]) -> Path | None:
    """The folder meant, if it is one on this machine; None if it can only be a name of the hub."""
    if not isinstance(name_or_folder, (str, os.PathLike)) or not os.fspath(name_or_folder):
        raise HubError(
            f"{name_or_folder!r} is not a model's name; expected one such as 'gpt2' or 'owner/name', or an existing "
            f"folder"
        )
    text = os.fspath(name_or_folder)
    path = existing(name_or_folder)
    if path is not None and path.is_dir():
        finish_interrupted_save(path)
        return path
    if path is not None:
        raise HubError(
            f"{path} is a file; expected a folder or a model's name: give its folder, {path.parent}, or open the "
            f"file alone with gpt2_core.checkpoints.open_checkpoint"
        )
    if text == EMBEDDED:
        return embedded_model()
    _check_absent(text)
    path_like = not isinstance(name_or_folder, str) or text.startswith((".", "/", "~")) or text.endswith("/")
    if path_like or "\\" in text or text.count("/") > 1:
        raise HubError(
            f"{text[:200]!r} looks like a folder, but there is none; expected an existing folder with config.json and "
            f"weights, or a model's name such as 'gpt2' or 'owner/name'; the current folder is {Path.cwd()}"
        )
    return None


def _check_absent(text: str) -> None:
    """Raise where `text` was not found for another reason than not being there: it may be, or can never be."""
    try:
        Path(text).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as cause:
        raise CheckpointError(
            f"{text} cannot be looked at: {cause.strerror}; check the permissions of the folders it stands in"
        ) from cause
    except (OSError, ValueError, RuntimeError) as cause:  # a NUL byte, a name too long, no home folder
        reason = getattr(cause, "strerror", None) or cause
        raise HubError(f"{text[:200]!r} is neither a folder nor a model's name ({reason})") from cause


def _repository(name: str) -> str:
    """The repository's full name. Raises: HubError for what the hub would not take as one."""
    name = REPOSITORIES.get(name, name)
    wrong = not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME or "--" in name or ".." in name
    if wrong or name.endswith((".git", "-", ".")):
        raise HubError(
            f"{name[:200]!r} is not a model's name; expected letters, digits, '-', '_' and '.', with at most one "
            f"'/', such as 'gpt2' or 'owner/name', or an existing folder"
        )
    return name


@dataclass(frozen=True)
class _Repository:
    """One repository at one revision, and how to reach it."""

    name: str
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    offline: bool
    endpoint: str

    def fetch(self, kind: str) -> Path:
        """Have the files of `kind` in the cache, and give their folder."""
        if kind == "tokenizer":
            return self._fetch_tokenizer()
        config = self.need("config.json", why="every model of the hub has one, so this is not a model's repository")
        _check_is_gpt2(config.parent, self.name)
        if kind == "model":
            self._at(config)._fetch_weights()
        return config.parent

    def _fetch_weights(self) -> None:
        found = next(((name, file) for name in WEIGHTS if (file := self.get(name)) is not None), None)
        if found is None:
            raise HubError(
                f"{self} has none of {', '.join(WEIGHTS)}{self._offline_hint()}; give a repository with one of them, "
                f"or convert its weights and give the folder"
            )
        name, file = found
        if name.endswith(".index.json"):
            from gpt2_core.checkpoints.sharding import shard_names

            try:
                shards = list(shard_names(file))
            except CheckpointError as cause:
                raise HubError(f"the index of shards in {self} cannot be used: {cause}") from cause
            for shard in shards:
                self.need(shard, why=f"{name} lists it")

    def _fetch_tokenizer(self) -> Path:
        for names in _VOCABULARIES:
            first = self.get(names[0])
            if first is not None:
                break
        else:
            raise HubError(
                f"{self} has neither vocab.json with merges.txt nor tokenizer.json{self._offline_hint()}; "
                f'use "gpt2" for GPT-2\'s own vocabulary, which needs no file'
            )
        pinned = self._at(first)
        for name in names[1:]:
            pinned.need(name, why=f"it belongs to {names[0]}")
        for name in _TOKENIZER_EXTRAS:
            pinned.get(name)
        return first.parent

    def _at(self, file: Path) -> _Repository:
        """This repository at the commit of a file just fetched, so that all files are of one commit."""
        return _Repository(self.name, file.parent.name, self.cache_dir, self.offline, self.endpoint)

    def need(self, name: str, *, why: str) -> Path:
        """The local path of a file. Raises: HubError if the repository has none."""
        file = self.get(name)
        if file is None:
            raise HubError(f"{self} has no {name}{self._offline_hint()}; {why}")
        return file

    def get(self, name: str) -> Path | None:
        """The local path of a file, downloaded if need be; None if the repository has none."""
        from huggingface_hub import utils

        known = self._cached(name)
        if known is not None and (self.offline or self._is_commit()):
            return Path(known) if isinstance(known, str) else None
        if known is None and not self.offline:
            self._check_reachable()
        try:
            path = self._download(name)
        except utils.LocalEntryNotFoundError as cause:
            if self.offline and self._has_any():
                return None
            raise self._unreachable(cause) from cause
        except utils.EntryNotFoundError:
            return None
        # Whatever else goes wrong is told in our words: the HTTP client, and so its exceptions, differ by version.
        except Exception as cause:
            raise self._failed(name, cause) from cause
        if known is None:
            self._verify(name, path)
        return path

    def _download(self, name: str) -> Path:
        """huggingface_hub's download, tried again where it broke off: newer versions do so themselves."""
        import huggingface_hub

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                path = huggingface_hub.hf_hub_download(
                    self.name,
                    name,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    endpoint=self.endpoint,
                    local_files_only=self.offline,
                    library_name="gpt2-duet",
                )
            except Exception as cause:
                if type(cause).__name__ not in _BROKEN or attempt == _ATTEMPTS:
                    raise
            else:
                break
        return Path(path)

    def _is_commit(self) -> bool:
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None

    def _cached(self, name: str) -> Any:
        """A path if the file is in the cache, some other object if it is known not to exist, else None."""
        import huggingface_hub

        return huggingface_hub.try_to_load_from_cache(
            self.name, name, cache_dir=self.cache_dir, revision=self.revision or "main"
        )

    def _has_any(self) -> bool:
        """Whether the cache holds anything of this repository at this revision."""
        return any(
            isinstance(self._cached(name), str) for name in ("config.json", *WEIGHTS, "vocab.json", "merges.txt")
        )

    def _check_reachable(self) -> None:
        """Fail at once without a network: huggingface_hub would try again for half a minute."""
        url = urllib.parse.urlsplit(self.endpoint)
        if urllib.request.getproxies().get(url.scheme) or not url.hostname:
            return
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname, port), timeout=_CONNECT_TIMEOUT).close()
        except (OSError, ValueError) as cause:
            raise self._unreachable(cause) from cause

    def _verify(self, name: str, path: Path) -> None:
        """Check a fresh download against the SHA-256 that names it in the cache; remove it if they differ."""
        if not path.is_symlink():
            return
        blob = path.parent / path.readlink()
        if not _SHA256.fullmatch(blob.name):
            return
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        if digest.hexdigest() != blob.name:
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise HubError(
                f"{name} of {self} was damaged on its way: its SHA-256 is {digest.hexdigest()}, expected {blob.name}; "
                f"it has been removed, try again"
            )

    def _unreachable(self, cause: BaseException) -> HubError:
        if self.offline:
            what = f"{self} is not in the cache, and the network is not to be used (local_files_only or HF_HUB_OFFLINE)"
        else:
            what = f"{self} is not in the cache, and {self.endpoint} cannot be reached ({_brief(cause)})"
        return HubError(
            f"{what}; without a network, download config.json and model.safetensors of {self.name} on another machine "
            f"and give their folder, or use {EMBEDDED!r}, which ships with this package; with one, check the "
            f"connection, the proxy, and HF_ENDPOINT{self._spelling_hint()}"
        )

    def _failed(self, name: str, cause: Exception) -> HubError:
        from huggingface_hub import utils

        status = getattr(getattr(cause, "response", None), "status_code", None)
        page = f"{self.endpoint}/{self.name}"
        if isinstance(cause, utils.RevisionNotFoundError):
            return HubError(
                f"{self.name} has no revision {self.revision!r}; expected a branch, tag or commit of {page}"
            )
        if isinstance(cause, utils.GatedRepoError) or status == 403:
            return HubError(
                f"access to {self} is restricted; ask for it at {page}, then log in (`hf auth login`, or set HF_TOKEN)"
            )
        if isinstance(cause, utils.RepositoryNotFoundError) or status in (401, 404):
            return HubError(
                f"there is no model {self.name!r} at {self.endpoint}, or it is private; expected 'owner/name', a short "
                f"name, or an existing folder; for a private model log in (`hf auth login`, or set HF_TOKEN)"
                f"{self._spelling_hint()}"
            )
        if isinstance(cause, OSError) and "onsistency check" in str(cause):
            return HubError(
                f"the download of {name} of {self} ended early ({_brief(cause)}); nothing was kept, try again"
            )
        return HubError(
            f"{name} of {self} could not be downloaded: {type(cause).__name__}: {_brief(cause)}; try again, "
            f"or download it by other means and give the folder"
        )

    def _spelling_hint(self) -> str:
        known = [*REPOSITORIES, *REPOSITORIES.values(), EMBEDDED]
        return "" if self.name in known else nearest(self.name, known)

    def _offline_hint(self) -> str:
        return " in the cache, and the network is not to be used" if self.offline else ""

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at {self.revision[:12]}"


def _check_is_gpt2(folder: Path, name: str) -> None:
    """Refuse a config.json that says to be of another architecture; whatever else is wrong is for GPT2Config."""
    config = folder / "config.json"
    try:
        if not config.is_file() or config.stat().st_size > _CONFIG_LIMIT:
            return
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    model_type = content.get("model_type", "gpt2") if isinstance(content, dict) else "gpt2"
    if model_type != "gpt2":
        raise HubError(f"{name} is a model of type {str(model_type)[:60]!r}; expected 'gpt2': only GPT-2 is read here")


def _is_true(text: str | None) -> bool:
    return (text or "").upper() in ("1", "ON", "YES", "TRUE")


def _brief(cause: BaseException) -> str:
    lines: Sequence[str] = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0][:200]
