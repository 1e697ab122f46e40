"""What the kernel knows of a connection and does with it: the socket options behind the settings.

Also its ends, `end` and `reset`. A plain close(2) says nothing to the peer as long as another
descriptor of the same socket is open: one that a child process has, which a C extension has forked,
or any child in the moment after its fork (`psofa_gevent.hub.forking`). Both ends reach the peer
anyway.

Plain system calls on non-blocking sockets: nothing here waits, and nothing switches greenlets.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import struct
import sys
from typing import Any, Protocol

from psofa_gevent.net.unix import unix_endpoint

try:
    import ctypes
except ImportError:
    HAS_CTYPES = False  # a Python that was built without libffi
else:
    HAS_CTYPES = True

__all__ = [
    "ARE_INHERITED",
    "UNNAMED",
    "UNSENT_LOW_WATER",
    "USER_TIMEOUT",
    "Endpoint",
    "end",
    "endpoint",
    "keep_urgent_in_line",
    "reset",
    "set_all_options",
    "set_options",
    "unacknowledged",
]


class Socket(Protocol):
    """A socket, plain or with TLS."""

    def fileno(self) -> int: ...
    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class SocketSettings(Protocol):
    """What this module has to know of the settings of a session."""

    @property
    def no_delay(self) -> bool: ...
    @property
    def high_water(self) -> int: ...
    @property
    def send_buffer_size(self) -> int | None: ...
    @property
    def unsent_low_water(self) -> int | None: ...
    @property
    def keep_alive(self) -> float | None: ...
    @property
    def user_timeout(self) -> float | None: ...


Endpoint = tuple[Any, ...]
"""An address as the socket module has it: (host, port), or (host, port, flow info, scope id)."""
UNNAMED: Endpoint = ("", 0)
"""That of a listening socket without a name, which few systems let listen."""

ARE_INHERITED = sys.platform == "linux"
"""Whether an accepted socket has the options of its listener."""
KEEP_IDLE: int = getattr(_socket, "TCP_KEEPIDLE", None) or _socket.TCP_KEEPALIVE  # type: ignore[attr-defined, unused-ignore]
"""macOS has it by another name."""
KEEP_PROBES = 3
USER_TIMEOUT: int | None = getattr(_socket, "TCP_USER_TIMEOUT", None)
"""None where there is no such option."""
UNSENT_LOW_WATER: int | None = getattr(_socket, "TCP_NOTSENT_LOWAT", None)
"""None where there is no such option."""
if UNSENT_LOW_WATER is None and sys.platform == "darwin":
    UNSENT_LOW_WATER = 0x201  # netinet/tcp.h
UNSENT_PER_HIGH_WATER = 4
"""How much of ``high_water`` the kernel may keep unsent, unless a setting says it. With so much,
large sends are as fast as without a bound, and at the default of 1 MiB it is no less than Linux's
own (tcp_wmem: 4 MiB)."""
LEAST_UNSENT = 65_536
"""Bytes that it may keep at least then. A segment of Linux's has as many, so with less the sender
is woken for each of them, and gains little."""
MOST_UNSENT = 4_194_304
"""Bytes from which on that is left to the kernel."""
_SO_BUF_LOCK = 72
"""Linux since 5.15, asm-generic/socket.h: which sizes of buffers were set, and so do not grow."""
_SOCK_SNDBUF_LOCK = 1
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_SO_NWRITE = 0x1024
"""macOS, sys/socket.h: bytes in the send buffer; Python has no name for it."""


def endpoint(address: object) -> Endpoint | None:
    """`address` as a tuple; ``None`` for a socket that has none (an unnamed Unix socket)."""
    return address if isinstance(address, tuple) else unix_endpoint(address)


def set_no_delay(sock: _socket.socket) -> None:
    """Set TCP_NODELAY; without effect on a socket that is not TCP."""
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)


def set_keep_alive(sock: _socket.socket, seconds: float) -> None:
    """Have the kernel probe a peer that has been silent for so long (SO_KEEPALIVE, tcp(7)).

    Three probes, a third of that time apart, each at least a second; without effect on a socket
    that is not TCP.
    """
    idle = max(1, round(seconds))
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.IPPROTO_TCP, KEEP_IDLE, idle)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPINTVL, max(1, round(seconds / 3)))
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPCNT, KEEP_PROBES)
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)


def set_user_timeout(sock: _socket.socket, seconds: float) -> None:
    """Have the kernel give a connection up when sent data is not acknowledged for so long.

    TCP_USER_TIMEOUT (RFC 5482, tcp(7)); without effect on a socket that is not TCP.
    """
    assert USER_TIMEOUT is not None
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.IPPROTO_TCP, USER_TIMEOUT, max(1, round(seconds * 1_000)))


def keep_urgent_in_line(sock: Any) -> None:
    """Have urgent data come where it stands in the stream: SO_OOBINLINE, as RFC 6093 demands.

    Otherwise the kernel takes the last urgent byte out of it: ftplib's ``abort`` sends such a line
    end, and telnet clients an interrupt. `sock`: of any kind, TLS included.
    """
    with contextlib.suppress(OSError):  # macOS, for a connection that was reset
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)


def set_send_buffer(sock: _socket.socket, size: int) -> None:
    """Fix the size of the kernel's send buffer (SO_SNDBUF, socket(7)), which grows no more then.

    Linux takes twice that, for its own needs too, and no more than net.core.wmem_max.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, size)


def release_send_buffer(sock: _socket.socket) -> None:
    """Leave its size to the kernel again, if somebody has fixed it; where the system can."""
    with contextlib.suppress(OSError):
        locks = sock.getsockopt(_socket.SOL_SOCKET, _SO_BUF_LOCK)
        if locks & _SOCK_SNDBUF_LOCK:
            with contextlib.closing(_socket.socket(sock.family, sock.type)) as fresh:
                size = fresh.getsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF)
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, size // 2)
            sock.setsockopt(_socket.SOL_SOCKET, _SO_BUF_LOCK, locks & ~_SOCK_SNDBUF_LOCK)


def unsent_low_water(settings: SocketSettings) -> int:
    """Bytes that the kernel may keep unsent; 0: as many as it likes.

    Without a setting that goes by how much may wait for the peer here: else one that does not read
    is given megabytes before anything waits, however little that may be. Only on Linux, where the
    kernel refuses what is more; elsewhere it only tells later that it takes more.
    """
    if settings.unsent_low_water is not None:
        return settings.unsent_low_water
    size = max(settings.high_water * UNSENT_PER_HIGH_WATER, LEAST_UNSENT)
    return size if sys.platform == "linux" and size < MOST_UNSENT else 0


def set_unsent_low_water(sock: _socket.socket, size: int) -> None:
    """Let the kernel take no more while so much is unsent (TCP_NOTSENT_LOWAT, tcp(7)).

    0: the system's own bound. Without effect on a socket that is not TCP.
    """
    if UNSENT_LOW_WATER is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(_socket.IPPROTO_TCP, UNSENT_LOW_WATER, size)


def set_options(sock: _socket.socket, settings: SocketSettings) -> None:
    """Set what the settings say of a session's connection."""
    if settings.no_delay:
        set_no_delay(sock)
    if settings.keep_alive is not None:
        set_keep_alive(sock, settings.keep_alive)
    if settings.user_timeout is not None:
        set_user_timeout(sock, settings.user_timeout)
    if settings.send_buffer_size is not None:
        set_send_buffer(sock, settings.send_buffer_size)
    if size := unsent_low_water(settings):
        set_unsent_low_water(sock, size)


def set_all_options(sock: _socket.socket, settings: SocketSettings) -> None:
    """Set what the settings say, also that something is off: whoever made its listener set more."""
    with contextlib.suppress(OSError):  # what is no TCP has none of them
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, settings.no_delay)
        if settings.keep_alive is None:
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 0)
        if settings.user_timeout is None and USER_TIMEOUT is not None:
            sock.setsockopt(_socket.IPPROTO_TCP, USER_TIMEOUT, 0)
        if settings.send_buffer_size is None:
            release_send_buffer(sock)
        set_unsent_low_water(sock, unsent_low_water(settings))
        set_options(sock, settings)


def end(sock: Socket) -> None:
    """Close `sock`, and end its connection, or its listening, whoever holds a duplicate of it.

    shutdown(2) of both directions does what close(2) does where there is no duplicate: FIN, and RST
    for what the peer still sends.
    """
    with contextlib.suppress(OSError):  # there is no connection any more
        sock.shutdown(_socket.SHUT_RDWR)
    sock.close()


def reset(sock: Socket) -> None:
    """Close `sock` so that the peer gets an RST, whoever holds a duplicate of it.

    On Linux a connect(2) to AF_UNSPEC does it. Elsewhere SO_LINGER with a time of zero has close(2)
    send the RST, and a FIN comes before it, which is all that a duplicate lets through.
    """
    if not _disconnect(sock):
        with contextlib.suppress(OSError):
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.shutdown(_socket.SHUT_RDWR)
    sock.close()


if sys.platform == "linux" and HAS_CTYPES:
    # With the GIL held: the call takes a microsecond, and does not wait.
    _connect = ctypes.PyDLL(None).connect
    _connect.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    _NOWHERE = bytes(16)
    """A struct sockaddr of the family AF_UNSPEC, which is 0."""

    def _disconnect(sock: Socket) -> bool:
        """Reset the connection (connect(2): AF_UNSPEC dissolves the association)."""
        return bool(_connect(sock.fileno(), _NOWHERE, len(_NOWHERE)) == 0)

else:

    def _disconnect(sock: Socket) -> bool:
        """There is no such call here."""
        return False


if sys.platform == "linux":
    import fcntl
    import termios

    _SIOCOUTQ = termios.TIOCOUTQ

    def unacknowledged(sock: _socket.socket) -> int | None:
        """Bytes that were sent and that the peer has not acknowledged (SIOCOUTQ, tcp(7)).

        A FIN that is not acknowledged counts as one. ``None`` where the system does not tell.
        Raises `OSError` on a closed socket.
        """
        descriptor = sock.fileno()
        if descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        answer = fcntl.ioctl(descriptor, _SIOCOUTQ, b"\0\0\0\0")
        return int.from_bytes(answer, sys.byteorder)

elif sys.platform == "darwin":

    def unacknowledged(sock: _socket.socket) -> int | None:
        """Bytes that were sent and that the peer has not acknowledged (SO_NWRITE)."""
        return sock.getsockopt(_socket.SOL_SOCKET, _SO_NWRITE)

else:

    def unacknowledged(sock: _socket.socket) -> int | None:
        """Nothing is known here."""
        return None
