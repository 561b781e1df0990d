"""The framework-free heart of gpt2-duet: everything that is not tensor arithmetic, once."""

from gpt2_core._version import __version__

__all__ = ["__version__"]
