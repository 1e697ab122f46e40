"""The registry: the sessions of one manager that have not ended, found by id.

A session's id is random bytes, of which a `uuid.UUID` is made only if somebody asks
(`psofa_gevent.session.connection_id`). The registry is one dictionary whose keys are those bytes:
so it takes no more memory than any other collection, and to find a session no id is made, neither
at the first time nor later.

Clients may choose ids, so several sessions may have one. A session whose id is taken is keyed by
the session itself, and a second dictionary, which is empty as a rule, has its id.

The hub's thread changes the registry. Any thread may copy it and look a session up: each of these
is one step of a dictionary.
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
    """Sessions in the order in which they came."""

    __slots__ = ("_later", "_sessions")

    def __init__(self) -> None:
        self._sessions: dict[bytes | PsSession[Any], PsSession[Any]] = {}
        self._later: dict[PsSession[Any], bytes] = {}
        """Those that came when another one had their id, which they have here."""

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[PsSession[Any]]:
        return iter(self._sessions.values())

    def copy(self) -> list[PsSession[Any]]:
        """All of them, as they came. From any thread."""
        # One step: with list(self), `__len__` is one in between, and more may have come by then.
        return list(self._sessions.values())

    def add(self, session: PsSession[Any]) -> None:
        """Keep one more session."""
        key = id_bytes(session)
        # Also where the first one has left: of those that have the id, the last is to be found.
        if key in self._sessions or (self._later and key in self._later.values()):
            self._later[session] = key
            self._sessions[session] = session
        else:
            self._sessions[key] = session

    def discard(self, session: PsSession[Any]) -> bool:
        """Forget a session; false if it is not here."""
        key = id_bytes(session)
        if self._sessions.get(key) is session:
            del self._sessions[key]
            return True
        if self._later.pop(session, None) is None:
            return False
        del self._sessions[session]
        return True

    def clear(self) -> None:
        """Forget all of them."""
        self._sessions.clear()
        self._later.clear()

    def find(self, connection_id: uuid.UUID) -> Iterator[PsSession[Any]]:
        """Those with that id, the last one first."""
        key = connection_id.bytes
        if self._later:
            for session, each in reversed(list(self._later.items())):
                if each == key:
                    yield session
        first = self._sessions.get(key)
        if first is not None:
            yield first
