"""The framework-free heart of gpt2-duet: everything that is not tensor arithmetic, once.

Importing it loads neither PyTorch nor TensorFlow; names are fetched from their modules when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpt2_core._version import __version__

if TYPE_CHECKING:
    from gpt2_core.config import PRESETS, GPT2Config
    from gpt2_core.errors import Gpt2Error
    from gpt2_core.reference import ReferenceModel
    from gpt2_core.sampling import GenerationConfig
    from gpt2_core.tokenizer import GPT2Tokenizer

__all__ = [
    "PRESETS",
    "GPT2Config",
    "GPT2Tokenizer",
    "GenerationConfig",
    "Gpt2Error",
    "ReferenceModel",
    "__version__",
]

_HOMES = {
    "PRESETS": "config",
    "GPT2Config": "config",
    "GPT2Tokenizer": "tokenizer",
    "GenerationConfig": "sampling",
    "Gpt2Error": "errors",
    "ReferenceModel": "reference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpt2_core' has no attribute {name!r}")
    return getattr(import_module(f"gpt2_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
