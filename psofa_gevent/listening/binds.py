"""Binds: where a server is to listen, checked in its constructor and opened at its start.

A bind is an address, a path, or an inherited socket, which somebody else made and which listens
already. Each bind opens itself; all differences between the kinds are in their classes.

Resource handling: an opened socket belongs to the server, until `ListeningSocket.close`. A socket
or descriptor that the server was given stays its owner's: the server makes a duplicate (dup(2)) and
closes that, and does not remove the socket's file.

`check_binds` runs in the constructor and opens nothing. `open_when_free` runs in the greenlet that
calls ``start``. It switches during the lookup of a name, and while it waits for another process to
stop listening.
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
"""None where the system has no such option."""
BIND_PATIENCE = 10.0
"""Seconds, at most, to wait until another process that listens has ended. A parent that forks to
become a daemon may wait for its child to be ready, a worker that is replaced for its last request.
"""
FIRST_PAUSE = 0.01
"""Seconds between the first two attempts to bind. Each pause is twice as long as the one before."""
LONGEST_PAUSE = 0.25
"""Seconds of the longest pause between two attempts. On a Unix socket each attempt connects to the
process that listens."""
WANTED = (
    "a listening socket, its descriptor, a tuple of host and port, 'unix:' and a path, or a list "
    "of such"
)


class HasFileno(Protocol):
    """A socket of Python or gevent, or another object that has the descriptor of a socket."""

    def fileno(self) -> int: ...


Given = HasFileno | int | str | tuple[str, int]
"""The types of one listener, as users give it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BindOptions:
    """How addresses and paths are bound. Inherited sockets use none of these options."""

    backlog: int
    receive_buffer_size: int | None
    unix_mode: int | None
    reuse_port: bool
    settings: SessionSettings


class Bind(Protocol):
    """One address, path or socket that a server listens on. Only `open` may switch."""

    def __str__(self) -> str:
        """Its name in errors and in the log."""

    @property
    def asked_for(self) -> Endpoint:
        """Its address, as far as that is known before the bind is open."""

    @property
    def identity(self) -> object:
        """Equal for binds that can't be open at once; ``None``: this bind excludes no other."""

    def open(self, options: BindOptions) -> ListeningSocket:
        """Listen there.

        Raises:
            OSError: it is not possible.
        """

    def is_taken(self) -> bool:
        """Whether another process listens there."""

    def where(self, endpoint: Endpoint) -> Bind:
        """The same bind with the port of `endpoint`, for a child of a process that listened there.

        Args:
            endpoint: what the bind was bound to in that process.
        """


@dataclass(frozen=True, slots=True)
class TcpBind:
    """A host and a port of this machine."""

    address: TcpAddress

    def __str__(self) -> str:
        return str(self._bound)

    @property
    def _bound(self) -> TcpAddress:
        """The address to bind; for a dual-stack socket ``::`` replaces 0.0.0.0."""
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
    """The path of a Unix domain socket that the server makes."""

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
    """A socket that listens already, and that belongs to somebody else."""

    def __init__(self, given: HasFileno | int) -> None:
        self._given = given  # a reference, so that it stays open as long as the server needs it
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
        return False  # other processes may share it

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
    """The binds of a server, in the order of its listeners.

    Args:
        listener: one listener, or several; ``None``: listen on `host` and `port`.
        host: the setting of `PsServer`.
        port: the setting of `PsServer`.
        family: the family of names and of IPv4 addresses; a listener with an IPv6 address is IPv6.

    Raises:
        TypeError: an argument, or a part of `listener`, has the wrong type.
        ValueError: the host or the port is not valid; `listener` is empty, names something twice,
            or has a socket that can't accept; or the caller gave both a listener and a host or
            port.
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
    """Raise `ValueError` where ``reuse_port=True`` would have no effect, or is not possible."""
    if REUSE_PORT is None:
        raise ValueError("reuse_port must not be True: this system has no SO_REUSEPORT")
    if not any(isinstance(each, TcpBind) for each in binds):
        where = ", ".join(map(str, binds))
        raise ValueError(f"reuse_port must not be True without a host and port, but for {where}")


def _open_all(binds: Sequence[Bind], options: BindOptions) -> list[ListeningSocket]:
    """Listen on all binds, or on none. May switch.

    Raises:
        PsServerError: it is not possible; the error names the bind that failed.
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
    """Listen on all binds, or on none. While another process still listens there, try again.

    A process that takes over from another one may start before the other has ended: a worker that
    a reload starts, a service that is restarted, a child whose parent is about to end. (nginx and
    gunicorn try again as well.) Only on Linux can the server find out that another process listens;
    in a child of the process that listened, EADDRINUSE is enough on any system. Switches while it
    waits.

    Args:
        binds: where; in a child of a process that listened, with the ports that this was given.
        options: how to bind addresses and paths.
        left_in: the id of the process in which the server ran at the fork; ``None``: this process
            is not a child of one in which the server ran.
        is_wanted: returns false when it should not be tried again.
        told: called with the reason before the first wait; not in a child of the process that
            listened, where a wait is expected.

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
    except (OSError, ValueError) as exc:  # ValueError from a closed file
        raise ValueError(f"listener must be a socket that is open, not {given!r}: {exc}") from exc
    if not isinstance(descriptor, int):
        raise TypeError(f"listener must have a descriptor, and {given!r} has none")
    if descriptor < 0:
        raise ValueError(f"listener must be open, and {given!r} is closed")
    return descriptor


@contextlib.contextmanager
def _looking_at(descriptor: int) -> Iterator[_socket.socket]:
    """The socket of `descriptor`, which the block must not close."""
    found = _socket.socket(fileno=descriptor)
    try:
        yield found
    finally:
        found.detach()


def _listens(found: _socket.socket) -> bool:
    try:
        return found.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN) != 0
    except OSError:
        return True  # this system has no such option: assume it
