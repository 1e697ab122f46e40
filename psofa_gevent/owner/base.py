"""The base class of the three owners of sessions, with their start, manager and shutdown.

An owner is stopped (no manager), running (a manager), or shutting down (a manager with a shutdown).
This state changes in the hub's thread, where a signal handler may change it between any two lines.
Another thread changes it only if the hub was destroyed or its thread has ended. In a child process
an owner begins stopped.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Collection, Hashable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, ClassVar, Generic, cast
from weakref import WeakValueDictionary

from psofa_gevent.callback import PsCallback, check_callback
from psofa_gevent.checks import check_instance, check_seconds
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.group import PsGroup, post_to_all
from psofa_gevent.hub.forking import track
from psofa_gevent.hub.greenlets import may_wait, may_wait_for_callbacks
from psofa_gevent.hub.logs import PeerLog
from psofa_gevent.hub.thread import LOOK_PERIOD, CallerEvent, Pulse, new_lock
from psofa_gevent.hub.times import NEVER
from psofa_gevent.messages import M, Message
from psofa_gevent.owner.attributes import check_attribute
from psofa_gevent.owner.keys import Keys
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.owner.shutdown import Shutdown
from psofa_gevent.session import inside
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import SessionSettings

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.typing import Owner

__all__ = ["SessionOwner"]

HUB_PATIENCE = 1.0
"""Seconds without a sign of life after which a hub is assumed not to run."""
UNDO_TIMEOUT = 5.0
"""Seconds that ``on_stop`` has if a start or a first connect fails after ``on_start``."""


class SessionOwner(Generic[M]):
    """The base of `PsServer`, `PsClient` and `PsMultiClient`."""

    _settings_class: ClassVar[type[SessionSettings]]
    """The class that describes the settings of this kind of owner."""

    def __init__(self, callback: PsCallback[M], settings: SessionSettings) -> None:
        check_callback(callback)
        self._callback = callback
        self._settings = settings
        self._manager: SessionManager | None = None
        self._peer_log = PeerLog()
        self._keys: Keys[M] = Keys()
        self._groups: WeakValueDictionary[str, PsGroup[M]] = WeakValueDictionary()
        self._groups_lock = new_lock()
        track(self)

    if not TYPE_CHECKING:  # type checkers would let every name pass

        def __setattr__(self, name: str, value: object) -> None:
            check_attribute(self, name, self._settings_class)
            super().__setattr__(name, value)

    # A signal handler or another thread may change the attribute `_manager` at any time: so each
    # method reads it once.

    def get_session_count(self) -> int:
        """The number of sessions that have not ended: before ``on_open``, open, or closing.

        A session whose PROXY header or TLS handshake is not complete also takes a slot of the pool.
        """
        manager = self._manager
        return 0 if manager is None else len(manager.sessions)

    @property
    def sessions(self) -> list[PsSession[M]]:
        """The sessions that are open now and have passed their preambles, in order of arrival."""
        manager = self._manager
        if manager is None:
            return []
        return inside.usable_of(manager.sessions.copy())

    # Many sessions

    def get_session(self, connection_id: uuid.UUID) -> PsSession[M] | None:
        """The open session with that id; ``None`` if there is none.

        Clients may choose ids. If several sessions have the id, the one that came last is returned.
        From any greenlet and any OS thread. The time does not depend on the number of sessions.

        Raises:
            TypeError: `connection_id` is not a `uuid.UUID`.
        """
        if not isinstance(connection_id, uuid.UUID):
            raise TypeError(f"connection_id must be a uuid.UUID, not {connection_id!r}")
        manager = self._manager
        return None if manager is None else manager.get_session(connection_id)

    def broadcast(
        self,
        message: M | Message,
        *,
        exclude: PsSession[M] | Collection[PsSession[M]] = (),
        raw: bool = False,
    ) -> None:
        """Post a message to every open session (`PsSession.post`), without waiting.

        The message is encoded once for each framing that the sessions have. From any greenlet and
        any OS thread.

        Args:
            message: as for `PsSession.send`.
            exclude: a session or several sessions to leave out. Sessions of other owners never get
                the message.
            raw: as for `PsSession.send`.

        Raises:
            PsFramingError: a session's framing can't carry the message. No session got it.
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: `message` is text with a lone surrogate, which UTF-8 can't encode.
                No session got it.
        """
        post_to_all(self.sessions, message, exclude, raw=raw)

    def group(self, name: str) -> PsGroup[M]:
        """The group with that name, for sessions to join. Each call returns the same group.

        The name belongs to this owner, but sessions of other owners may join as well. The group
        exists as long as the application holds a reference to it, or a session is in it.

        Raises:
            TypeError: `name` is not a str.
        """
        with self._groups_lock:  # the guarded steps are Python code, and so not atomic
            group = self._groups.get(name)
            if group is None:
                group = self._groups[name] = PsGroup(name)
            return group

    def bind(self, session: PsSession[M], key: Hashable, *, replace: bool = False) -> None:
        """Bind a key of the application to a session, for `find`, until its close is requested.

        A session may have several keys. Without effect if the session is closed. From any greenlet
        and any OS thread.

        Args:
            session: the session.
            key: any hashable object.
            replace: take the key from another session that has it, and close that session
                (REPLACED): for a device that reconnects before its old connection was found dead.

        Raises:
            PsKeyTakenError: another open session has the key, and `replace` is false.
            TypeError: `session` is not a session, or `key` is not hashable.
            ValueError: the session belongs to another owner; use the `bind` of that owner.
        """
        check_instance("session", session, PsSession)
        self._check_owns(session, session.owner)
        self._keys.bind(session, key, replace=replace)

    def _check_owns(self, what: object, owner: object) -> None:
        if owner is not self:
            raise ValueError(f"{what!r} belongs to {owner!r}, and not to {self!r}")

    def unbind(self, key: Hashable) -> None:
        """Take a key from the session that has it. Without effect if no session has it."""
        self._keys.unbind(key)

    def find(self, key: Hashable) -> PsSession[M] | None:
        """The open session that `key` was bound to; ``None`` if there is none."""
        return self._keys.find(key)

    @property
    def started(self) -> bool:
        """Whether the owner has started, and no call (`shutdown`, `disconnect`, …) has ended it."""
        manager = self._manager
        return manager is not None and manager.shutdown is None

    @property
    def _is_starting(self) -> bool:
        manager = self._manager
        return manager is not None and not manager.has_started

    @property
    def _is_shutting_down(self) -> bool:
        manager = self._manager
        return manager is not None and manager.shutdown is not None

    def _let_go(self, hub: Hub | None) -> None:
        """Be stopped, in a child process. The manager has its own ``_let_go``."""
        self._manager = None
        self._peer_log = PeerLog()
        self._keys.let_go()
        self._groups_lock = new_lock()  # it may be held in the parent

    def _forget_if_hub_is_gone(self) -> None:
        """Drop a manager whose hub was destroyed or whose thread has ended. Calls no callback.

        In any thread.
        """
        manager = self._manager
        if manager is not None and manager.thread.is_over():
            manager.end_with_hub()
            self._stopped()

    def _new_manager(self, max_sessions: int | None = None) -> SessionManager:
        owner = cast("Owner", self)
        return SessionManager(owner, self._callback, self._settings, self._peer_log, max_sessions)

    @contextlib.contextmanager
    def _starting(self, manager: SessionManager) -> Iterator[None]:
        """Register the caller as a starter during the block; an exception undoes the start.

        The undoing calls ``on_stop`` only if ``on_start`` has returned. A shutdown that is
        requested meanwhile waits until the block has ended.
        """
        try:
            with manager.starting():
                yield
        except BaseException:
            self._undo(manager)
            raise

    def _undo(self, manager: SessionManager) -> None:
        """Shut down a manager that has no sessions, and wait for the end if the caller may wait."""
        if self._manager is manager:
            self._begin_shutdown(manager, PsCloseReason.SHUTDOWN, UNDO_TIMEOUT, 0.0)
        if may_wait() and manager.process == os.getpid():
            manager.stopped.wait()

    def _shut_down(self, reason: PsCloseReason, timeout: float | None, drain: float = 0.0) -> None:
        """Shut down, and wait for the end if the caller may wait. From any greenlet and OS thread.

        If the hub does not run, a caller in another OS thread waits for `drain` and `timeout` only.
        """
        check_seconds("timeout", timeout)
        check_seconds("drain", drain, optional=False)
        self._forget_if_hub_is_gone()
        manager = self._manager
        if manager is None:
            return
        if manager.thread.is_current():
            self._begin_shutdown(manager, reason, timeout, drain).wait(manager)
            return
        done = CallerEvent()
        manager.thread.call_soon(self._shut_down_for_thread, manager, reason, timeout, drain, done)
        if not may_wait_for_callbacks():
            return
        until = NEVER if timeout is None else monotonic() + drain + timeout
        pulse = Pulse(manager.thread)
        # `stopped` as well: after the end, for any reason, the hub may never run to set `done`.
        while not done.wait(LOOK_PERIOD) and not manager.stopped.is_set():
            now = monotonic()
            if manager.thread.is_over():
                self._forget_if_hub_is_gone()
                return
            if not pulse.felt_since(now - HUB_PATIENCE) and now >= until:
                return

    def _shut_down_for_thread(
        self,
        manager: SessionManager,
        reason: PsCloseReason,
        timeout: float | None,
        drain: float,
        done: CallerEvent,
    ) -> None:
        if self._manager is manager:
            self._begin_shutdown(manager, reason, timeout, drain).add_thread(done)
        else:
            done.set()

    def _begin_shutdown(
        self, manager: SessionManager, reason: PsCloseReason, timeout: float | None, drain: float
    ) -> Shutdown:
        """Begin the shutdown, or shorten the one that has begun. Does not switch.

        A signal handler may call this in the middle of another call. So no step depends on an
        earlier check, and each step may be done twice.
        """
        shutdown = manager.set_shutdown(
            Shutdown(manager, reason, self._close_listeners_or_attempts, self._stopped)
        )
        if self._manager is manager:
            self._stop_admitting()
        shutdown.shorten(timeout, drain)
        shutdown.begin(manager)
        return shutdown

    def _stop_admitting(self) -> None:
        """Admit no new connection from now on. In the hub's thread; does not switch.

        A signal handler may call it at any line of any greenlet, and repeatedly.
        """
        raise NotImplementedError

    def _close_listeners_or_attempts(self) -> None:
        """Close the listeners, or end the attempts to connect.

        In the shutdown's greenlet, when no starter is left.
        """
        raise NotImplementedError

    def _stopped(self) -> None:
        """Become stopped: the shutdown is over, or the hub was destroyed. Does not switch."""
        self._manager = None
        self._peer_log.close()
