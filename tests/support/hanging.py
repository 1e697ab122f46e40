"""Callbacks that do not end by themselves, and servers with open clients to shut down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import gevent
from gevent import GreenletExit
from gevent.event import Event

from helpers import close_reasons, local_server
from psofa_gevent import PsCloseReason, PsServer, PsSession
from psofa_gevent.testing import RecordingCallback, ScriptedClient

FOREVER = 120.0
"""Seconds: longer than any test, not longer than its greenlet may live if the test fails."""
SECOND_BOUND = 1.0
"""Seconds that killed callbacks have at least (design: point 8)."""


@contextlib.contextmanager
def serving_clients(
    callback: RecordingCallback, count: int, **settings: Any
) -> Iterator[tuple[PsServer, list[ScriptedClient]]]:
    """A started server and clients of it, all of them open."""
    with local_server(callback, **settings) as server, contextlib.ExitStack() as stack:
        stack.callback(server.shutdown, 0)
        clients = [stack.enter_context(ScriptedClient(server.address)) for _ in range(count)]
        callback.wait_for("on_open", count)
        yield server, clients


def assert_all_closed(callback: RecordingCallback, reason: PsCloseReason, count: int) -> None:
    """Every session that was opened got one on_close, on_stop came last."""
    assert close_reasons(callback) == [reason] * count
    assert len(callback.named("on_open")) == count
    assert callback.events[-1].name == "on_stop"


class Hanging(RecordingCallback):
    """Its on_message never ends by itself, and does not resist its end."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        gevent.sleep(FOREVER)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        await asyncio.sleep(FOREVER)


class Resisting(RecordingCallback):
    """Its on_message ends when the test says so, or when it was killed `kills` times."""

    def __init__(self, kills: int, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self.kills_left = kills
        self.go_on = Event()

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        while self.kills_left > 0 and not self.go_on.is_set():
            try:
                self.go_on.wait(FOREVER)
            except GreenletExit:
                self.kills_left -= 1

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        while self.kills_left > 0 and not self.go_on.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                self.kills_left -= 1


class HangingOnClose(RecordingCallback):
    """Records its on_close before it hangs."""

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        gevent.sleep(FOREVER)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        await asyncio.sleep(FOREVER)


class HangingOnStop(RecordingCallback):
    def on_stop(self, owner: Any) -> None:
        super().on_stop(owner)
        gevent.sleep(FOREVER)

    async def on_stop_async(self, owner: Any) -> None:
        super().on_stop(owner)
        await asyncio.sleep(FOREVER)
