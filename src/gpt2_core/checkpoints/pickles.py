"""Reading a pickle without running anything.

A pickle is a program for a small stack machine; Python's own machine calls whatever the program names. This one
has no way to call: the only globals it knows are a caller's table, from a name to a function of ours that makes an
inert value out of plain arguments. Any other global is refused by name, before it is looked up anywhere. Values are
None, bool, int, float, str, bytes, list, dict, tuple, and what the table makes.

Bounded: every instruction takes at least one byte and makes at most one object, and both are counted. Integers are at
most 16 bytes long, keys of dicts are texts and small integers, so neither can be made slow.

Source: the opcodes of protocols 0 to 5 as the standard library's `pickletools` documents them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError

#: GPT-2 XL's state dict takes 20,000 instructions and 100 kB.
MOST_BYTES = 1 << 24
MOST_INSTRUCTIONS = 1_000_000
_LONGEST_INTEGER = 16  # bytes; torch's legacy magic number has 10
_LARGEST_KEY = 1 << 31
_LONGEST_LINE = 4096

Reducer = Callable[..., Any]
Persistent = Callable[[Any], Any]


class Global:
    """A name that the pickle mentioned and the table knows; inert."""

    __slots__ = ("path", "reducer")

    def __init__(self, path: str, reducer: Reducer | None) -> None:
        self.path = path
        self.reducer = reducer

    def __repr__(self) -> str:
        return f"<{self.path}>"


def decode(
    data: bytes, start: int, known: Mapping[str, Reducer | None], persistent: Persistent | None = None
) -> tuple[Any, int]:
    """The value of the pickle at `start` of `data`, and where it ends.

    `known` holds the globals allowed, as ``"module.name"``: a function makes a value from arguments, None means that
    the name may be mentioned but not called. `persistent` resolves persistent ids.
    Raises: UnsafeCheckpointError for any other global or call, CheckpointFormatError for a damaged pickle.
    """
    machine = _Machine(data, start, known, persistent)
    try:
        return machine.run(), machine.at
    except CheckpointError:
        raise
    # What the machine's own steps raise on a stack, a memo or a text that is not as it should be.
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error) as cause:
        raise CheckpointFormatError(
            f"the pickle is damaged at byte {machine.at}: {type(cause).__name__}; fetch the file again"
        ) from cause


class _Machine:
    def __init__(
        self, data: bytes, start: int, known: Mapping[str, Reducer | None], persistent: Persistent | None
    ) -> None:
        self.data = data
        self.at = start
        self.known = known
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MOST_INSTRUCTIONS):
            code = self.take(1)[0]
            if code == _STOP:
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise self.refused(code)
            step(self)
        raise CheckpointFormatError(
            f"the pickle has more than {MOST_INSTRUCTIONS:,} instructions; expected the few thousand of a state dict"
        )

    def refused(self, code: int) -> CheckpointError:
        """The error for an instruction that no state dict has: unsafe if it calls, else merely strange."""
        calls = {0x69: "INST", 0x6F: "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x92: "NEWOBJ_EX"}
        if code not in calls:
            return CheckpointFormatError(
                f"the pickle has the instruction {bytes([code])!r} at byte {self.at - 1}, which no state dict needs; "
                f"it is damaged or of another kind"
            )
        name = ""
        if code == 0x69:
            name = f" of {self.line()[:100]}.{self.line()[:100]}"
        return unsafe(f"makes an object with the instruction {calls[code]}{name}")

    # Reading -------------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise CheckpointFormatError(
                f"the pickle ends within an instruction that asks for {count} bytes at byte {self.at}; "
                f"it is truncated: fetch the file again"
            )
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + _LONGEST_LINE)
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # Instructions that do more than push a number --------------------------------------------------------------------

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def integer_line(self) -> None:
        text = self.line()
        if len(text) > 3 * _LONGEST_INTEGER:
            raise ValueError("an integer of too many digits")
        flags = {"00": False, "01": True}
        self.push(flags[text] if text in flags else int(text.removesuffix("L")))

    def long(self, layout: str) -> None:
        count = self.number(layout)
        if not 0 <= count <= _LONGEST_INTEGER:
            raise ValueError("an integer of too many bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def text(self, layout: str) -> None:
        self.push(self.take(self.number(layout)).decode("utf-8", "surrogatepass"))

    def quoted(self) -> None:
        """Python 2's str in protocol 0; escapes have no place in a state dict."""
        text = self.line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            raise ValueError("a text that is not simply quoted")
        self.push(text[1:-1])

    def unicode_line(self) -> None:
        text = self.line()
        if "\\" in text:
            raise ValueError("a text with escapes")
        self.push(text)

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise IndexError(count)
        del self.stack[-count:]
        self.push(items)

    def dictionary(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items set on something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("items appended to something else than a list")
        target.extend(items)

    def remember(self, place: int) -> None:
        if place < 0:
            raise ValueError("a negative place in the memo")
        self.memo[place] = self.stack[-1]

    def find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise unsafe("asks for a global whose name is not a text")
        path = f"{module}.{name}"
        if path not in self.known:
            raise unsafe(f"asks for the global {path[:200]!r}")
        self.push(Global(path, self.known[path]))

    def find_line(self) -> None:
        module = self.line()
        self.find(module, self.line())

    def find_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.find(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or function.reducer is None:
            named = function.path if type(function) is Global else type(function).__name__
            raise unsafe(f"calls {named}, which is not a function of a state dict")
        if type(arguments) is not tuple:
            raise TypeError("arguments that are not a tuple")
        self.push(function.reducer(*arguments))

    def build(self) -> None:
        """Attributes given to an object: a state dict's dict has `_metadata`, which nothing here needs."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not dict or type(state) not in (dict, tuple):
            raise unsafe(f"sets attributes of a {type(self.stack[-1]).__name__}")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise CheckpointFormatError("the pickle refers to a storage where none can be; it is damaged")
        self.push(self.persistent(self.stack.pop()))


def check_key(key: Any) -> str | int:
    """`key` if it may be the key of a dict: texts hash with a secret, small integers are too few to collide."""
    if type(key) is str or (type(key) in (int, bool) and abs(key) < _LARGEST_KEY):
        return key  # type: ignore[no-any-return]
    raise CheckpointFormatError(
        f"the pickle has a dict with a key of type {type(key).__name__}; expected texts or small integers"
    )


def unsafe(what: str) -> UnsafeCheckpointError:
    """The error for a pickle that wants to do something."""
    return UnsafeCheckpointError(
        f"the pickle {what}; nothing was run. Only tensors in plain dicts and lists are read: if you trust the "
        f"file, load it with the program that made it and save the state dict alone, best as safetensors"
    )


_STOP = ord(".")
_STEPS: Mapping[int, Callable[[_Machine], None]] = {
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): lambda m: (m.since_mark(), None)[1],
    ord("2"): lambda m: m.push(m.stack[-1]),
    # numbers
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): _Machine.integer_line,
    ord("L"): _Machine.integer_line,
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.long("<B"),
    0x8B: lambda m: m.long("<i"),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(m.number(">d")),
    # texts and bytes
    ord("S"): _Machine.quoted,
    ord("T"): lambda m: m.text("<I"),
    ord("U"): lambda m: m.text("<B"),
    ord("V"): _Machine.unicode_line,
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    0x8D: lambda m: m.text("<Q"),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    # containers
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(list(m.since_mark())),
    ord("a"): lambda m: m.append_items([m.stack.pop()]),
    ord("e"): lambda m: m.append_items(m.since_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): _Machine.dictionary,
    ord("s"): _Machine.set_item,
    ord("u"): lambda m: m.set_items(m.since_mark()),
    # memo
    ord("g"): lambda m: m.push(m.memo[int(m.line())]),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("p"): lambda m: m.remember(int(m.line())),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: lambda m: m.remember(len(m.memo)),
    # framing
    0x80: lambda m: (m.take(1), None)[1],
    0x95: lambda m: (m.number("<Q"), None)[1],
    # what would call, in a machine that can
    ord("c"): _Machine.find_line,
    0x93: _Machine.find_stack,
    ord("R"): _Machine.call,
    0x81: _Machine.call,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}
