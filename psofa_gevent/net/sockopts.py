"""The socket options behind the settings, and the functions that end a connection: `end`, `reset`.

A plain close(2) tells the peer nothing as long as another descriptor of the same socket is open:
in a child process that a C extension has forked, or in any child in the moment after its fork
(`psofa_gevent.hub.forking`). `end` reaches the peer even then, and so does `reset`: on Linux (with
ctypes) with an RST, elsewhere only with a FIN.

All functions make plain system calls that do not wait: nothing here switches.
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
    HAS_CTYPES = False  # Python was built without libffi
else:
    HAS_CTYPES = True

__all__ = [
    "ARE_INHERITED",
    "SENDFILE_REFUSALS",
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
    """The settings of a session that this module reads."""

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
"""The endpoint of a listening socket without a name; few systems let such a socket listen."""
SENDFILE_REFUSALS = frozenset(
    {
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOTSOCK,
        errno.ESPIPE,
        errno.EOVERFLOW,
        errno.EPERM,
        errno.EACCES,
        errno.EBUSY,
        errno.EIO,
        errno.ENOMEM,
    }
)
"""Errors of sendfile(2) when it can't send the file, or not to the socket. No byte has left then;
if something is wrong with the file, a read will fail as well."""

ARE_INHERITED = sys.platform == "linux"
"""Whether an accepted socket inherits the options of the listening socket."""
KEEP_IDLE: int = getattr(_socket, "TCP_KEEPIDLE", None) or _socket.TCP_KEEPALIVE  # type: ignore[attr-defined, unused-ignore]
"""TCP_KEEPIDLE, which macOS calls TCP_KEEPALIVE."""
KEEP_PROBES = 3
"""Unanswered probes after which the kernel gives a connection up."""
USER_TIMEOUT: int | None = getattr(_socket, "TCP_USER_TIMEOUT", None)
"""None where the system has no such option."""
UNSENT_LOW_WATER: int | None = getattr(_socket, "TCP_NOTSENT_LOWAT", None)
"""None where the system has no such option."""
if UNSENT_LOW_WATER is None and sys.platform == "darwin":
    UNSENT_LOW_WATER = 0x201  # netinet/tcp.h
UNSENT_PER_HIGH_WATER = 4
"""Without the setting ``unsent_low_water``, the kernel may keep that many times ``high_water``
unsent. With this factor large sends are as fast as without a bound, and at the default of 1 MiB the
bound is no less than Linux's own (tcp_wmem: 4 MiB)."""
LEAST_UNSENT = 65_536
"""Bytes of the least such bound. A segment of Linux has as many bytes: with a lower bound the
sender would be woken for each segment, and little would be gained."""
MOST_UNSENT = 4_194_304
"""Bytes from which on the bound is left to the kernel."""
_SO_BUF_LOCK = 72
"""Linux since 5.15, asm-generic/socket.h: the buffers whose sizes were set, and so do not grow."""
_SOCK_SNDBUF_LOCK = 1
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_SO_NWRITE = 0x1024
"""macOS, sys/socket.h: the bytes in the send buffer. Python has no name for this option."""


def endpoint(address: object) -> Endpoint | None:
    """`address` as a tuple; ``None`` for a socket that has none (an unnamed Unix socket)."""
    return address if isinstance(address, tuple) else unix_endpoint(address)


def set_no_delay(sock: _socket.socket) -> None:
    """Set TCP_NODELAY; without effect on a socket that is not TCP."""
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)


def set_keep_alive(sock: _socket.socket, seconds: float) -> None:
    """Have the kernel probe a peer that was silent for `seconds` (SO_KEEPALIVE, tcp(7)).

    It sends three probes, a third of `seconds` apart. The silence and the time between probes are
    at least one second. Without effect on a socket that is not TCP.
    """
    idle = max(1, round(seconds))
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.IPPROTO_TCP, KEEP_IDLE, idle)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPINTVL, max(1, round(seconds / 3)))
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_KEEPCNT, KEEP_PROBES)
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)


def set_user_timeout(sock: _socket.socket, seconds: float) -> None:
    """Have the kernel give a connection up when sent data is not acknowledged for `seconds`.

    Sets TCP_USER_TIMEOUT (RFC 5482, tcp(7)). Without effect on a socket that is not TCP.
    """
    assert USER_TIMEOUT is not None
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.IPPROTO_TCP, USER_TIMEOUT, max(1, round(seconds * 1_000)))


def keep_urgent_in_line(sock: Any) -> None:
    """Keep urgent data at its place in the stream: SO_OOBINLINE, as RFC 6093 demands.

    Without it the kernel takes the last urgent byte out of the stream. ftplib's ``abort`` sends a
    line end as urgent data, and telnet clients an interrupt.

    Args:
        sock: a socket of any kind, also a TLS socket.
    """
    with contextlib.suppress(OSError):  # macOS, for a connection that was reset
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_OOBINLINE, 1)


def set_send_buffer(sock: _socket.socket, size: int) -> None:
    """Fix the size of the kernel's send buffer (SO_SNDBUF, socket(7)), which then does not grow.

    Linux allows net.core.wmem_max at most, and doubles the size, as it needs space for itself.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, size)


def release_send_buffer(sock: _socket.socket) -> None:
    """Leave the size of the send buffer to the kernel again if it was fixed, where possible."""
    with contextlib.suppress(OSError):
        locks = sock.getsockopt(_socket.SOL_SOCKET, _SO_BUF_LOCK)
        if locks & _SOCK_SNDBUF_LOCK:
            with contextlib.closing(_socket.socket(sock.family, sock.type)) as fresh:
                size = fresh.getsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF)
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, size // 2)
            sock.setsockopt(_socket.SOL_SOCKET, _SO_BUF_LOCK, locks & ~_SOCK_SNDBUF_LOCK)


def unsent_low_water(settings: SocketSettings) -> int:
    """Bytes that the kernel may keep unsent; 0: the kernel decides.

    Without a setting the bound is derived from ``high_water``: otherwise the kernel would take
    megabytes for a peer that does not read before a post waits here, however low ``high_water`` is.
    Only Linux has this default, as its kernel refuses bytes beyond the bound. Other kernels take
    them, and only announce later that they take more.
    """
    if settings.unsent_low_water is not None:
        return settings.unsent_low_water
    size = max(settings.high_water * UNSENT_PER_HIGH_WATER, LEAST_UNSENT)
    return size if sys.platform == "linux" and size < MOST_UNSENT else 0


def set_unsent_low_water(sock: _socket.socket, size: int) -> None:
    """Have the kernel take no more bytes while `size` bytes are unsent (TCP_NOTSENT_LOWAT, tcp(7)).

    0: the system's own bound. Without effect on a socket that is not TCP.
    """
    if UNSENT_LOW_WATER is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(_socket.IPPROTO_TCP, UNSENT_LOW_WATER, size)


def set_options(sock: _socket.socket, settings: SocketSettings) -> None:
    """Set the options that the settings ask for on the socket of a session."""
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
    """Set all options as the settings say, and reset the others.

    For a socket accepted from an inherited listening socket, on which other code has set options.
    """
    with contextlib.suppress(OSError):  # a socket that is not TCP has no such options
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
    """Close `sock`, and end its connection, or its listening, even if there are duplicates of it.

    shutdown(2) of both directions does what close(2) does where there is no duplicate: it sends a
    FIN, and an RST in answer to bytes that the peer still sends.
    """
    with contextlib.suppress(OSError):  # the connection is gone already
        sock.shutdown(_socket.SHUT_RDWR)
    sock.close()


def reset(sock: Socket) -> None:
    """Close `sock` so that the peer gets an RST, on Linux even if there are duplicates of it.

    On Linux (with ctypes) a connect(2) to AF_UNSPEC sends it. Otherwise close(2) sends it, as
    SO_LINGER is set with a time of zero; a FIN precedes it then, and is all that the peer gets if
    there is a duplicate.
    """
    if not _disconnect(sock):
        with contextlib.suppress(OSError):
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.shutdown(_socket.SHUT_RDWR)
    sock.close()


if sys.platform == "linux" and HAS_CTYPES:
    # PyDLL keeps the GIL: the call takes a microsecond, and does not wait.
    _connect = ctypes.PyDLL(None).connect
    _connect.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    _NOWHERE = bytes(16)
    """A struct sockaddr of the family AF_UNSPEC, which has the number 0."""

    def _disconnect(sock: Socket) -> bool:
        """Reset the connection (connect(2): AF_UNSPEC dissolves the association)."""
        return bool(_connect(sock.fileno(), _NOWHERE, len(_NOWHERE)) == 0)

else:

    def _disconnect(sock: Socket) -> bool:
        """Do nothing: this system has no such call."""
        return False


if sys.platform == "linux":
    import fcntl
    import termios

    _SIOCOUTQ = termios.TIOCOUTQ

    def unacknowledged(sock: _socket.socket) -> int | None:
        """Bytes that were sent and that the peer has not acknowledged (SIOCOUTQ, tcp(7)).

        An unacknowledged FIN counts as one byte. ``None`` where the system does not tell. Raises
        `OSError` on a closed socket.
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
        """``None``: this system does not tell."""
        return None
