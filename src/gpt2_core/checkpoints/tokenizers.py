"""The tokenizer that goes with a checkpoint: read from whatever a format keeps, written as what another wants.

The common value is `TokenizerParts`: vocabulary, added tokens, settings. Formats that keep a tokenizer of their own
kind make one with `parts_of`, and write one from its vocabulary; all others have the hub's files beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_core.errors import CheckpointError
from gpt2_core.tokenizer_files import ROLES, AddedToken, TokenizerParts, _assemble, folder_files, read_folder
from gpt2_core.vocabulary import ENDOFTEXT, gpt2_vocabulary

#: What a folder's tokenizer may consist of, and what stands beside it; brought along as they are.
HUB_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
OPENAI_FILES = ("encoder.json", "vocab.bpe")

# What the hub's small files say where nothing else is known.
_SETTINGS: Mapping[str, Any] = {
    "errors": "replace",
    "padding_side": "right",
    "truncation_side": "right",
    "add_prefix_space": False,
    "model_max_length": 10**30,
}


def parts_of(
    ids: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    source: str,
    added: Sequence[AddedToken] = (),
    settings: Mapping[str, Any] | None = None,
) -> TokenizerParts:
    """A tokenizer from its tokens as vocabulary files write them, its merges, and the tokens added to them.

    Raises: TokenizerError for anything that does not go together; `source` names the file in messages.
    """
    found = {token.content: token for token in added}
    return _assemble(dict(ids), merges, found, dict(settings or {}), source)


def gpt2_parts(n_positions: int = 1024) -> TokenizerParts:
    """GPT-2's own tokenizer, which ships with the package."""
    vocabulary = gpt2_vocabulary()
    settings = dict.fromkeys(ROLES[:3], ENDOFTEXT) | {"pad_token": None, "model_max_length": n_positions}
    return TokenizerParts(vocabulary, [AddedToken(ENDOFTEXT, len(vocabulary) - 1, special=True)], settings)


def parts_beside(folder: Path) -> TokenizerParts | None:
    """The tokenizer of a folder's files, of the hub's kind or OpenAI's; None if there is none.

    Raises: TokenizerError if there is one that cannot be used.
    """
    here = [name for name in (*HUB_FILES[:3], *OPENAI_FILES) if (folder / name).is_file()]
    return read_folder(folder) if here else None


def hub_files(parts: TokenizerParts) -> Iterator[tuple[str, bytes]]:
    """The files that the hub keeps of a tokenizer, and their content."""
    roles = dict.fromkeys(ROLES)
    yield from folder_files(TokenizerParts(parts.vocabulary, parts.added, {**_SETTINGS, **roles, **parts.settings}))


def openai_files(parts: TokenizerParts, what: str) -> Iterator[tuple[str, bytes]]:
    """encoder.json and vocab.bpe. Raises: CheckpointError where tokens were added, which they have no place for."""
    refuse_added(parts, what)
    yield "encoder.json", parts.vocabulary.to_vocab_json()
    yield "vocab.bpe", parts.vocabulary.to_merges_txt()


def refuse_added(parts: TokenizerParts, what: str) -> None:
    """Raise CheckpointError if the tokenizer has tokens beyond its vocabulary; `what` has no place for them."""
    beyond = [token.content for token in parts.added if token.id >= len(parts.vocabulary)]
    if beyond:
        raise CheckpointError(
            f"{what} has no place for tokens beyond the vocabulary, and this tokenizer has {len(beyond)} "
            f"({', '.join(map(repr, beyond[:5]))}); leave the tokenizer out (--no-tokenizer), or use another format"
        )
