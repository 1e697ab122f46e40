"""The registry: the sessions of one manager that have not ended, found by id.

A session's id is random bytes; a `uuid.UUID` is made from them only when the id is read
(`psofa_gevent.session.connection_id`). The registry is one dictionary whose keys are those bytes.
So it takes no more memory than another collection, and no `uuid.UUID` is made to find a session.

Clients may choose ids, so several sessions may have the same id. A session whose id is taken is
keyed by the session itself; a second dictionary, which is usually empty, maps it to its id.

The hub's thread changes the registry. Any thread may copy it and find a session in it: each of
these is a single dictionary operation, or works on a copy made by one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from psofa_gevent.session.inside import id_bytes

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["Registry"]


class Registry:
    """Sessions in order of arrival."""

    __slots__ = ("_later", "_sessions")

    def __init__(self) -> None:
        self._sessions: dict[bytes | PsSession[Any], PsSession[Any]] = {}
        self._later: dict[PsSession[Any], bytes] = {}
        """The ids of the sessions that came when another session had the same id."""

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[PsSession[Any]]:
        return iter(self._sessions.values())

    def copy(self) -> list[PsSession[Any]]:
        """All sessions, in order of arrival. From any thread."""
        # Atomic. list(self) would call `__len__` first, and more sessions may come after that.
        return list(self._sessions.values())

    def add(self, session: PsSession[Any]) -> None:
        """Add a session."""
        key = id_bytes(session)
        # Also if the first session with the id has left: `find` must yield the last one first.
        if key in self._sessions or (self._later and key in self._later.values()):
            self._later[session] = key
            self._sessions[session] = session
        else:
            self._sessions[key] = session

    def discard(self, session: PsSession[Any]) -> bool:
        """Remove a session; false if it is not in the registry."""
        key = id_bytes(session)
        if self._sessions.get(key) is session:
            del self._sessions[key]
            return True
        if self._later.pop(session, None) is None:
            return False
        del self._sessions[session]
        return True

    def clear(self) -> None:
        """Remove all sessions."""
        self._sessions.clear()
        self._later.clear()

    def find(self, connection_id: uuid.UUID) -> Iterator[PsSession[Any]]:
        """The sessions with that id, the last one first. From any thread."""
        key = connection_id.bytes
        if self._later:
            for session, each in reversed(list(self._later.items())):
                if each == key:
                    yield session
        first = self._sessions.get(key)
        if first is not None:
            yield first
