"""Initial values from a seed, in numpy: every framework starts from the same bits.

Each parameter has a generator of its own, keyed by the seed and the parameter's name, so its values depend on
nothing else: not on the order of building, not on the head, not on the other parameters.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.parameters import PREFIX, Head, Parameter, parameter_table


def initial_value(parameter: Parameter, seed: int = 0) -> NDArray[np.float32]:
    """The float32 initial value of one parameter, of shape ``parameter.shape``.

    The name counts without its ``transformer.`` prefix, so a bare model and one with a head start alike.

    Raises: InputError, for a seed that is no whole number.
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise InputError(f"seed is {seed!r}, expected a whole number")
    if parameter.init == "ones":
        return np.ones(parameter.shape, np.float32)
    if parameter.init == "zeros":
        return np.zeros(parameter.shape, np.float32)
    name = parameter.name.removeprefix(PREFIX)
    digest = hashlib.sha256(f"{int(seed)}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    value = generator.standard_normal(parameter.shape, dtype=np.float32)
    value *= np.float32(parameter.std)
    return value


def initial_values(config: GPT2Config, head: Head | str = Head.LM, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """All initial values of a model by name, in the order of the parameter table."""
    return {row.name: initial_value(row, seed) for row in parameter_table(config, head)}
