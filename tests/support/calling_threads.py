"""Calls in OS threads that are not the hub's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import pytest

from helpers import NativeThread
from psofa_gevent import PsSession
from psofa_gevent.testing import RecordingCallback

AT_ONCE = 2.0
"""Seconds that a native join may take of a call that returns at once."""


def in_native_thread(function: Callable[..., Any], *args: Any) -> Any:
    return NativeThread(function, *args).wait()


def in_thread_pool(function: Callable[..., Any], *args: Any) -> Any:
    def outcome() -> tuple[Any, Exception | None]:
        # What is raised in the pool itself, gevent prints.
        try:
            return function(*args), None
        except Exception as error:
            return None, error

    value, error = gevent.get_hub().threadpool.apply(outcome)
    if error is not None:
        raise error
    return value


in_each_kind_of_thread = pytest.mark.parametrize("call", [in_native_thread, in_thread_pool])

InThread = Callable[..., Any]


def only_session(callback: RecordingCallback) -> PsSession:
    session = callback.wait_for("on_open")[0].session
    assert session is not None
    return session


class ActsInMessage(RecordingCallback):
    """Does what it is told in ``on_message``, in the session's own greenlet."""

    def __init__(self, action: Callable[[PsSession], object]) -> None:
        super().__init__()
        self._action = action

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self._action(session)
