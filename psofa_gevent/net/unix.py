"""Unix domain sockets: a server that listens on a path, and clients that connect to it (unix(7)).

They are hosts that begin with ``unix:``, as in ``unix:/run/app.sock``; the port does not matter.

Resource handling: the file belongs to the server that made it, which removes it when it stops. A
file that is left of a server that ended without a word is replaced; one on which a server listens,
or that is no socket, is refused. Between bind(2) and listen(2) a server's file looks like one that
is left: so servers that start in one directory wait for each other (`starting_alone`).
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

import gevent

__all__ = ["UnixFile", "is_unix", "make_room", "starting_alone", "unix_endpoint", "unix_path"]

UNIX_PREFIX = "unix:"
LONGEST_PATH = 107
"""Bytes (unix(7): sun_path has 108, with a null byte). macOS has 104."""
LOCK_PERIOD = 0.01
"""Seconds between two tries to lock the directory."""
MOST_LOCK_TRIES = 100
"""Tries, then it goes without: who has the lock for so long is no server that starts."""


def is_unix(host: object) -> bool:
    """Whether a host is a Unix socket, of whatever name: also one that nobody could ask for."""
    return isinstance(host, str) and host.startswith(UNIX_PREFIX)


def unix_path(host: str) -> str | None:
    """The path in a host that is one; ``None``: it is the name or address of a machine.

    Raises:
        ValueError: it is too long, or none.
    """
    if not host.startswith(UNIX_PREFIX):
        return None
    path = host.removeprefix(UNIX_PREFIX)
    size = len(os.fsencode(path))
    if not 1 <= size <= LONGEST_PATH:
        raise ValueError(
            f"host must have a path of 1 to {LONGEST_PATH} bytes after 'unix:', not {host!r}"
        )
    return path


def unix_endpoint(name: object) -> tuple[str, int] | None:
    """What the socket module says of a Unix socket, as a host and a port; unnamed: ``None``."""
    if isinstance(name, bytes):  # in Linux's abstract namespace
        name = os.fsdecode(name.replace(b"\0", b"@"))
    return (UNIX_PREFIX + name, 0) if isinstance(name, str) and name else None


class UnixFile(NamedTuple):
    """The file of a listening socket, as it was when it was made."""

    path: str
    device: int
    inode: int
    process: int

    @classmethod
    def of(cls, path: str) -> UnixFile:
        """The file that is there now."""
        found = os.stat(path)
        return cls(os.path.abspath(path), found.st_dev, found.st_ino, os.getpid())

    def remove(self) -> None:
        """Remove it, unless another one is in its place. Not in a process that was forked since."""
        if os.getpid() != self.process:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


@contextlib.contextmanager
def starting_alone(path: str) -> Iterator[None]:
    """The time in which a server makes the file `path` and begins to listen. Switches, to wait.

    Its directory is locked (flock(2)), which leaves nothing behind; where it can't be, it goes
    without.
    """
    with contextlib.ExitStack() as unlocking:
        with contextlib.suppress(OSError):
            directory = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
            unlocking.callback(os.close, directory)
            for _ in range(MOST_LOCK_TRIES):
                try:
                    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    gevent.sleep(LOCK_PERIOD)
                else:
                    # By itself, too: a child process may have a duplicate of the directory.
                    unlocking.callback(fcntl.flock, directory, fcntl.LOCK_UN)
                    break
        yield


def make_room(path: str) -> None:
    """Remove the file of a server that is gone.

    Raises:
        OSError: a server listens there (EADDRINUSE), or it is no socket (EEXIST).
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "the path exists and is not a socket")
    with contextlib.closing(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)) as asking:
        asking.setblocking(False)
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except BlockingIOError as exc:  # its backlog is full
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from exc
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
