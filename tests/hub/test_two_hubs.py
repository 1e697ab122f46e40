"""Servers and greenlets of one thread's hub, used from another one's."""

from __future__ import annotations

from typing import Any

import gevent
import pytest

from calling_threads import AT_ONCE, only_session
from helpers import NativeThread, close_reasons, run_python, stalled_peer
from psofa_gevent import PsCloseReason, PsServer, PsSession
from psofa_gevent.hub.thread import NativeEvent
from psofa_gevent.testing import (
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)


class ServerThread:
    """A server that lives in a native thread, until it is shut down."""

    def __init__(self, callback: RecordingCallback) -> None:
        self._started = NativeEvent()
        self.server = PsServer(callback, host="127.0.0.1", port=0)
        self.thread = NativeThread(self._serve)
        assert self._started.wait(5)

    def _serve(self) -> bool:
        self.server.start()
        self._started.set()
        return self.server.wait_for()


def test_server_in_another_thread_is_used_and_shut_down_from_here() -> None:
    callback = RecordingCallback(reply=bytes)
    other = ServerThread(callback)
    with ScriptedClient(other.server.address) as client:
        client.send("ping")
        client.expect("ping")
        session = only_session(callback)
        session.send("from here")
        client.expect("from here")
        other.server.stop_accepting()
        other.server.resume_accepting()
        other.server.shutdown()
        client.expect_eof()
    assert other.thread.join(AT_ONCE) is True
    assert close_reasons(callback) == [PsCloseReason.SHUTDOWN]


class ShutsOtherDown(RecordingCallback):
    """Shuts another thread's server down in one of its methods; an on_message "hang" hangs."""

    def __init__(self, method: str, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self._method = method
        self.other: PsServer | None = None
        self.returned = False
        self.waited = False

    def _act(self, method: str) -> None:
        if method == self._method and self.other is not None:
            self.other.shutdown(timeout=1.0)
            self.waited = self.other.get_session_count() == 0
            self.returned = True

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        if message == b"hang":
            gevent.sleep(600)
        self._act("on_message")

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        self._act("on_message")

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._act("on_close")

    def on_stop(self, owner: Any) -> None:
        super().on_stop(owner)
        self._act("on_stop")


@pytest.mark.parametrize(
    ("method", "use_async_callback"),
    [("on_message", False), ("on_message", True), ("on_close", False), ("on_stop", False)],
)
def test_callback_may_shut_down_the_server_of_another_thread_and_does_not_wait_for_it(
    method: str, use_async_callback: bool
) -> None:
    there = ShutsOtherDown("")
    other = ServerThread(there)
    here = ShutsOtherDown(method, use_async_callback=use_async_callback)
    with ScriptedClient(other.server.address) as hanging:
        hanging.send("hang")
        there.wait_for("on_message")
        here.other = other.server
        with serving(here) as server, ScriptedClient(server.address) as client:
            client.send("x")
            here.wait_for("on_message")
        eventually(lambda: here.returned)
        assert not here.waited, "it waited for the callback that hangs in the other thread"
        assert other.thread.wait() is True
        hanging.expect_eof()
    assert close_reasons(there) == [PsCloseReason.SHUTDOWN]


def test_servers_of_two_threads_may_shut_each_other_down() -> None:
    callbacks = [ShutsOtherDown("on_close") for _ in range(2)]
    servers = [ServerThread(callback) for callback in callbacks]
    callbacks[0].other, callbacks[1].other = servers[1].server, servers[0].server
    with (
        ScriptedClient(servers[0].server.address) as first,
        ScriptedClient(servers[1].server.address) as second,
    ):
        for callback in callbacks:
            callback.wait_for("on_open")
        first.eof()
        second.eof()
        first.expect_eof()
        second.expect_eof()
    for each in servers:
        assert each.thread.wait() is True
    for callback in callbacks:
        assert len(callback.named("on_close")) == 1
        assert callback.events[-1].name == "on_stop"


TWO_HUBS = """
    from helpers import NativeThread
    from psofa_gevent import PsServer
    from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually, serving
    from psofa_gevent.hub.thread import NativeEvent

    COUNT = 200

    class SendsToHere(RecordingCallback):
        def on_message(self, session, message):
            for _ in range(COUNT):
                session_here.send("x")

    def serve_there():
        server_there.start()
        started.set()
        server_there.wait_for()

    started = NativeEvent()
    server_there = PsServer(SendsToHere(), host="127.0.0.1", port=0)
    thread = NativeThread(serve_there)
    started.wait(5)
    with (
        serving(RecordingCallback()) as server_here,
        ScriptedClient(server_here.address) as client_here,
        ScriptedClient(server_there.address) as client_there,
    ):
        (session_here,) = eventually(lambda: server_here.sessions)
        (session_there,) = eventually(lambda: server_there.sessions)
        client_there.send("go")
        for _ in range(COUNT):
            session_there.send("y")
        client_here.expect("x" * COUNT)
        client_there.expect("y" * COUNT)
        server_there.shutdown()
    thread.join(5)
    print("done")
"""


def test_two_hubs_may_send_to_sessions_of_each_other_at_the_same_time() -> None:
    done = run_python(TWO_HUBS, timeout=20.0)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def give_up_sending(session: PsSession, message: bytes) -> str:
    """Runs in a thread with a hub of its own, whose greenlets may be thrown out of a send."""
    gevent.sleep(0)
    try:
        with gevent.Timeout(0.1):
            session.send(message, timeout=None)
    except gevent.Timeout:
        return "given up"
    return "sent"


def test_greenlet_of_another_hub_thrown_out_of_a_send_in_line_has_sent_nothing(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=0.0)
    with stalled_peer(server.address) as peer:
        session = only_session(callback)
        size = 32 * 1024 * 1024
        first = gevent.spawn(session.send, bytes(size), timeout=None)
        eventually(lambda: session.bytes_sent > 0)
        assert NativeThread(give_up_sending, session, b"never").wait() == "given up"
        assert session.is_open
        peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, size)
        peer.receive(size)
        first.get(timeout=5)
        session.send("fine")
        peer.expect("fine")


def test_greenlet_of_another_hub_thrown_out_after_a_part_left_fails_the_session(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=0.0)
    with stalled_peer(server.address):
        session = only_session(callback)
        thread = NativeThread(give_up_sending, session, bytes(32 * 1024 * 1024))
        assert thread.wait() == "given up"
        assert callback.wait_for("on_close")[0].value is PsCloseReason.FAILED
