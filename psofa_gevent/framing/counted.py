"""Framings in which the size of a message is known before it comes, by a length or by agreement."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Literal

from psofa_gevent.errors import PsFramingError
from psofa_gevent.framing.base import (
    DEFAULT_MAX_SIZE,
    LARGEST_SIZE,
    Decoder,
    Framing,
    check_size,
    too_large,
)
from psofa_gevent.messages import Message, as_bytes

__all__ = ["FixedSize", "LengthPrefix", "Raw", "Varint"]

STRUCT_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""The `struct` code for each size, in bytes, that `struct` has."""
LONGEST_VARINT = 5
"""Bytes of a length: protobuf's own readers take lengths of up to 32 bits."""


class LengthPrefix(Framing[bytes]):
    """Each message comes after its length, a number of `size` bytes.

    ``on_message`` gets the message without the length, and ``send`` adds it. Further settings, in
    the terms of Netty's ``LengthFieldBasedFrameDecoder``, are for protocols that have a header
    before the length field, which belongs to the message (`offset`), or a length that counts more
    or fewer bytes than follow it (`adjustment`, `includes_prefix`).

    =========================================  =====================================
    on the wire                                settings
    =========================================  =====================================
    ``00 00 00 05`` hello                      ``LengthPrefix(4)``
    ``05 00`` hello                            ``LengthPrefix(2, byteorder="little")``
    ``00 09`` hello                            ``LengthPrefix(2, adjustment=-4)``
    ``00 00 00 09`` hello                      ``LengthPrefix(4, includes_prefix=True)``
    ``CA FE 00 05`` hello                      ``LengthPrefix(2, offset=2)``; the message is
                                               ``CA FE`` hello
    ``CA 00 05 FE`` hello                      ``LengthPrefix(2, offset=1, adjustment=1)``; the
                                               message is ``CA FE`` hello
    =========================================  =====================================
    """

    def __init__(
        self,
        size: int = 4,
        *,
        byteorder: Literal["big", "little"] = "big",
        offset: int = 0,
        adjustment: int = 0,
        includes_prefix: bool = False,
        max_size: int = DEFAULT_MAX_SIZE,
    ) -> None:
        """Check the settings.

        Args:
            size: bytes of the length field, 1 to 8.
            byteorder: the order of its bytes, "big" or "little"; "big" is network byte order.
            offset: bytes of the message before the length field.
            adjustment: the number to add to the length to get the number of bytes after the field.
            includes_prefix: whether the length also counts the field itself and the bytes before
                it.
            max_size: the most bytes of a message, without its length field.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        self.size = check_size("size", size, 1, 8)
        if byteorder not in ("big", "little"):
            raise ValueError(f"byteorder must be 'big' or 'little', not {byteorder!r}")
        self.byteorder = byteorder
        self.offset = check_size("offset", offset, 0)
        self.adjustment = check_size("adjustment", adjustment, -LARGEST_SIZE)
        if not isinstance(includes_prefix, bool):
            raise TypeError(f"includes_prefix must be True or False, not {includes_prefix!r}")
        self.includes_prefix = includes_prefix
        self.max_size = check_size("max_size", max_size)
        if offset > max_size:
            raise ValueError(f"offset must be at most max_size={max_size}, not {offset}")
        self._added = adjustment - (offset + size if includes_prefix else 0)
        """The number to add to the length to get the number of bytes after the field."""
        self._struct = None
        if size in STRUCT_CODES:
            self._struct = struct.Struct((">" if byteorder == "big" else "<") + STRUCT_CODES[size])

    def __repr__(self) -> str:
        return (
            f"LengthPrefix({self.size}, byteorder={self.byteorder!r}, offset={self.offset}, "
            f"adjustment={self.adjustment}, includes_prefix={self.includes_prefix}, "
            f"max_size={self.max_size})"
        )

    def encode(self, message: Message) -> bytes:
        """Return `message` with its length."""
        data = message if type(message) is bytes else as_bytes(message)
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        length = len(data) - self.offset - self._added
        if self.offset:
            if len(data) < self.offset:
                raise PsFramingError(
                    f"{self!r}: a message of {len(data)} bytes is shorter than offset"
                )
            return data[: self.offset] + self._prefix(length) + data[self.offset :]
        return self._prefix(length) + data

    def _prefix(self, length: int) -> bytes:
        try:
            if self._struct is not None:
                return self._struct.pack(length)
            return length.to_bytes(self.size, self.byteorder)
        except (struct.error, OverflowError):
            raise PsFramingError(f"{self!r}: the length {length} does not fit") from None

    def decoder(self) -> Decoder[bytes]:
        """Make a decoder for one connection."""
        return _LengthDecoder(self, self._length_reader())

    def _length_reader(self) -> Callable[[bytes, int], tuple[int, ...]]:
        """Return a function of bytes and an index: it reads the length of the message there."""
        offset, size, byteorder = self.offset, self.size, self.byteorder
        if self._struct is None:
            return lambda data, at: (
                int.from_bytes(data[at + offset : at + offset + size], byteorder),
            )
        unpack = self._struct.unpack_from
        return (lambda data, at: unpack(data, at + offset)) if offset else unpack


class Varint(Framing[bytes]):
    """Each message comes after its length as a base-128 varint, as in protobuf's delimited streams.

    ``writeDelimitedTo`` (Java), ``google.protobuf.proto.serialize_length_prefixed`` (Python) and
    ``SerializeDelimitedToOstream`` (C++) write this format.
    """

    def __init__(self, *, max_size: int = DEFAULT_MAX_SIZE) -> None:
        """Check the settings.

        Args:
            max_size: the most bytes of a message, without its length.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        self.max_size = check_size("max_size", max_size)

    def __repr__(self) -> str:
        return f"Varint(max_size={self.max_size})"

    def encode(self, message: Message) -> bytes:
        """Return `message` with its length."""
        data = message if type(message) is bytes else as_bytes(message)
        length = len(data)
        if length > self.max_size:
            raise too_large(self, length)
        prefix = bytearray()
        while length > 0x7F:
            prefix.append(length & 0x7F | 0x80)
            length >>= 7
        prefix.append(length)
        return bytes(prefix) + data

    def decoder(self) -> Decoder[bytes]:
        """Make a decoder for one connection."""
        return _VarintDecoder(self)


class FixedSize(Framing[bytes]):
    """Each message has the same number of bytes."""

    def __init__(self, size: int) -> None:
        """Check the settings.

        Args:
            size: bytes of each message.

        Raises:
            TypeError: `size` is of the wrong type.
            ValueError: `size` is out of range.
        """
        self.size = self.max_size = check_size("size", size)

    def __repr__(self) -> str:
        return f"FixedSize({self.size})"

    def encode(self, message: Message) -> bytes:
        """Return `message` as it is."""
        data = as_bytes(message)
        if len(data) != self.size:
            raise PsFramingError(f"{self!r}: a message of {len(data)} bytes is of the wrong size")
        return data

    def decoder(self) -> Decoder[bytes]:
        """Make a decoder for one connection."""
        return _FixedSizeDecoder(self)


class Raw(Framing[bytes]):
    """No messages: the bytes as they come, all of them or a given number.

    After the last of `size` bytes the session goes on with the framing that it had before. This is
    for a header that says how many bytes follow, if not all of them should be kept in memory.
    """

    def __init__(self, size: int | None = None) -> None:
        """Check the settings.

        Args:
            size: bytes until the framing ends, 1 or more; ``None``: it does not end.

        Raises:
            TypeError: `size` is of the wrong type.
            ValueError: `size` is out of range.
        """
        self.size = None if size is None else check_size("size", size, 1, 2**63 - 1)

    def __repr__(self) -> str:
        return f"Raw({self.size})"

    def encode(self, message: Message) -> bytes:
        """Return `message` as it is."""
        return as_bytes(message)

    def decoder(self) -> Decoder[bytes]:
        """Make a decoder for one connection."""
        return _RawDecoder(self.size)


class _CountedDecoder(Decoder[bytes]):
    """Keeps the bytes of a message that is not whole, and knows how many bytes are missing."""

    def __init__(self, framing: Framing[bytes]) -> None:
        self._framing = framing
        self._max_size = framing.max_size
        self._tail = bytearray()
        self._header = 1
        """Bytes that must be there before the decoder looks for the length again."""
        self._need = 0
        """Bytes of the whole message with its length; 0: the length has not come."""
        self._data = b""
        self._at = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._need:
            return self._finish(data)
        if self._tail:
            self._tail += data
            if len(self._tail) < self._header:
                return iter(())
            data = bytes(self._tail)
            self._tail.clear()
        return self._cut(data, 0)

    def _finish(self, data: bytes) -> Iterator[bytes]:
        tail = self._tail
        missing = self._need - len(tail)
        if missing > len(data):
            tail += data
            return
        tail += memoryview(data)[:missing]
        message = self._strip(tail)
        tail.clear()
        self._need = 0
        self._data, self._at = data, missing
        yield message
        yield from self._cut(data, missing)

    def _cut(self, data: bytes, at: int) -> Iterator[bytes]:
        """Iterate over the messages that are whole in `data` from the index `at` on."""
        raise NotImplementedError

    def _strip(self, framed: bytearray) -> bytes:
        """Return the message in `framed`, which is whole, without its length."""
        raise NotImplementedError

    def _keep(self, data: bytes, at: int) -> None:
        self._tail += memoryview(data)[at:]
        self._data, self._at = b"", 0

    def unread(self) -> bytes:
        return bytes(self._tail) or self._data[self._at :]

    @property
    def kept(self) -> int:
        return len(self._tail)


class _LengthDecoder(_CountedDecoder):
    def __init__(
        self, framing: LengthPrefix, read: Callable[[bytes, int], tuple[int, ...]]
    ) -> None:
        super().__init__(framing)
        self._read = read
        self._offset = framing.offset
        self._header = framing.offset + framing.size
        self._added = framing._added  # noqa: SLF001 - the two are one framing

    def _cut(self, data: bytes, at: int) -> Iterator[bytes]:
        # Local names, as a read may have thousands of messages: attributes would cost time.
        read, offset, header, added = self._read, self._offset, self._header, self._added
        largest = self._max_size - offset
        self._data = data
        end = len(data)
        while (body := at + header) <= end:
            stop = body + read(data, at)[0] + added
            if not 0 <= stop - body <= largest:
                raise PsFramingError(
                    f"{self._framing!r}: a length says {stop - body + offset} bytes"
                )
            if stop > end:
                self._need = stop - at
                break
            self._at = stop
            yield data[at : at + offset] + data[body:stop] if offset else data[body:stop]
            at = stop
        self._keep(data, at)

    def _strip(self, framed: bytearray) -> bytes:
        with memoryview(framed) as view:
            return b"".join((view[: self._offset], view[self._header :]))


class _VarintDecoder(_CountedDecoder):
    def _cut(self, data: bytes, at: int) -> Iterator[bytes]:
        self._data = data
        end = len(data)
        while at < end:
            length, body = data[at], at + 1
            if length > 0x7F:
                length, body = _read_varint(data, at)
                if body < 0:
                    if end - at >= LONGEST_VARINT:
                        raise PsFramingError(
                            f"{self._framing!r}: a length of more than {LONGEST_VARINT} bytes"
                        )
                    break
            if length > self._max_size:
                raise too_large(self._framing, length)
            stop = body + length
            if stop > end:
                self._need = stop - at
                break
            self._at = stop
            yield data[body:stop]
            at = stop
        self._keep(data, at)

    def _strip(self, framed: bytearray) -> bytes:
        _length, body = _read_varint(framed, 0)
        with memoryview(framed) as view:
            return bytes(view[body:])


def _read_varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return the number at an index, and the index behind it; (0, -1): it is not whole."""
    number = shift = 0
    for index in range(at, min(at + LONGEST_VARINT, len(data))):
        byte = data[index]
        number |= (byte & 0x7F) << shift
        if byte <= 0x7F:
            return number, index + 1
        shift += 7
    return 0, -1


class _FixedSizeDecoder(_CountedDecoder):
    def _cut(self, data: bytes, at: int) -> Iterator[bytes]:
        self._data = data
        size = self._max_size
        end = len(data)
        while (stop := at + size) <= end:
            self._at = stop
            yield data[at:stop]
            at = stop
        self._need = size if at < end else 0
        self._keep(data, at)

    def _strip(self, framed: bytearray) -> bytes:
        return bytes(framed)


class _RawDecoder(Decoder[bytes]):
    kept = 0

    def __init__(self, size: int | None) -> None:
        self._missing = size
        self._unread = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._missing is not None:
            size = self._missing
            self._unread = data[size:]
            data = data[:size]
            self._missing = size - len(data)
            self.spent = self._missing == 0
        yield data

    def unread(self) -> bytes:
        return self._unread
