"""Messages of protocol buffers, as bytes: what TensorFlow's files are made of. One level at a time, no recursion.

    message = field ...          field = key, value          key = varint: number << 3 | kind
    kind 0: a varint    1: 8 bytes    2: a varint and as many bytes (text, bytes, a message)    5: 4 bytes
    varint  = 7 bits in each byte, the lowest first; the highest bit of a byte says that another follows

Which fields a message has is the caller's to know. A field that stands several times is given several times; a field
that is absent is its default, which is zero or empty. Groups (kinds 3 and 4), long out of use, are refused.

Source: Protocol Buffers, "Encoding" (protobuf.dev).
"""

from __future__ import annotations

from collections.abc import Iterator

from gpt2_core.errors import CheckpointFormatError

Value = int | bytes

_VARINT, _LONG, _BYTES, _SHORT = 0, 1, 2, 5
_SIZES = {_LONG: 8, _SHORT: 4}
_MOST_VARINT = 10  # bytes


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, below 2**64, and where the next thing stands.

    Raises: CheckpointFormatError, in the middle of a sentence, if it does not end or is too large.
    """
    number = 0
    for index, byte in enumerate(data[at : at + _MOST_VARINT]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if number >> 64:
                break
            return number, at + index + 1
    raise CheckpointFormatError(f"the number at byte {at} of {len(data)} does not end, or is above 2**64")


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The number and the value of each field in turn: bytes for those of kind 2, unsigned numbers for all others.

    Raises: CheckpointFormatError, in the middle of a sentence, for what is no message.
    """
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0 or number >> 29 or kind not in (_VARINT, _LONG, _BYTES, _SHORT):
            raise CheckpointFormatError(
                f"a message has a field of number {number} and kind {kind}, which none can have"
            )
        if kind == _VARINT:
            value, at = varint(data, at)
            yield number, value
            continue
        size, at = varint(data, at) if kind == _BYTES else (_SIZES[kind], at)
        if size > len(data) - at:
            raise CheckpointFormatError(f"field {number} of a message has {size} bytes, but {len(data) - at} are left")
        part = data[at : at + size]
        yield number, part if kind == _BYTES else int.from_bytes(part, "little")
        at += size


def number(value: Value) -> int:
    """A value as a signed number. Raises: CheckpointFormatError if it is bytes."""
    if isinstance(value, bytes):
        raise CheckpointFormatError("a field of a message holds bytes where a number belongs")
    return value - (1 << 64) if value >> 63 else value


def message(value: Value) -> bytes:
    """A value as bytes. Raises: CheckpointFormatError if it is a number."""
    if not isinstance(value, bytes):
        raise CheckpointFormatError("a field of a message holds a number where bytes belong")
    return value


def to_varint(value: int) -> bytes:
    """The bytes of a number from 0 to 2**64 - 1."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def to_field(number: int, value: Value, *, always: bool = False) -> bytes:
    """A field that holds a number as a varint, or bytes; nothing for the default value, unless `always`."""
    if not value and not always:
        return b""
    if isinstance(value, bytes):
        return to_varint(number << 3 | _BYTES) + to_varint(len(value)) + value
    return to_varint(number << 3 | _VARINT) + to_varint(value)


def to_short_field(number: int, value: int) -> bytes:
    """A field that holds a number in 4 bytes; nothing for zero."""
    return to_varint(number << 3 | _SHORT) + value.to_bytes(4, "little") if value else b""
