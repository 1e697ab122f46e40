"""The listeners of a server: each accepts from one listening socket, while the manager has room.

All listeners of a server share the pool of its manager. While the pool is full, no listener
accepts. Each slot that becomes free goes to the listener that has waited longest (`AcceptQueue`);
the event loop would give all slots to one listener.

Several processes, each with a server, may share an inherited socket. They accept so that all have
about the same number of sessions (`psofa_gevent.listening.balance`).

An accepted socket belongs to its session as soon as there is one. A connection that the rules of
the server refuse in the hub never gets to the manager (`psofa_gevent.listening.admission`). With
``refuse_when_full`` the listeners go on accepting while the pool is full.

Error handling: after any error of accept(2) accepting pauses, for 10 ms to one second, and resumes
by itself. Most often the process lacks descriptors or memory: connections wait in the backlog, no
session notices, and the log has a warning, at most once a minute. If a listening socket itself is
gone, the log has an error, and the open sessions go on.

The accept loop is that of gevent's `StreamServer`. `Listener` overrides only its public methods,
has a timer of its own for its pauses, and uses no private name of gevent. It uses one private name
of Python: ``socket._accept``, which returns a descriptor. The public ``accept`` makes a
`socket.socket` of it, in Python code, for each connection, while a session needs the plain C
object.

Accepting runs in the hub, where nothing may block or raise. The greenlet that calls the server's
``start`` makes and starts `Listeners`; the greenlet that stops the server calls `Listeners.close`.
`pause` and `resume` may be called in any thread. Nothing here switches.
"""

from __future__ import annotations

import _socket
import errno
import logging
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from gevent import monkey
from gevent.server import StreamServer

from psofa_gevent.hub.forking import keep
from psofa_gevent.hub.logs import log
from psofa_gevent.listening.admission import Admission
from psofa_gevent.listening.balance import SharedLoad
from psofa_gevent.listening.sockets import ListeningSocket
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.sockopts import (
    ARE_INHERITED,
    UNNAMED,
    Endpoint,
    end,
    endpoint,
    set_all_options,
    set_options,
)
from psofa_gevent.owner.manager import SessionManager

__all__ = ["Listeners"]

_new_poll: Callable[[], Any] = monkey.get_original("select", "poll")
"""The system's ``poll``, also in a patched process: the hub calls it, without waiting."""

EVERY_ADDRESS = frozenset({"0.0.0.0", "::", "::ffff:0.0.0.0"})
"""Hosts of listening sockets that are never the local address of an accepted socket."""
LISTENER_IS_GONE = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})
"""Errors of accept(2) after which it can never succeed again."""
ACCEPTS_OF_SHARED = 8
"""Accepts in one round of the hub, at most, from a socket that other processes accept from as well,
so that all get a part of a burst. A limit of 1 would be fairest, but each connection took 15 % more
time."""
ACCEPTS_PER_ROUND = 100
"""Accepts in one round of the hub, at most, from any other socket, and slots of a full pool given
away in one round. It is gevent's default."""


class AcceptQueue:
    """The accept queue: the listeners of a server that wait for a free slot of the full pool.

    All of it runs in the hub's thread, and does not switch.
    """

    def __init__(self, manager: SessionManager) -> None:
        self._pool = manager.pool
        self._loop = manager.thread.loop
        self._waiting: deque[Listener] = deque()
        self._is_due = False
        """Whether the event loop is about to call `_give`."""

    def must_wait(self, listener: Listener) -> bool:
        """Whether there is no slot for `listener`. If so, it will accept when its turn comes."""
        if not self._waiting and not self._pool.full():
            return False
        if listener not in self._waiting:
            self._waiting.append(listener)
        self.slot_is_free()
        return True

    def forget(self, listener: Listener) -> None:
        """Take a listener out of the queue."""
        if listener in self._waiting:
            self._waiting.remove(listener)

    def slot_is_free(self) -> None:
        """Give free slots away soon, if there are any and a listener waits."""
        if self._waiting and not self._is_due and not self._pool.full():
            self._is_due = True
            self._loop.run_callback(self._give)

    def _give(self) -> None:
        """Give the free slots away, one to each listener in turn."""
        self._is_due = False
        for _ in range(ACCEPTS_PER_ROUND):
            if not self._waiting or self._pool.full():
                break
            listener = self._waiting.popleft()
            if listener.accept_one():
                self._waiting.append(listener)
        self.slot_is_free()


class Listener(StreamServer):
    """Accepts from one listening socket, and hands the connections to a manager."""

    def __init__(
        self,
        listening: ListeningSocket,
        manager: SessionManager,
        admission: Admission | None,
        queue: AcceptQueue,
    ) -> None:
        """Make a listener that accepts from `start` on.

        Args:
            listening: the listening socket. `close` closes it.
            manager: gets the connections.
            admission: the rules that may refuse a connection in the hub; ``None``: no rules.
            queue: the accept queue of all listeners of the manager.
        """
        self._listening = listening
        self._manager = manager
        self._queue = queue
        self._paused = False
        self._backoff = self.min_delay
        sock = listening.socket
        # As plain numbers: a socket's family and type are enums.
        self._kind = int(sock.family), int(sock.type), sock.proto
        self.endpoint: Endpoint = endpoint(sock.getsockname()) or UNNAMED
        """The endpoint that it is bound to."""
        knows = self.endpoint[0] not in EVERY_ADDRESS
        self._local_endpoint = self.endpoint if knows else None
        """The local endpoint of all accepted sockets; None: it listens on every address."""
        self._admission = admission
        self._refuses_when_full = admission is not None and admission.refuse_when_full
        self._set_options = set_options
        self._has_options = ARE_INHERITED
        """Whether accepted sockets need no call of `_set_options`."""
        if listening.is_inherited:
            self._set_options, self._has_options = set_all_options, False
        if sock.family == _socket.AF_UNIX:  # has one option, which is not inherited
            self._set_options = set_options
            self._has_options = manager.settings.send_buffer_size is None
        self._load = SharedLoad(sock.fileno()) if listening.is_inherited else None
        """The balance with other processes that share the socket; None: it is not inherited."""
        self._wait = 0.0
        """Seconds for which `stop_accepting` will leave connections to these processes."""
        self._pause_timer: Any = None
        """Ends a pause that this class, and not gevent, has begun."""
        # Without the pool: when it has room again, gevent would not be fair to other listeners.
        super().__init__(sock, handle=_never_called, spawn=None)

    def close(self) -> None:
        """Close the socket, and remove the file of a Unix socket that the server made."""
        self._queue.forget(self)
        self._listening.end()
        super().close()

    def let_go(self, *, has_hub: bool) -> None:
        """Accept nothing in a child process.

        Args:
            has_hub: whether the hub is the child's; otherwise it is not touched.
        """
        self._paused = True
        self._queue.forget(self)
        if has_hub:
            self.stop_accepting()

    def full(self) -> bool:
        """Whether to leave connections in the backlog for now.

        gevent asks before each accept, and calls `stop_accepting` if so.
        """
        if not self._refuses_when_full and self._queue.must_wait(self):
            if self._load is not None:
                self._load.withdraw()
            return True
        if self._load is None or self._paused:
            return False
        self._wait = self._load.wait_for_others(self._count())
        return self._wait > 0.0

    @property
    def max_accept(self) -> int:  # type: ignore[override]  # no code sets it
        """Accepts in one round of the hub, at most. gevent asks at the start of each round."""
        if self._load is not None and self._load.has_others:
            return ACCEPTS_OF_SHARED
        return ACCEPTS_PER_ROUND

    def _count(self) -> int:
        return len(self._manager.sessions)

    def stop_accepting(self) -> None:
        """Stop watching the socket.

        If `full` has decided to leave connections to other processes, only for that time.
        """
        super().stop_accepting()
        timer, self._pause_timer = self._pause_timer, None
        if timer is not None:
            timer.stop()
            timer.close()
        if self._wait:
            self._start_pause(self._wait, self._wait_is_over)
            self._wait = 0.0

    def _start_pause(self, seconds: float, ended: Callable[[], None]) -> None:
        self._pause_timer = self.loop.timer(seconds)
        self._pause_timer.start(ended)

    def _wait_is_over(self) -> None:
        """Watch the socket again after a wait, and note whether others took the connection."""
        if self._load is not None and self.started:
            # Ask now whether a connection is left: the next one may come at any moment.
            asked = _new_poll()
            asked.register(self.socket, select.POLLIN)
            if not asked.poll(0):
                self._load.others_were_first()
        self._try_accepting()

    def accept_one(self) -> bool:
        """Accept one connection. False: none waits, or the listener may not accept now."""
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
        """Accept nothing more. From any OS thread: sets a flag that is read before each accept."""
        self._paused = True

    def resume(self) -> None:
        """Accept again. From any OS thread."""
        self._paused = False
        self._manager.thread.call_soon(self._try_accepting)

    def _try_accepting(self) -> None:
        if self.started:
            self.start_accepting()

    def start_accepting(self) -> None:
        """Watch for connections, unless paused. gevent calls it as well, after its own pauses."""
        if not self._paused:
            if self._load is not None:
                self._load.begin(self._count())
            try:
                super().start_accepting()
            except OSError as exc:  # other code has closed the descriptor
                self._accept_failed(exc)

    def do_read(  # type: ignore[override]  # no gevent socket, which would cost two watchers
        self,
    ) -> tuple[_socket.socket, Any] | None:
        """Accept one connection. ``None``: none waits, or the listener may not accept now."""
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
                # Another process may have made it blocking since: systemd sets the mode for each
                # service that it starts (NonBlocking=). A hub that waits here serves nobody.
                listening.setblocking(False)
            descriptor, address = listening._accept()  # noqa: SLF001 - see the module docstring
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
                # macOS. Without an address it would pass for a Unix socket, which the rules about
                # addresses don't refuse.
                raise ConnectionResetError("it no longer has an address")
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
            if isinstance(exc, OSError):  # the connection was reset
                log(logging.DEBUG, "%r: connection lost before its session began: %s", address, exc)
            elif isinstance(exc, Exception):
                log(logging.ERROR, "%r: the session could not be started", address, exc_info=exc)
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
        self._start_pause(self._backoff, self._try_accepting)
        self._backoff = min(self.max_delay, self._backoff * 2)

    def _tell(self, exc: OSError) -> None:
        """Log that accepting has paused. Limited, as a server at its limit pauses many times."""
        owner = self._manager.owner
        text = "%r: cannot accept: %s; connections wait in the backlog until it can"
        if exc.errno == errno.ECONNABORTED:
            log(logging.DEBUG, text, owner, exc)
        else:
            self._manager.peer_log.tell(owner, "cannot accept", text, owner, exc)


class Listeners:
    """All listeners of one server, in the order of its binds."""

    def __init__(
        self,
        opened: Sequence[ListeningSocket],
        manager: SessionManager,
        admission: Admission | None,
    ) -> None:
        queue = AcceptQueue(manager)
        self._manager = manager
        manager.slot_is_free = queue.slot_is_free
        self._all = [Listener(listening, manager, admission, queue) for listening in opened]
        self.endpoints = [listener.endpoint for listener in self._all]
        """The endpoints that they are bound to."""

    def start(self) -> None:
        """Begin to accept."""
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
        """Accept nothing in a child process.

        Args:
            has_hub: whether the hub is the child's; otherwise it is not touched.
        """
        keep(self)
        self._manager.slot_is_free = None
        for listener in self._all:
            listener.let_go(has_hub=has_hub)

    def close(self) -> None:
        """Close all listeners, even if closing one of them fails."""
        self._manager.slot_is_free = None
        with ExitStack() as closing:
            for listener in self._all:
                closing.callback(listener.close)


def _never_called(_accepted: object, _address: object) -> None:
    """The handler that `StreamServer` requires; `Listener.do_handle` does its work."""
