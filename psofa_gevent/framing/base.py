"""What a framing is, and what a decoder promises.

A decoder is fed with bytes as they come and gives out messages. It keeps the bytes of the one
message that is not whole yet, never more than ``max_size`` and what frames it. Those of this
package look at each byte once, however the stream was cut, so a message that comes byte by byte
costs no more than that. A framing of one's own that only has `Framing.decode` is asked again with
each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from psofa_gevent.errors import PsFramingError

__all__ = ["DEFAULT_MAX_SIZE", "Decoder", "Framing", "check_size"]

T = TypeVar("T")
U = TypeVar("U")

DEFAULT_MAX_SIZE = 1_048_576
"""Bytes of a message. A peer can make a session keep so much: give no more than is needed."""
LARGEST_SIZE = 2**31 - 1


class Framing(Generic[T]):
    """How messages of type `T` are cut out of a stream of bytes, and put into one.

    For a framing of your own override `decode` and `encode`::

        class Netstring(Framing[bytes]):
            def decode(self, data, start):
                colon = data.find(b":", start)
                if colon < 0:
                    return None
                end = colon + 1 + int(data[start:colon])
                if len(data) <= end:
                    return None
                return data[colon + 1 : end], end + 1

            def encode(self, message):
                return b"%d:%b," % (len(message), message)

    Attributes:
        max_size: the most bytes that are kept of a message that is not whole.
    """

    max_size: int = DEFAULT_MAX_SIZE

    def decode(self, data: bytes, start: int) -> tuple[T, int] | None:
        """Find the first message.

        Args:
            data: bytes that have come.
            start: the index in `data` of the first that belongs to no earlier message.

        Returns:
            The message, and the index behind it: more than `start`. ``None``: it is not whole yet.

        Raises:
            PsFramingError: these bytes can't be the beginning of a message. Any other exception
                counts as that, too.
        """
        raise NotImplementedError

    def encode(self, message: T) -> bytes:
        """The bytes that stand for `message` in the stream.

        Raises:
            PsFramingError: this framing can't carry such a message.
            TypeError: it is of the wrong type.
        """
        raise NotImplementedError

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
    """

    spent = False

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
        """Bytes kept of a message that is not whole; 0: none has begun."""
        raise NotImplementedError


class _DecodeAgain(Decoder[T]):
    """Asks `Framing.decode` again whenever more has come."""

    def __init__(self, framing: Framing[T]) -> None:
        self._framing = framing
        self._data = b""
        self._at = 0

    def feed(self, data: bytes) -> Iterator[T]:
        if self._data:
            data = self._data + data
        self._data, self._at = data, 0
        while self._at < len(data):
            found = self._decode(data)
            if found is None:
                break
            message, end = found
            if not self._at < end <= len(data):
                raise PsFramingError(
                    f"{self._framing!r}: decode returned the index {end}, which must be more than "
                    f"{self._at} and at most {len(data)}"
                )
            self._at = end
            yield message
        self._data, self._at = data[self._at :], 0
        if len(self._data) > self._framing.max_size:
            raise too_large(self._framing, len(self._data))

    def _decode(self, data: bytes) -> tuple[T, int] | None:
        try:
            return self._framing.decode(data, self._at)
        except PsFramingError:
            raise
        except Exception as exc:
            raise _malformed(self._framing, exc) from exc

    def unread(self) -> bytes:
        return self._data[self._at :]

    @property
    def kept(self) -> int:
        return len(self._data)


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

    def feed(self, data: bytes) -> Iterator[U]:
        decode = self._decode
        for message in self._decoder.feed(data):
            try:
                made = decode(message)
            except Exception as exc:
                raise _malformed(self._framing, exc) from exc
            yield made
        self.spent = self._decoder.spent

    @property
    def kept(self) -> int:
        return self._decoder.kept


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
