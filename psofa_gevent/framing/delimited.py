"""Framings in which certain bytes end each message: `Delimiter`, `Line`, `Between`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from psofa_gevent.errors import PsFramingError
from psofa_gevent.framing.base import (
    DEFAULT_MAX_SIZE,
    Decoder,
    Framing,
    LineEnds,
    check_size,
    too_large,
)
from psofa_gevent.messages import Message, as_bytes

__all__ = ["Between", "Delimiter", "Line"]

CARRIAGE_RETURN = 13


class Delimiter(Framing[bytes]):
    r"""Each message ends with the same bytes, which it does not contain.

    ``on_message`` gets the message without the delimiter, and ``send`` adds it. STOMP, with its
    heart-beats, is ``Delimiter(b"\0", ignore=b"\r\n")``.
    """

    _drops_carriage_return = False
    ignore = b""

    def __init__(
        self, delimiter: bytes, *, ignore: bytes = b"", max_size: int = DEFAULT_MAX_SIZE
    ) -> None:
        r"""Check the settings.

        Args:
            delimiter: the bytes that end a message: one byte or more.
            ignore: bytes that are dropped in front of a message, in any number, for peers that keep
                the connection alive with them. They count neither for ``frame_timeout`` nor for
                `max_size`. If `delimiter` begins with one of them, there are no empty messages.
                Without `ignore`, line ends in front of a message are its first bytes, but do not
                count for ``frame_timeout`` as long as nothing else has come.
            max_size: the most bytes of a message, without its delimiter.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        self.delimiter = _check_marker("delimiter", delimiter)
        if not isinstance(ignore, bytes):
            raise TypeError(f"ignore must be bytes, not {ignore!r}")
        if ignore:
            self.ignore = ignore
        self.max_size = check_size("max_size", max_size)

    def __repr__(self) -> str:
        ignore = f"ignore={self.ignore!r}, " if self.ignore else ""
        return f"{type(self).__name__}({self.delimiter!r}, {ignore}max_size={self.max_size})"

    def encode(self, message: Message) -> bytes:
        """Return `message` and the delimiter."""
        data = message if type(message) is bytes else as_bytes(message)
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        framed = data + self.delimiter
        # The message's last bytes and the delimiter's first ones may form a delimiter.
        if framed.find(self.delimiter) != len(data):
            raise PsFramingError(f"{self!r}: the message contains the delimiter")
        if self.ignore and framed[0] in self.ignore:
            raise PsFramingError(f"{self!r}: the message begins with a byte that is ignored")
        return framed

    def decoder(self) -> Decoder[bytes]:
        """Make a decoder for one connection."""
        return _DelimiterDecoder(
            self, self.delimiter, ignore=self.ignore, drops_cr=self._drops_carriage_return
        )


class Line(Delimiter):
    r"""Each message is a line: it ends with LF, or with CR LF.

    ``on_message`` gets the line without its end, and ``send`` adds an end.
    """

    _drops_carriage_return = True

    def __init__(self, *, newline: bytes = b"\n", max_size: int = DEFAULT_MAX_SIZE) -> None:
        r"""Check the settings.

        Args:
            newline: the end of the lines that `encode` makes: ``b"\n"`` or ``b"\r\n"``. The decoder
                understands both.
            max_size: the most bytes of a line, without its end.

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
        """Return `message` and a newline."""
        data = message if type(message) is bytes else as_bytes(message)
        line = data + self.newline
        # The only LF must be the last byte, and the decoder must not take a CR before it as a part
        # of the line's end.
        if line.find(b"\n") != len(line) - 1 or line[-2:] == self._mistaken:
            raise PsFramingError(f"{self!r}: the line contains a newline, or ends with CR")
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        return line


class Between(Framing[bytes]):
    r"""Each message stands between two markers, as in ``b"\x02…\x03"`` (STX, ETX) or in MLLP.

    ``on_message`` gets the message without the markers, and ``send`` adds them.

    Both markers may be the same, a flag: ``b"~"`` in HDLC, PPP (RFC 1662, section 3.1) and
    JT/T 808. One flag may end a message and begin the next. There are no empty messages then, so
    peers may send flags to fill the time. (This framing does not unescape the bytes between flags:
    those protocols have their own rules for escaping.)
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
            start: the bytes before a message. MLLP: ``b"\x0b"``.
            end: the bytes after a message, which the message does not contain. MLLP:
                ``b"\x1c\r"``.
            resynchronise: True: bytes between messages are skipped, and so are the bytes of a
                message that has not ended when the next one starts; then a message can't contain
                `start`. False: anything but `start` after a message is an error. If both markers
                are the same, this is only about the bytes before the first one.
            max_size: the most bytes of a message, without its markers.

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
        """Return `message` between its markers."""
        data = as_bytes(message)
        if len(data) > self.max_size:
            raise too_large(self, len(data))
        framed = self.start + data + self.end
        # Markers may share bytes with the message, and with each other.
        if framed.find(self.end, len(self.start)) != len(framed) - len(self.end):
            raise PsFramingError(f"{self!r}: the message contains the end marker")
        if self.start == self.end:
            if not data:
                raise PsFramingError(f"{self!r}: a message must not be empty")
        elif self.resynchronise and framed.rfind(self.start, 0, -len(self.end)) != 0:
            raise PsFramingError(f"{self!r}: the message contains the start marker")
        return framed

    def decoder(self) -> Decoder[bytes]:
        """Make a decoder for one connection."""
        return _FlagDecoder(self) if self.start == self.end else _BetweenDecoder(self)


class _SearchingDecoder(Decoder[bytes]):
    """Keeps the bytes of a message whose end has not come."""

    def __init__(self, framing: Framing[bytes], end: bytes, *, offset: int, most: int) -> None:
        self._framing = framing
        self._max_size = framing.max_size
        self._most = most
        """The most bytes that are kept; the last of them may be the first bytes of the end."""
        self._end = end
        self._offset = offset
        """Bytes before the message, where the decoder does not look for the end."""
        self._tail = bytearray()
        """The bytes that are kept."""
        self._data = b""
        self._at = 0

    def unread(self) -> bytes:
        return bytes(self._tail) or self._data[self._at :]

    @property
    def kept(self) -> int:
        return len(self._tail)

    def _join(self, data: bytes) -> int:
        """Add `data` to the kept bytes; return the index of the end in them, or -1."""
        tail = self._tail
        searched = max(len(tail) - len(self._end) + 1, self._offset)
        tail += data
        return tail.find(self._end, searched)

    def _keep(self, data: bytes, at: int) -> None:
        """Keep the bytes of `data` from `at` on: the end of their message has not come."""
        self._tail += memoryview(data)[at:]
        self._data, self._at = b"", 0

    def _check_tail(self) -> None:
        if len(self._tail) > self._most:
            raise too_large(self._framing, f"more than {self._max_size}")


class _DelimiterDecoder(_SearchingDecoder):
    def __init__(
        self, framing: Framing[bytes], end: bytes, *, ignore: bytes, drops_cr: bool
    ) -> None:
        most = framing.max_size + drops_cr + len(end) - 1
        super().__init__(framing, end, offset=0, most=most)
        self._drops_cr = drops_cr
        self._ignored = re.compile(b"[%b]*" % re.escape(ignore)).match if ignore else None
        """Finds the ignored bytes in front of a message."""
        self._line_ends = LineEnds()
        """The line ends at the beginning of the tail."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        # Local names, as a read may have thousands of messages: attributes would cost time.
        end, drops_cr, max_size = self._end, self._drops_cr, self._max_size
        ignored = self._ignored
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
            self._line_ends.restart()
            at = stop + size - before
            self._data, self._at = data, at
            if drops_cr and message.endswith(b"\r"):
                message = message[:-1]
            if len(message) > max_size:
                raise too_large(self._framing, len(message))
            yield message
        self._data = data
        find = data.find
        if ignored is not None:
            at = _end_of(ignored(data, at))
        while (stop := find(end, at)) >= 0:
            begin, at = at, stop + size
            if drops_cr and stop > begin and data[stop - 1] == CARRIAGE_RETURN:
                stop -= 1
            if stop - begin > max_size:
                raise too_large(self._framing, stop - begin)
            self._at = at
            yield data[begin:stop]
            if ignored is not None:
                at = _end_of(ignored(data, at))
        self._keep(data, at)
        self._check_tail()

    @property
    def has_begun(self) -> bool:
        return self._line_ends.look(self._tail, 0) < len(self._tail)


class _FlagDecoder(_SearchingDecoder):
    """The decoder of a `Between` whose two markers are the same, a flag."""

    def __init__(self, framing: Between) -> None:
        most = framing.max_size + len(framing.end) - 1
        super().__init__(framing, framing.end, offset=0, most=most)
        self._resynchronise = framing.resynchronise
        self._flags = re.compile(b"(?:%b)*" % re.escape(framing.end)).match
        self._is_inside = False
        """Whether a flag has come: the bytes up to the next flag are a message."""
        self._start = b""
        """That flag, unless it was the end of a message that was returned."""

    def unread(self) -> bytes:
        return self._start + super().unread()

    @property
    def kept(self) -> int:
        return len(self._start) + len(self._tail)

    @property
    def has_begun(self) -> bool:
        return len(self._tail) > 0  # flags alone fill the time

    def feed(self, data: bytes) -> Iterator[bytes]:
        flag = self._end
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
            at = stop + len(flag) - before
            self._data, self._at = data, at
            if self._is_message(message):
                yield message
        self._data = data
        while (stop := data.find(flag, at)) >= 0:
            message, at = data[at:stop], stop + len(flag)
            if self._is_message(message):
                self._at = at
                yield message
            elif data.startswith(flag, at):  # a whole read may consist of flags
                at = _end_of(self._flags(data, at))
        self._keep(data, at)
        self._check_tail()

    def _is_message(self, found: bytes) -> bool:
        """Whether these bytes, up to a flag, are a message."""
        if self._is_inside and found:
            if len(found) > self._max_size:
                raise too_large(self._framing, len(found))
            self._start = b""
            return True
        if found and not self._resynchronise:
            raise self._noise(found)
        self._is_inside = True
        self._start = self._end
        self.skips += 1
        return False

    def _check_tail(self) -> None:
        if self._is_inside:
            super()._check_tail()
        elif not self._resynchronise:
            if not self._end.startswith(self._tail):
                raise self._noise(self._tail)
        else:
            # All of it is noise, except bytes that may begin the first flag.
            noise = len(self._tail) - _size_of_cut(self._end, self._tail)
            if noise:
                del self._tail[:noise]
                self.skips += 1

    def _noise(self, found: bytes | bytearray) -> PsFramingError:
        begins = bytes(found[: len(self._end)])
        return PsFramingError(f"{self._framing!r}: a message starts with {begins!r}")


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
                # The start marker itself was cut: begin again with its first bytes.
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
        """The message in `framed`, which begins with the start marker and has no end marker."""
        begin = len(self._start)
        if self._resynchronise:
            begin += framed.rfind(self._start)
        if len(framed) - begin > self._max_size:
            raise too_large(self._framing, len(framed) - begin)
        return framed[begin:]

    def _find_start(self, data: bytes, at: int) -> int:
        """The index from `at` on where the next message starts, or may start if it is cut."""
        start = self._start
        if data.startswith(start, at):
            return at
        if not self._resynchronise:
            if start.startswith(data[at : at + len(start)]):
                return at  # the rest of the start marker has not come
            raise PsFramingError(
                f"{self._framing!r}: a message starts with {data[at : at + len(start)]!r}"
            )
        found = data.find(start, at)
        if found < 0:
            found = len(data) - _size_of_cut(start, data[at:])
        if found > at:
            self.skips += 1
        return found

    def _trim_tail(self, searched: int) -> None:
        """Drop the bytes before the last start marker in the tail, as they are noise.

        `searched` bytes were looked at before. A start marker that may be part of an end marker,
        whose rest has not come, does not count.
        """
        if self._resynchronise:
            tail, start, end = self._tail, self._start, self._end
            begin = max(searched - len(start) - len(end) + 2, 0)
            again = tail.rfind(start, begin, len(tail) - _size_of_cut(end, tail))
            if again > 0:
                del self._tail[:again]
                self.skips += 1


def _size_of_cut(marker: bytes, data: bytes | bytearray) -> int:
    """The number of bytes at the end of `data`, which has no `marker`, that may begin one."""
    for size in range(min(len(marker) - 1, len(data)), 0, -1):
        if data.endswith(marker[:size]):
            return size
    return 0


def _end_of(match: re.Match[bytes] | None) -> int:
    assert match is not None  # it may be empty
    return match.end()


def _check_marker(name: str, value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {value!r}")
    if not value:
        raise ValueError(f"{name} must be one byte or more, not {value!r}")
    return value
