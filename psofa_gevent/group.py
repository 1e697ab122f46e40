"""Posts of one message to many sessions: groups, and encoding a message once for all members.

A session joins and leaves groups, and leaves them by itself when its close is requested. A post
never waits (`PsSession.post`), so a slow member holds up neither the others nor the caller.

A post to thousands of sessions would hold the hub for too long: it takes 6 µs for each session, in
system calls. So after about 10 ms (`TURN`) the remaining sessions only collect the message, as
corked sessions do, which takes a twentieth of that time. The hub then sends it in turns
(`_LatePosts`). Anything that is sent or posted to such a session meanwhile is collected behind the
message, so the order is that of the calls. Anything that sends collected messages, such as a close,
sends this message, too.

Everything here may be called from any greenlet and any OS thread, for sessions of any owner.
Nothing switches. Each change of a dictionary is a single step, so there is no lock: a session that
joins looks afterwards whether it was closed meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from time import monotonic
from typing import Any, Generic

from gevent import get_hub

from psofa_gevent.checks import check_instance
from psofa_gevent.hub.forking import keep, track, unwatch, watch
from psofa_gevent.hub.native import new_local
from psofa_gevent.hub.times import SHORTEST_TIMER, TURN
from psofa_gevent.messages import M, Message, as_bytes
from psofa_gevent.session import inside
from psofa_gevent.session.session import PsSession

__all__ = ["PsGroup", "post_to_all"]

MEMBERS_AT_A_TIME = 16
"""Sessions that get a post between two looks at the clock."""


class PsGroup(Generic[M]):
    """Sessions that get the same messages: a chat room, the subscribers of a topic.

    Construct it, or get it by name from `PsServer.group`. Iterating gives the members that are
    open, in the order in which they joined.
    """

    def __init__(self, name: str = "") -> None:
        """Make an empty group; `name` is for people.

        Raises:
            TypeError: `name` is not a `str`.
        """
        self.name = check_instance("name", name, str)
        self._members: dict[PsSession[M], None] = {}

    def __repr__(self) -> str:
        return f"<PsGroup {self.name!r}, {len(self)} sessions>"

    def __len__(self) -> int:
        return len(self._members)

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __iter__(self) -> Iterator[PsSession[M]]:
        return iter([session for session in list(self._members) if session.is_open])

    def __contains__(self, session: object) -> bool:
        return session in self._members

    def join(self, session: PsSession[M]) -> None:
        """Add a session. Has no effect when the session is in the group, or closed.

        Raises:
            TypeError: `session` is not a `PsSession`.
        """
        check_instance("session", session, PsSession)
        if session not in self._members:
            self._members[session] = None
            inside.join(session, self, None)

    def leave(self, session: PsSession[M]) -> None:
        """Remove a session. Has no effect when it is not in the group."""
        if session in self._members:
            inside.leave(session, self)

    def post(
        self,
        message: M | Message,
        *,
        exclude: PsSession[M] | Collection[PsSession[M]] = (),
        raw: bool = False,
    ) -> None:
        """Post a message to every member.

        The message is encoded once for each framing of the members, and most groups have only one.
        Members that are just closing do not get it.

        Args:
            message: as for `PsSession.send`.
            exclude: a session, or several, that must not get the message.
            raw: as for `PsSession.send`.

        Raises:
            PsFramingError: a member's framing can't carry the message. No member got it.
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: `message` is text with a lone surrogate, which UTF-8 cannot encode.
                No member got it.
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
    """Post to the sessions that are not in `exclude`. Raises the errors of `PsGroup.post`."""
    if exclude:
        excluded = {exclude} if isinstance(exclude, PsSession) else set(exclude)
        sessions = [session for session in sessions if session not in excluded]
    # Encoded for all sessions, before the first one gets anything. Bound methods of one framing are
    # equal.
    alike = inside.alike(sessions)
    framed: dict[object, bytes] = {}
    for encode, _, _ in alike:
        if encode not in framed:
            framed[encode] = as_bytes(message if raw or encode is None else encode(message))
    for encode, thread, receivers in alike:
        data = framed[encode]
        if thread.is_current():
            _post_to_each(receivers, data)
        else:
            for session in receivers:
                inside.post_encoded_from_thread(session, data)


def _post_to_each(sessions: list[PsSession[Any]], data: bytes) -> None:
    late = _late_posts()
    now = 0 if late.is_pending else _post_for_a_turn(sessions, data)
    for session in sessions[now:]:
        late.post(session, data)


def _post_for_a_turn(sessions: list[PsSession[Any]], data: bytes) -> int:
    """Post to as many of `sessions` as the time of a turn allows; return their number."""
    end = monotonic() + TURN
    post_encoded = inside.post_encoded
    for number, session in enumerate(sessions, 1):
        post_encoded(session, data)
        if number % MEMBERS_AT_A_TIME == 0 and monotonic() >= end:
            return number
    return len(sessions)


class _LatePosts:
    """The sessions of one hub that have collected a post to many. Belongs to the hub's thread."""

    def __init__(self) -> None:
        self.hub = get_hub()
        self._sessions: deque[PsSession[Any]] = deque()
        track(self)

    def _let_go(self, _hub: object) -> None:
        """Drop the posts in a child process: the parent sends them (`psofa_gevent.hub.forking`)."""
        keep(*self._sessions)
        self._sessions.clear()

    @property
    def is_pending(self) -> bool:
        """Whether some sessions have not had their turn."""
        return len(self._sessions) > 0

    def post(self, session: PsSession[Any], data: bytes) -> None:
        """Post to a session. The message leaves later, unless the session posts it at once."""
        if not inside.collect_post(session, data):
            return
        self._sessions.append(session)
        if len(self._sessions) == 1:
            self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        # The hub calls a timer after it has looked at the sockets, but may call what run_callback
        # gets dozens of times before that.
        timer = watch(self.hub.loop.timer(SHORTEST_TIMER))
        timer.start(self._send_some, timer)

    def _send_some(self, timer: Any) -> None:
        unwatch(timer)
        end = monotonic() + TURN
        sessions = self._sessions
        try:
            while sessions:
                for _ in range(min(MEMBERS_AT_A_TIME, len(sessions))):
                    inside.flush(sessions[0])
                    sessions.popleft()
                if monotonic() >= end:
                    return
        finally:
            if sessions:  # a signal handler may have raised in any line
                self._wait_for_turn()


def _late_posts() -> _LatePosts:
    """The late posts of this thread's hub."""
    late: _LatePosts | None = getattr(_of_thread, "late", None)
    if late is None or late.hub is not get_hub():
        late = _of_thread.late = _LatePosts()
    return late


_of_thread = new_local()
