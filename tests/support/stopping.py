"""Callbacks and signal handlers in which an owner is shut down."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import TypeAlias

import gevent
import pytest

from psofa_gevent import PsClient, PsCloseReason, PsMultiClient, PsServer, PsSession
from psofa_gevent.testing import RecordingCallback, ScriptedClient

SOON = 5.0
"""Seconds: no shutdown comes near it, unless something waits for itself."""

SIGNAL = signal.SIGUSR1

Stop: TypeAlias = Callable[[], object]


class StopsIn(RecordingCallback):
    """Calls `stop` in one of its methods, sync or async, and notes when that has returned."""

    def __init__(self, method: str, *, use_async_callback: bool = False) -> None:
        super().__init__(reply=bytes, use_async_callback=use_async_callback)
        self._method = method
        self.stop: Stop = lambda: None
        self.returned: list[list[str]] = []

    def _act(self, method: str) -> None:
        if method == self._method and not self.returned:
            self.stop()
            self.returned.append([event.name for event in self.events])

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self._act("on_open")

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self._act("on_message")

    def on_eof(self, session: PsSession) -> None:
        super().on_eof(session)
        self._act("on_eof")

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._act("on_close")

    def on_stop(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        super().on_stop(owner)
        self._act("on_stop")

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        self._act("on_message")


METHODS = ["on_open", "on_message", "on_eof", "on_close", "on_stop"]


def provoke(method: str, peer: ScriptedClient, session: PsSession, stop: Stop) -> None:
    """Have `method` of the session called."""
    match method:
        case "on_message":
            peer.send("x")
        case "on_eof":
            peer.eof()
        case "on_close":
            session.close()
        case "on_stop":
            gevent.spawn(stop)


def expect_one_life_each(callback: RecordingCallback, sessions: int) -> None:
    closed = [event.session for event in callback.named("on_close")]
    assert len(closed) == len(set(closed)) == sessions
    assert len(callback.named("on_stop")) == 1
    assert callback.events[-1].name == "on_stop"


@pytest.fixture
def on_signal() -> Iterator[Callable[[Stop], None]]:
    """Sets a ``signal.signal`` handler for `SIGNAL`, which calls what it is given."""
    before = signal.getsignal(SIGNAL)

    def handle_by(stop: Stop) -> None:
        signal.signal(SIGNAL, lambda _number, _frame: stop() and None)

    yield handle_by
    signal.signal(SIGNAL, before)


OnSignal: TypeAlias = Callable[[Stop], None]
