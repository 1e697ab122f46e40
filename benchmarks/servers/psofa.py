"""psofa_gevent, with sync and with async callbacks."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import time

import gevent

from benchmarks.servers.works import BACKLOG, HOST, TLS, TO_ALL, Announce, pongs, tls_context
from psofa_gevent import PsCallback, PsCloseReason, PsServer, PsSession
from psofa_gevent.framing import Framing, LengthPrefix, Line

SHUTDOWN_TIMEOUT = 60.0
"""Seconds. Long, so that a slow shutdown is measured and not cut off."""


class Echo(PsCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


class Hold(Echo):
    closes = 0

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.closes += close_reason is PsCloseReason.SHUTDOWN


class Ping(PsCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(pongs(message))


class Broadcast(PsCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        if message[0] != TO_ALL:
            session.send(message)
            return
        session.owner.broadcast(message)


class EchoAlone(PsCallback):
    """Sends each reply in a system call of its own, to show the gain of sending them together."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        session._cork = None
        session.send(message)


class EchoAsync(PsCallback):
    use_async_callback = True

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await session.send_async(message)


class SuspendAsync(PsCallback):
    use_async_callback = True

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await asyncio.sleep(0)
        await session.send_async(message)


class PingAsync(PsCallback):
    use_async_callback = True

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await session.send_async(pongs(message))


CALLBACKS: dict[tuple[str, str], type[PsCallback]] = {
    ("sync", "echo"): Echo,
    ("sync", "hold"): Hold,
    ("sync", TLS): Echo,
    ("sync", "ping"): Ping,
    ("sync", "broadcast"): Broadcast,
    ("sync", "lines"): Echo,
    ("sync", "lengths"): Echo,
    ("alone", "lines"): EchoAlone,
    ("alone", "lengths"): EchoAlone,
    ("async", "lines"): EchoAsync,
    ("async", "lengths"): EchoAsync,
    ("async", "echo"): EchoAsync,
    ("async", "suspend"): SuspendAsync,
    ("async", "ping"): PingAsync,
}


FRAMINGS: dict[str, Framing[bytes]] = {"lines": Line(), "lengths": LengthPrefix()}


def serve(variant: str, work: str, announce: Announce) -> None:
    callback = CALLBACKS[variant, work]()
    server = PsServer(
        callback,
        host=HOST,
        port=0,
        backlog=BACKLOG,
        framing=FRAMINGS.get(work),
        ssl_context=tls_context(ssl.SSLContext) if work == TLS else None,
    )
    server.start()
    if isinstance(callback, Hold):
        gevent.signal_handler(signal.SIGUSR1, shut_down, server, callback)
    announce(server.address[1])
    server.wait_for()
    gevent.sleep(1)  # until `shut_down` has printed


def shut_down(server: PsServer, callback: Hold) -> None:
    cpu, began = time.process_time(), time.monotonic()
    server.shutdown(SHUTDOWN_TIMEOUT)
    seconds = time.monotonic() - began
    cpu = time.process_time() - cpu
    print(json.dumps({"closes": callback.closes, "seconds": seconds, "cpu": cpu}), flush=True)
