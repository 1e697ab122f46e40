"""Messages that leave together: those of one read with a framing, and those of a `corked` block."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest

from helpers import NativeThread, close_reasons
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsSendError,
    PsSession,
    run_coroutine,
)
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.session import framed
from psofa_gevent.session.sending import CORK_SIZE, SendingHalf
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)

Act = Callable[[PsSession[Any], bytes], object]
BIG = 8 * 1024 * 1024
"""Bytes: more than the buffers of a connection take."""


class Acting(RecordingCallback):
    """Records, and does for each message what a test says."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act

    def on_message(self, session: PsSession[Any], message: bytes) -> None:
        super().on_message(session, message)
        self.act(session, message)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that was given to the kernel, one for each system call."""
    sizes: list[int] = []
    send_now = SendingHalf._send_now

    def counting(self: SendingHalf[Any], data: bytes | memoryview) -> int:
        sizes.append(len(data))
        return send_now(self, data)

    monkeypatch.setattr(SendingHalf, "_send_now", counting)
    # What was collected leaves at the end of a turn, too, which comes early on a slow machine.
    monkeypatch.setattr(framed, "TURN", 1_000.0)
    return sizes


def echo(session: PsSession[Any], message: bytes) -> None:
    session.send(message)


def _sleep_until(gate: gevent.event.Event) -> None:
    while not gate.is_set():
        gevent.sleep(0.001)


async def _await(gate: gevent.event.Event) -> None:
    while not gate.is_set():
        await asyncio.sleep(0.001)


# With a framing


def test_the_replies_to_the_messages_of_one_read_leave_together(
    ps_server: ServerFactory, ps_client: ClientFactory, writes: list[int]
) -> None:
    client = ps_client(ps_server(Acting(echo), framing=Line()))
    lines = b"".join(b"%d\n" % number for number in range(1_000))
    client.send(lines)
    client.expect(lines)
    assert sum(writes) == len(lines)
    assert len(writes) <= 3  # as many as there were reads, and here is one


def test_many_replies_leave_before_all_are_made(
    ps_server: ServerFactory, ps_client: ClientFactory, writes: list[int]
) -> None:
    client = ps_client(
        ps_server(Acting(lambda session, _: session.send(b"x" * 10_000)), framing=Line())
    )
    client.send("\n" * 30)
    client.receive(30 * 10_001)
    assert max(writes) < CORK_SIZE + 10_001


@pytest.mark.parametrize(
    "wait",
    [
        lambda gate: gate.wait(5),
        _sleep_until,
        lambda gate: run_coroutine(_await(gate)),
        lambda gate: gevent.spawn(gate.wait).get(timeout=5),
    ],
    ids=["event", "sleep", "coroutine", "greenlet"],
)
def test_replies_leave_before_a_callback_waits(
    wait: Callable[[gevent.event.Event], object],
    ps_server: ServerFactory,
    ps_client: ClientFactory,
) -> None:
    gate = gevent.event.Event()

    def act(session: PsSession[Any], message: bytes) -> None:
        session.send(message)
        if message == b"2":
            wait(gate)
            session.send("waited")

    client = ps_client(ps_server(Acting(act), framing=Line()))
    client.send("1\n2\n3\n4\n")
    client.expect("1\n2\n")
    gate.set()
    client.expect("waited\n3\n4\n")


def test_what_others_send_while_a_callback_waits_comes_in_between(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def act(session: PsSession[Any], message: bytes) -> None:
        session.send(message)
        gevent.spawn(session.send, b"other").join()

    client = ps_client(ps_server(Acting(act), framing=Line()))
    client.send("1\n2\n")
    client.expect("1\nother\n2\nother\n")


def test_a_thread_sends_while_a_callback_waits(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def act(session: PsSession[Any], message: bytes) -> None:
        session.send(message)
        NativeThread(session.send, b"thread").wait()

    client = ps_client(ps_server(Acting(act), framing=Line()))
    client.send("1\n2\n")
    client.expect("1\nthread\n2\nthread\n")


def test_replies_before_a_close_reach_the_peer(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def act(session: PsSession[Any], message: bytes) -> None:
        session.send(message)
        if message == b"3":
            session.close()

    callback = Acting(act)
    client = ps_client(ps_server(callback, framing=Line()))
    client.send("1\n2\n3\n4\n")
    client.expect("1\n2\n3\n")
    client.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_replies_before_a_close_are_given_to_the_kernel_also_without_lingering(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def act(session: PsSession[Any], message: bytes) -> None:
        session.send(message)
        if message == b"2":
            session.close()

    client = ps_client(ps_server(Acting(act), framing=Line(), linger_timeout=0.0))
    client.send("1\n2\n")
    client.expect("1\n2\n")
    client.expect_eof()


def test_replies_before_a_half_close_come_before_the_fin(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def act(session: PsSession[Any], message: bytes) -> None:
        session.send(message)
        if message == b"2":
            session.send_eof()
            with pytest.raises(PsSendError, match="after send_eof"):
                session.send("too late")
            session.set_value("done", True)

    callback = Acting(lambda s, m: None if s.get_value("done") else act(s, m))
    client = ps_client(ps_server(callback, framing=Line()))
    client.send("1\n2\n3\n")
    client.expect("1\n2\n")
    client.expect_eof()
    callback.wait_for("on_message", 3)
    client.close()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


def test_a_peer_that_takes_nothing_holds_up_its_own_session_and_fails_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Acting(lambda session, _message: session.send(bytes(200_000)))
    server = ps_server(callback, framing=LengthPrefix(), send_timeout=0.3)
    client = ps_client(server)
    client.send(LengthPrefix().encode(b"x") * 1_000)
    callback.wait_for("on_close", timeout=10)
    (closed,) = callback.named("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, PsSendError)
    assert len(callback.named("on_message")) < 1_000  # it stood still, and memory did not grow


def test_collected_messages_leave_also_when_the_wait_for_that_is_broken_off() -> None:
    # They were sent, as far as the callback knows: the stream must not go on without them.
    def send_collected(session: PsSession[Any]) -> None:
        with gevent.Timeout(0.05), session.corked():
            session.send("collected ")

    filled = 0

    def act(session: PsSession[Any], _message: bytes) -> None:
        nonlocal filled
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += session._sock.send(bytes(65_536))
        with pytest.raises(gevent.Timeout):
            send_collected(session)
        session.post("and on")

    with connected_session(Acting(act)) as both:
        both.peer.send("go")
        eventually(lambda: both.session.pending_bytes == len("collected and on"))
        both.peer.receive(filled)
        both.peer.expect("collected and on")
        assert both.session.is_open


def test_a_close_while_collected_messages_wait_to_leave_loses_none(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    sent = 0

    def act(session: PsSession[Any], _message: bytes) -> None:
        nonlocal sent
        with contextlib.suppress(PsSendError):
            while True:
                session.send(b"%0100d" % sent, None)
                sent += 1

    server = ps_server(Acting(act), framing=Line(), linger_timeout=5.0)
    client = ps_client(server)
    client.send("go\n")
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session._send_queue is not None)
    session.close()
    lines = client.receive_until_eof().splitlines()
    assert [int(line) for line in lines] == list(range(len(lines)))
    assert len(lines) >= sent


# What the kernel does not take at once, when a callback begins to wait


def send_more_than_fits_and_wait(wait: Callable[[], object], then: Act) -> Act:
    def act(session: PsSession[Any], message: bytes) -> None:
        with session.corked():
            # One after the other below the bound at which a send would wait itself.
            session._cork = [b"%08d" % number for number in range(BIG // 8)]
            session._corked_size = 1
            wait()
        then(session, message)

    return act


EXPECTED = b"".join(b"%08d" % number for number in range(BIG // 8))


def test_what_does_not_fit_before_a_wait_is_sent_meanwhile(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    gate = gevent.event.Event()
    act = send_more_than_fits_and_wait(gate.wait, lambda session, _: session.send("after it"))
    client = ps_client(ps_server(Acting(act)))
    client.send("go")
    assert client.receive(BIG) == EXPECTED  # the callback still waits
    gate.set()
    client.expect("after it")


def test_what_does_not_fit_before_a_wait_still_arrives_after_a_close(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    act = send_more_than_fits_and_wait(gevent.sleep, lambda session, _: session.close())
    callback = Acting(act)
    client = ps_client(ps_server(callback, linger_timeout=5.0))
    client.send("go")
    assert client.receive(BIG) == EXPECTED
    client.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_what_does_not_fit_is_dropped_when_the_peer_takes_nothing_for_linger_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    act = send_more_than_fits_and_wait(gevent.sleep, lambda session, _: session.close())
    callback = Acting(act)
    client = ps_client(ps_server(callback, linger_timeout=0.1, send_timeout=None))
    client.send("go")
    callback.wait_for("on_close", timeout=30)
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]
    client.close()


# Async callbacks


class AsyncReplies(PsCallback):
    """Replies, and does what a message says besides."""

    use_async_callback = True

    def __init__(self) -> None:
        self.handled: list[bytes] = []

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await session.send_async(message)
        self.handled.append(message)
        if message == b"suspend":
            await asyncio.sleep(0.2)
        if message == b"hold":
            gevent.sleep(0.2)  # a step that waits in gevent's way holds the loop


def test_the_replies_of_coroutines_to_the_messages_of_one_read_leave_together(
    ps_server: ServerFactory, ps_client: ClientFactory, writes: list[int]
) -> None:
    client = ps_client(ps_server(AsyncReplies(), framing=Line()))
    lines = b"".join(b"%d\n" % number for number in range(1_000))
    client.send(lines)
    client.expect(lines)
    assert len(writes) <= 3


@pytest.mark.parametrize("wait", ["suspend", "hold"])
def test_replies_leave_before_a_coroutine_waits(
    wait: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = AsyncReplies()
    client = ps_client(ps_server(callback, framing=Line()))
    client.send(f"1\n{wait}\n3\n")
    client.expect(f"1\n{wait}\n")
    assert callback.handled == [b"1", wait.encode()]
    client.expect("3\n")


def test_replies_leave_before_they_wait_for_a_coroutine_of_another_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = AsyncReplies()
    server = ps_server(callback, framing=Line())
    clients = [ps_client(server), ps_client(server)]
    eventually(lambda: len(server.sessions) == 2)
    for _ in range(2):  # in either order
        clients.reverse()
        callback.handled.clear()
        holding, other = clients
        for client, data in ((holding, b"a\nhold\n"), (other, b"1\n2\n3\n")):
            os.write(client.socket.fileno(), data)  # both in one round of the loop
        other.expect("1\n")
        if callback.handled.index(b"1") < callback.handled.index(b"hold"):
            assert b"3" not in callback.handled
        other.expect("2\n3\n")
        holding.expect("a\nhold\n")


@pytest.mark.logs_errors
@pytest.mark.parametrize("framing", [None, Line()], ids=["raw", "lines"])
def test_a_sync_send_in_a_coroutine_is_refused_where_it_would_have_to_wait(
    framing: Line | None, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    reasons: list[PsCloseReason] = []
    most = 0

    class Careless(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            nonlocal most
            session.send(bytes(500_000), raw=True)
            most = max(most, session.pending_bytes)

        async def on_close_async(self, session: PsSession, reason: PsCloseReason) -> None:
            assert "send_async" in str(session.close_cause)
            reasons.append(reason)

    client = ps_client(ps_server(Careless(), framing=framing))
    with contextlib.suppress(OSError):
        while not reasons:
            client.send("x\n")
            gevent.sleep(0.001)
    eventually(lambda: reasons)
    assert reasons == [PsCloseReason.FAILED]
    assert most < 2_000_000


# By hand


def test_what_is_sent_in_a_block_leaves_together(
    ps_server: ServerFactory, ps_client: ClientFactory, writes: list[int]
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    with session.corked():
        buffer = bytearray(b"one ")
        session.send(buffer)
        buffer[:] = b"xxxx"
        with session.corked():
            session.send("two ")
        session.send(memoryview(b"three"))
        assert writes == []
        assert session.bytes_sent == 0
    assert writes == [13]
    client.expect("one two three")
    session.send("four")
    client.expect("four")


def test_what_was_collected_leaves_when_the_block_raises(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)

    def fail() -> None:
        with session.corked():
            session.send("one")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    client.expect("one")


def test_a_coroutine_sends_together(
    ps_server: ServerFactory, ps_client: ClientFactory, writes: list[int]
) -> None:
    class Corking(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            with session.corked():
                await session.send_async("one ")
                await session.send_async("two")

    client = ps_client(ps_server(Corking()))
    client.send("go")
    client.expect("one two")
    assert writes == [7]


def test_corking_is_refused_where_nothing_can_be_sent(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)

    def cork() -> None:
        with session.corked():
            pass

    with pytest.raises(RuntimeError, match="thread"):
        NativeThread(cork).wait()
    client.close()
    eventually(lambda: not session.is_open)
    with pytest.raises(PsSendError, match="closed"):
        cork()


def test_a_session_that_closes_in_a_block_sends_what_was_collected(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def act(session: PsSession[Any], _message: bytes) -> None:
        with session.corked():
            session.send("last words")
            session.close()

    with ScriptedClient(ps_server(Acting(act)).address) as client:
        client.send("go")
        client.expect("last words")
        client.expect_eof()
