"""The tokenizer in the keys of a GGUF file, in llama.cpp's kind, both ways.

    tokenizer.ggml.model             "gpt2" for any byte-level BPE; "no_vocab" where there is none
    tokenizer.ggml.pre               how text is cut before merging; "gpt-2" is GPT-2's way
    tokenizer.ggml.tokens            every token by id, in the spelling of vocab.json; added tokens as their text
    tokenizer.ggml.token_type        int32 for each: 1 an ordinary one, 3 special, 4 added, 5 unused
    tokenizer.ggml.merges            texts, two tokens with a space between
    tokenizer.ggml.{bos,eos,unknown,padding}_token_id      u32
    tokenizer.ggml.add_bos_token, .add_eos_token           false: GPT-2's tokenizer adds nothing

llama.cpp wants one token for each row of the token table; rows beyond the vocabulary become unused tokens [PAD0], as
its converter names them, and are no tokens here. A file without an eos_token_id makes llama.cpp take token 11, which in
GPT-2's vocabulary is a comma. Roles and settings that have no key stand as JSON in `OWN`, which llama.cpp ignores.

Source: llama.cpp of 2026, src/llama-vocab.cpp and conversion/base.py (get_vocab_base, _set_vocab_gpt2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt2_core.checkpoints.gguf_container import Value, text_of
from gpt2_core.checkpoints.tokenizers import parts_of
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CannotHoldError, TokenizerError
from gpt2_core.tokenizer_files import ROLES, AddedToken, TokenizerParts
from gpt2_core.vocabulary import ENDOFTEXT

PREFIX = "tokenizer.ggml."
MODEL, TOKENS, MERGES = PREFIX + "model", PREFIX + "tokens", PREFIX + "merges"
PRE, TYPES = PREFIX + "pre", PREFIX + "token_type"
OWN = "gpt2_duet.tokenizer"
#: Our roles of tokens -> the keys with their ids.
ROLE_IDS: Mapping[str, str] = {
    "bos_token": PREFIX + "bos_token_id",
    "eos_token": PREFIX + "eos_token_id",
    "unk_token": PREFIX + "unknown_token_id",
    "pad_token": PREFIX + "padding_token_id",
}
ADDS = (PREFIX + "add_bos_token", PREFIX + "add_eos_token", PREFIX + "add_sep_token")
SPACE = PREFIX + "add_space_prefix"
NO_VOCABULARY = ("no_vocab", "none")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# The names of GPT-2's way of cutting text in llama.cpp: it is that of several models.
_PRE = ("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum",
        "modern-bert", "exaone4")  # fmt: skip
# What files from before April 2024 have.
_NO_PRE = ("", "default")
_SETTINGS: Mapping[str, type] = {
    **dict.fromkeys(ROLES, str),
    "errors": str,
    "padding_side": str,
    "truncation_side": str,
    "model_max_length": int,
}

# Writing --------------------------------------------------------------------------------------------------------------


def tokenizer_values(parts: TokenizerParts, config: GPT2Config) -> dict[str, Value | list[str]]:
    """The keys of a tokenizer for a model of this configuration, which may have more rows than there are tokens.

    Raises: CannotHoldError for a tokenizer that llama.cpp could not have.
    """
    if parts.settings.get("add_prefix_space"):
        raise CannotHoldError(
            "gguf cannot say add_prefix_space=True: llama.cpp puts no space before a text; leave the tokenizer out "
            "(--no-tokenizer), or set add_prefix_space to false and write the space yourself"
        )
    tokens = list(parts.vocabulary.tokens)
    types = [_NORMAL] * len(tokens)
    for token in parts.added:
        if token.id == len(tokens):
            tokens.append(token.content)
            types.append(_NORMAL)
        types[token.id] = _CONTROL if token.special else _USER_DEFINED
    if len(tokens) > config.vocab_size:
        raise CannotHoldError(
            f"the tokenizer has {len(tokens)} tokens and the model {config.vocab_size} rows for them; gguf needs a row "
            f"for each: leave the tokenizer out (--no-tokenizer), or resize the model's token table"
        )
    _add_unused(tokens, types, config.vocab_size)
    if len(set(tokens)) < len(tokens) or not all(tokens):
        raise CannotHoldError("the tokenizer has two tokens of one spelling, or an empty one, which llama.cpp refuses")
    values: dict[str, Value | list[str]] = {
        MODEL: "gpt2",
        PRE: _PRE[0],
        TOKENS: tokens,
        TYPES: np.array(types, np.int32),
        MERGES: parts.vocabulary.merges(),
    }
    values |= _role_ids(parts, config, {token: index for index, token in enumerate(tokens)})
    own = {key: value for key, value in parts.settings.items() if key in _SETTINGS}
    return values | dict.fromkeys(ADDS[:2], False) | {OWN: json.dumps(own)}


def _add_unused(tokens: list[str], types: list[int], rows: int) -> None:
    known = set(tokens)
    for index in range(len(tokens), rows):
        name = f"[PAD{index}]"
        while name in known:
            name += "_"
        tokens.append(name)
        types.append(_UNUSED)


def _role_ids(parts: TokenizerParts, config: GPT2Config, ids: Mapping[str, int]) -> dict[str, Value | list[str]]:
    """The ids of roles: those of the model, which stops at them, else of the tokenizer."""
    eos = config.eos_token_ids
    of_model = {
        "bos_token": config.bos_token_id,
        "eos_token": eos[0] if eos else None,
        "pad_token": config.pad_token_id,
    }
    found: dict[str, Value | list[str]] = {}
    for role, key in ROLE_IDS.items():
        index = of_model.get(role)
        if index is None:
            index = ids.get(parts.settings.get(role) or "")
        if index is not None and index < len(ids):
            found[key] = index
    return found


# Reading --------------------------------------------------------------------------------------------------------------


def parts_from(values: Mapping[str, Value], source: str) -> TokenizerParts:
    """The tokenizer in a file's keys. Raises: TokenizerError for another kind, or what does not go together."""
    _check_kind(values, source)
    tokens = _texts(values, TOKENS, source)
    types = _types(values, len(tokens), source)
    while types and types[-1] == _UNUSED:
        types.pop()
    tokens = tokens[: len(types)]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise TokenizerError(f"{source} has tokens that stand there twice; expected each once; make the file again")
    added = [
        AddedToken(token, index, special=types[index] == _CONTROL)
        for index, token in enumerate(tokens)
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]
    for token in _beyond(added, tokens, types):
        del ids[token]
    settings = _settings(values, tokens, source)
    return parts_of(ids, _merges(values, source), source=source, added=added, settings=settings)


def _check_kind(values: Mapping[str, Value], source: str) -> None:
    model, pre = text_of(values, MODEL), text_of(values, PRE)
    if model != "gpt2" or pre not in (*_PRE, *_NO_PRE):
        raise TokenizerError(
            f"{source} has a tokenizer of the kind {model[:50]!r}, which cuts text in the way {pre[:50]!r}; "
            f"expected 'gpt2' and {_PRE[0]!r}; take the tokenizer of the original model"
        )
    adding = [key for key in (*ADDS, SPACE) if values.get(key, False) is not False]
    if adding:
        raise TokenizerError(
            f"{source} wants {', '.join(adding)}, which GPT-2's tokenizer does not do; set it to false with "
            f"gguf_set_metadata.py, and put the token before the text yourself"
        )


def _texts(values: Mapping[str, Value], key: str, source: str) -> list[str]:
    found = values.get(key)
    if not isinstance(found, tuple):
        raise TokenizerError(f"{source} has no {key}, or not as texts; expected the tokens of a GPT-2")
    try:
        return [text.decode("utf-8") for text in found]
    except UnicodeDecodeError as cause:
        raise TokenizerError(f"{source} has {cause.object[:40]!r} in {key}; expected text in UTF-8") from cause


def _types(values: Mapping[str, Value], count: int, source: str) -> list[int]:
    found = values.get(TYPES)
    if found is None:
        return [_NORMAL] * count
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.size != count:
        raise TokenizerError(f"{source} has a {TYPES} that is no list of {count} integers; make the file again")
    return [int(kind) for kind in found]


def _beyond(added: list[AddedToken], tokens: list[str], types: list[int]) -> list[str]:
    """The added tokens that follow the vocabulary. Its own last token, ``<|endoftext|>``, is none of them."""
    end = len(tokens)
    while end and types[end - 1] in (_CONTROL, _USER_DEFINED):
        end -= 1
    end += tokens[end : end + 1] == [ENDOFTEXT]
    return [token.content for token in added if token.id >= end]


def _merges(values: Mapping[str, Value], source: str) -> list[tuple[str, str]]:
    merges = []
    for line in _texts(values, MERGES, source):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(f"{source} has the merge {line[:80]!r}; expected two tokens with a space between")
        merges.append((left, right))
    return merges


def _settings(values: Mapping[str, Value], tokens: list[str], source: str) -> dict[str, Any]:
    """What the small files of a tokenizer say: what `tokenizer_values` kept, else the tokens with a role."""
    settings: dict[str, Any] = {}
    for role, key in ROLE_IDS.items():
        index = values.get(key)
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise TokenizerError(f"{source} has {key} {str(index)[:50]}; expected an id below {len(tokens)}")
        settings[role] = tokens[index]
    return settings | _own(values.get(OWN))


def _own(text: Value | None) -> dict[str, Any]:
    try:
        own = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        own = {}
    if not isinstance(own, dict):
        return {}
    return {key: own[key] for key, kind in _SETTINGS.items() if key in own and _is(own[key], kind, key)}


def _is(value: object, kind: type, key: str) -> bool:
    return (value is None and key in ROLES) or type(value) is kind
