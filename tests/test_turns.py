"""Whoever sends thousands of messages at once does not hold the hub: others have their turns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gevent
import pytest
from gevent import monkey

from helpers import NativeThread, close_reasons
from psofa_gevent import PsCallback, PsClosedError, PsCloseReason, PsHandler, PsServer, PsSession
from psofa_gevent.framing import Line
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)

COUNT = 60
LINES = [b"%d" % number for number in range(COUNT)]
FLOOD = b"".join(line + b"\n" for line in LINES)
"""Many lines that come in one read."""
BUSY = 0.003
"""Seconds for which each of them blocks the thread: all of them for much longer than a turn."""

block: Callable[[float], None] = monkey.get_original("time", "sleep")

Act = Callable[[PsSession, bytes], object]


class Blocking(RecordingCallback):
    """Records each message, blocks for a while, and does what a test says."""

    def __init__(self, act: Act | None = None, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self._act = act

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        block(BUSY)
        if self._act is not None:
            self._act(session, message)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.on_message(session, message)

    @property
    def messages(self) -> list[object]:
        return [event.value for event in self.named("on_message")]


class Straight(PsHandler):
    """Hands over to a `Blocking` what it receives itself."""

    def __init__(self, recording: Blocking) -> None:
        super().__init__()
        self._recording = recording

    def handle(self, session: PsSession) -> None:
        for message in session:
            self._recording.on_message(session, message)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self._recording.on_close(session, close_reason)


def throw_soon(session: PsSession, error: BaseException) -> None:
    """Throw `error` into the session's greenlet when the hub has its turn."""
    assert session._greenlet is not None
    gevent.get_hub().loop.run_callback(session._greenlet.throw, error)


class Rig:
    """A way to get messages: in sync callbacks, in async ones, or by asking for them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def make(self, act: Act | None = None) -> tuple[Blocking, PsCallback]:
        recording = Blocking(act, use_async_callback=self._kind == "async")
        return recording, Straight(recording) if self._kind == "handler" else recording


@pytest.fixture(params=["sync", "async", "handler"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def test_the_hub_and_other_sessions_have_their_turns_within_one_read(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            gevent.sleep(0.001)
            ticks += 1

    def begin(_session: PsSession, message: bytes) -> None:
        nonlocal ticks
        if message == LINES[0]:
            ticks = 0
            other.send("one of another\n")

    recording, callback = rig.make(begin)
    server = ps_server(callback, framing=Line())
    flooding, other = ps_client(server), ps_client(server)
    ticking = gevent.spawn(tick)
    try:
        flooding.send(FLOOD)
        recording.wait_for("on_message", COUNT + 1)
    finally:
        ticking.kill()
    at = recording.messages.index(b"one of another")
    assert 0 < at < COUNT / 2
    assert ticks >= 4
    assert [message for message in recording.messages if message in LINES] == LINES


def test_a_turn_is_bounded_however_long_the_read_and_the_messages_are(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    ran = 0
    in_a_row: list[int] = []

    def count_turns() -> None:
        nonlocal ran
        while True:
            in_a_row.append(ran)
            ran = 0
            gevent.sleep(0)

    def count(_session: PsSession, _message: bytes) -> None:
        nonlocal ran
        ran += 1

    recording, callback = rig.make(count)
    client = ps_client(ps_server(callback, framing=Line()))
    counting = gevent.spawn(count_turns)
    try:
        client.send(FLOOD)
        recording.wait_for("on_message", COUNT)
    finally:
        counting.kill()
    # 10 ms are 3 or 4 of them, where nothing else takes the time.
    assert max(in_a_row) <= 6


def test_what_was_sent_leaves_before_others_have_their_turn(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    came: list[bytes] = []

    def answer(session: PsSession, message: bytes) -> None:
        session.send(message)
        if message == LINES[0]:
            gevent.spawn(lambda: came.append(client.socket.recv(1_000)))

    recording, callback = rig.make(answer)
    client = ps_client(ps_server(callback, framing=Line()))
    client.send(FLOOD)
    recording.wait_for("on_message", COUNT)
    (first,) = came
    client.expect(FLOOD[len(first) :])  # and the rest of them, in order
    assert first.startswith(b"0\n1\n")


@pytest.mark.logs_errors  # of a kill
@pytest.mark.parametrize("how", ["close", "abort", "thread", "shutdown", "kill"])
def test_who_closes_the_session_in_a_turn_of_others_ends_it_there(
    how: str, rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[int] = []

    def end(session: PsSession) -> None:
        seen.append(len(recording.messages))
        if how == "close":
            session.close()
        elif how == "abort":
            session.abort()
        elif how == "thread":
            NativeThread(session.close).join()
        elif how == "kill":
            assert session._greenlet is not None
            session._greenlet.kill(block=False)
        else:
            shutting_down.append(gevent.spawn(server.shutdown))

    def begin(session: PsSession, message: bytes) -> None:
        if message == LINES[0]:
            gevent.spawn(end, session)

    shutting_down: list[gevent.Greenlet[..., Any]] = []
    recording, callback = rig.make(begin)
    server: PsServer = ps_server(callback, framing=Line())
    client = ps_client(server)
    client.send(FLOOD)
    (closed,) = recording.wait_for("on_close")
    reason = {"shutdown": PsCloseReason.SHUTDOWN, "kill": PsCloseReason.FAILED}
    assert closed.value is reason.get(how, PsCloseReason.SELF_CLOSE)
    # A shutdown begins one turn later.
    assert seen[0] < COUNT / 4
    assert len(recording.messages) == seen[0] or how == "shutdown"
    assert len(recording.messages) < COUNT
    gevent.joinall(shutting_down)


def test_a_session_whose_turn_is_over_is_neither_idle_nor_late(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def begin(_session: PsSession, message: bytes) -> None:
        if message in LINES[:20]:
            gevent.spawn(block, 0.02)

    recording, callback = rig.make(begin)
    server = ps_server(
        callback, framing=Line(), idle_milliseconds=10_000, frame_timeout=10, divide=1
    )
    client = ps_client(server)
    client.send("half ")
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.bytes_received == 5)
    session._idle = 0.001  # both clocks have run out, as far as the timer knows
    assert session._frame_deadline > 0
    session._frame_deadline = 0.001
    assert session._slice is not None
    session._slice.due = 0.0
    client.send(FLOOD)
    recording.wait_for("on_message", COUNT)
    assert recording.messages == [b"half 0", *LINES[1:]]


def test_callback_timeout_does_not_count_the_turns_of_others(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def begin(_session: PsSession, message: bytes) -> None:
        if message == LINES[0]:
            gevent.spawn(block, 0.6)

    recording, callback = Rig("handler").make(begin)
    client = ps_client(ps_server(callback, framing=Line(), callback_timeout=0.5))
    client.send(FLOOD)
    recording.wait_for("on_message", COUNT, timeout=10)
    assert close_reasons(recording) == []


def test_a_receive_that_is_broken_off_in_the_turn_of_others_loses_no_message(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    got: list[bytes] = []
    broken_off: list[int] = []

    def handle(session: PsSession) -> None:
        while len(got) < COUNT:
            block(BUSY)
            if len(got) == 1:
                throw_soon(session, gevent.Timeout())
            try:
                got.append(session.receive())
            except gevent.Timeout:
                broken_off.append(len(got))

    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    client.send(FLOOD)
    client.expect_eof()
    assert got == LINES
    assert 0 < broken_off[0] < COUNT


def test_a_message_that_is_received_in_a_callback_leaves_the_others_to_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    pairs: list[tuple[bytes, bytes]] = []

    def receive_another(session: PsSession, message: bytes) -> None:
        pairs.append((message, session.receive()))

    recording = Blocking(receive_another)
    client = ps_client(ps_server(recording, framing=Line()))
    client.send(FLOOD)
    eventually(lambda: len(pairs) == COUNT / 2)
    assert [message for pair in pairs for message in pair] == LINES


def test_no_one_else_changes_the_framing_in_the_turn_of_others(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    refused: list[str] = []

    def change(session: PsSession) -> None:
        with pytest.raises(RuntimeError, match="in a callback of the session") as raised:
            session.set_framing(None)
        refused.append(str(raised.value))

    def begin(session: PsSession, message: bytes) -> None:
        if message == LINES[0]:
            gevent.spawn(change, session)

    recording, callback = rig.make(begin)
    client = ps_client(ps_server(callback, framing=Line()))
    client.send(FLOOD)
    recording.wait_for("on_message", COUNT)
    assert len(refused) == 1
    assert recording.messages == LINES


@pytest.mark.logs_errors
def test_an_error_thrown_into_the_turn_of_others_is_no_malformed_message(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def begin(session: PsSession, message: bytes) -> None:
        if message == LINES[0]:
            throw_soon(session, ValueError("a stranger's"))

    recording = Blocking(begin)
    client = ps_client(ps_server(recording, framing=Line()))
    client.send(FLOOD)
    (closed,) = recording.wait_for("on_close")
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, ValueError)
    assert [each.levelno for each in caplog.records if each.levelno > logging.INFO] == [
        logging.ERROR
    ]


def test_a_peer_that_takes_no_replies_still_holds_up_its_own_messages(
    ps_server: ServerFactory,
) -> None:
    def answer(session: PsSession, _message: bytes) -> None:
        session.send(bytes(1_000_000), timeout=None)

    recording = Blocking(answer)
    server = ps_server(recording, framing=Line(), idle_milliseconds=None)
    with ScriptedClient(server.address, receive_buffer_size=4_096) as client:
        client.send(FLOOD)
        (session,) = eventually(lambda: server.sessions)
        eventually(lambda: session._line is not None)
        assert len(recording.messages) < COUNT
        assert session.pending_bytes < 3_000_000
        session.abort()


def test_all_messages_come_also_if_the_peer_closes_behind_them(rig: Rig) -> None:
    recording, callback = rig.make()
    with connected_session(callback, framing=Line()) as both:
        both.peer.send(FLOOD)
        both.peer.eof()
        (closed,) = recording.wait_for("on_close")
    assert closed.value is PsCloseReason.PEER_CLOSE
    assert recording.messages == LINES


def test_receive_raises_when_the_session_is_closed_in_the_turn_of_others(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    got: list[int] = []
    seen: list[int] = []

    def close(session: PsSession) -> None:
        seen.append(len(got))
        session.close()

    def handle(session: PsSession) -> None:
        gevent.spawn(close, session)
        for _ in session:
            got.append(len(got))
            block(BUSY)
        with pytest.raises(PsClosedError, match="SELF_CLOSE"):
            session.receive()

    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    client.send(FLOOD)
    client.expect_eof()
    assert seen == [len(got)]
    assert len(got) < COUNT
