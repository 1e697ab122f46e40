"""Posting one message to many sessions: groups, and how a message is framed once for all of them.

A session joins and leaves groups, and leaves them by itself when its close is requested. Posting
waits for nobody (`PsSession.post`), so a slow member holds up neither the others nor the poster.

May be called from any greenlet and any OS thread, for sessions of any owner. Nothing switches.
Changes of a dictionary are single steps, so nothing is locked: who joins looks, afterwards, whether
the session closed meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Generic

from psofa_gevent.hub_thread import HubThread
from psofa_gevent.messages import M, Message, as_bytes
from psofa_gevent.session import PsSession
from psofa_gevent.settings import check_instance

__all__ = ["PsGroup", "post_to_all"]


class PsGroup(Generic[M]):
    """Sessions that get the same messages: a chat room, the subscribers of a topic.

    Made by itself, or by name by `PsServer.group`. Iterating gives the members that are open, in
    the order in which they joined.
    """

    def __init__(self, name: str = "") -> None:
        """An empty group; `name` is for people.

        Raises:
            TypeError: `name` is no text.
        """
        self.name = check_instance("name", name, str)
        self._members: dict[PsSession[M], None] = {}

    def __repr__(self) -> str:
        return f"<PsGroup {self.name!r}, {len(self)} sessions>"

    def __len__(self) -> int:
        return len(self._members)

    def __bool__(self) -> bool:
        return True  # an empty one is a group, too

    def __iter__(self) -> Iterator[PsSession[M]]:
        return iter([session for session in list(self._members) if session.is_open])

    def __contains__(self, session: object) -> bool:
        return session in self._members

    def join(self, session: PsSession[M]) -> None:
        """Add a session; without effect when it is in the group, or closed.

        Raises:
            TypeError: that is no session.
        """
        check_instance("session", session, PsSession)
        if session not in self._members:
            self._members[session] = None
            session._join(self, None)

    def leave(self, session: PsSession[M]) -> None:
        """Remove a session; without effect when it is not in the group."""
        if session in self._members:
            session._leave(self)

    def post(
        self,
        message: M | Message,
        *,
        exclude: PsSession[M] | Collection[PsSession[M]] = (),
        raw: bool = False,
    ) -> None:
        """Post a message to every member.

        It is framed once for each framing that the members have, which is once, as a rule, and
        members that are closing just now are passed over.

        Args:
            message: as for `PsSession.send`.
            exclude: a session, or several, that shall not get it.
            raw: as for `PsSession.send`.

        Raises:
            PsFramingError: a member's framing can't carry the message. Nobody got it.
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: it is text with a lone surrogate, which is no UTF-8. Nobody got it.
        """
        post_to_all(list(self._members), message, exclude, raw=raw)

    def _left(self, session: PsSession[Any], _state: object) -> None:
        self._members.pop(session, None)

    _let_go = _left


def post_to_all(
    sessions: list[PsSession[Any]],
    message: object,
    exclude: PsSession[Any] | Collection[PsSession[Any]],
    *,
    raw: bool,
) -> None:
    """Post to those of `sessions` that are not in `exclude`. Errors as of `PsGroup.post`."""
    if exclude:
        excluded = {exclude} if isinstance(exclude, PsSession) else set(exclude)
        sessions = [session for session in sessions if session not in excluded]
    # Framed for all, before the first one gets something. Bound methods of one framing are equal.
    alike: list[tuple[bytes, HubThread, list[PsSession[Any]]]] = []
    receivers: list[PsSession[Any]] = []
    encode: object = alike  # none yet
    thread = None
    framed: dict[object, bytes] = {}
    for session in sessions:
        own: Any = session._encode
        if own != encode or session._host.thread is not thread:
            encode, thread = own, session._host.thread
            if encode not in framed:
                framed[encode] = as_bytes(message if raw or own is None else own(message))
            receivers = []
            alike.append((framed[encode], thread, receivers))
        receivers.append(session)
    for data, thread, receivers in alike:
        if thread.is_current():
            for session in receivers:
                session._post_here(data)
        else:
            for session in receivers:
                session._post_from_thread(data)
