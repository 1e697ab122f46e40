"""The callbacks of one owner as plain functions: sync or async, with or without a time limit.

The choice is made once, when the server or client starts. From then on each callback is a function
of its arguments that returns when the callback has ended. For a sync callback without a limit the
function is the user's bound method, so a message passes through nothing else.

Each function runs in the greenlet that calls it, in the session's context, and may switch. An async
callback runs as a task of the hub's asyncio loop, in the same context, while that greenlet waits.
An exception that is thrown into the waiting greenlet cancels the task
(`psofa_gevent.aio.coroutines.run_task`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from psofa_gevent.aio.coroutines import run_task
from psofa_gevent.callback import PsCallback, is_overridden
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import SlowPeerError
from psofa_gevent.hub.logs import log
from psofa_gevent.net.sockopts import Endpoint
from psofa_gevent.owner.time_limit import TimeLimit
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession
    from psofa_gevent.typing import Owner

__all__ = ["Callbacks"]


class Callbacks:
    """The callbacks of one server or client, as plain functions."""

    def __init__(self, callback: PsCallback[Any], callback_timeout: float | None) -> None:
        self._is_async = callback.use_async_callback
        self._timeout = callback_timeout
        self.on_open: Callable[[PsSession[Any]], None] = self._of_session(callback, "on_open")
        self.on_message: Callable[[PsSession[Any], bytes], None] = self._of_session(
            callback, "on_message"
        )
        self.on_eof: Callable[[PsSession[Any]], None] = self._of_session(callback, "on_eof")
        self.on_idle: Callable[[PsSession[Any]], object] | None = None
        """None: the callback does not override it, and an idle session closes."""
        if is_overridden(callback, "on_idle_async" if self._is_async else "on_idle"):
            self.on_idle = self._of_session(callback, "on_idle")
        self.on_close: Callable[[PsSession[Any], PsCloseReason], None] = self._of_close_greenlet(
            self._of_session(callback, "on_close", limited=False), "on_close"
        )
        self.on_accept: Callable[[PsSession[Any], Endpoint | None], object] | None = (
            self._of_accept(callback)
        )
        """None: the callback does not override it, so it is not asked."""
        self.on_start: Callable[[Owner], None] = self._of_owner(callback, "on_start")
        self.on_stop: Callable[[Owner], None] = self._of_close_greenlet(
            self._of_owner(callback, "on_stop"), "on_stop"
        )

    def _of_session(
        self, callback: PsCallback[Any], name: str, *, limited: bool = True
    ) -> Callable[..., Any]:
        if self._is_async:
            method = getattr(callback, f"{name}_async")
            context_of = inside.context_of

            def call(session: PsSession[Any], *args: Any) -> Any:
                return run_task(method(session, *args), context=context_of(session), in_turn=True)

        else:
            call = getattr(callback, name)
        if self._timeout is None or not limited:
            return call
        return _limited_in_session(call, name, self._timeout)

    def _of_accept(
        self, callback: PsCallback[Any]
    ) -> Callable[[PsSession[Any], Endpoint | None], object] | None:
        name = "on_accept_async" if self._is_async else "on_accept"
        if not is_overridden(callback, name):
            return None
        method = getattr(callback, name)

        def ask(session: PsSession[Any], peer: Endpoint | None) -> object:
            if not self._is_async:
                return method(peer)
            return run_task(method(peer), context=inside.context_of(session), in_turn=True)

        return ask if self._timeout is None else _limited_answer(ask, self._timeout)

    def _of_owner(self, callback: PsCallback[Any], name: str) -> Callable[..., None]:
        if not self._is_async:
            function: Callable[..., None] = getattr(callback, name)
            return function
        if not is_overridden(callback, f"{name}_async"):
            return _do_nothing  # so that a coroutine, which can't wait for a task here, may start
        method = getattr(callback, f"{name}_async")
        return lambda owner: run_task(method(owner))

    def _of_close_greenlet(self, call: Callable[..., None], name: str) -> Callable[..., None]:
        if self._timeout is None:
            return call
        return _limited(call, name, self._timeout)


def _do_nothing(_owner: object) -> None:
    pass


def _limited_in_session(call: Callable[..., Any], name: str, timeout: float) -> Callable[..., Any]:
    def call_limited(session: PsSession[Any], *args: Any) -> Any:
        def expired(error: TimeoutError) -> TimeoutError:
            is_peers = inside.is_held_by_its_peer(session)
            if is_peers:
                error = SlowPeerError(f"{error}: it waited in a send")
            inside.request_close(session, PsCloseReason.FAILED, error)
            if is_peers:
                kind = "callback_timeout in a send"
                inside.log_peer(session, kind, "%r: %s", session, error)
            else:
                inside.log(session, logging.WARNING, "%r: %s", session, error)
            return error

        with TimeLimit(name, timeout, expired) as limit:
            return inside.call_limited(session, limit, call, args)

    return call_limited


def _limited_answer(
    ask: Callable[[PsSession[Any], Endpoint | None], object], timeout: float
) -> Callable[[PsSession[Any], Endpoint | None], object]:
    def ask_limited(session: PsSession[Any], peer: Endpoint | None) -> object:
        errors: list[TimeoutError] = []

        def expired(error: TimeoutError) -> TimeoutError:
            errors.append(error)
            return error

        try:
            with TimeLimit("on_accept", timeout, expired):
                answer = ask(session, peer)
            if errors:  # the callback swallowed it
                raise errors[0]
            return answer
        finally:
            errors.clear()  # an error and this frame would keep each other alive

    return ask_limited


def _limited(call: Callable[..., None], name: str, timeout: float) -> Callable[..., None]:
    def call_limited(subject: Any, *args: Any) -> None:  # a session's callback has args
        def expired(error: TimeoutError) -> TimeoutError:
            context = inside.context_of(subject) if args else None
            log(logging.WARNING, "%r: %s", subject, error, context=context)
            return error

        with TimeLimit(name, timeout, expired):
            call(subject, *args)

    return call_limited
