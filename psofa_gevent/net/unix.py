"""Unix domain sockets: the paths on which servers listen and to which clients connect (unix(7)).

They are written as hosts that begin with ``unix:``, as in ``unix:/run/app.sock``; the port has no
effect.

Resource handling: the file belongs to the server that made it, which removes it when it stops. A
stale file, left by a server that died, is replaced. A file on which a server listens, or that is
not a socket, is an error. Between bind(2) and listen(2) the file of a server looks stale, so
servers that start in one directory wait for each other (`starting_alone`).

Only `starting_alone` switches.
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
"""Tries to lock the directory, after which a server starts without the lock: the program that holds
the lock for that long is not a server that starts."""


def is_unix(host: object) -> bool:
    """Whether a host is a Unix socket of any name, also one that users can't ask for."""
    return isinstance(host, str) and host.startswith(UNIX_PREFIX)


def unix_path(host: str) -> str | None:
    """The path of a host that is a Unix socket; ``None``: it is the name or address of a machine.

    Raises:
        ValueError: the path is empty or too long.
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
    """The socket module's name of a Unix socket as a host and a port; ``None``: it has no name."""
    if isinstance(name, bytes):  # in Linux's abstract namespace
        name = os.fsdecode(name.replace(b"\0", b"@"))
    return (UNIX_PREFIX + name, 0) if isinstance(name, str) and name else None


class UnixFile(NamedTuple):
    """The file of a listening socket: its path and identity, and the process that made it."""

    path: str
    device: int
    inode: int
    process: int

    @classmethod
    def of(cls, path: str) -> UnixFile:
        """The file that is at `path` now, made by this process."""
        found = os.stat(path)
        return cls(os.path.abspath(path), found.st_dev, found.st_ino, os.getpid())

    def remove(self) -> None:
        """Remove the file, unless another file is in its place.

        Without effect in a process that was forked since the file was made.
        """
        if os.getpid() != self.process:
            return
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


@contextlib.contextmanager
def starting_alone(path: str) -> Iterator[None]:
    """Keep other servers in the directory of `path` from starting during the block.

    In the block a server makes the file and begins to listen. The directory is locked (flock(2)),
    which leaves nothing behind; where it can't be locked, the block runs without the lock. Switches
    while another process holds the lock.
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
                    # The close alone is not enough: a child process may have a duplicate.
                    unlocking.callback(fcntl.flock, directory, fcntl.LOCK_UN)
                    break
        yield


def make_room(path: str) -> None:
    """Remove the stale file of a server that is gone, if there is one.

    Raises:
        OSError: a server listens there (EADDRINUSE), or the path is not a socket (EEXIST).
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
