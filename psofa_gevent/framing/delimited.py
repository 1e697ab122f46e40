"""Framings in which certain bytes end a message: `Delimiter`, `Line`, `Between`."""

from __future__ import annotations

from collections.abc import Iterator

from psofa_gevent.errors import PsFramingError
from psofa_gevent.framing.base import (
    DEFAULT_MAX_SIZE,
    Decoder,
    Framing,
    check_size,
    too_large,
)
from psofa_gevent.messages import Message, as_bytes

__all__ = ["Between", "Delimiter", "Line"]

CARRIAGE_RETURN = 13


class Delimiter(Framing[bytes]):
    """Each message ends with the same bytes, which it does not contain.

    ``on_message`` gets it without them, and ``send`` adds them.
    """

    _drops_carriage_return = False

    def __init__(self, delimiter: bytes, *, max_size: int = DEFAULT_MAX_SIZE) -> None:
        """Check the settings.

        Args:
            delimiter: what ends a message: one byte or more.
            max_size: bytes of a message, without its delimiter.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        self.delimiter = _check_marker("delimiter", delimiter)
        self.max_size = check_size("max_size", max_size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.delimiter!r}, max_size={self.max_size})"

    def encode(self, message: Message) -> bytes:
        """`message` and the delimiter."""
        data = message if type(message) is bytes else as_bytes(message)
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        framed = data + self.delimiter
        # A delimiter of several bytes may begin in the message.
        if framed.find(self.delimiter) != len(data):
            raise PsFramingError(f"{self!r}: the message contains the delimiter")
        return framed

    def decoder(self) -> Decoder[bytes]:
        """A decoder for one connection."""
        return _DelimiterDecoder(self, self.delimiter, drops_cr=self._drops_carriage_return)


class Line(Delimiter):
    r"""Each message is a line: it ends with LF, or with CR LF.

    ``on_message`` gets it without its end, and ``send`` adds one.
    """

    _drops_carriage_return = True

    def __init__(self, *, newline: bytes = b"\n", max_size: int = DEFAULT_MAX_SIZE) -> None:
        r"""Check the settings.

        Args:
            newline: what `encode` ends lines with: ``b"\n"`` or ``b"\r\n"``. Both are understood.
            max_size: bytes of a line, without its end.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        if newline not in (b"\n", b"\r\n"):
            raise ValueError(rf"newline must be b'\n' or b'\r\n', not {newline!r}")
        super().__init__(b"\n", max_size=max_size)
        self.newline = newline
        self._mistaken = b"\r\n" if newline == b"\n" else b""

    def __repr__(self) -> str:
        return f"Line(newline={self.newline!r}, max_size={self.max_size})"

    def encode(self, message: Message) -> bytes:
        """`message` and a newline."""
        data = message if type(message) is bytes else as_bytes(message)
        line = data + self.newline
        # The end of its line, the first one, and of what is a line's end the longest.
        if line.find(b"\n") != len(line) - 1 or line[-2:] == self._mistaken:
            raise PsFramingError(f"{self!r}: the line contains a newline, or ends with CR")
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        return line


class Between(Framing[bytes]):
    r"""Each message stands between two markers, as in ``b"\x02…\x03"`` (STX, ETX) or in MLLP.

    ``on_message`` gets it without them, and ``send`` adds them.
    """

    def __init__(
        self,
        start: bytes,
        end: bytes,
        *,
        resynchronise: bool = False,
        max_size: int = DEFAULT_MAX_SIZE,
    ) -> None:
        r"""Check the settings.

        Args:
            start: what a message begins with. MLLP: ``b"\x0b"``.
            end: what it ends with, and does not contain. MLLP: ``b"\x1c\r"``.
            resynchronise: whether bytes between messages are skipped, as are those of a message
                that has not ended when the next one starts; a message can't contain `start` then.
                Otherwise anything but `start` after a message is an error.
            max_size: bytes of a message, without its markers.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        self.start = _check_marker("start", start)
        self.end = _check_marker("end", end)
        if not isinstance(resynchronise, bool):
            raise TypeError(f"resynchronise must be True or False, not {resynchronise!r}")
        self.resynchronise = resynchronise
        self.max_size = check_size("max_size", max_size)

    def __repr__(self) -> str:
        return (
            f"Between({self.start!r}, {self.end!r}, resynchronise={self.resynchronise}, "
            f"max_size={self.max_size})"
        )

    def encode(self, message: Message) -> bytes:
        """`message` between its markers."""
        data = as_bytes(message)
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        framed = self.start + data + self.end
        # Markers may share bytes with the message, and with each other.
        if framed.find(self.end, len(self.start)) != len(framed) - len(self.end):
            raise PsFramingError(f"{self!r}: the message contains the end marker")
        if self.resynchronise and framed.rfind(self.start, 0, -len(self.end)) != 0:
            raise PsFramingError(f"{self!r}: the message contains the start marker")
        return framed

    def decoder(self) -> Decoder[bytes]:
        """A decoder for one connection."""
        return _BetweenDecoder(self)


class _SearchingDecoder(Decoder[bytes]):
    """Keeps what has come of a message whose end has not."""

    def __init__(self, framing: Framing[bytes], end: bytes, *, offset: int, most: int) -> None:
        self._framing = framing
        self._max_size = framing.max_size
        self._most = most
        """Bytes that are kept at most, of which the last may be the first of the end."""
        self._end = end
        self._offset = offset
        """Bytes before the message in which its end is not looked for."""
        self._tail = bytearray()
        self._data = b""
        self._at = 0

    def unread(self) -> bytes:
        return bytes(self._tail) or self._data[self._at :]

    @property
    def kept(self) -> int:
        return len(self._tail)

    def _join(self, data: bytes) -> int:
        """Put `data` to what was kept: the index of the end in both, or -1."""
        tail = self._tail
        searched = max(len(tail) - len(self._end) + 1, self._offset)
        tail += data
        return tail.find(self._end, searched)

    def _keep(self, data: bytes, at: int) -> None:
        """Keep what has no end yet."""
        self._tail += memoryview(data)[at:]
        self._data, self._at = b"", 0

    def _check_tail(self) -> None:
        if len(self._tail) > self._most:
            raise too_large(self._framing, f"more than {self._max_size}")


class _DelimiterDecoder(_SearchingDecoder):
    def __init__(self, framing: Framing[bytes], end: bytes, *, drops_cr: bool) -> None:
        most = framing.max_size + drops_cr + len(end) - 1
        super().__init__(framing, end, offset=0, most=most)
        self._drops_cr = drops_cr

    def feed(self, data: bytes) -> Iterator[bytes]:
        # Each attribute would be felt: a read may have thousands of messages.
        end, drops_cr, max_size = self._end, self._drops_cr, self._max_size
        size = len(end)
        at = 0
        if self._tail:
            before = len(self._tail)
            stop = self._join(data)
            if stop < 0:
                self._check_tail()
                return
            with memoryview(self._tail) as view:
                message = bytes(view[:stop])
            self._tail.clear()
            at = stop + size - before
            self._data, self._at = data, at
            if drops_cr and message.endswith(b"\r"):
                message = message[:-1]
            if len(message) > max_size:
                raise too_large(self._framing, len(message))
            yield message
        self._data = data
        find = data.find
        while (stop := find(end, at)) >= 0:
            begin, at = at, stop + size
            if drops_cr and stop > begin and data[stop - 1] == CARRIAGE_RETURN:
                stop -= 1
            if stop - begin > max_size:
                raise too_large(self._framing, stop - begin)
            self._at = at
            yield data[begin:stop]
        self._keep(data, at)
        self._check_tail()


class _BetweenDecoder(_SearchingDecoder):
    def __init__(self, framing: Between) -> None:
        frame = len(framing.start) + len(framing.end)
        super().__init__(
            framing, framing.end, offset=len(framing.start), most=framing.max_size + frame - 1
        )
        self._start = framing.start
        self._resynchronise = framing.resynchronise

    def feed(self, data: bytes) -> Iterator[bytes]:
        start, end = self._start, self._end
        at = 0
        if self._tail:
            before = len(self._tail)
            if before < len(start):
                # The start itself was cut: begin again with it.
                data = bytes(self._tail) + data
                self._tail.clear()
            else:
                stop = self._join(data)
                if stop < 0:
                    self._trim_tail(before)
                    self._check_tail()
                    return
                with memoryview(self._tail) as view:
                    framed = bytes(view[:stop])
                self._tail.clear()
                at = stop + len(end) - before
                self._data, self._at = data, at
                yield self._between(framed)
        self._data = data
        while (at := self._find_start(data, at)) + len(start) <= len(data):
            stop = data.find(end, at + len(start))
            if stop < 0:
                break
            begin, at = at, stop + len(end)
            self._at = at
            yield self._between(data[begin:stop])
        self._keep(data, at)
        self._trim_tail(0)
        self._check_tail()

    def _between(self, framed: bytes) -> bytes:
        """The message in `framed`, which begins with the start and goes up to the end."""
        begin = len(self._start)
        if self._resynchronise:
            begin += framed.rfind(self._start)
        if len(framed) - begin > self._max_size:
            raise too_large(self._framing, len(framed) - begin)
        return framed[begin:]

    def _find_start(self, data: bytes, at: int) -> int:
        """Where the next message starts, from `at` on; the first index at which it may, if cut."""
        start = self._start
        if data.startswith(start, at):
            return at
        if not self._resynchronise:
            if start.startswith(data[at : at + len(start)]):
                return at  # not all of it has come
            raise PsFramingError(
                f"{self._framing!r}: a message starts with {data[at : at + len(start)]!r}"
            )
        found = data.find(start, at)
        if found >= 0:
            return found
        for cut in range(min(len(start) - 1, len(data) - at), 0, -1):
            if data.endswith(start[:cut]):
                return len(data) - cut
        return len(data)

    def _trim_tail(self, searched: int) -> None:
        """Forget what a later start makes noise of. So many bytes were looked at before."""
        if self._resynchronise:
            again = self._tail.rfind(self._start, max(searched - len(self._start) + 1, 0))
            if again > 0:
                del self._tail[:again]


def _check_marker(name: str, value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {value!r}")
    if not value:
        raise ValueError(f"{name} must be one byte or more, not {value!r}")
    return value
