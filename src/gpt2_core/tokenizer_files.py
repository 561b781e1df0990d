"""Reading and writing the files of a tokenizer folder.

Read, the first that is there: ``tokenizer.json``; ``vocab.json`` with ``merges.txt``; OpenAI's ``encoder.json`` with
``vocab.bpe``. Beside them ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``, if any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_core.errors import TokenizerError
from gpt2_core.vocabulary import ENDOFTEXT, Vocabulary, build_vocabulary, check_integers

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_PAIRS_OF_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_UNSUPPORTED_FLAGS = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before it is cut into pieces; special ones can be skipped when decoding."""

    content: str
    id: int
    special: bool


@dataclass
class TokenizerParts:
    """What the files of a tokenizer say, checked: the vocabulary, the added tokens, and the settings."""

    vocabulary: Vocabulary
    added: list[AddedToken] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def read_folder(folder: Path) -> TokenizerParts:
    """The tokenizer of a folder.

    Raises: TokenizerError if no vocabulary is there, or if a file is damaged or contradicts itself or another.
    """
    config = _read_object(folder / "tokenizer_config.json") or {}
    roles = _read_object(folder / "special_tokens_map.json") or {}
    found = _read_added(folder, config)
    tokenizer_json = folder / "tokenizer.json"
    settings: dict[str, Any] = {}
    if _is_there(tokenizer_json):
        source = str(tokenizer_json)
        content = _read_object(tokenizer_json) or {}
        ids, merges, prefix_space = _check_tokenizer_json(content, source)
        settings["add_prefix_space"] = prefix_space
        _collect(found, _added_of_tokenizer_json(content, source), source)
    else:
        vocab_file, merges_file = _find_files(folder)
        source = f"{vocab_file} with {merges_file.name}"
        ids, merges = read_vocab_json(vocab_file), read_merges_txt(merges_file)
    settings |= _settings(config, roles, folder)
    return _assemble(ids, merges, found, settings, source)


def read_pair_of_files(vocab_file: Path, merges_file: Path) -> TokenizerParts:
    """The tokenizer of a vocab.json (or encoder.json) and a merges.txt (or vocab.bpe).

    Raises: TokenizerError if a file is missing, damaged or contradicts itself or the other.
    """
    source = f"{vocab_file} with {merges_file.name}"
    return _assemble(read_vocab_json(vocab_file), read_merges_txt(merges_file), {}, {}, source)


def read_vocab_json(path: Path) -> dict[str, int]:
    """The ids of a vocab.json or encoder.json, by token."""
    content = _read_object(path)
    if content is None:
        raise TokenizerError(f"{path} is not there; expected a vocabulary as JSON; check the folder")
    return content


def read_merges_txt(path: Path) -> list[tuple[str, str]]:
    """The merges of a merges.txt or vocab.bpe, with or without its ``#version`` line."""
    lines = _read_text(path).split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], first + 1):
        parts = line.removesuffix("\r").split(" ")
        if parts == [""]:
            continue
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(
                f"line {number} of {path} is {line[:80]!r}; expected two tokens with a space between; "
                f"repair the file, or take it from the model's source again"
            )
        merges.append((parts[0], parts[1]))
    return merges


def folder_files(parts: TokenizerParts) -> Iterator[tuple[str, bytes]]:
    """The name and content of each file of a tokenizer folder."""
    vocabulary, added = parts.vocabulary, parts.added
    yield "vocab.json", vocabulary.to_vocab_json()
    yield "merges.txt", vocabulary.to_merges_txt()
    new = {token.content: token.id for token in added if token.id >= len(vocabulary)}
    if new:
        yield "added_tokens.json", _to_json(new)
    yield "tokenizer.json", json.dumps(_tokenizer_json(parts), ensure_ascii=False).encode("utf-8")
    described = {str(token.id): {"content": token.content, **_FLAGS, "special": token.special} for token in added}
    settings = {**parts.settings, "added_tokens_decoder": described, "tokenizer_class": "GPT2Tokenizer"}
    yield "tokenizer_config.json", _to_json(settings)
    in_roles = [parts.settings[role] for role in ROLES]
    extra = [token.content for token in added if token.special and token.content not in in_roles]
    roles: dict[str, Any] = {role: parts.settings[role] for role in ROLES if parts.settings[role] is not None}
    yield "special_tokens_map.json", _to_json(roles | ({"additional_special_tokens": extra} if extra else {}))


_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _tokenizer_json(parts: TokenizerParts) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": parts.settings["add_prefix_space"], "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token.id, "content": token.content, **_FLAGS, "special": token.special}
            for token in sorted(parts.added, key=lambda token: token.id)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"trim_offsets": True},
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level | {"trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": parts.vocabulary.token_ids,
            "merges": parts.vocabulary.merges(),
        },
    }


def _to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _assemble(
    ids: dict[str, int],
    merges: Sequence[Sequence[str]],
    found: dict[str, AddedToken],
    settings: dict[str, Any],
    source: str,
) -> TokenizerParts:
    """Join tokens of all files: those that the vocabulary lacks follow after it, or fill its holes."""
    check_integers(ids, source)
    for content, token in found.items():
        if ids.get(content, token.id) != token.id:
            raise TokenizerError(
                f"{content!r} has the id {token.id} as an added token, and {ids[content]} in {source}; "
                f"expected one id; repair the files, or take them from the model's source again"
            )
    beyond = {content: token.id for content, token in found.items() if content not in ids}
    if beyond and (max(ids.values(), default=-1) >= len(ids)):  # they stand among the others
        ids, beyond = ids | beyond, {}
    vocabulary = build_vocabulary(ids, merges, source=source)
    _check_beyond(beyond, len(vocabulary), source)
    if ENDOFTEXT in ids and ENDOFTEXT not in found and not vocabulary.is_piece[ids[ENDOFTEXT]]:
        found[ENDOFTEXT] = AddedToken(ENDOFTEXT, ids[ENDOFTEXT], special=True)
    known = set(ids) | set(found)
    for role in ROLES:
        named = settings.get(role)
        if named is not None and named not in known:
            raise TokenizerError(
                f"{role} is {named!r}, which is not a token of {source}; expected one of its tokens; "
                f"correct tokenizer_config.json or special_tokens_map.json"
            )
        if role not in settings:
            settings[role] = ENDOFTEXT if role != "pad_token" and ENDOFTEXT in known else None
    return TokenizerParts(vocabulary, sorted(found.values(), key=lambda token: token.id), settings)


def _check_beyond(beyond: Mapping[str, int], size: int, source: str) -> None:
    wanted = list(range(size, size + len(beyond)))
    if sorted(beyond.values()) != wanted:
        raise TokenizerError(
            f"the added tokens have the ids {sorted(beyond.values())[:10]} but {source} has {size} tokens; "
            f"expected the added ids to go on from {size}, each once; repair the files"
        )


def _find_files(folder: Path) -> tuple[Path, Path]:
    for vocab_name, merges_name in _PAIRS_OF_FILES:
        pair = folder / vocab_name, folder / merges_name
        here = [_is_there(path) for path in pair]
        if all(here):
            return pair
        if any(here):
            there, missing = (vocab_name, merges_name) if here[0] else (merges_name, vocab_name)
            raise TokenizerError(
                f"{folder} has {there} but not {missing}; expected both; copy {missing} of the same model there"
            )
    raise TokenizerError(
        f"{folder} holds no tokenizer; expected tokenizer.json, or vocab.json with merges.txt, or encoder.json "
        f'with vocab.bpe; check the path, or use "gpt2" for GPT-2\'s own vocabulary'
    )


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as cause:
        raise TokenizerError(
            f"{path.parent} cannot be looked into: {cause.strerror}; check its permissions, or copy it elsewhere"
        ) from cause
    return True


def _read_text(path: Path) -> str:
    from gpt2_core.files import read_small_file  # here, because it takes time to import

    try:
        return read_small_file(path, TokenizerError).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise TokenizerError(
            f"{path} is not UTF-8 (byte 0x{cause.object[cause.start]:02x} at {cause.start}); expected UTF-8 text; "
            f"take the file from the model's source again"
        ) from cause
    except FileNotFoundError as cause:
        raise TokenizerError(f"{path} cannot be read: {cause.strerror}; check the path") from cause


def _read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no such file; a key that stands twice is an error."""
    if not _is_there(path):
        return None

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise TokenizerError(f"{path} has {twice!r} twice; expected each once; repair the file")
        return content

    text = _read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=no_repeats)
    except (json.JSONDecodeError, RecursionError) as cause:
        raise TokenizerError(
            f"{path} is not JSON ({cause}); expected a JSON object; take the file from the model's source again"
        ) from cause
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a JSON {type(content).__name__}; expected an object; check the file")
    return content


def _check_tokenizer_json(content: dict[str, Any], source: str) -> tuple[dict[str, int], list[tuple[str, str]], bool]:
    """The ids, the merges and add_prefix_space of a tokenizer.json, if it does what GPT-2's does."""

    def expect(what: str, got: object, *wanted: object) -> None:
        if got not in wanted:
            raise TokenizerError(
                f"{source} has {what} {json.dumps(got)[:200]}; expected {' or '.join(map(repr, wanted))}, as in "
                f"GPT-2's; this tokenizer reads byte-level BPE only: open the file with the tokenizers library"
            )

    model, before, after = (_section(content, key, source) for key in ("model", "pre_tokenizer", "post_processor"))
    expect("model.type", model.get("type", "BPE"), "BPE")
    for key, wanted in (
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("byte_fallback", (None, False)),
        ("ignore_merges", (None, False)),
    ):
        expect(f"model.{key}", model.get(key), *wanted)
    expect("normalizer", content.get("normalizer"), None)
    expect("pre_tokenizer.type", before.get("type"), "ByteLevel")
    expect("pre_tokenizer.use_regex", before.get("use_regex", True), True)
    expect("post_processor.type", after.get("type"), "ByteLevel", None)
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(f"{source} has no model.vocab and model.merges; expected both; check the file")
    merges = [_merge_of_json(merge, source) for merge in model["merges"]]
    return ids, merges, bool(before.get("add_prefix_space", False))


def _section(content: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    section = content.get(key) or {}
    if not isinstance(section, dict):
        raise TokenizerError(f"{source} has a {type(section).__name__} as {key}; expected an object; check the file")
    return section


def _merge_of_json(merge: object, source: str) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts):
        return parts[0], parts[1]
    raise TokenizerError(f"{source} has the merge {json.dumps(merge)[:80]}; expected two tokens; repair the file")


def _added_of_tokenizer_json(content: dict[str, Any], source: str) -> list[AddedToken]:
    entries = content.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TokenizerError(f"{source} has added_tokens that are no list of objects; repair the file")
    return [_added_token(entry, entry.get("id"), source) for entry in entries]


def _added_token(entry: Mapping[str, Any], index: object, source: str) -> AddedToken:
    content = entry.get("content")
    if not isinstance(content, str) or not content or not isinstance(index, int) or isinstance(index, bool):
        raise TokenizerError(
            f"{source} has the added token {dict(entry)!r} with the id {index!r}; expected a text and an integer; "
            f"repair the file"
        )
    flags = [flag for flag in _UNSUPPORTED_FLAGS if entry.get(flag)]
    if flags:
        raise TokenizerError(
            f"{source} wants {', '.join(flags)} for the added token {content!r}; GPT-2's tokenizer has no such "
            f"rule; set it to false, or use the tokenizers library"
        )
    return AddedToken(content, index, bool(entry.get("special", False)))


def _read_added(folder: Path, config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The added tokens that stand outside tokenizer.json."""
    found: dict[str, AddedToken] = {}
    source = str(folder / "tokenizer_config.json")
    described = config.get("added_tokens_decoder") or {}
    if not isinstance(described, dict) or not all(
        key.isdecimal() and isinstance(entry, dict) for key, entry in described.items()
    ):
        raise TokenizerError(f"{source} has an added_tokens_decoder that is no table of tokens by id; repair the file")
    _collect(found, [_added_token(entry, int(key), source) for key, entry in described.items()], source)
    path = folder / "added_tokens.json"
    for content, index in (_read_object(path) or {}).items():
        if content not in found or found[content].id != index:
            _collect(found, [_added_token({"content": content, "special": False}, index, str(path))], str(path))
    return found


def _collect(found: dict[str, AddedToken], tokens: Sequence[AddedToken], source: str) -> None:
    by_id = {token.id: token.content for token in found.values()}
    for token in tokens:
        known = found.get(token.content)
        if (known and known.id != token.id) or by_id.get(token.id, token.content) != token.content:
            raise TokenizerError(
                f"{source} gives the added token {token.content!r} the id {token.id}; another place gives "
                f"{'it ' + str(known.id) if known else repr(by_id[token.id]) + ' that id'}; expected one id for each "
                f"token; repair the files"
            )
        by_id[token.id] = token.content
        found[token.content] = token


def _settings(config: Mapping[str, Any], roles: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings that the two small files hold; tokenizer_config.json has the last word."""
    settings: dict[str, Any] = {}
    for name, content in (("special_tokens_map.json", roles), ("tokenizer_config.json", config)):
        for role in ROLES:
            if role in content:
                settings[role] = _role(content[role], role, folder / name)
    if config.get("add_bos_token"):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'} wants add_bos_token, which GPT-2's tokenizer does not do; set it "
            f"to false, and put tokenizer.bos_token before the text yourself"
        )
    for key, kind in (
        ("add_prefix_space", bool),
        ("errors", str),
        ("padding_side", str),
        ("truncation_side", str),
    ):
        if key in config:
            if not isinstance(config[key], kind):
                raise TokenizerError(
                    f"{folder / 'tokenizer_config.json'} has {key} {config[key]!r}; expected a {kind.__name__}; "
                    f"correct the file"
                )
            settings[key] = config[key]
    length = config.get("model_max_length")
    if length is not None:
        if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 1:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'} has model_max_length {length!r}; expected a number of tokens"
            )
        settings["model_max_length"] = int(min(length, 10**30))
    return settings


def _role(value: object, role: str, path: Path) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if content is None or isinstance(content, str):
        return content
    raise TokenizerError(f"{path} has {role} {value!r}; expected a token's text; correct the file")
