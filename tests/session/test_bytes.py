"""Point 2 of the design: what arrived before the FIN is handed over, what was sent gets there.

Where a test says that something ends early, the limit that it must not wait for is `FOREVER`, so
that the test ends in time only if the promise holds.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import time
from collections.abc import Callable

import gevent
import gevent.event
import pytest

from acting import LONGER_THAN_A_WINDOW_PROBE, STALLING, ActingCallback, sending, wait_until_stalled
from helpers import NativeThread, stalled_peer
from psofa_gevent import PsCloseReason, PsSendError, PsServer, PsSession
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

FOREVER = 600.0
DATA = random.Random(2).randbytes(4_000_000)
"""More than a `stalled_peer` and the kernel's send buffer take together."""
knows_what_is_acknowledged = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="no SIOCOUTQ, so every close lingers"
)


# Bytes that arrive


@pytest.mark.parametrize("read_buffer_size", [1_000, 65_536])
def test_all_bytes_before_the_fin_are_handed_over_before_on_close(
    ps_server: ServerFactory, ps_client: ClientFactory, read_buffer_size: int
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, read_buffer_size=read_buffer_size))
    client.send(DATA[:1_000_000])
    client.close()
    callback.wait_for("on_close")
    assert callback.received() == DATA[:1_000_000]
    assert callback.events[-1].name == "on_close"
    assert callback.events[-1].value is PsCloseReason.PEER_CLOSE
    messages = [event.value for event in callback.named("on_message")]
    assert max(len(each) for each in messages if isinstance(each, bytes)) <= read_buffer_size


def test_all_bytes_are_handed_over_when_the_fin_came_before_the_session_began(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    server.stop_accepting()
    for number in range(5):
        client = ps_client(server)
        client.send(DATA[:10_000])
        if number % 2:
            client.eof()
        else:
            client.close()
    server.resume_accepting()
    callback.wait_for("on_close", 5)
    for event in callback.named("on_open"):
        assert callback.received(event.session) == DATA[:10_000]


def test_all_bytes_are_handed_over_when_the_fin_comes_while_a_callback_runs(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = gevent.event.Event()
    callback = ActingCallback(on_message=lambda session, message: go_on.wait())
    client = ps_client(ps_server(callback, read_buffer_size=10_000, idle_milliseconds=1))
    client.send(DATA[:200_000])
    client.close()
    gevent.sleep(0.05)  # nothing tells that the FIN is there
    go_on.set()
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.PEER_CLOSE
    assert callback.received() == DATA[:200_000]


# Bytes that were sent

Ending = Callable[[PsServer, PsSession, ScriptedClient], object]
ENDINGS: dict[PsCloseReason, Ending] = {
    PsCloseReason.SELF_CLOSE: lambda server, session, client: session.close(),
    PsCloseReason.FAILED: lambda server, session, client: client.send("fail"),
    PsCloseReason.TIMEOUT: lambda server, session, client: session.change_idle_milliseconds(1),
    PsCloseReason.SHUTDOWN: lambda server, session, client: gevent.spawn(server.shutdown, None),
    PsCloseReason.PEER_CLOSE: lambda server, session, client: client.eof(),
}


def fail_if_told(_session: PsSession, message: bytes) -> None:
    if b"fail" in message:
        raise ValueError


def send_to_reader(session: PsSession, client: ScriptedClient) -> bytes:
    """Send `DATA`, read no more of it than it takes for that to return, and return what was read.

    The rest is in the kernel's buffers then: more than the peer's own takes.
    """
    sender = sending(session, DATA)
    read = bytearray()
    while not sender.ready():
        read += client.receive(10_000)
        gevent.sleep(0)
    assert sender.get() is None
    assert len(DATA) - len(read) > 50_000
    return bytes(read)


@pytest.mark.logs_errors
@pytest.mark.parametrize("reason", ENDINGS)
def test_what_was_sent_before_the_close_reaches_a_slow_peer_before_the_fin(
    ps_server: ServerFactory, reason: PsCloseReason
) -> None:
    callback = ActingCallback(on_message=fail_if_told)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        read = send_to_reader(session, client)
        ENDINGS[reason](server, session, client)
        eventually(lambda: not session.is_open)
        gevent.sleep(0.02)
        assert read + client.receive_until_eof() == DATA
        assert callback.closed(session) is reason


@pytest.mark.logs_errors
@pytest.mark.parametrize(
    "reason", [PsCloseReason.SELF_CLOSE, PsCloseReason.FAILED, PsCloseReason.SHUTDOWN]
)
def test_what_was_sent_before_the_close_arrives_while_the_peer_goes_on_sending(
    ps_server: ServerFactory, reason: PsCloseReason
) -> None:
    """A plain close would answer the peer's bytes with RST, which destroys ours on their way."""

    def send_on() -> None:
        with contextlib.suppress(ConnectionError):
            while not stop.is_set():
                client.socket.send(b"x" * 1_000)
                stop.wait(0.001)

    stop = gevent.event.Event()
    callback = ActingCallback(on_message=fail_if_told)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        read = send_to_reader(session, client)
        sender = gevent.spawn(send_on)
        callback.wait_for("on_message", 10)
        ENDINGS[reason](server, session, client)
        eventually(lambda: not session.is_open)
        messages = session.messages_received
        gevent.sleep(0.02)
        assert not callback.named("on_close")
        assert read + client.receive_until_eof() == DATA
        stop.set()
        sender.join()
        assert callback.closed(session) is reason
        assert session.messages_received == messages


def test_what_was_sent_arrives_though_bytes_of_the_peer_were_never_read(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """With unread bytes in its buffer the kernel makes an RST of a plain close."""
    go_on = gevent.event.Event()

    def reply_and_close(session: PsSession, message: bytes) -> None:
        go_on.wait()
        session.send(DATA[:100_000])
        session.close()

    callback = ActingCallback(on_message=reply_and_close)
    client = ps_client(ps_server(callback, read_buffer_size=1, linger_timeout=FOREVER))
    client.send(b"x" * 100_000)
    callback.wait_for("on_message")
    go_on.set()
    assert client.receive_until_eof() == DATA[:100_000]
    assert callback.received() == b"x"


def test_a_close_in_the_callback_right_after_its_sends_loses_nothing(
    ps_server: ServerFactory,
) -> None:
    def send_and_close(session: PsSession) -> None:
        for start in range(0, len(DATA), 100_000):
            session.send(DATA[start : start + 100_000], None)
        session.close()

    callback = ActingCallback(on_open=send_and_close)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        gevent.sleep(0.05)
        assert client.receive_until_eof() == DATA
    assert callback.closed(callback.opened()) is PsCloseReason.SELF_CLOSE


def test_a_peer_that_half_closed_gets_the_whole_answer(ps_server: ServerFactory) -> None:
    def answer(session: PsSession) -> None:
        session.send(DATA, None)
        session.close()

    callback = ActingCallback(on_eof=answer)
    server = ps_server(callback, linger_timeout=FOREVER, allow_half_open=True)
    with stalled_peer(server.address) as client:
        client.eof()
        wait_until_stalled(callback.opened())
        assert client.receive_until_eof() == DATA
        assert callback.closed(callback.opened()) is PsCloseReason.SELF_CLOSE


# How long a close lingers


@knows_what_is_acknowledged
def test_a_shutdown_with_quiet_peers_lingers_for_none_of_them(ps_client: ClientFactory) -> None:
    """Their last bytes have arrived, though they never read them and send no FIN."""
    callback = ActingCallback(on_open=lambda session: session.send("welcome"))
    with serving(callback, linger_timeout=FOREVER) as server:
        for _ in range(100):
            ps_client(server)
        callback.wait_for("on_open", 100)
        server.shutdown(timeout=None)
    reasons = [event.value for event in callback.named("on_close")]
    assert reasons == [PsCloseReason.SHUTDOWN] * 100


@knows_what_is_acknowledged
def test_a_close_lingers_no_longer_than_the_peer_takes_for_the_last_bytes(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        [opened] = callback.wait_for("on_open")
        session = opened.session
        assert session is not None
        read = send_to_reader(session, client)
        session.close()
        gevent.sleep(0.02)
        assert not callback.named("on_close")
        # All but what its own buffer takes: it never sees the FIN, nor sends one.
        client.receive(len(DATA) - len(read) - 10)
        callback.wait_for("on_close")


def test_the_peers_fin_ends_the_lingering_and_the_rest_arrives_all_the_same(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        [opened] = callback.wait_for("on_open")
        session = opened.session
        assert session is not None
        read = send_to_reader(session, client)
        session.close()
        gevent.sleep(0.02)
        assert not callback.named("on_close")
        client.eof()
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.SELF_CLOSE
        assert read + client.receive_until_eof() == DATA


@pytest.mark.parametrize("linger_timeout", [0.0, 0.2])
def test_a_close_lingers_for_linger_timeout_where_the_peer_takes_nothing(
    ps_server: ServerFactory, linger_timeout: float
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=linger_timeout)
    with stalled_peer(server.address):
        [opened] = callback.wait_for("on_open")
        session = opened.session
        assert session is not None
        sender = sending(session)
        wait_until_stalled(session)
        began = time.monotonic()
        session.close()
        callback.wait_for("on_close")
        assert time.monotonic() - began >= linger_timeout
        assert isinstance(sender.get(), PsSendError)


def test_a_peer_that_never_stops_sending_is_lingered_for_in_vain(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def send_on() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                client.socket.sendall(b"x" * 10_000)
                gevent.sleep(0)

    callback = RecordingCallback()
    client = ps_client(ps_server(callback, linger_timeout=0.2))
    [opened] = callback.wait_for("on_open")
    sender = gevent.spawn(send_on)
    callback.wait_for("on_message", 3)
    assert opened.session is not None
    opened.session.close()
    callback.wait_for("on_close")
    sender.join()


def test_there_is_no_lingering_after_peer_close(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        [opened] = callback.wait_for("on_open")
        assert opened.session is not None
        sender = sending(opened.session)
        wait_until_stalled(opened.session)
        client.eof()
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.PEER_CLOSE
        assert isinstance(sender.get(), PsSendError)


def test_there_is_no_lingering_after_a_reset(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        [opened] = callback.wait_for("on_open")
        assert opened.session is not None
        sender = sending(opened.session)
        wait_until_stalled(opened.session)
        client.reset()
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.FAILED
        assert isinstance(sender.get(), PsSendError)


def test_there_is_no_lingering_after_a_send_timeout(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address):
        [opened] = callback.wait_for("on_open")
        assert opened.session is not None
        assert isinstance(sending(opened.session, timeout=0.1).get(), PsSendError)
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.FAILED


def test_there_is_no_lingering_after_a_send_that_failed(ps_server: ServerFactory) -> None:
    """By an error of the socket alone: the connection is there, and bytes are on their way."""
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address):
        [opened] = callback.wait_for("on_open")
        session = opened.session
        assert session is not None
        filling = sending(session)
        wait_until_stalled(session)
        with socket.socket(fileno=os.dup(session._sock.fileno())) as of_a_stranger:
            of_a_stranger.shutdown(socket.SHUT_WR)
        assert isinstance(filling.get(), PsSendError)
        assert isinstance(session.close_cause, OSError)
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.FAILED


def test_there_is_no_lingering_after_a_send_timeout_in_a_callback_during_shutdown() -> None:
    callback = ActingCallback(on_message=lambda session, message: session.send(STALLING, 0.3))
    with (
        serving(callback, linger_timeout=FOREVER) as server,
        stalled_peer(server.address) as client,
    ):
        client.send("x")
        wait_until_stalled(callback.opened())
        server.shutdown(timeout=None)
        assert callback.closed(callback.opened()) is PsCloseReason.SHUTDOWN


def test_a_close_that_lingers_holds_up_no_other(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback(lambda message: message)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address):
        [opened] = callback.wait_for("on_open")
        lingering = opened.session
        assert lingering is not None
        sender = sending(lingering)
        wait_until_stalled(lingering)
        lingering.close()
        other = ps_client(server)
        other.send("hello")
        other.expect("hello")
        other.eof()
        [closed] = callback.wait_for("on_close")
        assert closed.session is not lingering
        assert server.get_session_count() == 1
        assert server.sessions == []
        lingering.abort()
        callback.wait_for("on_close", 2)
        sender.join()


# Abort


@pytest.mark.parametrize("state", ["waiting", "in a callback", "sending", "lingering"])
@pytest.mark.parametrize("thread", [False, True])
def test_abort_resets_the_connection_at_once_whatever_the_session_does(
    ps_server: ServerFactory, state: str, thread: bool
) -> None:
    """At once: while the callback still runs, and without the bytes that were sent before."""
    go_on = gevent.event.Event()
    callback = ActingCallback(on_message=lambda session, message: go_on.wait())
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        if state == "in a callback":
            client.send("x")
            callback.wait_for("on_message")
        elif state != "waiting":
            sender = sending(session)
            # So full that a FIN can't get through before the reset.
            wait_until_stalled(session, LONGER_THAN_A_WINDOW_PROBE)
            if state == "lingering":
                session.close()
                gevent.sleep(0.02)
        sent = session.bytes_sent
        if thread:
            NativeThread(session.abort).wait()
            # The hub has been asked, and does it in its next turn: before that the peer, which
            # is in this thread too, must not make room for all that is on its way, FIN included.
            gevent.sleep(0)
        else:
            session.abort()
        assert not session.is_open
        try:
            client.expect_reset()
        except AssertionError as error:
            # A window probe in time has let the FIN of the close through: then a reset is told
            # by the next send only (tcp(7): EPIPE), and without one that send would succeed.
            if state != "lingering" or "then EOF" not in str(error):
                raise
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                client.socket.send(b"x")
        assert session.bytes_sent == sent
        if state == "in a callback":
            assert not callback.named("on_close")
            go_on.set()
        elif state != "waiting":
            assert isinstance(sender.get(), PsSendError)
        assert callback.closed(session) is PsCloseReason.SELF_CLOSE


@pytest.mark.logs_errors
@pytest.mark.parametrize("reason", [PsCloseReason.FAILED, PsCloseReason.SHUTDOWN])
def test_abort_of_a_close_that_lingers_resets_and_keeps_its_reason(
    ps_server: ServerFactory, reason: PsCloseReason
) -> None:
    callback = ActingCallback(on_message=fail_if_told)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        send_to_reader(session, client)
        ENDINGS[reason](server, session, client)
        eventually(lambda: not session.is_open)
        gevent.sleep(0.02)
        assert not callback.named("on_close")
        session.abort()
        client.expect_reset()
        assert callback.closed(session) is reason


def test_abort_of_a_session_that_has_ended_does_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Its descriptor may be another session's by now."""
    callback = RecordingCallback(lambda message: message)
    server = ps_server(callback)
    client = ps_client(server)
    client.eof()
    [closed] = callback.wait_for("on_close")
    client.close()
    assert closed.session is not None
    others = [ps_client(server) for _ in range(5)]
    callback.wait_for("on_open", 6)
    for end in (closed.session.abort, closed.session.close, closed.session.send_eof):
        end()
    for other in others:
        other.send("still here")
        other.expect("still here")
    assert len(callback.named("on_close")) == 1


def test_abort_in_on_open_resets_before_anything_is_sent(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    errors: list[PsSendError] = []

    def send_and_abort(session: PsSession) -> None:
        session.abort()
        try:
            session.send("too late")
        except PsSendError as error:
            errors.append(error)

    callback = ActingCallback(on_open=send_and_abort)
    client = ps_client(ps_server(callback))
    client.expect_reset()
    assert callback.closed(callback.opened()) is PsCloseReason.SELF_CLOSE
    assert len(errors) == 1
