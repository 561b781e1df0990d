"""Messages of the library in the words of the command line: an option is called what was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gpt2_core.errors import GenerationError, InputError

#: What the library says -> how it may be typed, the usual way first. A name with an underscore is looked for anywhere
#: in messages about settings, a plain word only where such a message begins with it, several words anywhere.
Options = Mapping[str, tuple[str, ...]]


def in_options(error: BaseException, options: Options, typed: Sequence[str] = ()) -> str:
    """The message of `error`, with the options that were `typed`, or else the usual ones, for what they set."""
    message = str(error)
    about_settings = isinstance(error, (GenerationError, InputError))
    for name, spellings in options.items():
        option = next((each for each in spellings if any(_is(each, argument) for argument in typed)), spellings[0])
        if " " in name:
            message = message.replace(name, option)
        elif about_settings:
            word = rf"(?<![\w/.'\"-]){name}" if "_" in name else rf"\A{name}"
            message = re.sub(rf"{word}=(?=\d)", f"{option} ", message)
            message = re.sub(rf"{word}(?![\w/.'\"-])", option, message)
    # None is what Python says for an option that is not there.
    return re.sub(r"expected None(?: \([^)]*\))? or ", "expected ", message) if about_settings else message


def _is(option: str, argument: str) -> bool:
    """Whether `argument` is this option, alone or with its value: ``--length=3``, ``-n3``."""
    if argument == option or argument.startswith(f"{option}="):
        return True
    return len(option) == 2 and argument.startswith(option)
