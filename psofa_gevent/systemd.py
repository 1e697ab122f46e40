"""A program's dealings with systemd: the sockets that it inherits, and the notifications it sends.

Socket activation (sd_listen_fds(3)) and the notification protocol (sd_notify(3)), without systemd's
library. If systemd did not start the program, there are no sockets, and nothing is sent.

`PsServer.serve_forever` notifies systemd by itself that the server is ready, that it stops, and
that its hub is alive; a program that calls ``start`` and ``wait_for`` instead calls `notify`.

Nothing here waits, and nothing is remembered: each call reads the environment anew and leaves it as
it is. A child process inherits the environment, which does no harm: the variables of the sockets
name the process for which they are, and systemd heeds notifications of the main process only,
unless the unit says otherwise.
"""

from __future__ import annotations

import _socket
import contextlib
import itertools
import os
import socket
import stat
from collections.abc import Iterable

__all__ = ["listen_sockets", "notify", "watchdog_timeout"]

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START (sd-daemon.h)."""
NAMELESS = "unknown"
"""The name of all sockets if systemd gives no names (sd_listen_fds_with_names(3))."""
LONGEST_NUMBER = 20
"""Digits of a uint64_t, the widest of systemd's numbers."""


def listen_sockets(name: str | None = None) -> list[socket.socket]:
    """The sockets that systemd has opened for this process, for ``PsServer(listener=...)``.

    They are duplicates, which you must close, so a second call returns new ones. systemd's own
    descriptors (3 and the following) stay open, but programs that this one runs do not inherit
    them. Call it in the process that systemd has started, before a fork.

    Args:
        name: only the sockets of that name: ``FileDescriptorName=`` in the socket unit, by default
            the unit's own name (``echo.socket``). ``None``: all sockets.

    Returns:
        The sockets in systemd's order; an empty list if systemd gave none.

    Raises:
        TypeError: `name` is not a `str`.
        ValueError: the LISTEN_* variables are malformed, or a descriptor of the wanted name is not
            a socket (but a FIFO, or a file).
        OSError: a descriptor is not open.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be text or None, not {name!r}")
    if _number("LISTEN_PID") != os.getpid():
        return []
    count = _number("LISTEN_FDS") or 0
    joined = os.environ.get("LISTEN_FDNAMES")
    names: Iterable[str] = itertools.repeat(NAMELESS)
    if count and joined is not None:
        names = joined.split(":")
        if len(names) != count:
            raise ValueError(f"LISTEN_FDNAMES must have {count} names, not {joined!r}")
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count)
    found: list[socket.socket] = []
    try:
        for descriptor, its_name in zip(descriptors, names, strict=False):
            os.set_inheritable(descriptor, False)
            if name in (None, its_name):
                found.append(_duplicate(descriptor, its_name))
    except BaseException:
        for sock in found:
            sock.close()
        raise
    return found


def notify(state: str) -> bool:
    r"""Send systemd a notification: ``READY=1``, ``STOPPING=1``, ``WATCHDOG=1``, ``STATUS=...``.

    From any greenlet and any OS thread; it does not wait.

    Args:
        state: one or several of these, with line ends (``\n``) between.

    Returns:
        Whether the notification was sent. False: systemd did not start the program (there is no
        NOTIFY_SOCKET), nothing listens on that socket, or the socket is full at the moment; or no
        descriptor is left.

    Raises:
        TypeError: `state` is not a `str`.
    """
    if not isinstance(state, str):
        raise TypeError(f"state must be text, not {state!r}")
    if not has_manager():
        return False
    try:
        with contextlib.closing(new_socket()) as sending:
            return send(state, sending)
    except OSError:
        return False


def new_socket() -> _socket.socket:
    """Open a socket for `send`.

    Raises:
        OSError: no descriptor is left.
    """
    sending = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    sending.setblocking(False)
    return sending


def send(state: str, sending: _socket.socket) -> bool:
    """Send a notification by an open socket; return whether it was sent.

    Call it only if `has_manager` returns true.

    Raises:
        BlockingIOError: the socket is full, so that another try may succeed.
    """
    name = os.fsencode(os.environ.get("NOTIFY_SOCKET", ""))
    if name.startswith(b"@"):  # in the abstract namespace
        name = b"\0" + name[1:]
    try:
        sending.sendto(state.encode("utf-8", "surrogateescape"), name)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def has_manager() -> bool:
    """Whether NOTIFY_SOCKET has a path, or a name in Linux's abstract namespace."""
    return os.environ.get("NOTIFY_SOCKET", "").startswith(("/", "@"))


def watchdog_timeout() -> float | None:
    """Seconds within which systemd expects each ``WATCHDOG=1``; it is usual to send at half of it.

    Returns:
        ``None`` if systemd expects none from this process (sd_watchdog_enabled(3)).

    Raises:
        ValueError: the WATCHDOG_* variables are malformed.
    """
    microseconds = _number("WATCHDOG_USEC")
    process = _number("WATCHDOG_PID")
    if not microseconds or process not in (None, os.getpid()):
        return None
    return microseconds / 1_000_000


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal() or not text.isascii() or len(text) > LONGEST_NUMBER:
        raise ValueError(f"{variable} must be a number, not {text!r}")
    return int(text)


def _duplicate(descriptor: int, name: str) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise ValueError(
            f"descriptor {descriptor} of systemd's, named {name!r}, is not a socket; "
            "ask for the others by their names"
        )
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except BaseException:
        os.close(copy)
        raise
