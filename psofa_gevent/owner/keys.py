"""Keys of the application that find its sessions: a device's number, a user's name.

A key belongs to one session. A session may have several keys, and loses them when its close is
requested. So a session that is found is open.

Everything may be called from any greenlet and any OS thread. Nothing switches. A native lock is
held for a few lines. It is reentrant, for a signal handler or a finalizer that runs within them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, NamedTuple

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsKeyTakenError
from psofa_gevent.hub.forking import keep
from psofa_gevent.hub.thread import new_lock
from psofa_gevent.messages import M
from psofa_gevent.session import inside
from psofa_gevent.session.session import PsSession

__all__ = ["Keys"]


class Keys(Generic[M]):
    """The keys of one owner's sessions."""

    def __init__(self) -> None:
        self._sessions: dict[Hashable, PsSession[M]] = {}
        self._lock = new_lock()

    def bind(self, session: PsSession[M], key: Hashable, *, replace: bool) -> None:
        """Bind `key` to `session` (`PsServer.bind`)."""
        with self._lock:
            old = self._sessions.get(key)
            if not session.is_open or old is session:
                return
            if old is not None and old.is_open and not replace:
                raise PsKeyTakenError(
                    f"the key {key!r} is taken by {old!r}; pass replace=True to take it over"
                )
            self._sessions[key] = session
            inside.join(session, _Binding(self, key), None)
        if old is not None:
            inside.leave(old, _Binding(self, key))
            inside.ask_to_close(old, PsCloseReason.REPLACED)

    def unbind(self, key: Hashable) -> None:
        """Forget `key`."""
        with self._lock:
            session = self._sessions.get(key)
            if session is not None:
                inside.leave(session, _Binding(self, key))

    def find(self, key: Hashable) -> PsSession[M] | None:
        """The open session that `key` is bound to, if there is one."""
        session = self._sessions.get(key)
        return session if session is not None and session.is_open else None

    def let_go(self) -> None:
        """Forget all keys, in a child process: the sessions belong to the parent.

        Replaces the lock, which may have been held at the fork.
        """
        keep(dict(self._sessions))
        self._sessions.clear()
        self._lock = new_lock()

    def forget(self, session: PsSession[Any], key: Hashable) -> None:
        """Forget `key`, which `session` has lost."""
        with self._lock:
            if self._sessions.get(key) is session:
                del self._sessions[key]


class _Binding(NamedTuple):
    """The membership of a session that has a key. Bindings of the same key are equal."""

    keys: Keys[Any]
    key: Hashable

    def _left(self, session: PsSession[Any], _state: object) -> None:
        self.keys.forget(session, self.key)

    def _let_go(self, session: PsSession[Any], state: object) -> None:
        """Do nothing: `Keys.let_go` forgets all keys."""
