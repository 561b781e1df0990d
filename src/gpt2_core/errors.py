"""Every error the library raises, in one tree.

    Gpt2Error
    ├── ConfigError              (ValueError)   a configuration that cannot be built
    ├── InputError               (ValueError)   input that this model cannot take
    ├── TokenizerError           (ValueError)   text, ids or vocabulary files the tokenizer cannot take
    ├── GenerationError          (ValueError)   contradictory or impossible generation settings
    ├── TrainingError            (ValueError)   a training run that cannot go on
    ├── HubError                 (OSError)      a name that could not be turned into local files
    ├── WriteError               (OSError)      a file or folder that could not be written
    └── CheckpointError          (ValueError)   anything wrong with a checkpoint
        ├── CheckpointFormatError               damaged, truncated, or not what it says it is
        ├── CheckpointMismatchError             names or shapes that do not fit the model
        ├── CannotHoldError                     a model that a file format has no place for
        ├── VerificationError                   what was written, read back, is not what it should be
        └── UnsafeCheckpointError               a file that would run code or leave its folder

Each message says four things: what is wrong, what was got, what was expected, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class Gpt2Error(Exception):
    """The root: catch this to catch everything that the library raises on purpose."""


class ConfigError(Gpt2Error, ValueError):
    """A configuration value, or a combination of them, that no model can be built from."""


class InputError(Gpt2Error, ValueError):
    """Input that this model cannot take: too long, out of range, or of the wrong shape."""


class TokenizerError(Gpt2Error, ValueError):
    """Text, ids, or vocabulary files that the tokenizer cannot take."""


class GenerationError(Gpt2Error, ValueError):
    """Generation settings that are unknown, out of range, or contradict each other."""


class TrainingError(Gpt2Error, ValueError):
    """A run that cannot go on: its loss or its gradients are no numbers any more."""


class HubError(Gpt2Error, OSError):
    """A model name that could not be turned into local files."""


class WriteError(Gpt2Error, OSError):
    """A file or folder could not be written; what stood there before is untouched. Carries errno and filename."""

    def __str__(self) -> str:
        return str(self.args[1]) if len(self.args) > 1 else super().__str__()


class CheckpointError(Gpt2Error, ValueError):
    """Anything wrong with a checkpoint on disk."""


class CheckpointFormatError(CheckpointError):
    """A file that is damaged, truncated, or not what its header says it is."""


class UnsafeCheckpointError(CheckpointError):
    """A file that would run code when read, or that points outside its folder."""


class CannotHoldError(CheckpointError):
    """A model that a file format has no place for; nothing was written."""


class VerificationError(CheckpointError):
    """What was written, read back, is not what it should be; nothing was left behind."""


class CheckpointMismatchError(CheckpointError):
    """Parameters of a file that do not fit the model, all of them reported together.

    Attributes: ``missing`` and ``unexpected`` are names; ``misshaped`` holds (name, shape in the file,
    shape in the model).
    """

    def __init__(
        self,
        source: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        remedy: str = "check that the checkpoint and the configuration belong together",
    ) -> None:
        self.source = source
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshaped = tuple(misshaped)
        lines = [f"the checkpoint {source} does not fit the model"]
        lines += _section("missing", self.missing)
        lines += _section("unexpected", self.unexpected)
        lines += _section(
            "misshaped", [f"{name}: {got} in the file, expected {want}" for name, got, want in self.misshaped]
        )
        super().__init__("\n".join(lines) + f"\nremedy: {remedy}")


def _section(title: str, rows: Sequence[str], most: int = 20) -> list[str]:
    if not rows:
        return []
    shown = [f"    {row}" for row in rows[:most]]
    if len(rows) > most:
        shown.append(f"    ... and {len(rows) - most} more")
    return [f"  {title} ({len(rows)}):", *shown]


def nearest(word: str, candidates: Sequence[str]) -> str:
    """A hint ``; did you mean 'x'?`` to end a message about a misspelt name with, or the empty string."""
    import difflib

    found = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
