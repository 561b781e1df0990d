"""GPT2Tokenizer: text to ids and back, exactly.

    tokenizer = GPT2Tokenizer()                    # GPT-2's own vocabulary, which ships with the package
    tokenizer.encode("Hello world")                # [15496, 995]
    tokenizer.decode([15496, 995])                 # "Hello world"
    tokenizer(["one", "two words"], padding=True)  # input_ids and attention_mask, once there is a pad token

The work is done elsewhere: `gpt2_core.pretokenize` cuts text into pieces, `gpt2_core.bpe` merges a piece,
`gpt2_core.text_encoder` puts both together and is quick about it, `gpt2_core.tokenizer_files` reads and writes.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from gpt2_core.batch_encoding import TENSORS, BatchEncoding, to_tensor
from gpt2_core.errors import TokenizerError, nearest
from gpt2_core.id_decoder import IdDecoder, vocabulary_decoder
from gpt2_core.text_encoder import LONG, TextEncoder, to_list
from gpt2_core.tokenizer_files import (
    ROLES,
    AddedToken,
    TokenizerParts,
    folder_files,
    read_folder,
    read_pair_of_files,
)
from gpt2_core.vocabulary import ENDOFTEXT, gpt2_vocabulary

# Names whose tokenizer is GPT-2's own vocabulary, with the number of positions of their models.
EMBEDDED_NAMES: Mapping[str, int] = {
    **dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"), 1024),
    **dict.fromkeys((f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")), 1024),
    "distilbert/distilgpt2": 1024,
    "gpt2-tales": 512,
}
SPECIAL = ("allow", "forbid", "text")
_SIDES = ("right", "left")
_BETWEEN_TEXTS = -1
_NO_LIMIT = 10**30  # how the field writes "no limit" into tokenizer_config.json


T = TypeVar("T")


class _Setting(Generic[T]):
    """An attribute whose values are checked whenever it is set."""

    def __init__(self, check: Callable[[str, Any], T]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> T:
        value: T = instance.__dict__[self._name]
        return value

    def __set__(self, instance: object, value: T) -> None:
        instance.__dict__[self._name] = self._check(self._name, value)


class GPT2Tokenizer:
    """GPT-2's byte-level BPE: every string has ids, and they decode to that string.

    vocab_file and merges_file: files to read instead of the embedded vocabulary, both or neither.
    errors: what decoding does with bytes that are not UTF-8, as in ``bytes.decode``.
    bos_token, eos_token, unk_token, pad_token: tokens of the vocabulary, or None; there is no pad token at first.
    padding_side, truncation_side: "right" or "left".
    add_prefix_space: whether texts that do not start with a space get one.
    model_max_length: where ``truncation=True`` without a max_length cuts, in tokens.

    Raises: TokenizerError for a setting or a file that cannot be used.
    """

    errors: _Setting[str] = _Setting(lambda name, value: str(_one_of(name, value, None)))
    padding_side: _Setting[str] = _Setting(lambda name, value: str(_one_of(name, value, _SIDES)))
    truncation_side: _Setting[str] = _Setting(lambda name, value: str(_one_of(name, value, _SIDES)))
    model_max_length: _Setting[int] = _Setting(lambda name, value: _length(name, value))

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        *,
        errors: str = "replace",
        bos_token: str | None = ENDOFTEXT,
        eos_token: str | None = ENDOFTEXT,
        unk_token: str | None = ENDOFTEXT,
        pad_token: str | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        add_prefix_space: bool = False,
        model_max_length: int = 1024,
    ) -> None:
        settings = {
            "errors": errors,
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
            "padding_side": padding_side,
            "truncation_side": truncation_side,
            "add_prefix_space": add_prefix_space,
            "model_max_length": model_max_length,
        }
        if (vocab_file is None) != (merges_file is None):
            raise TokenizerError(
                f"vocab_file is {vocab_file!r} and merges_file is {merges_file!r}; expected both or neither; "
                f"to read a folder use GPT2Tokenizer.from_pretrained(folder)"
            )
        if vocab_file is None or merges_file is None:
            parts = _embedded_parts()
        else:
            parts = read_pair_of_files(Path(vocab_file), Path(merges_file))
        self._setup(parts, settings)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> GPT2Tokenizer:
        """The tokenizer of a folder or of a model's name; `changes` are arguments of GPT2Tokenizer.

        The names of the released models (`EMBEDDED_NAMES`) use the embedded vocabulary and no network. Other names go
        through `gpt2_core.hub`, where revision, cache_dir and local_files_only are explained.

        Raises: TokenizerError for files that cannot be used, HubError for a name that cannot be found.
        """
        name = str(name_or_folder)
        if name in EMBEDDED_NAMES and not Path(name).is_dir():
            parts = _embedded_parts()
            parts.settings["model_max_length"] = EMBEDDED_NAMES[name]
        else:
            from gpt2_core.files import existing, finish_interrupted_save  # here, because it takes time to import

            folder = existing(name_or_folder)
            if folder is None or not folder.is_dir():
                from gpt2_core.hub import resolve

                folder = resolve(
                    name_or_folder,
                    kind="tokenizer",
                    revision=revision,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            finish_interrupted_save(folder)  # a save that was killed may still have to put its files in place
            parts = read_folder(folder)
        tokenizer = cls.__new__(cls)
        tokenizer._setup(parts, {**_DEFAULTS, **parts.settings, **_known_settings(changes)})
        return tokenizer

    def _setup(self, parts: TokenizerParts, settings: Mapping[str, Any]) -> None:
        self._vocabulary = parts.vocabulary
        self._encoder = TextEncoder(parts.vocabulary)
        self._added = {token.content: token for token in parts.added}
        self._token_bytes: list[bytes] = list(parts.vocabulary.token_bytes)
        for token in parts.added:
            if token.id == len(self._token_bytes):
                self._token_bytes.append(token.content.encode())
        self._decoders: dict[tuple[int, tuple[int, ...]], IdDecoder] = {}
        self._recognise()
        self.errors = settings["errors"]
        self.padding_side = settings["padding_side"]
        self.truncation_side = settings["truncation_side"]
        self.add_prefix_space = bool(settings["add_prefix_space"])
        self.model_max_length = settings["model_max_length"]
        self._roles: dict[str, str | None] = dict.fromkeys(ROLES)
        for role in ROLES:
            self._set_role(role, settings[role])

    def __repr__(self) -> str:
        roles = "".join(f", {role}={token!r}" for role, token in self._roles.items() if token is not None)
        return f"GPT2Tokenizer({len(self)} tokens{roles})"

    # ---- the vocabulary ------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary's files, without those added later; `len` counts all."""
        return len(self._vocabulary)

    def __len__(self) -> int:
        return len(self._token_bytes)

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, as vocabulary files write it; added tokens as they are."""
        return self._vocabulary.token_ids | {token.content: token.id for token in self._added.values()}

    @property
    def bos_token(self) -> str | None:
        """The token before a text; GPT-2 has been trained with it between texts."""
        return self._roles["bos_token"]

    @bos_token.setter
    def bos_token(self, token: str | None) -> None:
        self._set_role("bos_token", token)

    @property
    def eos_token(self) -> str | None:
        """The token after a text: generation stops there."""
        return self._roles["eos_token"]

    @eos_token.setter
    def eos_token(self, token: str | None) -> None:
        self._set_role("eos_token", token)

    @property
    def unk_token(self) -> str | None:
        """What `convert_tokens_to_ids` takes unknown tokens for; texts never need it."""
        return self._roles["unk_token"]

    @unk_token.setter
    def unk_token(self, token: str | None) -> None:
        self._set_role("unk_token", token)

    @property
    def pad_token(self) -> str | None:
        """What fills the short rows of a batch; GPT-2 has none: ``tokenizer.pad_token = tokenizer.eos_token``."""
        return self._roles["pad_token"]

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self._set_role("pad_token", token)

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._role_id("bos_token")

    @bos_token_id.setter
    def bos_token_id(self, index: int | None) -> None:
        self._set_role_id("bos_token", index)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._role_id("eos_token")

    @eos_token_id.setter
    def eos_token_id(self, index: int | None) -> None:
        self._set_role_id("eos_token", index)

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`."""
        return self._role_id("unk_token")

    @unk_token_id.setter
    def unk_token_id(self, index: int | None) -> None:
        self._set_role_id("unk_token", index)

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self._role_id("pad_token")

    @pad_token_id.setter
    def pad_token_id(self, index: int | None) -> None:
        self._set_role_id("pad_token", index)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, by id: those in a role and those added as special."""
        return self.convert_ids_to_tokens(self.all_special_ids)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that ``decode(..., skip_special_tokens=True)`` leaves out."""
        special = {token.id for token in self._added.values() if token.special}
        special.update(index for role in ROLES if (index := self._role_id(role)) is not None)
        return sorted(special)

    def _role_id(self, role: str) -> int | None:
        token = self._roles[role]
        return None if token is None else self._find(token)

    def _set_role(self, role: str, token: str | None) -> None:
        if token is not None and (not isinstance(token, str) or self._find(token) is None):
            raise TokenizerError(
                f"{role} is {token!r}, which is not in the vocabulary; expected one of its tokens or None; add it "
                f'first: tokenizer.add_special_tokens({{"{role}": {token!r}}})'
            )
        self._roles[role] = token

    def _set_role_id(self, role: str, index: int | None) -> None:
        known = isinstance(index, (int, np.integer)) and not isinstance(index, bool) and 0 <= index < len(self)
        if index is not None and not known:
            raise TokenizerError(
                f"{role}_id is {index!r}; expected None or an id from 0 to {len(self) - 1}; for a new token use "
                f'tokenizer.add_special_tokens({{"{role}": ...}})'
            )
        self._set_role(role, None if index is None else self.convert_ids_to_tokens(index))

    def _find(self, token: str) -> int | None:
        added = self._added.get(token)
        if added is not None:
            return added.id
        return self._vocabulary.token_ids.get(token)

    def add_tokens(self, tokens: str | Sequence[str], *, special_tokens: bool = False) -> int:
        """Add tokens that are found in texts before anything else, the longest first; returns how many are new.

        A token that the vocabulary has already keeps its id. Resize the model's embeddings to ``len(tokenizer)``.

        Raises: TokenizerError for an empty token, one with a lone surrogate, or something that is no string.
        """
        new = 0
        for content in [tokens] if isinstance(tokens, str) else list(tokens):
            if not isinstance(content, str) or not content or any("\ud800" <= char <= "\udfff" for char in content):
                raise TokenizerError(
                    f"{content!r} cannot be added as a token; expected a string with at least one character and "
                    f"without lone surrogates"
                )
            index = self._find(content)
            if index is None:
                index = len(self._token_bytes)
                self._token_bytes.append(content.encode())
                new += 1
            known = self._added.get(content)
            special = special_tokens or (known is not None and known.special)
            self._added[content] = AddedToken(content, index, special)
        self._recognise()
        return new

    def add_special_tokens(self, tokens: Mapping[str, str | Sequence[str]]) -> int:
        """Add special tokens by role, as in ``{"pad_token": "<pad>"}``; returns how many are new.

        Roles: bos_token, eos_token, unk_token, pad_token, with one token each; additional_special_tokens, with a list.

        Raises: TokenizerError for an unknown role.
        """
        for role in tokens:
            if role not in (*ROLES, "additional_special_tokens"):
                raise TokenizerError(
                    f"{role!r} is no role of a special token; expected {', '.join(ROLES)} or "
                    f"additional_special_tokens{nearest(str(role), ROLES)}"
                )
            if role != "additional_special_tokens" and not isinstance(tokens[role], str):
                raise TokenizerError(f"{role} is {tokens[role]!r}; expected one token, as a string")
        new = 0
        for role, value in tokens.items():
            new += self.add_tokens(value, special_tokens=True)
            if role != "additional_special_tokens":
                self._set_role(role, str(value))
        return new

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the list of ids of a list of tokens; unknown ones become `unk_token_id`.

        Raises: TokenizerError for an unknown token when there is no unk_token.
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._find(tokens)
        if index is None and self.unk_token is None:
            raise TokenizerError(
                f"{tokens!r} is not in the vocabulary, and there is no unk_token to stand for it; expected a token as "
                f'tokenize() writes it, with "Ġ" for a space; use encode() for text'
            )
        return self.unk_token_id if index is None else index

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """The token of an id, or the list of tokens of a list of ids, as vocabulary files write them.

        Raises: TokenizerError for an id that the tokenizer does not have.
        """
        if isinstance(ids, (int, np.integer)):
            return self.convert_ids_to_tokens([int(ids)])[0]
        flat = [int(index) for index in _flat_ids(ids)]
        self._decoder(False).decode(flat)  # reports ids that are not there
        tokens, size = self._vocabulary.tokens, self.vocab_size
        return [tokens[index] if index < size else self._token_bytes[index].decode() for index in flat]

    # ---- text to ids ---------------------------------------------------------------------------------------------

    def encode(
        self,
        text: str,
        *,
        special: str = "allow",
        add_prefix_space: bool | None = None,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """The ids of `text`: a list, or a tensor of shape (1, T) if asked for.

        special: what special tokens inside the text are. "allow": they are recognised; "forbid": they raise, so that
            text from outside cannot smuggle one in; "text": they are read like any other text. Tokens added with
            ``add_tokens`` are not special and are always recognised.
        truncation, max_length: cut to max_length tokens (model_max_length if None) on the truncation_side.
        return_tensors: None, "np", "pt" or "tf".

        Lone surrogates, which no UTF-8 has, become U+FFFD, and surrogates that pair up become their character.

        Raises: TokenizerError for something that is no string, and for a forbidden special token.
        """
        ids = self._encode(_text(text), special, add_prefix_space)
        limit = self._limit(truncation, max_length)
        if limit is not None:
            ids = self._truncate(ids, limit)
        if return_tensors is None:
            return ids
        return to_tensor("input_ids", [ids], _one_of("return_tensors", return_tensors, TENSORS))

    def tokenize(self, text: str, *, special: str = "allow", add_prefix_space: bool | None = None) -> list[str]:
        """The tokens of `text` as vocabulary files write them: ``["Hello", "Ġworld"]``."""
        return self.convert_ids_to_tokens(self._encode(_text(text), special, add_prefix_space))

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        add_prefix_space: bool | None = None,
        special: str = "allow",
    ) -> BatchEncoding:
        """The model's inputs for one text or a list of texts.

        padding: False or "do_not_pad"; True or "longest", to the longest row; "max_length", to max_length.
        truncation: False or "do_not_truncate"; True or "longest_first", to max_length, which is model_max_length if
            None.
        padding_side: "right" or "left"; the tokenizer's own if None.
        return_tensors: None for lists, "np", "pt" or "tf".
        return_offsets_mapping: also give ``offset_mapping``, the characters (first, one past the last) of each token.
            Tokens that share a character all have it; padding has (0, 0); an added prefix space has no characters.
        special: see `encode`.

        Raises: TokenizerError for arguments that are unknown or do not go together, for padding without a pad token,
            for rows of different lengths in one tensor, and for whatever `encode` raises.
        """
        single = isinstance(text, str)
        texts = [_text(text)] if isinstance(text, str) else _texts(text)
        kind = _one_of("return_tensors", return_tensors, TENSORS)
        limit = self._limit(truncation, max_length)
        rows = self._encode_rows(texts, special, add_prefix_space, None)
        spans = None
        if return_offsets_mapping:
            spans = [self._offsets(one, row, add_prefix_space) for one, row in zip(texts, rows, strict=True)]
        if limit is not None:
            rows = [self._truncate(row, limit) for row in rows]
            spans = spans and [self._truncate(row, limit) for row in spans]
        columns: dict[str, list[Any]] = {"input_ids": rows}
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(row) for row in rows]
        if spans is not None:
            columns["offset_mapping"] = spans
        self._pad(columns, padding, max_length, padding_side)
        if kind is not None:
            return BatchEncoding({name: to_tensor(name, column, kind) for name, column in columns.items()})
        return BatchEncoding({name: column[0] if single else column for name, column in columns.items()})

    def encode_array(self, text: str, *, special: str = "allow", threads: int | None = 1) -> NDArray[np.int32]:
        """The ids of `text` as an array of shape (T,): as `encode`, without the time that a list of ints takes.

        threads: how many work on a long text; None for as many as there are cores.
        """
        return self._ids([_text(text)], special, None, threads)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        special: str = "allow",
        add_prefix_space: bool | None = None,
        threads: int | None = None,
    ) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all cores or as many as `threads` says.

        Raises: whatever `encode` raises for one of the texts.
        """
        return self._encode_rows(_texts(texts), special, add_prefix_space, threads)

    def _encode(self, text: str, special: str, add_prefix_space: bool | None) -> list[int]:
        if len(text) < LONG:
            with contextlib.suppress(UnicodeEncodeError):
                segments, between = self._segments(self._prefixed(text, add_prefix_space), special)
                if not between:
                    return self._encoder.encode(segments[0])
        return to_list(self._ids([text], special, add_prefix_space, 1))

    def _encode_rows(
        self, texts: list[str], special: str, add_prefix_space: bool | None, threads: int | None
    ) -> list[list[int]]:
        """All texts in one go."""
        if len(texts) < 2:
            return [self._encode(text, special, add_prefix_space) for text in texts]
        ids = self._ids(texts, special, add_prefix_space, threads)
        ends = [*np.flatnonzero(ids == _BETWEEN_TEXTS).tolist(), len(ids)]
        flat = to_list(ids)
        return [flat[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]

    def _ids(
        self, texts: list[str], special: str, add_prefix_space: bool | None, threads: int | None
    ) -> NDArray[np.int32]:
        """The ids of the texts, one after the other, with _BETWEEN_TEXTS between."""

        def encode(texts: list[str]) -> NDArray[np.int32]:
            segments: list[str] = []
            between: list[int] = []
            for text in texts:
                more, more_between = self._segments(self._prefixed(text, add_prefix_space), special)
                segments += more
                between += [*more_between, _BETWEEN_TEXTS]
            return self._encoder.encode_segments(segments, between[:-1], threads)

        try:
            return encode(texts)
        except UnicodeEncodeError:  # rare, and only encoding finds it out
            return encode([_repair(text) for text in texts])

    def _segments(self, text: str, special: str) -> tuple[list[str], list[int]]:
        """The plain text around the added tokens of a text, and these tokens' ids: (n + 1, n)."""
        finder = self._finders[_one_of("special", special, SPECIAL) != "text"]
        if finder is None or not finder.may_match(text):
            return [text], []
        segments: list[str] = []
        between: list[int] = []
        start = 0
        for match in finder.pattern.finditer(text):
            token = self._added[match.group()]
            if special == "forbid" and token.special:
                raise _forbidden(token, match.start())
            segments.append(text[start : match.start()])
            between.append(token.id)
            start = match.end()
        segments.append(text[start:])
        return segments, between

    def _prefixed(self, text: str, add_prefix_space: bool | None) -> str:
        wanted = self.add_prefix_space if add_prefix_space is None else add_prefix_space
        return " " + text if wanted and text and not text.startswith(" ") else text

    def _recognise(self) -> None:
        """Prepare to find the added tokens, with the special ones and without."""
        plain = [token.content for token in self._added.values() if not token.special]
        self._finders = {True: _finder(list(self._added)), False: _finder(plain)}

    def _offsets(self, text: str, ids: list[int], add_prefix_space: bool | None) -> list[tuple[int, int]]:
        """The characters of each token, from the number of bytes each stands for."""
        repaired = _repair(text)
        prepared = self._prefixed(repaired, add_prefix_space)
        data = np.frombuffer(prepared.encode(), np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
        ends = np.cumsum([len(self._token_bytes[index]) for index in ids], dtype=np.int64)
        starts = ends - [len(self._token_bytes[index]) for index in ids]
        if not ids:
            return []
        first, last = character[starts], character[ends - 1] + 1
        added = len(prepared) - len(repaired)
        first, last = np.maximum(first - added, 0), np.maximum(last - added, 0)
        original = _surrogate_places(text)
        if original is not None:
            first, last = original[first], original[last]
        return list(zip(first.tolist(), last.tolist(), strict=True))

    def _limit(self, truncation: bool | str, max_length: int | None) -> int | None:
        if max_length is not None:
            _length("max_length", max_length)
        if truncation in (False, None, "do_not_truncate"):
            return None
        if truncation not in (True, "longest_first", "only_first"):
            raise TokenizerError(
                f'truncation is {truncation!r}; expected True, False, "longest_first" or "do_not_truncate"'
            )
        return self.model_max_length if max_length is None else max_length

    def _truncate(self, row: list[Any], limit: int) -> list[Any]:
        if len(row) <= limit:
            return row
        return row[:limit] if self.truncation_side == "right" else row[len(row) - limit :]

    def _pad(
        self, columns: dict[str, list[Any]], padding: bool | str, max_length: int | None, padding_side: str | None
    ) -> None:
        side = _one_of("padding_side", self.padding_side if padding_side is None else padding_side, _SIDES)
        rows = columns["input_ids"]
        if padding in (False, None, "do_not_pad"):
            return
        if padding == "max_length":
            width = self.model_max_length if max_length is None else max_length
        elif padding in (True, "longest"):
            width = max(map(len, rows), default=0)
        else:
            raise TokenizerError(f'padding is {padding!r}; expected True, False, "longest" or "max_length"')
        if width >= _NO_LIMIT:
            raise TokenizerError('padding="max_length" needs a max_length: this tokenizer has no model_max_length')
        pad = self.pad_token_id
        if pad is None:
            raise TokenizerError(
                "padding was asked for, but this tokenizer has no pad token (GPT-2 was trained without one); set one: "
                "tokenizer.pad_token = tokenizer.eos_token. The attention mask tells padding from real tokens"
            )
        fillers: dict[str, Any] = {"input_ids": pad, "attention_mask": 0, "offset_mapping": (0, 0)}
        for name, column in columns.items():
            for place, row in enumerate(column):
                gap = [fillers[name]] * (width - len(row))
                column[place] = row + gap if side == "right" else gap + row

    # ---- ids to text ---------------------------------------------------------------------------------------------

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids (a list, an array or a tensor of one axis, or one id), with no clean-up.

        The exact inverse of `encode`. Ids that do not add up to UTF-8 follow `errors`: "replace" gives U+FFFD.

        Raises: TokenizerError for an id that the tokenizer does not have and for more than one axis.
        """
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", self.errors)

    def decode_bytes(self, ids: Any, skip_special_tokens: bool = False) -> bytes:
        """The bytes of one sequence of ids; the inverse of `encode` even where a sequence ends within a character."""
        flat = _flat_ids(ids)
        try:
            return self._decoder(bool(skip_special_tokens)).decode(flat)
        except TypeError as cause:
            raise _not_flat() from cause

    def _decoder(self, skip_special_tokens: bool) -> IdDecoder:
        skipped = tuple(self.all_special_ids) if skip_special_tokens else ()
        if not skipped and len(self) == self.vocab_size:
            return vocabulary_decoder(self._vocabulary)
        key = (len(self), skipped)
        if key not in self._decoders:
            while len(self._decoders) > 3:
                del self._decoders[next(iter(self._decoders))]
            self._decoders[key] = IdDecoder(self._token_bytes, frozenset(skipped))
        return self._decoders[key]

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """The text of each of several sequences of ids: rows of a list, an array or a tensor."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def decode_stream(self, skip_special_tokens: bool = False) -> DecodeStream:
        """A decoder for ids that arrive one by one; see `DecodeStream`."""
        return DecodeStream(self, skip_special_tokens)

    # ---- saving --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write the tokenizer's files into `folder`, which may hold a model; returns their paths.

        vocab.json, merges.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json; added_tokens.json
        too if there are added tokens. Either all are replaced or none is, even if the process is killed.

        Raises: WriteError (an OSError) naming what could not be written.
        """
        settings = {
            "add_prefix_space": self.add_prefix_space,
            **self._roles,
            "errors": self.errors,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }
        parts = TokenizerParts(self._vocabulary, sorted(self._added.values(), key=lambda token: token.id), settings)
        from gpt2_core.files import atomic_folder  # only saving needs it, and it takes time to import

        target = Path(folder)
        with atomic_folder(target, replaces=_OLD_FILES.__contains__) as stage:
            names = []
            for name, content in folder_files(parts):
                (stage / name).write_bytes(content)
                names.append(name)
        return tuple(target / name for name in names)


class DecodeStream:
    """Text from ids that arrive one by one, never splitting a character.

        stream = tokenizer.decode_stream()
        for index in ids:
            print(stream.push(index), end="")
        print(stream.finish())

    The parts together are what ``decode`` gives for all ids at once.
    """

    def __init__(self, tokenizer: GPT2Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)

    def push(self, index: int) -> str:
        """The characters that this id completes, maybe none.

        Raises: TokenizerError for an id that the tokenizer does not have.
        """
        return self._decoder.decode(self._tokenizer.decode_bytes(index, self._skip))

    def finish(self) -> str:
        """What is left of a character that was begun, decoded as `errors` says; the stream can then begin again."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True)
class _Finder:
    """Finds added tokens in a text, the longest first where several start."""

    contents: tuple[str, ...]
    pattern: re.Pattern[str]

    def may_match(self, text: str) -> bool:
        """Whether the pattern need be tried: looking for a few fixed strings is ten times as quick."""
        return len(self.contents) > 8 or any(content in text for content in self.contents)


def _finder(contents: list[str]) -> _Finder | None:
    if not contents:
        return None
    longest_first = sorted(contents, key=len, reverse=True)
    return _Finder(tuple(contents), re.compile("|".join(map(re.escape, longest_first))))


_DEFAULTS: dict[str, Any] = {
    "errors": "replace",
    "bos_token": None,
    "eos_token": None,
    "unk_token": None,
    "pad_token": None,
    "padding_side": "right",
    "truncation_side": "right",
    "add_prefix_space": False,
    "model_max_length": _NO_LIMIT,
}
_OLD_FILES = ("added_tokens.json", "encoder.json", "vocab.bpe")


def _embedded_parts() -> TokenizerParts:
    vocabulary = gpt2_vocabulary()
    index = len(vocabulary) - 1
    settings = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT)
    return TokenizerParts(vocabulary, [AddedToken(ENDOFTEXT, index, special=True)], dict(settings))


def _known_settings(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in changes:
        if name not in _DEFAULTS:
            raise TokenizerError(
                f"from_pretrained got {name!r}, which is no setting of a tokenizer; expected some of "
                f"{', '.join(_DEFAULTS)}{nearest(name, list(_DEFAULTS))}"
            )
    return changes


def _one_of(name: str, value: Any, choices: Sequence[str | None] | None) -> Any:
    if choices is None:
        try:
            codecs.lookup_error(value)
        except (LookupError, TypeError) as cause:
            raise TokenizerError(
                f'{name} is {value!r}; expected a way to treat bad bytes, as "replace", "strict" or "ignore"'
            ) from cause
    elif value not in choices:
        raise TokenizerError(f"{name} is {value!r}; expected {' or '.join(map(repr, choices))}")
    return value


def _length(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
        raise TokenizerError(f"{name} is {value!r}; expected a number of tokens, 0 or more")
    return int(value)


def _text(text: Any) -> str:
    if isinstance(text, str):
        return text
    if isinstance(text, (bytes, bytearray, memoryview)):
        raise TokenizerError(
            f"got {type(text).__name__}; expected a str; decode it first, for example "
            f'data.decode("utf-8"), or data.decode("utf-8", "replace") if it may be damaged'
        )
    raise TokenizerError(f"got {type(text).__name__}; expected a str; convert it to text first")


def _texts(texts: Any) -> list[str]:
    if isinstance(texts, (bytes, bytearray, memoryview)) or not isinstance(texts, Iterable):
        raise TokenizerError(f"got {type(texts).__name__}; expected a str or a list of them; decode bytes first")
    return [_text(text) for text in texts]


def _flat_ids(ids: Any) -> list[int] | NDArray[np.integer]:
    """One sequence of ids, whatever it came as: a list, or an array of integers of one axis."""
    if isinstance(ids, (list, tuple)):
        return list(ids)
    if isinstance(ids, (int, np.integer)) and not isinstance(ids, bool):
        return [int(ids)]
    if hasattr(ids, "detach"):  # PyTorch, maybe on another device
        ids = ids.detach().cpu()
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.ndim == 0 and array.dtype.kind in "iu":
        array = array.reshape(1)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise _not_flat()
    return array.astype(np.int64)


def _not_flat() -> TokenizerError:
    return TokenizerError(
        "the ids are not one sequence of integers; expected a list, array or tensor of one axis; "
        "use batch_decode for several rows"
    )


def _repair(text: str) -> str:
    """The text as UTF-8 can hold it: paired surrogates are joined, lone ones become U+FFFD, as in tiktoken."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _surrogate_places(text: str) -> NDArray[np.int64] | None:
    """For each character of the repaired text, and its end, the place in `text`; None if nothing was repaired."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    high, low = codes >> 10 == 0xD800 >> 10, codes >> 10 == 0xDC00 >> 10
    if not (high.any() or low.any()):
        return None
    second = np.zeros(len(codes), bool)
    second[1:] = high[:-1] & low[1:]
    return np.append(np.flatnonzero(~second), len(codes))


def _forbidden(token: AddedToken, place: int) -> TokenizerError:
    return TokenizerError(
        f"the text has the special token {token.content!r} at character {place}, and special tokens are forbidden in "
        f'this call; to have it recognised use special="allow"; to read it as plain text use special="text"; or '
        f"take it out of the text first"
    )
