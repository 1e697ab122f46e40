"""Requests: a requester sends a request to a session and returns the reply to the caller.

Replies are ordinary messages of the session. So the session's callback hands them over
(`PsRequester.resolve`), while the caller waits elsewhere: in another greenlet, a coroutine, an OS
thread, a WSGI view. A request is registered and its send begun in one step, so the requests stand
in the line of pending replies in the order in which they leave.

The pending requests of a session are kept with that session, and end when its close is requested.
All of it belongs to the hub's thread, which runs the requests of callers in other OS threads.

When the time of a request is over, the session looks once more whether bytes have come: if the hub
stood still (a blocking call, a suspended machine), the reply may be in the socket.

Replies that come in order (`_InOrder`) do not say what they reply to. The requester only knows how
many replies have come, and when. After a request W that got no reply in its time:

- W keeps its place in the line. The next reply may be W's, so it is dropped. When as many replies
  have come as requests were sent, the last reply certainly belongs to the last request.
- If only one reply comes while the next request, X, waits, X times out: the reply was W's or X's.
  So the reply to the request after that, Y, may be X's: a peer that is late is often late again.
- The requester concludes that the peer did not answer W, and is not late, after two observations
  that a late peer causes only by chance. First: the dropped reply came in the first eighth of X's
  time, although W's had been due for much longer. Then Y waits unsent for half of its time
  (libmodbus pauses after an error for the same reason). A peer that is equally late each time
  replies to X in that pause, which puts the line in step again. Second: after Y was sent, a reply
  comes in an eighth of Y's time, and no other reply follows in the rest of it. If another reply
  follows, that one is Y's, and the first one was late.
- Otherwise W keeps its place until ``late_timeout``.

If a peer replies to each request at the moment when the next one comes, and not before, a wrong
reply gets past any rule that lets the line recover: its replies come at the same moments as those
of a peer that did not answer one request.

This file is longer than others because it keeps that reasoning beside the code that follows it.
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
"""The share of a request's time for which the request, if it must be held, waits unsent for a late
reply. The other half is for its own reply."""
PROMPT = 1 / 8
"""The share of a request's time in which a reply counts as prompt, and so is not likely to be a
late one. Less than `PAUSE_SHARE`, so that the pause finds a peer that is equally late each time."""
LOOK_TIME = 1.0
"""Seconds that the last look of a coroutine may take: its event loop may hold up the hub."""

_NO_REPLY: Any = object()
"""Stands for no reply, as ``None`` may be a reply."""


class PsRequester(Generic[M]):
    """Sends requests, and returns to each caller the reply to its request.

    One requester serves any number of sessions, of any owner, with any number of pending requests
    for each::

        class Devices(PsCallback):
            requester = PsRequester()

            def on_message(self, session, message):
                if not self.requester.resolve(session, message):
                    ...  # not a reply to a request

        # in another greenlet, a thread, a WSGI view:
        answer = devices.requester.request(session, "how are you?", timeout=2)

    Without a `key` the peer must answer every request, in order. If a request gets no reply in its
    time, its late reply is dropped, and so is any reply that may be the late one. So after a
    request that is never answered the next request may time out as well. The request after that is
    held back for half of its time, to see whether the peer is late. From then on replies reach
    their requests again, if the peer answers promptly (in an eighth of their time). A wrong reply
    can only get through if the peer is late several times in a row, and two of its late replies
    come right after another request was sent: by chance, or because the peer replies to a request
    when the next one comes.

    If the peer may leave requests unanswered, send one request at a time: with several pending
    requests, there is no telling which one the peer left out.
    """

    def __init__(
        self,
        key: Callable[[M], Hashable | None] | None = None,
        *,
        request_key: Callable[[M], Hashable] | None = None,
        late_timeout: float = 10.0,
        unanswered: Literal["close", "skip"] = "close",
    ) -> None:
        """Say how to match replies to requests.

        Args:
            key: a function of a message that returns what a request and its reply have in common,
                such as ``message["id"]``; ``None`` for a message that is not a reply. By default
                there is no key: then the peer must answer every request, in order.
            request_key: the same function for requests, if those look different; by default `key`.
            late_timeout: seconds for which a late reply may still come after a request has timed
                out, or was given up for another reason. Only without `key`: a key tells which reply
                is late.
            unanswered: what happens if no late reply has come by then. ``"close"``: the session
                closes with FAILED, as it is out of step for good; its requests raise
                `PsRequestClosedError`. ``"skip"``: the request counts as never answered, and the
                next reply belongs to the next request. That request waits unsent for this moment,
                if the wait takes no more than half of its time. The risk: a reply that comes even
                later is taken for the reply to another request. So use ``"skip"`` for peers that do
                not answer some requests (SCPI instruments after a wrong command, Modbus RTU devices
                after a bad checksum), with a `late_timeout` after which they never reply.

        Raises:
            TypeError: `key` or `request_key` can't be called, or is ``async``; or `late_timeout` is
                not a number.
            ValueError: `request_key` is given without `key`; `late_timeout` is negative; or
                `unanswered` is neither.
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
        """Send `message`, wait for its reply, and return the reply.

        From any greenlet and any OS thread; in coroutines await `request_async`.

        Args:
            session: the session of the peer that is asked.
            message: as for `PsSession.send`.
            timeout: seconds for the send and the reply together. If the time ends when a part of
                the message has left, the session closes with FAILED, since its stream is broken.
                ``None``: until the session ends. A reply that is in the socket when the time ends,
                but was not read yet, is in time.

        Raises:
            PsRequestTimeoutError: no reply came in time. If replies come in order, a late reply is
                dropped; with a key, `resolve` returns False for it.
            PsRequestClosedError: the session is closed, or was closed before the reply came; also
                because an earlier request got no reply within `late_timeout`.
            PsRequestError: the caller would wait for itself: it is a callback of this very session,
                a coroutine, or the hub.
            PsFramingError, TypeError: the message can't be sent.
            UnicodeEncodeError: the message is text with a lone surrogate, which UTF-8 cannot
                encode.
            ValueError: the message has no key, or has the key of another pending request.
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
        """Give a message that has come from `session` to the request that it replies to.

        Call it in ``on_message``; it does not switch.

        Returns:
            Whether the message is the reply to a request; also True for a late reply to a request
            that was given up, when replies come in order.
        """
        pending: _Pending[M] | None = _pending_of(self, session)
        if pending is None:
            return False
        return pending.take(None if self._key is None else self._key(message), message)

    def get_request_count(self, session: PsSession[M]) -> int:
        """The number of requests that wait for a reply of `session`. In the hub's thread."""
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
        """The pending requests of `session`. Raises `PsRequestClosedError` if it is closed."""
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
        """Fail the session's requests: its close was requested, so no reply will come."""
        pending.fail(lambda: _closed(session))

    def _let_go(self, _session: PsSession[Any], pending: _Pending[M]) -> None:
        """Never collect the requests in a child process: session and callers are the parent's."""
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
        """Its reply has come, or its sender no longer waits."""
        self.held_until = 0.0
        """The latest moment (monotonic clock) until which it is held back; 0: no such moment."""
        self.late_at = 0.0
        """When its place is given up (monotonic clock); 0: its sender still waits."""
        self._parking = parking
        self._reply: T = _NO_REPLY
        self._error: PsRequestError | None = None

    def left(self) -> None:
        """Note that the request has been sent."""
        self.is_sent = True
        self.sent_at = monotonic()

    def end(self, *, reply: T = _NO_REPLY, error: PsRequestError | None = None) -> None:
        """Let the sender go on soon, with the reply or the error."""
        self._reply, self._error = reply, error
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        """Let the sender look again soon."""
        self._parking.wake()

    async def wait(self) -> None:
        """Wait until the request is over."""
        while not self.is_over:
            await self._parking

    async def hold(self, session: PsSession[Any]) -> None:
        """Wait before the request is sent: until `held_until`, or until `wake` is called."""
        if not self.held_until:
            await self._parking
            return
        await self._pause(session, max(self.held_until - monotonic(), SHORTEST_TIMER))
        if monotonic() >= self.held_until:
            await self.look_again(session)  # a hub that stood still has not read what came

    async def look_again(self, session: PsSession[Any]) -> None:
        """Let a session that waits for bytes read once, and hand over the messages of that read.

        Waits for all messages of one read, even if other sessions have their turns in between; but
        not for further reads, as the peer may never stop.
        """
        has_looked = False

        def look_is_over() -> None:
            nonlocal has_looked
            has_looked = True
            self.wake()

        inside.wake(session)
        # The loop calls it after the wake-up: callbacks are called in order.
        inside.thread_of(session).loop.run_callback(look_is_over)
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
        """Wait for that many seconds, or until `wake` is called."""
        timer = watch(inside.thread_of(session).loop.timer(seconds))
        timer.start(self.wake)
        try:
            await self._parking
        finally:
            unwatch(timer)

    def get_reply(self) -> T:
        """Return the reply, or raise the error that `end` got."""
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
        """The number of requests that wait."""
        raise NotImplementedError

    def add(self, request: _Request[T]) -> bool:
        """Register `request`, which must be sent at once; false: it must be held first (`hold`).

        Raises:
            ValueError: its reply could not be told from the reply to another request.
        """
        raise NotImplementedError

    def take(self, key: Hashable | None, message: T) -> bool:
        """Take a message that has come: whether it is a reply. A reply ends its request."""
        raise NotImplementedError

    def time_is_over(self, request: _Request[T]) -> None:
        """The time of `request` is over: end it if a reply for it has been kept."""

    def withdraw(self, request: _Request[T]) -> None:
        """The sender of `request` no longer waits. Has no effect when its reply has come."""
        raise NotImplementedError

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        """End all requests. From any thread, as the hub may have been destroyed."""
        raise NotImplementedError


class _InOrder(_Pending[T]):
    """Requests to a peer that answers each of them, in order. The module docstring has the rules.

    The line has the requests that were sent, in order. A request that was given up keeps its place
    until a reply comes for it, or for `late_timeout`. Requests that must not be sent yet are held
    beside the line.
    """

    def __init__(self, session: PsSession[T], late_timeout: float, *, skips: bool) -> None:
        self._session = session
        self._late_timeout = late_timeout
        self._skips = skips
        self._line: deque[_Request[T]] = deque()
        self._given_up = 0
        """The number of requests in the line that were given up."""
        self._held: dict[_Request[T], None] = {}
        """Requests that are not sent yet, in order: the others wait behind the first one."""
        self._replies = 0
        """The number of replies since the youngest request of the line was registered."""
        self._reply_at = 0.0
        """When the last of these replies came (monotonic clock)."""
        self._in_doubt = False
        """All requests in the line are given up, and the last reply may be the youngest's."""
        self._trial: _Request[T] | None = None
        """The request that was sent, after a pause, to end the doubt."""
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
                return True  # until their places are given up
        if self._in_doubt and not request.held_until:
            request.held_until = now + self._time_of(request) * PAUSE_SHARE
        return self._in_doubt and now < request.held_until

    def _time_of(self, request: _Request[T]) -> float:
        """Seconds in which a reply to `request` is in time, `late_timeout` at most."""
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
                self._take_first()  # another reply: the kept one is of a request that is given up
            self._end_trial()
        request = self._take_first()
        if not request.late_at:
            request.end(reply=message)
        if self._in_doubt:  # the peer is late, but it answers
            self._in_doubt = False
            self._wake_held()
        return True

    def _take_first(self) -> _Request[T]:
        """Take the first request, whose reply has come, out of the line."""
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
        """End `trial` with the kept reply, and forget the requests that were given up before."""
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
        """Give up the places whose `late_timeout` is over. Called by the timer, in the hub."""
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
            self._timer = None  # the timer ended with the hub
        self._stop_timer()
        self._trial = None
        for request in (*self._line, *self._held):
            if not request.is_over:
                request.end(error=error())
        self._line.clear()
        self._held.clear()
        self._given_up = 0


class _ByKey(_Pending[T]):
    """Requests whose replies say by their keys to which request they belong."""

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
