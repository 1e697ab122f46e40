"""What a framing is, and what a decoder promises.

A decoder is fed with bytes as they come and gives out messages. It keeps the bytes of the one
message that is not whole yet, never more than ``max_size`` and what frames it. The decoders of this
package look at each byte once, however the stream was cut, so a message that comes byte by byte
costs no more than that.

A framing of one's own that only has `Framing.decode` is asked with each piece that comes, so that
no message is late; `Need` spares it the questions that it can't answer yet. The bytes that are kept
for it are never copied for that: they grow in an `io.BytesIO`, which gives them out as ``bytes``
without a copy, and goes on in the same memory when nobody holds those any more. 20 MiB in reads of
64 KiB take 10 ms, of which a join for each read would make 1.5 s.

Line ends in front of a message are what many peers keep a connection alive with (STOMP's
heart-beats, the CRLF of RFC 5626 for SIP). As long as nothing else has come, no message has begun
for a decoder that has to look for its end.
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
"""Bytes of a message. A peer can make a session keep so much: give no more than is needed."""
LARGEST_SIZE = 2**31 - 1
_line_ends = re.compile(rb"[\r\n]*").match
MOST_LINE_ENDS = 65_536
"""How many of them, in front of a message, do not count for ``max_size``: as many as a read has."""


class Skip(enum.Enum):
    """The type of `SKIP`."""

    SKIP = "SKIP"

    def __repr__(self) -> str:
        return "SKIP"


SKIP: Final = Skip.SKIP
"""What `Framing.decode` returns instead of a message: there is none in the bytes up to the end."""


@dataclass(frozen=True, slots=True)
class Need:
    """What `Framing.decode` returns to be asked again when more has come, and not earlier.

    Attributes:
        n: bytes that must be there, counted from `start`: more than there are, and at most
            ``max_size``.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int):
            raise TypeError(f"Need(n) takes a whole number of bytes, not {self.n!r}")
        if self.n < 1:
            raise ValueError(f"Need(n) takes a number of bytes from 1 on, not {self.n}")


Decoded: TypeAlias = tuple[T | Skip, int] | Need | None
"""What `Framing.decode` may return; ``Decoded[bytes]`` where the messages are bytes."""


class Framing(Generic[T]):
    """How messages of type `T` are cut out of a stream of bytes, and put into one.

    For a framing of your own override `decode` and `encode`. This one is that of
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
        max_size: the most bytes that are kept of a message that is not whole. Line ends (CR, LF) in
            front of it do not count, up to 65,536 of them.
    """

    max_size: int = DEFAULT_MAX_SIZE

    def decode(self, data: bytes, start: int) -> Decoded[T]:
        """Find the first message.

        It is asked whenever more has come, so it should look only at as much as it must: a message
        of which each question looks at all bytes costs the square of its size. `Need` saves most
        of the questions where a length comes first.

        Args:
            data: bytes that have come. (It may be kept, or a part of it as a ``memoryview``; but
                then the next bytes cost a copy of it.)
            start: the index in `data` of the first byte that belongs to no earlier message; there
                is at least this one.

        Returns:
            The message, and the index behind it: more than `start`. `SKIP`, and the index behind
            what is no message: keep-alive bytes, padding, noise. It is gone then, and counts
            neither for ``frame_timeout`` nor for `max_size`; skip all that can be skipped in one
            go. ``None``: no message is whole yet; ask again when more has come. ``Need(n)``: ask
            again when there are n bytes from `start` on.

        Raises:
            PsFramingError: these bytes can't be the beginning of a message. Any other exception
                counts as that, too, and so does an index or a `Need` that can't be.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def encode(self, message: T) -> bytes:
        """The bytes that stand for `message` in the stream.

        Raises:
            PsFramingError: this framing can't carry such a message.
            TypeError: it is of the wrong type.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decoder(self) -> Decoder[T]:
        """A decoder for one connection."""
        return _DecodeAgain(self)

    def typed(self, decode: Callable[[T], U], encode: Callable[[U], T | str]) -> Framing[U]:
        """The same framing with messages of another type.

        Args:
            decode: makes of each message what ``on_message`` gets; whatever it raises is a
                malformed message.
            encode: makes of what is sent a message of this framing.

        ::

            framing = Line().typed(json.loads, json.dumps)
        """
        return _Typed(self, decode, encode)


class Decoder(Generic[T]):
    """Cuts the bytes of one connection into messages.

    Attributes:
        spent: it takes no more; what comes is another framing's (`Raw` with a size).
        skips: how often it has skipped bytes that a message seemed to begin with: what it keeps
            begins after those, and after the last message that it gave out.
        left_off: the iterator has ended early, since its turn was over: feed it with no bytes to
            go on.
    """

    spent = False
    skips = 0
    left_off = False

    def take_turns(self, seconds: float) -> None:
        """Leave off when bytes without a message have taken so long.

        Only one that asks others for each thing that it skips needs it; the rest skip at once.
        """

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages that are whole with `data`, which has just come.

        The iterator may be left after any message, for good: then `unread` has what is left.

        Raises:
            PsFramingError: raised by the iterator, after the messages before it.
        """
        raise NotImplementedError

    def unread(self) -> bytes:
        """What belongs to no message that was given out. The decoder is not used any more."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """Bytes kept of a message that is not whole."""
        raise NotImplementedError

    @property
    def has_begun(self) -> bool:
        """Whether a message has begun that is not whole."""
        return self.kept > 0


class LineEnds:
    """Counts the line ends in front of what a decoder keeps, looking at each byte once."""

    __slots__ = ("_looked_at", "count")

    def __init__(self) -> None:
        self.count = 0
        self._looked_at = 0

    def look(self, data: bytes | bytearray, at: int) -> int:
        """How many there are in `data` from `at` on, where more has come since the last look."""
        if self.count == self._looked_at:
            found = _line_ends(data, at + self.count)
            assert found is not None  # it may be of none
            self.count = found.end() - at
        self._looked_at = len(data) - at
        return self.count

    def restart(self) -> None:
        """Something else is kept now."""
        self.count = self._looked_at = 0


class _DecodeAgain(Decoder[T]):
    """Asks `Framing.decode` again whenever more has come."""

    def __init__(self, framing: Framing[T]) -> None:
        self._framing = framing
        self._buffer: io.BytesIO | None = None
        """All that has come of what is not whole, and maybe something before that."""
        self._data = b""
        """What is being decoded: whoever holds that makes the buffer copy it at the next write."""
        self._at = 0
        """Where in either of them the bytes begin that belong to no message given out."""
        self._kept_from = 0
        """The same, when it was fed for the last time."""
        self._need = 0
        """Bytes that there must be from there on, to ask again."""
        self._turn = 0.0
        """Seconds after which it leaves off; 0: it does not."""
        self._turn_until = 0.0
        """When that is; 0: nothing was skipped since it was fed."""
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
        """Whether the turn is over, after one more skip, with so many bytes left to look at."""
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
        """The bytes that there must be; 0: any number of them."""
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
        """Keep what is in `data` from `at` on: of no message, or of one that is not whole."""
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
    """Another framing's messages, made into another type."""

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
    # Not its repr: that of a UnicodeDecodeError has the whole message, escaped.
    return PsFramingError(f"{framing!r}: malformed: {type(exc).__name__}: {exc}")


def too_large(framing: object, size: int | str) -> PsFramingError:
    """The error for a message of `size` bytes, or what is known of it."""
    return PsFramingError(f"{framing!r}: a message of {size} bytes is larger than max_size")


def check_size(name: str, value: object, least: int = 1, most: int = LARGEST_SIZE) -> int:
    """Return `value`, a number of bytes.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than `least` or more than `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of bytes, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most} bytes, not {value}")
    return value
