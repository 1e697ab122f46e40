"""The base classes of framings and decoders, and what a decoder promises.

A decoder gets bytes as they come and returns messages. It keeps the bytes of the one message that
is not whole yet: never more than ``max_size`` and the bytes that frame the message. The decoders of
this package look at each byte once, wherever the stream was cut. So a message that comes byte by
byte costs no more than one that comes at once.

For an application's framing that only has `Framing.decode`, the library calls ``decode`` with each
chunk that comes, so that no message is late; with `Need` the framing avoids calls that come too
early. These calls never copy the kept bytes: they grow in an `io.BytesIO`, which returns them as
``bytes`` without a copy, and goes on in the same memory when no one holds these ``bytes`` any more.
20 MiB in reads of 64 KiB take 10 ms; with a join for each read they would take 1.5 s.

Many peers keep a connection alive with line ends in front of a message (STOMP's heart-beats, the
CRLF of RFC 5626 for SIP). For a decoder that looks for the end of a message, no message has begun
as long as only line ends have come.
"""

from __future__ import annotations

import enum
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Generic, TypeAlias, TypeVar

from psofa_gevent.errors import PsFramingError

__all__ = [
    "DEFAULT_MAX_SIZE",
    "SKIP",
    "Decoded",
    "Decoder",
    "Framing",
    "LineEnds",
    "Need",
    "check_size",
]

T = TypeVar("T")
U = TypeVar("U")

DEFAULT_MAX_SIZE = 1_048_576
"""Bytes of a message. A peer can make a session keep this much: allow no more than is needed."""
LARGEST_SIZE = 2**31 - 1
"""Bytes: the largest size that a setting may have."""
_line_ends = re.compile(rb"[\r\n]*").match
MOST_LINE_ENDS = 65_536
"""Bytes: this many line ends in front of a message do not count for ``max_size``. One read has as
many."""


class Skip(enum.Enum):
    """The type of `SKIP`."""

    SKIP = "SKIP"

    def __repr__(self) -> str:
        return "SKIP"


SKIP: Final = Skip.SKIP
"""What `Framing.decode` returns instead of a message: the bytes up to the index are not one."""


@dataclass(frozen=True, slots=True)
class Need:
    """What `Framing.decode` returns to be called again only when enough bytes have come.

    Attributes:
        n: the number of bytes from `start` on that must be there: more than there are now, and at
            most ``max_size``.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int):
            raise TypeError(f"Need(n) takes a whole number of bytes, not {self.n!r}")
        if self.n < 1:
            raise ValueError(f"Need(n) takes a number of bytes from 1 on, not {self.n}")


Decoded: TypeAlias = tuple[T | Skip, int] | Need | None
"""What `Framing.decode` may return; ``Decoded[bytes]`` if the messages are bytes."""


class Framing(Generic[T]):
    """Cuts a stream of bytes into messages of type `T`, and makes bytes of messages.

    For a framing of your own override `decode` and `encode`. This example is the framing of
    https://cr.yp.to/proto/netstrings.txt::

        class Netstring(Framing[bytes]):
            max_size = 99_999  # with the length, which then has 5 digits at most

            def decode(self, data, start):
                colon = data.find(b":", start, start + 6)
                digits = data[start : start + 6 if colon < 0 else colon]
                if not digits.isdigit() or len(digits) > 5:
                    raise PsFramingError(f"not the length of a netstring: {digits!r}")
                if len(digits) > 1 and digits.startswith(b"0"):
                    raise PsFramingError(f"the length of a netstring begins with 0: {digits!r}")
                if colon < 0:
                    return None
                end = colon + 1 + int(digits)
                if len(data) <= end:
                    return Need(end + 1 - start)
                if data[end : end + 1] != b",":
                    raise PsFramingError("a netstring does not end with a comma")
                return data[colon + 1 : end], end + 1

            def encode(self, message):
                netstring = b"%d:%b," % (len(message), message)
                if len(netstring) > self.max_size:
                    raise PsFramingError(f"{len(message)} bytes are too many for a netstring")
                return netstring

    Attributes:
        max_size: the most bytes that a decoder keeps of a message that is not whole. Line ends (CR,
            LF) in front of it do not count, up to 65,536 bytes of them.
    """

    max_size: int = DEFAULT_MAX_SIZE

    def decode(self, data: bytes, start: int) -> Decoded[T]:
        """Find the first message.

        It is called whenever more bytes have come, so it should look at as few bytes as possible:
        if each call looks at all bytes, a message costs the square of its size. If a length comes
        first, `Need` avoids most of the calls.

        Args:
            data: bytes that have come. (You may keep it, or a part of it as a ``memoryview``, but
                then the next bytes cost a copy of it.)
            start: the index in `data` of the first byte that belongs to no earlier message; this
                byte is always there.

        Returns:
            The message, and the index behind it, which is more than `start`. Or `SKIP`, and the
            index behind bytes that are not a message: keep-alive bytes, padding, noise. They are
            dropped, and count neither for ``frame_timeout`` nor for `max_size`; skip as many as
            possible in one call. Or ``None``: no message is whole yet; call again when more has
            come. Or ``Need(n)``: call again when there are n bytes from `start` on.

        Raises:
            PsFramingError: these bytes can't be the beginning of a message. Any other exception
                has the same effect, and so has an impossible index or `Need`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def encode(self, message: T) -> bytes:
        """Return the bytes that stand for `message` in the stream.

        Raises:
            PsFramingError: this framing can't carry such a message.
            TypeError: `message` is of the wrong type.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decoder(self) -> Decoder[T]:
        """Make a decoder for one connection."""
        return _DecodeAgain(self)

    def typed(self, decode: Callable[[T], U], encode: Callable[[U], T | str]) -> Framing[U]:
        """Return the same framing with messages of another type.

        Args:
            decode: converts each message to the object that ``on_message`` gets; if it raises, the
                message is malformed.
            encode: converts each object that is sent to a message of this framing.

        ::

            framing = Line().typed(json.loads, json.dumps)
        """
        return _Typed(self, decode, encode)


class Decoder(Generic[T]):
    """Cuts the bytes of one connection into messages.

    Attributes:
        spent: the decoder takes no more bytes; further bytes are for another framing (`Raw` with a
            size).
        skips: how often it has skipped bytes that seemed to begin a message. The bytes that it
            keeps begin after those, and after the last message that it returned.
        left_off: the iterator has ended early, since its turn was over: call `feed` with no bytes
            to go on.
    """

    spent = False
    skips = 0
    left_off = False

    def take_turns(self, seconds: float) -> None:
        """Leave off when skipping bytes without a message has taken `seconds`.

        Only a decoder that calls foreign code for each skip needs it; the others skip in one step.
        """

    def feed(self, data: bytes) -> Iterator[T]:
        """Iterate over the messages that are whole with `data`, which has just come.

        The caller may leave the iterator after any message, for good: then `unread` returns the
        rest of the bytes.

        Raises:
            PsFramingError: the iterator raises it for malformed bytes, after the messages before
                them.
        """
        raise NotImplementedError

    def unread(self) -> bytes:
        """The bytes that belong to no message that was returned. Ends the use of the decoder."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """The number of bytes kept of a message that is not whole."""
        raise NotImplementedError

    @property
    def has_begun(self) -> bool:
        """Whether a message has begun that is not whole."""
        return self.kept > 0


class LineEnds:
    """Counts the line ends in front of the bytes that a decoder keeps. Looks at each byte once."""

    __slots__ = ("_looked_at", "count")

    def __init__(self) -> None:
        self.count = 0
        self._looked_at = 0

    def look(self, data: bytes | bytearray, at: int) -> int:
        """Count the line ends in `data` from `at` on, also those since the last look."""
        if self.count == self._looked_at:
            found = _line_ends(data, at + self.count)
            assert found is not None  # it may be empty
            self.count = found.end() - at
        self._looked_at = len(data) - at
        return self.count

    def restart(self) -> None:
        """Count anew: the decoder keeps other bytes now."""
        self.count = self._looked_at = 0


class _DecodeAgain(Decoder[T]):
    """Calls `Framing.decode` again whenever more bytes have come."""

    def __init__(self, framing: Framing[T]) -> None:
        self._framing = framing
        self._buffer: io.BytesIO | None = None
        """All bytes of the message that is not whole, and possibly bytes before it."""
        self._data = b""
        """The bytes being decoded. While anything holds them, the next write copies the buffer."""
        self._at = 0
        """The index in `_buffer` or `_data` of the first byte of no message that was returned."""
        self._kept_from = 0
        """The value of `_at` at the end of the last `feed`."""
        self._need = 0
        """Bytes from `_at` on that must be there before the next call of ``decode``."""
        self._turn = 0.0
        """Seconds of skipping after which it leaves off; 0: never."""
        self._turn_until = 0.0
        """When the turn ends (monotonic clock); 0: nothing was skipped in this `feed`."""
        self._line_ends = LineEnds()

    def take_turns(self, seconds: float) -> None:
        self._turn = seconds

    def feed(self, data: bytes) -> Iterator[T]:
        self.left_off = False
        self._turn_until = 0.0
        at = self._at
        buffer = self._buffer
        if buffer is not None:
            self._data = b""
            buffer.write(data)
            if buffer.tell() - at < self._need:
                return
            data = buffer.getvalue()
        self._data = data
        while at < len(data):
            found = self._decode(data, at)
            if not isinstance(found, tuple):
                self._need = self._check_need(found, len(data) - at)
                break
            try:
                message, end = found
                goes_on = at < end <= len(data)
            except (TypeError, ValueError):
                raise self._mistaken(found) from None
            if not goes_on:
                raise PsFramingError(
                    f"{self._framing!r}: decode returned the index {end}, which must be more than "
                    f"{at} and at most {len(data)}"
                )
            self._at = at = end
            if message is not SKIP:
                yield message
            elif self._leaves_off(len(data) - at):
                break
        self._keep(data, at)

    def _leaves_off(self, left: int) -> bool:
        """Note one more skip; return whether the turn is over while `left` bytes are left."""
        self.skips += 1
        if not self._turn:
            return False
        now = monotonic()
        if not self._turn_until:
            self._turn_until = now + self._turn
        elif now >= self._turn_until and left:
            self.left_off = True
            self._need = 0
        return self.left_off

    def _decode(self, data: bytes, at: int) -> Decoded[T]:
        try:
            return self._framing.decode(data, at)
        except PsFramingError:
            raise
        except Exception as exc:
            raise _malformed(self._framing, exc) from exc

    def _mistaken(self, found: object) -> PsFramingError:
        return PsFramingError(
            f"{self._framing!r}: decode returned {found!r}, which is not (message, index), "
            "(SKIP, index), Need(n) or None"
        )

    def _check_need(self, need: object, there: int) -> int:
        """Return the number of bytes that must be there for the next call; 0: any number."""
        if need is None:
            return 0
        if not isinstance(need, Need):
            raise self._mistaken(need)
        if need.n <= there:
            raise PsFramingError(
                f"{self._framing!r}: decode returned {need!r}, but {there} bytes are there"
            )
        if need.n > self._framing.max_size:
            raise too_large(self._framing, need.n)
        return need.n

    def _keep(self, data: bytes, at: int) -> None:
        """Keep the bytes of `data` from `at` on, which are not a whole message."""
        self._data = b""
        kept = len(data) - at
        if at > self._kept_from:
            self._line_ends.restart()
        if not kept:
            self._buffer, self._at = None, 0
        elif self._buffer is None or at > kept:
            self._buffer, self._at = io.BytesIO(), 0
            self._buffer.write(memoryview(data)[at:])
        self._kept_from = self._at
        if kept > self._framing.max_size and not self.left_off:
            before = min(self._line_ends.look(data, at), MOST_LINE_ENDS)
            if kept - before > self._framing.max_size:
                raise too_large(self._framing, kept - before)

    def unread(self) -> bytes:
        if self._data or self._buffer is None:
            return self._data[self._at :]
        return self._buffer.getvalue()[self._at :]

    @property
    def kept(self) -> int:
        return 0 if self._buffer is None else self._buffer.tell() - self._at

    @property
    def has_begun(self) -> bool:
        if self._buffer is None:
            return False
        ends = self._line_ends.look(self._buffer.getvalue(), self._at)
        return self._need > 0 or ends < self.kept


class _Typed(Framing[U]):
    """A framing whose messages are those of another framing, converted to another type."""

    def __init__(
        self, framing: Framing[Any], decode: Callable[[Any], U], encode: Callable[[U], Any]
    ) -> None:
        self._framing = framing
        self._decode = decode
        self._encode = encode
        self.max_size = framing.max_size

    def __repr__(self) -> str:
        return f"{self._framing!r}.typed({_name(self._decode)}, {_name(self._encode)})"

    def encode(self, message: U) -> bytes:
        return self._framing.encode(self._encode(message))

    def decoder(self) -> Decoder[U]:
        return _TypedDecoder(self._framing.decoder(), self._decode, self)


class _TypedDecoder(Decoder[U]):
    def __init__(
        self, decoder: Decoder[Any], decode: Callable[[Any], U], framing: _Typed[U]
    ) -> None:
        self._decoder = decoder
        self._decode = decode
        self._framing = framing
        self.unread = decoder.unread  # type: ignore[method-assign]  # nothing to add
        self.take_turns = decoder.take_turns  # type: ignore[method-assign]

    def feed(self, data: bytes) -> Iterator[U]:
        decode = self._decode
        for message in self._decoder.feed(data):
            try:
                made = decode(message)
            except Exception as exc:
                raise _malformed(self._framing, exc) from exc
            yield made
        self.left_off = self._decoder.left_off
        self.spent = self._decoder.spent
        self.skips = self._decoder.skips

    @property
    def kept(self) -> int:
        return self._decoder.kept

    @property
    def has_begun(self) -> bool:
        return self._decoder.has_begun


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _malformed(framing: Framing[Any], exc: Exception) -> PsFramingError:
    # Not the repr of the exception: that of a UnicodeDecodeError has the whole message, escaped.
    return PsFramingError(f"{framing!r}: malformed: {type(exc).__name__}: {exc}")


def too_large(framing: object, size: int | str) -> PsFramingError:
    """Make the error for a message of `size` bytes; a text if the exact size is not known."""
    return PsFramingError(f"{framing!r}: a message of {size} bytes is larger than max_size")


def check_size(name: str, value: object, least: int = 1, most: int = LARGEST_SIZE) -> int:
    """Return `value`, a number of bytes.

    Raises:
        TypeError: `value` is not a whole number.
        ValueError: `value` is less than `least` or more than `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of bytes, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most} bytes, not {value}")
    return value
