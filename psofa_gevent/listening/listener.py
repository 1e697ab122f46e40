"""The listening sockets of a server, and gevent's `StreamServer` that accepts from each.

Resource handling: `bind`, `bind_unix` and `duplicate` make a socket and close it again if they
fail; `Listener.close` closes it at the end. An accepted socket belongs to its session as soon as
there is one.

All listeners of a server share its manager's pool. While that is full none of them accepts; each
place that becomes free goes to the one that has waited longest (`AcceptQueue`), for the event loop
would give them all to one.

A socket that somebody else made may be shared by several processes, each with a server: they accept
so that all have about the same number of sessions (`psofa_gevent.listening.balance`).

Error handling: whatever accept(2) says, accepting pauses, from 10 ms to a second, and starts again
by itself. Mostly that is a lack of descriptors or memory: the connections wait in the backlog, no
session notices, and a warning tells, once a minute at most.

What the server's rules refuse never gets to the manager (`psofa_gevent.listening.admission`); where
it is to be refused when the pool is full, the listeners go on accepting then.

If a listening socket itself is gone, that is an error in the log, and the open sessions go on.

What accepts runs in the hub, where nothing may block or raise. The greenlet that calls the server's
``start`` makes the sockets, and makes and starts `Listeners`; the greenlet that stops the server
calls `Listeners.close`. `pause` and `resume` may be called in any thread.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from gevent import monkey
from gevent.pool import Pool
from gevent.server import StreamServer

from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.hub.forking import keep, track
from psofa_gevent.hub.logs import log
from psofa_gevent.listening.balance import SharedLoad
from psofa_gevent.net.addresses import SocketAddress, format_address, socket_family
from psofa_gevent.net.sockopts import (
    ARE_INHERITED,
    NAMELESS,
    Endpoint,
    end,
    endpoint,
    set_all_options,
    set_options,
)
from psofa_gevent.net.unix import UnixFile, make_room, starting_in_turn
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.settings import SessionSettings

__all__ = ["Listeners", "ListeningSocket", "bind", "bind_unix", "duplicate"]

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")
"""The blocking one, also in a patched process: it is only asked when the hub says it is ready."""
_new_poll: Callable[[], Any] = monkey.get_original("select", "poll")
"""The system's, which is asked in the hub, and with no time to wait."""

EVERY_ADDRESS = frozenset({"0.0.0.0", "::", "::ffff:0.0.0.0"})
"""Hosts that are no address of an accepted socket."""
LISTENER_IS_GONE = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})
ACCEPTS_OF_SHARED = 8
"""Accepts in one turn of the hub from a socket that other processes accept from, too: a burst of
clients is for all of them. One would be fairest, and took 15 % more time for each connection."""
ACCEPTS = 100
"""The same from any other socket, and places of a full pool that are given away; as gevent's."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ListeningSocket:
    """A socket that listens, and what goes with it."""

    socket: socket.socket
    file: UnixFile | None = None
    """What `close` is to remove."""
    is_inherited: bool = False
    """Whether somebody else made the socket, and may share it."""

    def __post_init__(self) -> None:
        track(self)

    def _let_go(self, _hub: object) -> None:
        """Close the socket, in a child process. It goes on to listen: it is the parent's."""
        self.socket.close()

    def end(self) -> None:
        """Let nobody connect any more, and remove the file of a socket that has one.

        Also where another process has a duplicate of the socket, unless somebody else made it: who
        has an inherited one may go on.
        """
        if self.file is not None:
            self.file.remove()
        if not self.is_inherited:
            with contextlib.suppress(OSError):  # it does not listen yet; or, on macOS, anyway
                self.socket.shutdown(_socket.SHUT_RDWR)

    def close(self) -> None:
        """The same, and close the socket."""
        self.end()
        self.socket.close()


def bind(
    address: SocketAddress,
    family: PsSocketAddressFamily,
    *,
    backlog: int,
    receive_buffer_size: int | None,
    reuse_port: int | None,
    settings: SessionSettings,
) -> ListeningSocket:
    """A socket that listens on `address`.

    SO_REUSEADDR is set, so that a restart need not wait for the connections of before to leave
    TIME_WAIT; and `reuse_port`, the system's SO_REUSEPORT, unless it is ``None``. Options that are
    set here, accepted sockets inherit.

    Raises:
        OSError: the address is in use, or not this machine's, or the family is not there.
    """
    listening = _SystemSocket(socket_family(family), _socket.SOCK_STREAM)
    try:
        listening.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if reuse_port is not None:
            listening.setsockopt(_socket.SOL_SOCKET, reuse_port, 1)
        if family is PsSocketAddressFamily.IPV6:
            listening.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
        if receive_buffer_size is not None:
            # Before listen: the window scale is fixed in the handshake (tcp(7)).
            listening.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVBUF, receive_buffer_size)
        set_options(listening, settings)
        listening.bind(address)
        listening.listen(backlog)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return ListeningSocket(listening)


def bind_unix(path: str, *, backlog: int, mode: int | None) -> ListeningSocket:
    """A socket that listens on the file `path`, which it makes. Switches.

    Raises:
        OSError: a server listens there, or another file is there, or it can't be made.
    """
    with starting_in_turn(path):
        make_room(path)
        listening = _SystemSocket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        made: UnixFile | None = None
        try:
            listening.bind(path)
            made = UnixFile.of(path)
            if mode is not None:
                os.chmod(path, mode)  # nobody can connect before the next line
            listening.listen(backlog)
            listening.setblocking(False)
        except BaseException:
            ListeningSocket(listening, made).close()
            raise
    return ListeningSocket(listening, made)


def duplicate(descriptor: int) -> ListeningSocket:
    """Another descriptor of somebody's listening socket, which becomes non-blocking.

    That is the socket's, so its owner sees it too. All else that was set stays as it is: accepted
    sockets get the options of the settings one by one.

    Raises:
        OSError: the descriptor is none of a socket, or there is none left.
    """
    copy = os.dup(descriptor)
    try:
        listening = _SystemSocket(fileno=copy)
    except BaseException:
        os.close(copy)
        raise
    try:
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return ListeningSocket(listening, is_inherited=True)


class AcceptQueue:
    """Which listener of a server accepts next while its pool is full, or was a moment ago."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: deque[Listener] = deque()
        self._is_linked = False

    def must_wait(self, listener: Listener) -> bool:
        """Whether there is no place for a connection; then there will be a turn of `listener`."""
        if not self._waiting and not self._pool.full():
            return False
        if listener not in self._waiting:
            self._waiting.append(listener)
        self._ask()
        return True

    def forget(self, listener: Listener) -> None:
        """Give it no turn any more."""
        if listener in self._waiting:
            self._waiting.remove(listener)

    def _ask(self) -> None:
        if not self._is_linked:
            self._is_linked = True
            # As gevent's own servers do: it tells when a place is free, once.
            pool: Any = self._pool
            pool._semaphore.rawlink(self._give)

    def _give(self, _semaphore: object) -> None:
        """Give away the places that are free, one to each in turn."""
        self._is_linked = False
        for _ in range(ACCEPTS):
            if not self._waiting or self._pool.full():
                break
            listener = self._waiting.popleft()
            if listener.take_turn():
                self._waiting.append(listener)
        if self._waiting:
            self._ask()


class Listener(StreamServer):
    """Accepts connections and hands them to a manager, while its pool has room."""

    def __init__(
        self, listening: ListeningSocket, manager: SessionManager, turns: AcceptQueue
    ) -> None:
        self._listening = listening
        self._manager = manager
        self._turns = turns
        self._paused = False
        self._backoff = self.min_delay
        sock = listening.socket
        # As plain numbers, which a socket's own properties are not.
        self._kind = int(sock.family), int(sock.type), sock.proto
        self.endpoint: Endpoint = endpoint(sock.getsockname()) or NAMELESS
        """What it is bound to."""
        knows = self.endpoint[0] not in EVERY_ADDRESS
        self._local_endpoint = self.endpoint if knows else None
        """That of all accepted sockets, if the server listens on one address only."""
        self._admission = manager.admission
        self._refuses_when_full = self._admission is not None and self._admission.refuse_when_full
        self._set_options = set_options
        self._has_options = ARE_INHERITED
        """Whether accepted sockets have their options by themselves."""
        if listening.is_inherited:
            self._set_options, self._has_options = set_all_options, False
        if sock.family == _socket.AF_UNIX:  # has one option, and does not hand it on
            self._set_options = set_options
            self._has_options = manager.settings.send_buffer_size is None
        self._load = SharedLoad(sock.fileno()) if listening.is_inherited else None
        """What it and the other processes that share the socket know of each other."""
        self._wait = 0.0
        """Seconds for which it is about to leave connections to them."""
        # Without the pool: gevent's way to go on when it has room is not fair to the others.
        super().__init__(sock, handle=_never_called, spawn=None)

    def close(self) -> None:
        """Close the socket, and remove the file of one that has one."""
        self._turns.forget(self)
        self._listening.end()
        super().close()

    def let_go(self, *, has_hub: bool) -> None:
        """Accept nothing, in a child process. The hub is touched only where that has it."""
        self._paused = True
        self._turns.forget(self)
        if has_hub:
            self.stop_accepting()

    def full(self) -> bool:
        """Whether to leave connections where they are. gevent asks, and pauses if so."""
        if not self._refuses_when_full and self._turns.must_wait(self):
            if self._load is not None:
                self._load.withdraw()
            return True
        if self._load is None or self._paused:
            return False
        self._wait = self._load.wait_for_others(self._count())
        return self._wait > 0.0

    @property
    def max_accept(self) -> int:  # type: ignore[override]  # nobody sets it
        """Accepts in one turn of the hub, at most. gevent asks at the begin of each."""
        if self._load is not None and self._load.has_others:
            return ACCEPTS_OF_SHARED
        return ACCEPTS

    def _count(self) -> int:
        return len(self._manager.sessions)

    def stop_accepting(self) -> None:
        """Watch no more; if that is to leave connections to other processes, for a moment only."""
        super().stop_accepting()
        if self._wait:
            self._timer = self.loop.timer(self._wait)
            self._timer.start(self._wait_is_over)
            self._wait = 0.0

    def _wait_is_over(self) -> None:
        """Accept, unless others have meanwhile."""
        if self._load is not None and self.started:
            # Not a matter of time: the next connection may come in the very next moment.
            asked = _new_poll()
            asked.register(self.socket, select.POLLIN)
            if not asked.poll(0):
                self._load.others_were_first()
        self._try_accepting()

    def take_turn(self) -> bool:
        """Accept one connection; false when none waits, or none may be accepted."""
        if self._paused:
            return False  # until `resume`
        try:
            accepted = self._accept()
        except BlockingIOError:
            self.start_accepting()
            return False
        if accepted is None:
            return False
        self.do_handle(*accepted)
        return True

    def pause(self) -> None:
        """Accept nothing more. From any OS thread: a flag that is looked at before each accept."""
        self._paused = True

    def resume(self) -> None:
        """Accept again. From any OS thread."""
        self._paused = False
        self._manager.thread.call_soon(self._try_accepting)

    def _try_accepting(self) -> None:
        if self.started:
            self.start_accepting()

    def start_accepting(self) -> None:
        """Watch for connections, unless paused. Called by gevent too, after a pause of its own."""
        if not self._paused:
            if self._load is not None:
                self._load.begin(self._count())
            try:
                super().start_accepting()
            except OSError as exc:  # a stranger has closed the descriptor
                self._accept_failed(exc)

    def do_read(  # type: ignore[override]  # no gevent socket, which would cost two watchers
        self,
    ) -> tuple[_socket.socket, Any] | None:
        """Accept one connection; ``None`` when there is none, or none may be accepted now."""
        if self._paused:
            self.stop_accepting()
            if self._load is not None:
                self._load.withdraw()
            return None
        try:
            return self._accept()
        except BlockingIOError:
            return None

    def _accept(self) -> tuple[_socket.socket, Any] | None:
        listening: Any = self.socket
        try:
            if self._listening.is_inherited:
                # Others may have set it otherwise since: systemd does for each service that it
                # starts (NonBlocking=), and a hub that waits here serves nobody.
                listening.setblocking(False)
            descriptor, address = listening._accept()
        except BlockingIOError:
            raise
        except OSError as exc:
            self._accept_failed(exc)
            return None
        self._backoff = self.min_delay
        try:
            return _socket.socket(*self._kind, descriptor), address
        except BaseException:
            os.close(descriptor)
            raise

    def do_handle(self, accepted: _socket.socket, address: Any) -> None:
        """Give an accepted connection to the manager, unless the rules refuse it."""
        try:
            if address is None and accepted.family != _socket.AF_UNIX:
                # macOS. With no address it would pass for a Unix socket, which has rights.
                raise ConnectionResetError("it has no address any more")
            if self._admission is not None and self._admission.refuses(
                accepted, address, self._manager
            ):
                return
            if not self._has_options:
                self._set_options(accepted, self._manager.settings)
            manager = self._manager
            manager.open(accepted, address, None, self._local_endpoint, manager.context)
        except BaseException as exc:
            end(accepted)
            if isinstance(exc, OSError):  # reset before it could be looked at
                log(logging.DEBUG, "%r: gone before it began: %s", address, exc)
            elif isinstance(exc, Exception):
                log(logging.ERROR, "%r: could not be started", address, exc_info=exc)
            else:
                raise

    def _accept_failed(self, exc: OSError) -> None:
        owner = self._manager.owner
        self.stop_accepting()
        if self._load is not None:
            self._load.withdraw()
        if exc.errno in LISTENER_IS_GONE:
            where = format_address(*self.endpoint[:2])
            why = os.strerror(exc.errno)
            log(logging.ERROR, "%r: the listener %s is gone: %s", owner, where, why)
            return
        if self._backoff == self.min_delay:
            self._tell(exc)
        self._timer = self.loop.timer(self._backoff)
        self._timer.start(self._try_accepting)
        self._backoff = min(self.max_delay, self._backoff * 2)

    def _tell(self, exc: OSError) -> None:
        """Tell that accepting has paused: a server at its limit fails and heals many times."""
        owner = self._manager.owner
        text = "%r: cannot accept: %s; connections wait in the backlog until it can"
        if exc.errno == errno.ECONNABORTED:
            log(logging.DEBUG, text, owner, exc)
        else:
            self._manager.peer_log.tell(owner, "cannot accept", text, owner, exc)


class Listeners:
    """All listeners of one server."""

    def __init__(self, opened: Sequence[ListeningSocket], manager: SessionManager) -> None:
        turns = AcceptQueue(manager.pool)
        self._all = [Listener(listening, manager, turns) for listening in opened]
        self.endpoints = [listener.endpoint for listener in self._all]
        """What they are bound to."""

    def start(self) -> None:
        """Accept."""
        for listener in self._all:
            listener.start()

    def pause(self) -> None:
        """Accept nothing more. From any OS thread."""
        for listener in self._all:
            listener.pause()

    def resume(self) -> None:
        """Accept again. From any OS thread."""
        for listener in self._all:
            listener.resume()

    def let_go(self, *, has_hub: bool) -> None:
        """Accept nothing, in a child process. The hub is touched only where that has it."""
        keep(self)
        for listener in self._all:
            listener.let_go(has_hub=has_hub)

    def close(self) -> None:
        """Close all of them, also where one fails."""
        with ExitStack() as closing:
            for listener in self._all:
                closing.callback(listener.close)


def _never_called(_accepted: object, _address: object) -> None:
    """`StreamServer` wants a handler; `Listener.do_handle` does its work."""
