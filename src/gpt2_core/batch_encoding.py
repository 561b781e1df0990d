"""What calling a tokenizer returns: a dictionary whose entries can also be read as attributes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2_core.errors import TokenizerError

TENSORS = (None, "np", "pt", "tf")


class BatchEncoding(dict[str, Any]):
    """The model's inputs by name: ``enc["input_ids"]``, ``enc.input_ids`` and ``model(**enc)`` all work.

    Entries: ``input_ids``, ``attention_mask`` (1 for real tokens, 0 for padding) and ``offset_mapping`` (first
    character and one past the last, for each token), as asked for. Shape (T) for one text and (B, T) for a list, or
    (B, T) always when tensors were asked for; offsets have a last axis of 2.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"this encoding has no {name!r}; it has {', '.join(self)}; ask the tokenizer for more, "
                f"for example return_offsets_mapping=True"
            ) from None

    def to(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        """The same encoding with each PyTorch tensor's ``.to(...)`` applied.

        Raises: TokenizerError if an entry is not a PyTorch tensor.
        """
        for name, value in self.items():
            if not hasattr(value, "to"):
                raise TokenizerError(
                    f"{name} is a {type(value).__name__}, which has no .to(); expected PyTorch tensors; "
                    f'call the tokenizer with return_tensors="pt"'
                )
        return BatchEncoding({name: value.to(*args, **kwargs) for name, value in self.items()})


def to_tensor(name: str, rows: Sequence[Any], kind: str) -> Any:
    """Rows of equal length as one tensor: int64 for "np" and "pt", int32 for "tf".

    Raises: TokenizerError for rows of different lengths and for a framework that is not installed.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise TokenizerError(
            f"{name} has rows of {min(lengths)} to {max(lengths)} tokens, which fit in no tensor; expected rows of "
            f"equal length; use padding=True (with a pad token), or return_tensors=None for lists"
        )
    shape = (len(rows), lengths.pop() if lengths else 0) + ((2,) if name == "offset_mapping" else ())
    array = np.array(rows, np.int64).reshape(shape)
    if kind == "np":
        return array
    if kind == "pt":
        return _framework("torch", kind, "pip install gpt2-duet[pt]").from_numpy(array)
    return _framework("tensorflow", kind, "pip install gpt2-duet[tf]").constant(array.astype(np.int32))


def _framework(module: str, kind: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise TokenizerError(
            f'return_tensors="{kind}" needs {module}, which cannot be imported ({cause}); '
            f'{remedy}, or use return_tensors="np"'
        ) from cause
