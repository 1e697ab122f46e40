"""Whoever sends thousands of messages at once does not hold the hub: others have their turns."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import monkey

from helpers import NativeThread, close_reasons
from psofa_gevent import (
    PsCallback,
    PsClosedError,
    PsCloseReason,
    PsHandler,
    PsServer,
    PsSession,
    group,
)
from psofa_gevent.framing import SKIP, Decoded, Framing, Line
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

    def __init__(
        self,
        act: Act | None = None,
        *,
        use_async_callback: bool = False,
        suspends: bool = False,
    ) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self._act = act
        self._suspends = suspends

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        block(BUSY)
        if self._act is not None:
            self._act(session, message)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.on_message(session, message)
        if self._suspends:
            await asyncio.sleep(0)

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


class Ticks:
    """Counts how often the hub has come to a timer."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> None:
        while True:
            gevent.sleep(0.001)
            self.count += 1


@contextlib.contextmanager
def ticking() -> Iterator[Ticks]:
    ticks = Ticks()
    greenlet = gevent.spawn(ticks.tick)
    try:
        yield ticks
    finally:
        greenlet.kill()


def throw_soon(session: PsSession, error: BaseException) -> None:
    """Throw `error` into the session's greenlet when the hub has its turn."""
    assert session.greenlet is not None
    gevent.get_hub().loop.run_callback(session.greenlet.throw, error)


class Rig:
    """A way to get messages: in sync callbacks, in async ones, or by asking for them.

    Async ones may suspend, and be woken by the asyncio loop alone.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def make(self, act: Act | None = None) -> tuple[Blocking, PsCallback]:
        recording = Blocking(
            act,
            use_async_callback=self._kind in ("async", "suspending"),
            suspends=self._kind == "suspending",
        )
        return recording, Straight(recording) if self._kind == "handler" else recording


@pytest.fixture(params=["sync", "async", "suspending", "handler"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def test_the_hub_and_other_sessions_have_their_turns_within_one_read(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def begin(_session: PsSession, message: bytes) -> None:
        if message == LINES[0]:
            ticks.count = 0
            other.send("one of another\n")

    recording, callback = rig.make(begin)
    server = ps_server(callback, framing=Line())
    flooding, other = ps_client(server), ps_client(server)
    with ticking() as ticks:
        flooding.send(FLOOD)
        recording.wait_for("on_message", COUNT + 1)
        ticked = ticks.count
    at = recording.messages.index(b"one of another")
    assert 0 < at < COUNT / 2
    assert ticked >= 4
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
            assert session.greenlet is not None
            session.greenlet.kill(block=False)
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


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_session_that_closes_itself_gives_up_no_turn(
    how: str, rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def end(session: PsSession, message: bytes) -> None:
        if message == LINES[9]:
            block(0.02)  # its turn is over
            getattr(session, how)()

    recording, callback = rig.make(end)
    server = ps_server(callback, framing=Line())
    client = ps_client(server)  # the only one: when it is aborted nobody is left who could be ready
    client.send(FLOOD)
    (closed,) = recording.wait_for("on_close")
    assert closed.value is PsCloseReason.SELF_CLOSE
    assert recording.messages == LINES[:10]


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


class Noise(Framing[bytes]):
    """Ended by LF, with zeros in between, each of which is looked at for long and skipped."""

    max_size = 8

    def __init__(self) -> None:
        self.skipped = 0

    def decode(self, data: bytes, start: int) -> Decoded[bytes]:
        if data[start] == 0:
            block(BUSY)
            self.skipped += 1
            return SKIP, start + 1
        end = data.find(b"\n", start)
        return None if end < 0 else (data[start:end], end + 1)


@pytest.mark.parametrize("is_typed", [False, True], ids=["plain", "typed"])
def test_others_have_their_turns_while_a_framing_skips_what_is_no_message(
    is_typed: bool, rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    noise = Noise()
    framing = noise.typed(bytes, bytes) if is_typed else noise
    recording, callback = rig.make()
    server = ps_server(callback, framing=framing)
    noisy, other = ps_client(server), ps_client(server)
    eventually(lambda: server.get_session_count() == 2)
    with ticking() as ticks:
        noisy.send(bytes(COUNT) + b"noisy\n")
        eventually(lambda: noise.skipped > 0)
        other.send("other\n")
        recording.wait_for("on_message", 2)
        ticked = ticks.count
    assert recording.messages == [b"other", b"noisy"]
    assert ticked >= 4


def test_who_closes_the_session_while_its_framing_skips_ends_it_there(
    rig: Rig, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    recording, callback = rig.make()
    noise = Noise()
    server = ps_server(callback, framing=noise)
    client = ps_client(server)
    eventually(lambda: server.get_session_count() == 1)
    (session,) = server.sessions
    client.send(b"first\n" + bytes(COUNT) + b"last\n")
    recording.wait_for("on_message")
    session.close()
    recording.wait_for("on_close")
    assert noise.skipped < COUNT
    assert recording.messages == [b"first"]
    assert close_reasons(recording) == [PsCloseReason.SELF_CLOSE]


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
        eventually(lambda: session._send_queue is not None)
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


# What goes to many sessions, or comes from many


class Many:
    """A server with many sessions, and the peer of each."""

    def __init__(self, server: PsServer, ps_client: ClientFactory, count: int) -> None:
        self.server = server
        self.peers: dict[PsSession, ScriptedClient] = {}
        peers = {peer.local_endpoint: peer for peer in (ps_client(server) for _ in range(count))}
        eventually(lambda: server.get_session_count() == count)
        eventually(lambda: all(session.waiting_since for session in server.sessions))
        for session in server.sessions:
            self.peers[session] = peers[session.remote_endpoint]
        self.sessions = list(self.peers)

    def expect(self, data: str) -> None:
        for peer in self.peers.values():
            peer.expect(data)


@pytest.fixture
def many(
    ps_server: ServerFactory, ps_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> Many:
    """So many that a turn is over while they are posted to."""
    monkeypatch.setattr(group, "TURN", 0.0)
    return Many(ps_server(PsCallback(), framing=Line(), idle_milliseconds=None), ps_client, 80)


def test_a_post_to_many_leaves_in_turns_and_the_call_returns_before(many: Many) -> None:
    sent: list[int] = []

    def count() -> None:
        sent.append(sum(session.bytes_sent > 0 for session in many.sessions))

    # Called in each round of the hub, behind its timers.
    check = gevent.get_hub().loop.check()
    check.start(count)
    try:
        many.server.broadcast("news")
        assert sum(session.bytes_sent > 0 for session in many.sessions) == group.MEMBERS_AT_A_TIME
        assert sum(session.pending_bytes for session in many.sessions) == 5 * (80 - 16)
        eventually(lambda: all(session.bytes_sent == 5 for session in many.sessions))
    finally:
        check.stop()
        check.close()
    many.expect("news\n")
    assert {16, 32, 48, 64} <= {*sent, 16}


def test_what_is_sent_meanwhile_comes_behind_a_post_to_many(many: Many) -> None:
    members = many.server.group("members")
    for session in many.sessions:
        members.join(session)
    many.server.broadcast("1")
    for session in many.sessions:
        session.send("2")
    members.post("3")
    for session in many.sessions:
        session.post("4")
    NativeThread(many.server.broadcast, "5").wait()
    with many.sessions[-1].corked():
        many.sessions[-1].send("6")
    many.server.broadcast("7")
    many.sessions[-1].send_eof()
    *others, last = many.sessions
    for session in others:
        many.peers[session].expect("1\n2\n3\n4\n5\n7\n")
    many.peers[last].expect("1\n2\n3\n4\n5\n6\n7\n")
    many.peers[last].expect_eof()


def test_what_was_posted_to_many_comes_before_the_end_of_a_session_that_closes(many: Many) -> None:
    many.server.broadcast("last words")
    for session in many.sessions[:-1]:
        session.close()
    many.sessions[-1].abort()
    for session in many.sessions[:-1]:
        many.peers[session].expect("last words\n")
        many.peers[session].expect_eof()
    many.peers[many.sessions[-1]].expect_reset()


def test_replies_of_callbacks_come_behind_a_post_to_many(
    ps_server: ServerFactory, ps_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "TURN", 0.0)

    class Echo(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            if message == b"all":
                server.broadcast("to all")
            session.send(message)

    server = ps_server(Echo(), framing=Line())
    many = Many(server, ps_client, 60)
    for peer in many.peers.values():
        peer.send("one\n")
    many.expect("one\n")
    first, *others = many.peers.values()
    first.send("all\n")
    for peer in others:
        peer.send("two\n")
    first.expect("to all\nall\n")
    for peer in others:
        assert peer.receive(len("to all\ntwo\n")) in (b"to all\ntwo\n", b"two\nto all\n")


def test_a_large_post_to_many_leaves_in_turns_and_a_slow_peer_holds_up_nobody(many: Many) -> None:
    slow = many.sessions[-1]
    message = "x" * 200_000
    eventually(lambda: slow.post(message) and slow._send_queue is not None)
    before = slow.pending_bytes
    many.server.broadcast(message)
    assert sum(session.bytes_sent > 0 for session in many.sessions) == group.MEMBERS_AT_A_TIME + 1
    assert slow.pending_bytes == before + 200_001
    for session, peer in many.peers.items():
        if session is not slow:
            assert peer.receive(200_001) == message.encode() + b"\n"
    slow.abort()


def test_others_have_their_turns_while_the_heartbeats_of_many_leave(
    ps_server: ServerFactory, ps_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticked: list[int] = []
    post = PsSession.post

    def slow_post(session: PsSession[Any], message: Any, *, raw: bool = False) -> bool:
        ticked.append(ticks.count)
        block(BUSY)
        return post(session, message, raw=raw)

    monkeypatch.setattr(PsSession, "post", slow_post)
    with ticking() as ticks:
        server = ps_server(PsCallback(), framing=Line(), heartbeat=(2_000, "beat"))
        many = Many(server, ps_client, COUNT)
        ticked.clear()
        block(2.1)  # so that all of them are due now
        many.expect("beat\n")
    assert len(ticked) >= COUNT
    assert ticked[COUNT - 1] - ticked[0] >= 4


def test_others_have_their_turns_while_many_sessions_close(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Closing(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            block(BUSY)

    callback = Closing()
    many = Many(ps_server(callback), ps_client, COUNT)
    with ticking() as ticks:
        for session in many.sessions:
            session.close()
        callback.wait_for("on_close")
        ticks.count = 0
        callback.wait_for("on_close", COUNT)
        assert ticks.count >= 4
