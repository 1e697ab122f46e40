"""Where a server listens: what it was told, checked in the constructor and opened at its start.

A bind is an address, a path, or a socket that somebody else made and that listens already. Each
opens itself; what differs from one kind to another is in its class and nowhere else.

Resource handling: what is opened belongs to the server, until `ListeningSocket.close`. A given
socket or descriptor stays its owner's: a duplicate is opened (dup(2)), and closed, and its file is
not removed.

The constructor's part (`check_binds`) opens nothing. `open_when_free` runs in the greenlet of
``start``, and switches while a name is looked up, and while another process has yet to leave.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol, cast

import gevent

from psofa_gevent.checks import MAX_BUFFER, check_int
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.errors import PsServerError
from psofa_gevent.hub.greenlets import may_wait
from psofa_gevent.listening.sockets import ListeningSocket, bind, bind_unix, duplicate
from psofa_gevent.listening.taken import path_is_taken, port_is_taken
from psofa_gevent.net.addresses import (
    Address,
    TcpAddress,
    UnixAddress,
    check_address,
    format_address,
)
from psofa_gevent.net.sockopts import UNNAMED, Endpoint, endpoint
from psofa_gevent.settings import SessionSettings

__all__ = [
    "BIND_PATIENCE",
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "Bind",
    "BindOptions",
    "Given",
    "check_binds",
    "check_reuse_port",
    "open_when_free",
]

DEFAULT_HOST = "0.0.0.0"
DEFAULT_PORT = 8710
REUSE_PORT: int | None = getattr(_socket, "SO_REUSEPORT", None)
"""None where there is no such option."""
BIND_PATIENCE = 10.0
"""Seconds that another process which listens has, at most, to end. A parent that forks to become a
daemon may wait for its child to be ready, a worker that is replaced for its last request."""
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.25
"""Seconds between two looks whether it has. Of a Unix socket each is a connection."""
WANTED = (
    "a listening socket, its descriptor, a tuple of host and port, 'unix:' and a path, or a list "
    "of such"
)


class HasFileno(Protocol):
    """A socket: Python's, gevent's, or anything that has one's descriptor."""

    def fileno(self) -> int: ...


Given = HasFileno | int | str | tuple[str, int]
"""What one listener may be given as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BindOptions:
    """How addresses and paths are bound. Nothing of it is for sockets of others."""

    backlog: int
    receive_buffer_size: int | None
    unix_mode: int | None
    reuse_port: bool
    settings: SessionSettings


class Bind(Protocol):
    """One thing that a server listens on. `open` may switch; what else there is does not."""

    def __str__(self) -> str:
        """As errors and the log name it."""

    @property
    def asked_for(self) -> Endpoint:
        """Its address as far as it is known before it is open."""

    @property
    def identity(self) -> object:
        """Equal for two that cannot both be listened on; ``None``: there is no such."""

    def open(self, options: BindOptions) -> ListeningSocket:
        """Listen there.

        Raises:
            OSError: it is not possible.
        """

    def is_taken(self) -> bool:
        """Whether another process listens there."""

    def where(self, endpoint: Endpoint) -> Bind:
        """The same with the port of `endpoint`, to which it was bound: to listen there again."""


@dataclass(frozen=True, slots=True)
class TcpBind:
    """A host and a port of this machine."""

    address: TcpAddress

    def __str__(self) -> str:
        return str(self._bound)

    @property
    def _bound(self) -> TcpAddress:
        """The address, where 0.0.0.0 is every address of a dual-stack socket too."""
        is_ipv6 = self.address.family is PsSocketAddressFamily.IPV6
        if is_ipv6 and self.address.host == "0.0.0.0":
            return replace(self.address, host="::")
        return self.address

    @property
    def asked_for(self) -> Endpoint:
        return self.address.host, self.address.port

    @property
    def identity(self) -> object:
        bound = self._bound
        return (bound.host, bound.port) if bound.port else None

    def open(self, options: BindOptions) -> ListeningSocket:
        try:
            return bind(
                self._bound.resolve()[0],
                self.address.family,
                backlog=options.backlog,
                receive_buffer_size=options.receive_buffer_size,
                reuse_port=REUSE_PORT if options.reuse_port else None,
                settings=options.settings,
            )
        except OSError as exc:
            raise OSError(exc.errno, self._explain(exc)) from exc

    def is_taken(self) -> bool:
        return port_is_taken(self.address.port)

    def where(self, endpoint: Endpoint) -> Bind:
        return replace(self, address=replace(self.address, port=endpoint[1]))

    def _explain(self, exc: OSError) -> str:
        no_ipv6 = exc.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
        if no_ipv6 and self.address.family is PsSocketAddressFamily.IPV6:
            return "this machine has no IPv6"
        if exc.errno == errno.EADDRNOTAVAIL:
            return f"{exc.strerror}: the host is not an address of this machine"
        return exc.strerror or str(exc)


@dataclass(frozen=True, slots=True)
class UnixBind:
    """The path of a Unix domain socket, which the server makes."""

    address: UnixAddress

    def __str__(self) -> str:
        return self.address.host

    @property
    def asked_for(self) -> Endpoint:
        return self.address.host, 0

    @property
    def identity(self) -> object:
        return os.path.abspath(self.address.path)

    def open(self, options: BindOptions) -> ListeningSocket:
        return bind_unix(self.address.path, backlog=options.backlog, mode=options.unix_mode)

    def is_taken(self) -> bool:
        return path_is_taken(self.address.path)

    def where(self, _endpoint: Endpoint) -> Bind:
        return self


class InheritedBind:
    """A socket that listens already, and that is somebody else's."""

    def __init__(self, given: HasFileno | int) -> None:
        self._given = given  # kept, so that it stays open as long as the server needs it
        descriptor = _descriptor(given)
        try:
            with _looking_at(descriptor) as found:
                self._check(found)
                self.asked_for = endpoint(found.getsockname()) or UNNAMED
            status = os.fstat(descriptor)
            self.identity: object = status.st_dev, status.st_ino
        except OSError as exc:
            raise ValueError(
                f"listener must be a listening socket, not {given!r}: {exc.strerror or exc}"
            ) from exc

    def __str__(self) -> str:
        return f"{format_address(*self.asked_for[:2])} (inherited)"

    def _check(self, found: _socket.socket) -> None:
        if found.type != _socket.SOCK_STREAM:
            raise ValueError(f"listener must be a stream socket (TCP or Unix), not {self._given!r}")
        if not _listens(found):
            raise ValueError(f"listener must listen already, and {self._given!r} does not")

    def is_taken(self) -> bool:
        return False  # it may be shared

    def open(self, _options: BindOptions) -> ListeningSocket:
        try:
            descriptor = _descriptor(self._given)
            with _looking_at(descriptor) as found:
                self._check(found)
        except ValueError as exc:
            raise OSError(errno.EBADF, str(exc)) from exc
        return duplicate(descriptor)

    def where(self, _endpoint: Endpoint) -> Bind:
        return self


def check_binds(
    listener: Given | Sequence[Given] | None,
    host: str,
    port: int,
    family: PsSocketAddressFamily,
) -> Sequence[Bind]:
    """What a server is to listen on, in that order.

    Args:
        listener: one, or several; ``None``: host and port say it.
        host: as `PsServer` has it.
        port: the same.
        family: that of names, and of IPv4 addresses; a listener with an IPv6 address is IPv6.

    Raises:
        TypeError: something of it is of the wrong type.
        ValueError: it is empty, has one twice, or a socket that can't be accepted from; or it is
            given besides a host and a port.
    """
    asked_for = check_address(host, port, family, least_port=0)
    if listener is None:
        return [_at(asked_for)]
    if (host, port) != (DEFAULT_HOST, DEFAULT_PORT):
        where = format_address(host, port)
        raise ValueError(
            f"listener must not be given besides a host or a port ({where}), as {listener!r} is"
        )
    if isinstance(listener, list) or (isinstance(listener, tuple) and not _is_address(listener)):
        several = list(listener)
    else:
        several = [cast("Given", listener)]
    if not several:
        raise ValueError(f"listener must have one listener or more, not {listener!r}")
    binds = [_bind_of(one, family) for one in several]
    known: set[object] = set()
    for given, each in zip(several, binds, strict=True):
        if each.identity in known:
            raise ValueError(f"listener must not have the same twice: {given!r}")
        if each.identity is not None:
            known.add(each.identity)
    return binds


def check_reuse_port(binds: Sequence[Bind]) -> None:
    """Raise `ValueError` where ``reuse_port=True`` has nothing to do, or can't be."""
    if REUSE_PORT is None:
        raise ValueError("reuse_port must not be True: this system has no SO_REUSEPORT")
    if not any(isinstance(each, TcpBind) for each in binds):
        where = ", ".join(map(str, binds))
        raise ValueError(f"reuse_port must not be True without a host and port, but for {where}")


def _open_all(binds: Sequence[Bind], options: BindOptions) -> list[ListeningSocket]:
    """Listen on all of them, or on none.

    Raises:
        PsServerError: it is not possible; it names the bind that failed.
    """
    opened: list[ListeningSocket] = []
    try:
        for each in binds:
            try:
                opened.append(each.open(options))
            except OSError as exc:
                cause = exc.__cause__ if isinstance(exc.__cause__, OSError) else exc
                text = f"cannot listen on {each}: {exc.strerror or exc}"
                raise PsServerError(text) from cause
    except BaseException:
        for listening in opened:
            listening.close()
        raise
    return opened


def open_when_free(
    binds: Sequence[Bind],
    options: BindOptions,
    *,
    left_in: int | None,
    is_wanted: Callable[[], bool],
    told: Callable[[str], object],
) -> list[ListeningSocket]:
    """Listen on all of them, or on none. While another process still listens there, try again.

    A process that takes over from another one may come before that has gone: a worker that a reload
    starts, a service that is started anew, a child whose parent is about to end. (nginx and
    gunicorn try again, too.) Only on Linux it is known who listens; a child knows it of its parent
    anywhere. Switches meanwhile.

    Args:
        binds: where; in a child of a process that listened, with the ports that it was given.
        options: how.
        left_in: the id of the process in which the server ran at the fork; ``None``: it did not.
        is_wanted: false when it is to be tried no more.
        told: called with the reason before the first wait, but for a parent, which is expected.

    Raises:
        PsServerError: it is not possible, or the address was not free within `BIND_PATIENCE`.
    """
    deadline = monotonic() + BIND_PATIENCE
    pause = FIRST_PAUSE
    while True:
        try:
            return _open_all(binds, options)
        except PsServerError as exc:
            cause = exc.__cause__
            waits = isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE and is_wanted()
            if left_in is None:
                waits = waits and may_wait() and any(each.is_taken() for each in binds)
            if not waits or monotonic() >= deadline:
                text = f"{exc}, by another process for {BIND_PATIENCE:g} s" if waits else str(exc)
                if left_in is not None:
                    text = (
                        f"{exc}. Process {left_in} listened there at the fork, of which this "
                        f"process {os.getpid()} is a child: it must have ended within "
                        f"{BIND_PATIENCE:g} s. For several processes, and for ports that this one "
                        "may not bind: listen, fork, and make a PsServer(listener=sock) in each"
                    )
                raise PsServerError(text) from cause
            if pause == FIRST_PAUSE and left_in is None:
                told(str(exc))
        gevent.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_address(given: tuple[object, ...]) -> bool:
    if len(given) != 2 or not isinstance(given[0], str):
        return False
    port = given[1]
    return isinstance(port, int) or (isinstance(port, str) and port.isdecimal())


def _bind_of(given: object, family: PsSocketAddressFamily) -> Bind:
    if isinstance(given, bool):
        raise TypeError(f"listener must be {WANTED}, not {given!r}")
    if isinstance(given, int):
        check_int("listener", given, 0, MAX_BUFFER)
        return InheritedBind(given)
    if isinstance(given, str):
        return _path(given)
    if isinstance(given, tuple) and _is_address(given):
        return _address(given, family)
    if hasattr(given, "do_handshake"):
        raise TypeError(
            f"listener must be a socket without TLS, not {given!r}; give the server an ssl_context"
        )
    if callable(getattr(given, "fileno", None)):
        return InheritedBind(cast("HasFileno", given))
    raise TypeError(f"listener must be {WANTED}, not {given!r}")


def _address(given: tuple[object, ...], family: PsSocketAddressFamily) -> Bind:
    host, port = given
    if ":" in str(host):
        family = PsSocketAddressFamily.IPV6
    try:
        address = check_address(host, port, family, least_port=0)
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"listener must be a host and a port, not {given!r}: {exc}") from exc
    if port and isinstance(address, UnixAddress):
        raise ValueError(f"listener must have the port 0 for a Unix socket, not {given!r}")
    return _at(address)


def _path(given: str) -> Bind:
    try:
        address = check_address(given, 0, PsSocketAddressFamily.IPV4, least_port=0)
    except ValueError as exc:
        raise ValueError(f"listener must be 'unix:' and a path, not {given!r}: {exc}") from exc
    if isinstance(address, TcpAddress):
        raise ValueError(
            f"listener must be 'unix:' and a path, or a tuple of host and port, not {given!r}"
        )
    return UnixBind(address)


def _at(address: Address) -> Bind:
    return TcpBind(address) if isinstance(address, TcpAddress) else UnixBind(address)


def _descriptor(given: HasFileno | int) -> int:
    if isinstance(given, int):
        return given
    try:
        descriptor: object = given.fileno()
    except (OSError, ValueError) as exc:  # of a file that is closed
        raise ValueError(f"listener must be a socket that is open, not {given!r}: {exc}") from exc
    if not isinstance(descriptor, int):
        raise TypeError(f"listener must have a descriptor, and {given!r} has none")
    if descriptor < 0:
        raise ValueError(f"listener must be open, and {given!r} is closed")
    return descriptor


@contextlib.contextmanager
def _looking_at(descriptor: int) -> Iterator[_socket.socket]:
    """The socket that has that descriptor, without owning it."""
    found = _socket.socket(fileno=descriptor)
    try:
        yield found
    finally:
        found.detach()


def _listens(found: _socket.socket) -> bool:
    try:
        return found.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN) != 0
    except OSError:
        return True  # the system does not tell
