"""Ask and wait: a request is sent to a session, and its reply comes back to who asked.

The replies are messages of the session like any others, so its callback hands them over
(`PsRequester.resolve`), and whoever asked waits elsewhere: in another greenlet, a coroutine, an OS
thread, a WSGI view. A request is registered and its send begun in one step, so requests are in the
line of replies in the order in which they leave.

What waits for a session is kept with that session, and ends when its close is requested. All of it
belongs to the hub's thread; callers in other OS threads are handed over.

When the time of a request is over, the session looks once more whether bytes are there: a hub that
stood still (a blocking call, a suspended machine) finds the reply in the socket.

Replies that come in order (`_InOrder`) do not say what they reply to. All that is known is how many
have come, and when. After a request W that got no reply in its time:

- W keeps its place in the line. The next reply may be W's, so it is dropped. When as many replies
  have come as requests were sent, the last one belongs to the last request for certain.
- If only one reply comes while the next request, X, waits, X times out: the reply was W's or X's.
  So the reply to the request after that, Y, may be X's: a peer that is late is often late again.
- The peer counts as one that did not answer W, and is not late, after two observations that a late
  peer makes by chance only. First: the dropped reply had come in the first eighth of X's time,
  although W's had been due for much longer. Then Y waits unsent for half of its time (libmodbus
  pauses after an error for the same reason); a peer that is equally late each time replies to X in
  that pause, which puts the line in step again. Second: a reply comes in an eighth of its time
  after Y was sent, and no other one follows in the rest of it. If another one follows, that one is
  Y's, and the first was late.
- Otherwise the place is kept, until ``late_timeout``.

A peer that replies to each request at the moment when the next one comes, and not before, gets a
wrong reply past any rule that lets the line recover: its replies come at the same moments as those
of a peer that did not answer one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any, Generic, Literal, TypeVar

from gevent import Timeout, getcurrent

from psofa_gevent.aio.coroutines import greenlet_that_waits
from psofa_gevent.checks import check_instance, check_seconds
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import (
    PsRequestClosedError,
    PsRequestError,
    PsRequestTimeoutError,
    PsSendError,
)
from psofa_gevent.hub.forking import keep, unwatch, watch
from psofa_gevent.hub.greenlets import may_wait
from psofa_gevent.hub.parking import GreenletParking, Parking, TaskParking, run_in_greenlet
from psofa_gevent.hub.times import SHORTEST_TIMER
from psofa_gevent.messages import M, Message
from psofa_gevent.session import inside
from psofa_gevent.session.session import PsSession

__all__ = ["PsRequester"]

T = TypeVar("T")

PAUSE_SHARE = 1 / 2
"""Of the time that a request has: how long it waits for a late reply before it is sent, if at all.
The other half is for its own reply."""
PROMPT = 1 / 8
"""Of the same time: a reply that comes sooner is not likely to be a late one. Less than
`PAUSE_SHARE`, so that a late peer that is as slow to each request is found out in the pause."""
LOOK_TIME = 1.0
"""Seconds that a last look may take: the loop of a coroutine may be one that holds up the hub."""

_NO_REPLY: Any = object()
"""No reply; ``None`` may be one."""


class PsRequester(Generic[M]):
    """Sends requests, and gives each the reply that belongs to it.

    One requester serves any number of sessions, of any owner, with any number of requests on their
    way to each::

        class Devices(PsCallback):
            requester = PsRequester()

            def on_message(self, session, message):
                if not self.requester.resolve(session, message):
                    ...  # nobody has asked for this one

        # in another greenlet, a thread, a WSGI view:
        answer = devices.requester.request(session, "how are you?", timeout=2)

    Without a `key` the peer must answer every request, in order. If a request gets no reply in its
    time, a late reply is dropped, and so is one that may be the late one. So after a request that
    is never answered the next one may time out as well. The one after that is held back for half of
    its time, to see whether the peer is late; from then on replies reach their requests again, if
    the peer answers promptly (in an eighth of their time). A wrong reply can only get through if
    the peer is late several times in a row, and two of its late replies come right after another
    request was sent: by chance, or because it replies to a request when the next one comes.

    Where the peer may leave requests unanswered, ask one at a time: of several on their way nobody
    can tell which one it left out.
    """

    def __init__(
        self,
        key: Callable[[M], Hashable | None] | None = None,
        *,
        request_key: Callable[[M], Hashable] | None = None,
        late_timeout: float = 10.0,
        unanswered: Literal["close", "skip"] = "close",
    ) -> None:
        """Say how a reply is known to belong to its request.

        Args:
            key: gives what a message and its reply have in common, such as ``message["id"]``;
                for a message that is no reply, ``None``. By default nothing: then the peer answers
                every request, in order.
            request_key: the same for requests, where those look different; by default `key`.
            late_timeout: seconds for which a late reply may still come after a request has timed
                out, or was given up otherwise. Without `key` only: with one, a late reply is known.
            unanswered: what happens when none has come by then. ``"close"``: the session closes
                with FAILED, as it is out of step for good; its requests raise
                `PsRequestClosedError`. ``"skip"``: it counts as one that is never answered, and the
                next reply is that of the next request, which waits for this moment where that takes
                no more than half of its time. The risk: a reply that comes even later is taken for
                the reply to another request. So this is for peers that say nothing to some requests
                (SCPI instruments after a wrong command, Modbus RTU devices after a bad checksum),
                with a `late_timeout` after which they never reply.

        Raises:
            TypeError: that can't be called, or is ``async``; or `late_timeout` is no number.
            ValueError: `request_key` without `key`; `late_timeout` is negative; or `unanswered` is
                neither.
        """
        for name, function in (("key", key), ("request_key", request_key)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function of a message, not {function!r}")
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} must be a plain function, not {function!r}")
        if key is None and request_key is not None:
            raise ValueError("request_key needs a key for the replies")
        check_seconds("late_timeout", late_timeout, optional=False)
        if unanswered not in ("close", "skip"):
            raise ValueError(f"unanswered must be 'close' or 'skip', not {unanswered!r}")
        self._late_timeout = late_timeout
        self._skips_unanswered = unanswered == "skip"
        self._key = key
        self._request_key = request_key or key

    def request(
        self, session: PsSession[M], message: M | Message, timeout: float | None = 5.0
    ) -> M:
        """Send `message`, wait for its reply, and return that.

        From any greenlet and any OS thread; in coroutines await `request_async`.

        Args:
            session: whom to ask.
            message: as for `PsSession.send`.
            timeout: seconds for all of it. If it ends when a part of the message has left, the
                session closes with FAILED, since its stream is broken. ``None``: no limit but the
                session's end. A reply that has come when the time is over, and that nobody has read
                yet, is in time.

        Raises:
            PsRequestTimeoutError: there was no reply in time. A late one is dropped where replies
                come in order, else `resolve` does not know it.
            PsRequestClosedError: the session is closed, or was closed before the reply came; also
                since an earlier request got none within `late_timeout`.
            PsRequestError: it would wait for itself: called in a callback of this very session, or
                in a coroutine or the hub.
            PsFramingError, TypeError: the message can't be sent.
            UnicodeEncodeError: the message is text with a lone surrogate, which is no UTF-8.
            ValueError: the message has no key, or that of a request that waits already.
        """
        check_instance("session", session, PsSession)
        check_seconds("timeout", timeout)
        if inside.thread_of(session).is_current():
            return self._request_here(session, message, timeout)
        replies: list[M] = []

        def ask() -> None:
            replies.append(self._request_here(session, message, timeout))

        if not inside.run_in_its_thread(session, ask):
            raise _closed(session)
        return replies[0]

    async def request_async(
        self, session: PsSession[M], message: M | Message, timeout: float | None = 5.0
    ) -> M:
        """`request` for coroutines, in any asyncio loop of any thread."""
        check_instance("session", session, PsSession)
        check_seconds("timeout", timeout)
        if inside.thread_of(session).is_current():
            return await self._request_async_here(session, message, timeout)
        replies: list[M] = []

        def ask() -> None:
            replies.append(self._request_here(session, message, timeout))

        if not await inside.run_in_its_thread_async(session, ask):
            raise _closed(session)
        return replies[0]

    def resolve(self, session: PsSession[M], message: M) -> bool:
        """Give a message that has come from `session` to the request that it is the reply to.

        To be called in ``on_message``; does not switch.

        Returns:
            Whether it is the reply to a request; true also where that has given up waiting, and the
            replies come in order.
        """
        pending: _Pending[M] | None = _pending_of(self, session)
        if pending is None:
            return False
        return pending.take(None if self._key is None else self._key(message), message)

    def get_request_count(self, session: PsSession[M]) -> int:
        """How many requests wait for a reply of `session`. In the hub's thread."""
        pending: _Pending[M] | None = _pending_of(self, session)
        return 0 if pending is None else pending.count

    def _request_here(
        self, session: PsSession[M], message: M | Message, timeout: float | None
    ) -> M:
        if not may_wait():
            raise PsRequestError(
                f"{session!r}: a coroutine and the hub must not wait for a reply: "
                "use 'await requester.request_async(...)'"
            )
        _check_waits_for_other(session, getcurrent())
        pending = self._pending(session)
        request = self._new_request(message, timeout, GreenletParking())
        limit = Timeout(timeout)
        try:
            limit.start()
            while not (request.is_over or pending.add(request)):
                run_in_greenlet(request.hold(session))
            if not request.is_over:
                session.send(message)
                request.left()
                inside.flush(session)
                run_in_greenlet(request.wait())
        except Timeout as exc:
            if exc is not limit:
                raise
            if request.is_sent and not request.is_over:
                run_in_greenlet(request.look_again(session))
                pending.time_is_over(request)
            if not (request.is_sent and request.is_over):
                raise _timed_out(session, timeout) from None
        except PsSendError as exc:
            raise PsRequestClosedError(f"{exc}: no reply will come") from exc
        finally:
            limit.close()
            del limit  # an exception and a frame that holds it would keep each other alive
            pending.withdraw(request)
        return request.get_reply()

    async def _request_async_here(
        self, session: PsSession[M], message: M | Message, timeout: float | None
    ) -> M:
        task = asyncio.current_task()
        if task is not None:
            _check_waits_for_other(session, greenlet_that_waits(task))
        pending = self._pending(session)
        request = self._new_request(message, timeout, TaskParking())
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                while not (request.is_over or pending.add(request)):
                    await request.hold(session)
                if not request.is_over:
                    await session.send_async(message)
                    request.left()
                    inside.flush(session)
                    await request.wait()
        except TimeoutError:
            if not limit.expired():
                raise
            if request.is_sent and not request.is_over:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(request.look_again(session), LOOK_TIME)
                pending.time_is_over(request)
            if not (request.is_sent and request.is_over):
                raise _timed_out(session, timeout) from None
        except PsSendError as exc:
            raise PsRequestClosedError(f"{exc}: no reply will come") from exc
        finally:
            pending.withdraw(request)
        return request.get_reply()

    def _pending(self, session: PsSession[M]) -> _Pending[M]:
        """What waits for replies of `session`."""
        if not session.is_open:
            raise _closed(session)
        pending: _Pending[M] | None = _pending_of(self, session)
        if pending is None:
            pending = (
                _InOrder(session, self._late_timeout, skips=self._skips_unanswered)
                if self._key is None
                else _ByKey()
            )
            inside.join(session, self, pending)
        return pending

    def _new_request(self, message: Any, timeout: float | None, parking: Parking) -> _Request[M]:
        key: Hashable = None
        if self._request_key is not None:
            key = self._request_key(message)
            if key is None:
                raise ValueError(
                    f"the message has no key, so no reply can be matched to it: {message!r}"
                )
        return _Request(key, timeout, parking)

    def _left(self, session: PsSession[Any], pending: _Pending[M]) -> None:
        """The session closes: nothing more will come."""
        pending.fail(lambda: _closed(session))

    def _let_go(self, _session: PsSession[Any], pending: _Pending[M]) -> None:
        """The session, and who asks it, are the parent process's."""
        keep(pending)


class _Request(Generic[T]):
    """One request, and where its sender waits."""

    __slots__ = (
        "_error",
        "_parking",
        "_reply",
        "held_until",
        "is_over",
        "is_sent",
        "key",
        "late_at",
        "sent_at",
        "timeout",
    )

    def __init__(self, key: Hashable, timeout: float | None, parking: Parking) -> None:
        self.key = key
        self.timeout = timeout
        self.sent_at = monotonic()
        self.is_sent = False
        self.is_over = False
        """Its reply has come, or nobody waits for that any more."""
        self.held_until = 0.0
        """When it may be sent, at the latest (monotonic clock); 0: nothing says so."""
        self.late_at = 0.0
        """When its place is given up; 0: its sender still waits."""
        self._parking = parking
        self._reply: T = _NO_REPLY
        self._error: PsRequestError | None = None

    def left(self) -> None:
        """It has been sent."""
        self.is_sent = True
        self.sent_at = monotonic()

    def end(self, *, reply: T = _NO_REPLY, error: PsRequestError | None = None) -> None:
        """Let the one who waits go on, soon."""
        self._reply, self._error = reply, error
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        """Let the one who waits look again, soon."""
        self._parking.wake()

    async def wait(self) -> None:
        """Wait for the end."""
        while not self.is_over:
            await self._parking

    async def hold(self, session: PsSession[Any]) -> None:
        """Wait before it is sent: until `held_until`, or until somebody calls `wake`."""
        if not self.held_until:
            await self._parking
            return
        await self._pause(session, max(self.held_until - monotonic(), SHORTEST_TIMER))
        if monotonic() >= self.held_until:
            await self.look_again(session)  # a hub that stood still has not seen what came

    async def look_again(self, session: PsSession[Any]) -> None:
        """Let a session that waits for bytes look whether some are there, and hand them over.

        All messages of one read, also while others have their turns in between; but of no more, as
        a peer may never stop.
        """
        has_looked = False

        def look_is_over() -> None:
            nonlocal has_looked
            has_looked = True
            self.wake()

        inside.wake(session)
        inside.thread_of(session).loop.run_callback(look_is_over)  # after that: they come in order
        while not (self.is_over or has_looked):
            await self._parking
        received = session.bytes_received
        while (
            not self.is_over
            and inside.is_within_read(session)
            and session.bytes_received == received
        ):
            await self._pause(session, SHORTEST_TIMER)

    async def _pause(self, session: PsSession[Any], seconds: float) -> None:
        """Wait for so long, or until somebody calls `wake`."""
        timer = watch(inside.thread_of(session).loop.timer(seconds))
        timer.start(self.wake)
        try:
            await self._parking
        finally:
            unwatch(timer)

    def get_reply(self) -> T:
        """The reply. Raises what kept it from coming."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # with its traceback it would keep this frame alive
        return self._reply


class _Pending(Generic[T]):
    """The requests that wait for the replies of one session."""

    @property
    def count(self) -> int:
        """How many wait."""
        raise NotImplementedError

    def add(self, request: _Request[T]) -> bool:
        """Let `request` be the one that is sent next, at once; false: it must wait (`hold`) before.

        Raises:
            ValueError: its reply could not be told from another's.
        """
        raise NotImplementedError

    def take(self, key: Hashable | None, message: T) -> bool:
        """A message has come: whether it is a reply. It ends the request that it belongs to."""
        raise NotImplementedError

    def time_is_over(self, request: _Request[T]) -> None:
        """No more replies for it: end it, if there is one for it by now."""

    def withdraw(self, request: _Request[T]) -> None:
        """Its sender does not wait any more; without effect when its reply has come."""
        raise NotImplementedError

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        """End all of them. From any thread, as the hub may be gone."""
        raise NotImplementedError


class _InOrder(_Pending[T]):
    """The peer answers each request, in order. See the top of this file for the rules.

    The line has the requests that were sent, in order. One that was given up keeps its place until
    a reply comes for it, or for `late_timeout`. Those that must not be sent yet stand beside it.
    """

    def __init__(self, session: PsSession[T], late_timeout: float, *, skips: bool) -> None:
        self._session = session
        self._late_timeout = late_timeout
        self._skips = skips
        self._line: deque[_Request[T]] = deque()
        self._given_up = 0
        """How many of the line."""
        self._held: dict[_Request[T], None] = {}
        """Those that are not sent yet: the first one until it may be, the others after it."""
        self._replies = 0
        """How many have come since the youngest of the line was sent."""
        self._reply_at = 0.0
        """When the last of them came (monotonic clock)."""
        self._in_doubt = False
        """All in the line are given up, and the last reply may have been that of the youngest."""
        self._trial: _Request[T] | None = None
        """The one that was sent, after a pause, to end the doubt."""
        self._kept: T = _NO_REPLY
        """The reply that came promptly in the trial."""
        self._timer: Any = None
        """Runs while a place is kept."""

    @property
    def count(self) -> int:
        return len(self._line) - self._given_up + len(self._held)

    def add(self, request: _Request[T]) -> bool:
        if self._trial is not None or self._must_be_held(request):
            self._held[request] = None
            return False
        self._held.pop(request, None)
        if self._in_doubt:
            self._in_doubt = False
            self._trial = request
        else:
            self._wake_held()
        self._replies = 0
        self._line.append(request)
        return True

    def _must_be_held(self, request: _Request[T]) -> bool:
        if self._held and request is not next(iter(self._held)):
            return True
        if not self._line or self._given_up < len(self._line):
            return False
        now = monotonic()
        if self._skips:
            left = max(each.late_at for each in self._line) - now
            if request.timeout is None or left <= request.timeout * PAUSE_SHARE:
                return True  # until they are given up
        if self._in_doubt and not request.held_until:
            request.held_until = now + self._time_of(request) * PAUSE_SHARE
        return self._in_doubt and now < request.held_until

    def _time_of(self, request: _Request[T]) -> float:
        """Seconds that a reply to it may take, late ones left out."""
        timeout = request.timeout
        return self._late_timeout if timeout is None else min(timeout, self._late_timeout)

    def take(self, key: Hashable | None, message: T) -> bool:
        if not self._line:
            return False
        self._replies += 1
        self._reply_at = monotonic()
        trial = self._trial
        if trial is not None and self._given_up:
            if self._kept is _NO_REPLY and self._is_prompt(trial):
                self._kept = message
                return True
            if self._kept is not _NO_REPLY:
                self._take_first()  # one more has come: that one was to a request that is given up
            self._end_trial()
        request = self._take_first()
        if not request.late_at:
            request.end(reply=message)
        if self._in_doubt:  # it is late, but it answers
            self._in_doubt = False
            self._wake_held()
        return True

    def _take_first(self) -> _Request[T]:
        """Take the first one, to which a reply has come, out of the line."""
        first = self._line.popleft()
        if first.late_at:
            self._given_up -= 1
            if not self._given_up:
                self._stop_timer()
                self._wake_held()
        return first

    def _is_prompt(self, request: _Request[T]) -> bool:
        """Whether the last reply has come soon after `request` was sent."""
        return self._reply_at - request.sent_at <= self._time_of(request) * PROMPT

    def time_is_over(self, request: _Request[T]) -> None:
        if self._trial is request and self._kept is not _NO_REPLY:
            self._pass_trial(request)

    def _pass_trial(self, trial: _Request[T]) -> None:
        """The reply was its own, and those that were given up before get none."""
        trial.end(reply=self._kept)
        self._line.clear()
        self._given_up = 0
        self._stop_timer()
        self._end_trial()

    def _end_trial(self) -> None:
        self._trial = None
        self._kept = _NO_REPLY
        self._wake_held()

    def _wake_held(self) -> None:
        for request in self._held:
            request.wake()

    def withdraw(self, request: _Request[T]) -> None:
        if request in self._held:
            del self._held[request]
            self._wake_held()
        if request.is_over:
            return
        request.is_over = True
        if request not in self._line:
            return
        if self._trial is request:
            if self._kept is not _NO_REPLY:
                self._take_first()
            self._end_trial()
        if not request.is_sent:
            self._line.remove(request)
            return
        request.late_at = monotonic() + self._late_timeout
        self._given_up += 1
        self._in_doubt = (
            self._replies == 1
            and self._line[-1] is request
            and self._given_up == len(self._line)
            and self._is_prompt(request)
        )
        if self._timer is None:
            self._start_timer()

    def _start_timer(self) -> None:
        next_at = min(request.late_at for request in self._line if request.late_at)
        seconds = max(next_at - monotonic(), SHORTEST_TIMER)
        self._timer = watch(inside.thread_of(self._session).loop.timer(seconds, ref=False))
        self._timer.start(self._give_places_up)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        unwatch(timer)

    def _give_places_up(self) -> None:
        """In the hub: there may be places for which no reply has come in time."""
        self._stop_timer()
        now = monotonic()
        over = [each for each in self._line if each.late_at and each.late_at <= now]
        if over and self._trial is not None and self._kept is not _NO_REPLY:
            self._pass_trial(self._trial)
        elif over and not self._skips:
            self._close_session()
        else:
            for each in over:
                self._line.remove(each)
            self._given_up -= len(over)
            if self._given_up:
                self._start_timer()
            else:
                self._in_doubt = False
                self._end_trial()

    def _close_session(self) -> None:
        session = self._session
        error = PsRequestTimeoutError(
            f"{session!r}: a request had no reply within its time, nor within "
            f"late_timeout={self._late_timeout:g} s after that"
        )
        inside.request_close(session, PsCloseReason.FAILED, error)
        inside.log(session, logging.DEBUG, "%s", error)

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        if inside.thread_of(self._session).is_over():
            self._timer = None  # it went with the hub
        self._stop_timer()
        self._trial = None
        for request in (*self._line, *self._held):
            if not request.is_over:
                request.end(error=error())
        self._line.clear()
        self._held.clear()
        self._given_up = 0


class _ByKey(_Pending[T]):
    """Each reply says to which request it belongs."""

    def __init__(self) -> None:
        self._requests: dict[Hashable, _Request[T]] = {}

    @property
    def count(self) -> int:
        return len(self._requests)

    def add(self, request: _Request[T]) -> bool:
        if request.key in self._requests:
            raise ValueError(f"a request with the key {request.key!r} waits for its reply already")
        self._requests[request.key] = request
        return True

    def take(self, key: Hashable | None, message: T) -> bool:
        request = None if key is None else self._requests.pop(key, None)
        if request is None:
            return False
        request.end(reply=message)
        return True

    def withdraw(self, request: _Request[T]) -> None:
        if self._requests.get(request.key) is request:
            del self._requests[request.key]

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        while self._requests:
            self._requests.popitem()[1].end(error=error())


def _pending_of(requester: PsRequester[M], session: PsSession[M]) -> Any:
    return inside.kept_for(session, requester)


def _check_waits_for_other(session: PsSession[Any], greenlet: object) -> None:
    if inside.runs_in(session, greenlet):
        raise PsRequestError(
            f"{session!r}: a callback of this session would wait for itself, as the reply can only "
            "come when it has returned: ask in another greenlet (session.spawn)"
        )


def _closed(session: PsSession[Any]) -> PsRequestClosedError:
    return PsRequestClosedError(f"{session!r}: the session is closed: no reply will come")


def _timed_out(session: PsSession[Any], timeout: float | None) -> PsRequestTimeoutError:
    return PsRequestTimeoutError(f"{session!r}: no reply came within {timeout:g} s")
