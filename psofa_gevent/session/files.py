"""The file that `PsSession.send_file` sends, of which only a piece is in memory at a time.

A `FileSource` stands in the send queue (`psofa_gevent.session.send_queue`) like any message, and
gives the session a part of the file at each of its turns. The kernel sends a regular file by itself
(sendfile(2)) where it can. Otherwise the file is read and sent in pieces: with TLS, with a framing,
on file systems that refuse sendfile, and for objects that can only be read.

Runs in the greenlet or task that sends. Reading a regular file blocks the thread while the disk
works, one piece at a time. Only ``read`` of a user's object and a user's ``progress`` may switch.
The session may be in any phase after such a switch, so the queue checks it before the next byte.

Resource handling: the descriptor belongs to the `FileSource`. It opens a path, and duplicates the
descriptor of a file object: if the user closes the file meanwhile, its descriptor's number may be
used again, but no other file's bytes are sent.
"""

from __future__ import annotations

import errno
import inspect
import io
import logging
import os
import stat
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from psofa_gevent.checks import MAX_BUFFER, check_int
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsSendError
from psofa_gevent.hub.forking import track
from psofa_gevent.messages import as_bytes
from psofa_gevent.session.send_buffers import Step
from psofa_gevent.tls.socket import TlsSocket

if TYPE_CHECKING:
    from psofa_gevent.session.connection import Connection

__all__ = ["File", "FileSource", "Progress", "Readable"]

TURN_SIZE = 1_048_576
"""Bytes after which other sessions have their turn, even if the kernel would take more."""
LEAST_OF_A_TURN = 8_192
"""Minimum charge for a piece, in bytes: even a tiny piece costs 10 to 25 µs."""
MAX_SIZE = 2**63 - 1
"""Bytes: the largest file size and position (``off_t``)."""
HAS_SENDFILE = hasattr(os, "sendfile")

Progress = Callable[[int, int | None], object]


class Readable(Protocol):
    """A binary file, or any other object that can be read piece by piece."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; at the end, no bytes."""


File = str | os.PathLike[str] | os.PathLike[bytes] | Readable


class FileSource:
    """A file that is being sent (`psofa_gevent.session.send_buffers.Source`). Must be closed."""

    __slots__ = (
        "__weakref__",
        "_by_kernel",
        "_encode",
        "_input",
        "_left",
        "_pending",
        "_pending_size",
        "_piece_size",
        "_progress",
        "_turn",
        "begun",
        "offered_at",
        "sent",
        "total",
    )

    def __init__(
        self,
        file: File,
        offset: int,
        count: int | None,
        *,
        encode: Callable[[Any], bytes] | None,
        piece_size: int,
        progress: Progress | None,
    ) -> None:
        """Open the file. Arguments and errors as for `PsSession.send_file`.

        `encode` makes a message of each piece; None: the pieces are sent unchanged.
        """
        check_int("offset", offset, 0, MAX_SIZE)
        if count is not None:
            check_int("count", count, 0, MAX_SIZE)
        check_int("piece_size", piece_size, 1, MAX_BUFFER)
        _check_progress(progress)
        self._input = _open(file, offset)
        try:
            self.total = _expected(self._input, count)
        except BaseException:
            self._input.close()
            raise
        self._left = self.total
        self._encode = encode
        self._piece_size = piece_size
        self._progress = progress
        self._by_kernel = HAS_SENDFILE and encode is None and self._input.size is not None
        self._pending: bytes | memoryview = b""
        """The part of an encoded piece that the kernel has not taken."""
        self._pending_size = 0
        """Bytes of the file in the pending piece; 0: no piece is pending."""
        self._turn = 0
        self.sent = 0
        """Bytes of the file that the kernel has taken."""
        self.begun = False
        self.offered_at = 0.0
        track(self)

    def close(self) -> None:
        """Close the descriptor; a user's object stays open. May be called again."""
        self._input.close()

    def _let_go(self, _hub: object) -> None:
        """Close the descriptor, in a child process: the parent sends the file."""
        self.close()

    @property
    def is_small(self) -> bool:
        """Whether the file may be sent at once, in one piece."""
        return self._left is not None and self._left <= self._piece_size

    def give(self, session: Connection[Any]) -> Step:
        """See `psofa_gevent.session.send_buffers.Source`."""
        if self._pending_size:
            return self._give_piece(session)
        if self._left == 0:
            return Step.ALL
        if self._by_kernel and type(session._sock) is not TlsSocket:
            return self._give_by_kernel(session)
        return self._read_piece(session)

    def _give_by_kernel(self, session: Connection[Any]) -> Step:
        assert self._left is not None
        file = self._input
        assert isinstance(file, _RegularFile)
        try:
            taken = session._send_file_now(file.descriptor, file.at, min(self._left, TURN_SIZE))
        except OSError:
            self._by_kernel = False
            return Step.MORE
        if taken is None:
            return Step.SOME
        if taken == 0:
            raise self._ended_early(session)
        file.at += taken
        self._count(taken)
        return Step.SOME if self._left else Step.ALL

    def _read_piece(self, session: Connection[Any]) -> Step:
        size = self._piece_size if self._left is None else min(self._piece_size, self._left)
        piece = self._input.read(size)
        if self._encode is not None and 0 < len(piece) < size:
            piece = self._fill_up(piece, size)
        self.offered_at = monotonic()
        if piece:
            self._pending = memoryview(piece if self._encode is None else self._encode(piece))
            self._pending_size = len(piece)
            return Step.MORE
        if self._left is not None:
            raise self._ended_early(session)
        self.begun = False
        return Step.ALL

    def _fill_up(self, piece: bytes, size: int) -> bytes:
        """Read more until `piece` has `size` bytes, or the file ends: the piece is a message."""
        parts = [piece]
        left = size - len(piece)
        while left and (more := self._input.read(left)):
            parts.append(more)
            left -= len(more)
        return b"".join(parts)

    def _give_piece(self, session: Connection[Any]) -> Step:
        taken = session._send_now(self._pending)
        self._turn += max(taken, LEAST_OF_A_TURN)
        if taken < len(self._pending):
            self.begun = self.begun or taken + session._half_sent > 0
            self._pending = self._pending[taken:]
            self._turn = 0
            return Step.SOME
        size, self._pending_size = self._pending_size, 0
        self._pending = b""
        self._count(size)
        if self._left == 0:
            return Step.ALL
        if self._turn < TURN_SIZE:
            return Step.MORE
        self._turn = 0
        return Step.SOME

    def _count(self, size: int) -> None:
        """Count `size` bytes of the file as sent, and call ``progress``."""
        self.sent += size
        if self._left is not None:
            self._left -= size
        self.begun = self._left != 0
        if self._progress is not None:
            self._progress(self.sent, self.total)
            self.offered_at = monotonic()

    def _ended_early(self, session: Connection[Any]) -> PsSendError:
        error = PsSendError(f"{session!r}: the file ended after {self.sent} of {self.total} bytes")
        if self.begun:
            session._break_stream()
            session._request_close(PsCloseReason.FAILED, error)
            session._log(logging.WARNING, "%s", error)
        return PsSendError(*error.args)  # another object than the one that the session keeps


class _RegularFile:
    """A regular file, by a descriptor of its own, whose position is neither used nor moved."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self.descriptor = descriptor
        self.at = offset
        # Files of /proc report a size of 0: they are read up to their end.
        size = os.fstat(descriptor).st_size
        self.size = max(size - offset, 0) if size else None
        """Bytes from `offset` to the end; None: unknown."""

    def read(self, size: int) -> bytes:
        piece = os.pread(self.descriptor, size, self.at)
        self.at += len(piece)
        return piece

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _Stream:
    """A user's object, which stays open."""

    size: None = None

    def __init__(self, file: Readable) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        piece: object = self._file.read(size)
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            raise TypeError(f"file.read must return bytes, not {type(piece).__name__}")
        data = as_bytes(piece)
        if len(data) > size:
            raise ValueError(f"file.read({size}) returned {len(data)} bytes")
        return data

    def close(self) -> None:
        pass


def _check_progress(progress: object) -> None:
    if progress is None:
        return
    if not callable(progress) or inspect.iscoroutinefunction(progress):
        raise TypeError(f"progress must be a plain function or None, not {progress!r}")


def _open(file: Any, offset: int) -> _RegularFile | _Stream:
    if isinstance(file, (str, os.PathLike)):
        return _open_path(file, offset)
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"file must be opened in binary mode ('rb'), not {file!r}")
    if isinstance(file, type) or not callable(getattr(file, "read", None)):
        kind = f"the class {file.__name__}" if isinstance(file, type) else type(file).__name__
        raise TypeError(f"file must be a path, or an object with a method read, not {kind}")
    readable = getattr(file, "readable", None)
    if readable is not None and not readable():
        raise TypeError(f"file must be opened for reading, not {file!r}")
    descriptor = _descriptor(file)
    if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
        if file.writable():
            file.flush()
        return _regular_file(os.dup(descriptor), offset)
    _seek(file, offset)
    return _Stream(file)


def _open_path(path: str | os.PathLike[str] | os.PathLike[bytes], offset: int) -> _RegularFile:
    # Without O_NONBLOCK, opening a FIFO would block the thread before its kind can be checked.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return _regular_file(descriptor, offset)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise ValueError(f"file must be the path of a regular file (open others yourself): {path!r}")


def _regular_file(descriptor: int, offset: int) -> _RegularFile:
    try:
        return _RegularFile(descriptor, offset)
    except BaseException:
        os.close(descriptor)
        raise


def _descriptor(file: Any) -> int | None:
    """The descriptor that holds exactly the bytes that `file` reads; ``None``: there may be none.

    Only for file objects that `open` returns: the descriptor of a `gzip.GzipFile`, for example,
    holds the compressed bytes.
    """
    kinds = (io.BufferedReader, io.BufferedRandom)
    raw = file.raw if type(file) in kinds else file
    return raw.fileno() if type(raw) is io.FileIO else None


def _seek(file: Any, offset: int) -> None:
    seekable = getattr(file, "seekable", None)
    can_seek = seekable() if seekable is not None else hasattr(file, "seek")
    if can_seek:
        file.seek(offset)
    elif offset:
        raise ValueError(f"offset must be 0 for a file that can't seek, not {offset}")


def _expected(file: _RegularFile | _Stream, count: int | None) -> int | None:
    """The number of bytes to send; ``None``: all up to the end, whose position is unknown."""
    if count is None:
        return file.size
    if file.size is not None and file.size < count:
        raise PsSendError(f"the file has {file.size} bytes from there on, not {count}")
    return count
