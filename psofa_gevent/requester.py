"""Ask and wait: a request is sent to a session, and its reply comes back to who asked.

The replies are messages of the session like any others, so its callback hands them over
(`PsRequester.resolve`), and whoever asked waits elsewhere: in another greenlet, a coroutine, an OS
thread, a WSGI view. A request is registered and its send begun in one step, so requests are in the
line of replies in the order in which they leave.

What waits for a session is kept with that session, and ends when its close is requested. All of it
belongs to the hub's thread; callers in other OS threads are handed over.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from gevent import Timeout, getcurrent

from psofa_gevent.aio import greenlet_that_waits
from psofa_gevent.errors import (
    PsRequestClosedError,
    PsRequestError,
    PsRequestTimeoutError,
    PsSendError,
)
from psofa_gevent.forking import keep
from psofa_gevent.hub_thread import get_ident
from psofa_gevent.messages import M, Message
from psofa_gevent.send_line import GreenletParking, Parking, TaskParking, run_in_greenlet
from psofa_gevent.session import PsSession
from psofa_gevent.settings import check_instance, check_seconds
from psofa_gevent.worker import may_wait

__all__ = ["PsRequester"]

T = TypeVar("T")


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
    """

    def __init__(
        self,
        key: Callable[[M], Hashable | None] | None = None,
        *,
        request_key: Callable[[M], Hashable] | None = None,
    ) -> None:
        """Say how a reply is known to belong to its request.

        Args:
            key: gives what a message and its reply have in common, such as ``message["id"]``;
                for a message that is no reply, ``None``. By default nothing: then the peer answers
                every request, in order.
            request_key: the same for requests, where those look different; by default `key`.

        Raises:
            TypeError: that can't be called, or is ``async``.
            ValueError: `request_key` without `key`.
        """
        for name, function in (("key", key), ("request_key", request_key)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function of a message, not {function!r}")
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} must be a plain function, not {function!r}")
        if key is None and request_key is not None:
            raise ValueError("request_key needs a key for the replies")
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
                session's end.

        Raises:
            PsRequestTimeoutError: there was no reply in time. A late one is dropped where replies
                come in order, else `resolve` does not know it.
            PsRequestClosedError: the session is closed, or was closed before the reply came.
            PsRequestError: it would wait for itself: called in a callback of this very session, or
                in a coroutine or the hub.
            PsFramingError, TypeError: the message can't be sent.
            ValueError: the message has no key, or that of a request that waits already.
        """
        check_instance("session", session, PsSession)
        check_seconds("timeout", timeout)
        if get_ident() == session._thread_ident:
            return self._request_here(session, message, timeout)
        replies: list[M] = []

        def ask() -> None:
            replies.append(self._request_here(session, message, timeout))

        if not session._host.thread.run(lambda: session._released, ask):
            raise _closed(session)
        return replies[0]

    async def request_async(
        self, session: PsSession[M], message: M | Message, timeout: float | None = 5.0
    ) -> M:
        """`request` for coroutines, in any asyncio loop of any thread."""
        check_instance("session", session, PsSession)
        check_seconds("timeout", timeout)
        if get_ident() == session._thread_ident:
            return await self._request_async_here(session, message, timeout)
        replies: list[M] = []

        def ask() -> None:
            replies.append(self._request_here(session, message, timeout))

        if not await session._host.thread.run_async(lambda: session._released, ask):
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
        request = pending.take(None if self._key is None else self._key(message))
        if request is None:
            return False
        request.end(reply=message)
        return True

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
        request = self._register(session, message, GreenletParking())
        limit = Timeout(timeout)
        try:
            limit.start()
            session.send(message)
            request.is_sent = True
            session._uncork_without_waiting()
            run_in_greenlet(request.wait())
            return request.get_reply()
        except Timeout as exc:
            if exc is not limit:
                raise
            raise _timed_out(session, timeout) from None
        except PsSendError as exc:
            raise PsRequestClosedError(f"{exc}: no reply will come") from exc
        finally:
            limit.close()
            del limit  # an exception and a frame that holds it would keep each other alive
            self._withdraw(session, request)

    async def _request_async_here(
        self, session: PsSession[M], message: M | Message, timeout: float | None
    ) -> M:
        task = asyncio.current_task()
        if task is not None:
            _check_waits_for_other(session, greenlet_that_waits(task))
        request = self._register(session, message, TaskParking())
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                await session.send_async(message)
                request.is_sent = True
                session._uncork_without_waiting()
                await request.wait()
            return request.get_reply()
        except TimeoutError:
            if not limit.expired():
                raise
            raise _timed_out(session, timeout) from None
        except PsSendError as exc:
            raise PsRequestClosedError(f"{exc}: no reply will come") from exc
        finally:
            self._withdraw(session, request)

    def _register(self, session: PsSession[M], message: Any, parking: Parking) -> _Request[M]:
        key: Hashable = None
        if self._request_key is not None:
            key = self._request_key(message)
            if key is None:
                raise ValueError(f"the message has no key, so no reply can be known: {message!r}")
        if not session._open:
            raise _closed(session)
        pending: _Pending[M] | None = _pending_of(self, session)
        if pending is None:
            pending = _InOrder() if self._key is None else _ByKey()
            session._join(self, pending)
        request: _Request[M] = _Request(key, parking)
        pending.add(request)
        return request

    def _withdraw(self, session: PsSession[M], request: _Request[M]) -> None:
        """Nobody waits for `request` any more."""
        pending: _Pending[M] | None = _pending_of(self, session)
        if pending is not None:
            pending.withdraw(request)

    def _left(self, session: PsSession[Any], pending: _Pending[M]) -> None:
        """The session closes: nothing more will come."""
        pending.fail(lambda: _closed(session))

    def _let_go(self, _session: PsSession[Any], pending: _Pending[M]) -> None:
        """The session, and who asks it, are the parent process's."""
        keep(pending)


class _Request(Generic[T]):
    """One request, and where its sender waits."""

    __slots__ = ("_error", "_parking", "_reply", "is_over", "is_sent", "key")

    def __init__(self, key: Hashable, parking: Parking) -> None:
        self.key = key
        self.is_sent = False
        self.is_over = False
        self._parking = parking
        self._reply: T | None = None
        self._error: PsRequestError | None = None

    def end(self, *, reply: T | None = None, error: PsRequestError | None = None) -> None:
        """Let the one who waits go on, soon."""
        self._reply, self._error = reply, error
        self.is_over = True
        self._parking.wake()

    async def wait(self) -> None:
        """Wait for the end."""
        while not self.is_over:
            await self._parking

    def get_reply(self) -> T:
        """The reply. Raises what kept it from coming."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # with its traceback it would keep this frame alive
        return self._reply  # type: ignore[return-value]  # it is over


class _Pending(Generic[T]):
    """The requests that wait for the replies of one session."""

    @property
    def count(self) -> int:
        """How many wait."""
        raise NotImplementedError

    def add(self, request: _Request[T]) -> None:
        """One more was made; raises `ValueError` if its reply could not be told from another's."""
        raise NotImplementedError

    def take(self, key: Hashable | None) -> _Request[T] | None:
        """The one whose reply has come."""
        raise NotImplementedError

    def withdraw(self, request: _Request[T]) -> None:
        """Its sender does not wait any more; without effect when its reply has come."""
        raise NotImplementedError

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        """End all of them."""
        raise NotImplementedError


class _InOrder(_Pending[T]):
    """The peer answers each request, in order. One that was given up keeps its place."""

    def __init__(self) -> None:
        self._requests: deque[_Request[T]] = deque()

    @property
    def count(self) -> int:
        return sum(not request.is_over for request in self._requests)

    def add(self, request: _Request[T]) -> None:
        self._requests.append(request)

    def take(self, key: Hashable | None) -> _Request[T] | None:
        return self._requests.popleft() if self._requests else None

    def withdraw(self, request: _Request[T]) -> None:
        if not request.is_over:
            request.is_over = True
            if not request.is_sent:
                self._requests.remove(request)

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        while self._requests:
            self._requests.popleft().end(error=error())


class _ByKey(_Pending[T]):
    """Each reply says to which request it belongs."""

    def __init__(self) -> None:
        self._requests: dict[Hashable, _Request[T]] = {}

    @property
    def count(self) -> int:
        return len(self._requests)

    def add(self, request: _Request[T]) -> None:
        if request.key in self._requests:
            raise ValueError(f"a request with the key {request.key!r} waits for its reply already")
        self._requests[request.key] = request

    def take(self, key: Hashable | None) -> _Request[T] | None:
        return None if key is None else self._requests.pop(key, None)

    def withdraw(self, request: _Request[T]) -> None:
        if self._requests.get(request.key) is request:
            del self._requests[request.key]

    def fail(self, error: Callable[[], PsRequestError]) -> None:
        while self._requests:
            self._requests.popitem()[1].end(error=error())


def _pending_of(requester: PsRequester[M], session: PsSession[M]) -> Any:
    memberships = session._memberships
    return None if memberships is None else memberships.get(requester)


def _check_waits_for_other(session: PsSession[Any], greenlet: object) -> None:
    if greenlet is not None and greenlet is session._greenlet:
        raise PsRequestError(
            f"{session!r}: a callback of this session would wait for itself, as the reply can only "
            "come when it has returned: ask in another greenlet (session.spawn)"
        )


def _closed(session: PsSession[Any]) -> PsRequestClosedError:
    return PsRequestClosedError(f"{session!r}: the session is closed: no reply will come")


def _timed_out(session: PsSession[Any], timeout: float | None) -> PsRequestTimeoutError:
    return PsRequestTimeoutError(f"{session!r}: no reply came within {timeout:g} s")
