"""`PsSession.post`: it never waits, keeps the order, and what overflows is decided by a policy."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest

from helpers import NativeThread, close_reasons
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsFramingError,
    PsOverflow,
    PsSendError,
    PsServer,
    PsSession,
    run_coroutine,
)
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)

PIECE = 65_536
MANY = 128
"""Pieces: more than the buffers of a connection take."""
PLENTY = 64 * 1024 * 1024
"""Bytes of ``high_water`` that no test here reaches."""


def piece(number: int) -> bytes:
    return b"%07d|" % number * (PIECE // 8)


PIECES = [piece(number) for number in range(MANY)]


def the_session(server: PsServer[Any]) -> PsSession[Any]:
    (session,) = eventually(lambda: server.sessions)
    return session


def fill(session: PsSession[Any]) -> int:
    """Post until something waits; how many pieces that took."""
    for number in itertools.count():
        assert session.post(piece(number))
        if session.pending_bytes:
            return number + 1
    raise AssertionError


def stall(session: PsSession[Any]) -> int:
    """Fill the buffers past the session: how many bytes that took.

    Those of a pair of Unix sockets: full ones of TCP take bytes now and then.
    """
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += session._sock.send(bytes(PIECE))
    return filled


# It never waits, and everything arrives


def test_what_a_peer_does_not_take_is_kept_until_it_reads_again(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY)
    client = ps_client(server)
    session = the_session(server)
    assert all(session.post(each) for each in PIECES)
    assert session.pending_bytes > 0
    assert session.pending_bytes + session.bytes_sent == MANY * PIECE
    assert client.receive(MANY * PIECE) == b"".join(PIECES)
    eventually(lambda: session.pending_bytes == 0)
    assert session.bytes_sent == MANY * PIECE
    assert session.messages_dropped == 0
    session.post("and on")
    client.expect("and on")


def test_posts_to_a_peer_that_reads_wait_for_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    session = the_session(server)
    assert session.post("text ")
    assert session.pending_bytes == 0
    assert session.post(bytearray(b"bytes"))
    assert session.post(b"")
    client.expect("text bytes")


def test_a_buffer_that_is_posted_may_change_afterwards(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY)
    client = ps_client(server)
    session = the_session(server)
    number = fill(session)
    buffer = bytearray(b"before")
    session.post(buffer)
    session.post(memoryview(buffer))
    buffer[:] = b"after!"
    client.receive(number * PIECE)
    client.expect("beforebefore")


def test_a_peer_may_take_nothing_for_longer_than_send_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY, send_timeout=0.05)
    client = ps_client(server)
    session = the_session(server)
    number = fill(session)
    gevent.sleep(0.3)
    assert session.is_open
    assert client.receive(number * PIECE) == b"".join(map(piece, range(number)))


def test_posts_of_many_small_messages_leave_whole_and_in_order(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY, framing=LengthPrefix())
    client = ps_client(server)
    session = the_session(server)
    expected = b""
    for number in range(20):
        for message in (b"%d" % number, bytes(PIECE * 4), b"", b"x" * number):
            expected += LengthPrefix().encode(message)
            assert session.post(message)
    assert session.pending_bytes
    assert client.receive(len(expected)) == expected


@pytest.mark.parametrize("poster", ["hub", "greenlet", "coroutine", "thread", "thread's loop"])
def test_anyone_may_post(poster: str, ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY)
    client = ps_client(server)
    session = the_session(server)
    posted: list[bool] = []

    def post_all() -> None:
        posted.extend([session.post(each) for each in PIECES])

    async def post_all_async() -> None:
        post_all()

    if poster == "hub":
        gevent.get_hub().loop.run_callback(post_all)
    elif poster == "greenlet":
        gevent.spawn(post_all)
    elif poster == "coroutine":
        run_coroutine(post_all_async())
    elif poster == "thread":
        NativeThread(post_all).wait()
    else:
        NativeThread(asyncio.run, post_all_async()).wait()
    assert client.receive(MANY * PIECE) == b"".join(PIECES)
    assert posted == [True] * MANY


def test_posts_of_threads_do_not_mix_their_bytes(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY)
    client = ps_client(server)
    session = the_session(server)

    def post_some(letter: bytes) -> None:
        for number in range(50):
            session.post(letter + b"%03d" % number + letter * 4_092)

    threads = [NativeThread(post_some, letter) for letter in (b"a", b"b", b"c", b"d")]
    received = client.receive(4 * 50 * 4_096)
    for thread in threads:
        thread.wait()
    messages = [received[at : at + 4_096] for at in range(0, len(received), 4_096)]
    for letter in b"abcd":
        mine = [message for message in messages if message[0] == letter]
        assert [int(message[1:4]) for message in mine] == list(range(50))
        assert all(set(message[4:]) == {letter} for message in mine)


# Order with sends


def test_a_send_after_posts_comes_after_them_and_waits_for_them(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY, send_timeout=None)
    client = ps_client(server)
    session = the_session(server)
    number = fill(session)
    sender = gevent.spawn(session.send, "sent ")
    gevent.sleep(0)
    session.post("posted")  # after the send that waits
    assert not sender.ready()
    assert client.receive(number * PIECE) == b"".join(map(piece, range(number)))
    client.expect("sent posted")
    sender.get(timeout=5)


def test_posts_and_sends_leave_in_the_order_of_their_calls(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY, send_timeout=None)
    client = ps_client(server)
    session = the_session(server)
    senders = []
    for number, each in enumerate(PIECES):
        if number % 3:
            session.post(each)
        else:
            senders.append(gevent.spawn(session.send, each))
            gevent.sleep(0)
    assert client.receive(MANY * PIECE) == b"".join(PIECES)
    gevent.joinall(senders, timeout=5, raise_error=True)


def test_a_send_behind_posts_fails_when_the_peer_takes_nothing_for_its_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, high_water=PLENTY)
    ps_client(server)
    session = the_session(server)
    fill(session)
    with pytest.raises(PsSendError, match="accepted no data"):
        session.send("x", timeout=0.1)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]


# Past the high-water mark


def test_the_default_closes_a_session_whose_peer_is_too_slow(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, high_water=4 * PIECE)
    ps_client(server)
    session = the_session(server)
    posted = 0
    with caplog.at_level(logging.WARNING, "psofa_gevent"):
        while session.post(piece(posted)):
            posted += 1
            assert session.pending_bytes <= 4 * PIECE
        assert not session.is_open
        assert session.pending_bytes == 0
        callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert isinstance(session.close_cause, PsSendError)
    assert "high_water=262144" in str(session.close_cause)
    assert [record.getMessage() for record in caplog.records] == [str(session.close_cause)]


def test_a_slow_peer_costs_the_callback_that_posts_to_it_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Forward(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            for other in server.sessions:
                other.post(message * PIECE)

    callback = Forward()
    server = ps_server(callback, high_water=PIECE)
    slow = ps_client(server)
    eventually(lambda: len(server.sessions) == 1)
    quick = ps_client(server)
    eventually(lambda: len(server.sessions) == 2)
    while len(server.sessions) == 2:
        quick.send("x")
        quick.expect("x" * PIECE)
    quick.send("y")
    quick.expect("y" * PIECE)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    slow.close()


def numbers_that_arrive(client: ScriptedClient, session: PsSession[Any], posted: int) -> list[int]:
    """Post as many numbered messages, read them all, and say which ones came, whole."""
    framing = LengthPrefix()
    for number in range(posted):
        session.post(piece(number))
    session.change_idle_milliseconds(None)
    left = session.bytes_sent + session.pending_bytes
    decoder = framing.decoder()
    numbers = []
    for message in decoder.feed(client.receive(left)):
        number = int(message[:7])
        assert message == piece(number)
        numbers.append(number)
    assert decoder.kept == 0
    return numbers


def test_the_newest_are_dropped_where_that_is_the_policy(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(
        PsCallback(),
        framing=LengthPrefix(),
        high_water=8 * PIECE,
        overflow=PsOverflow.DROP_NEWEST,
    )
    client = ps_client(server)
    session = the_session(server)
    numbers = numbers_that_arrive(client, session, MANY)
    assert numbers == list(range(len(numbers)))
    assert session.messages_dropped == MANY - len(numbers) > 0
    assert session.post("again")
    client.expect(LengthPrefix().encode(b"again"))


def test_the_oldest_are_dropped_where_that_is_the_policy(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(
        PsCallback(),
        framing=LengthPrefix(),
        high_water=8 * PIECE,
        overflow=PsOverflow.DROP_OLDEST,
    )
    client = ps_client(server)
    session = the_session(server)
    numbers = numbers_that_arrive(client, session, MANY)
    assert session.messages_dropped == MANY - len(numbers) > 0
    assert numbers[-7:] == list(range(MANY - 7, MANY))
    assert numbers == sorted(numbers)
    assert numbers[0] == 0  # a part of it, or all, had left
    assert session.is_open


def test_the_oldest_are_dropped_across_a_send_that_waits(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(
        PsCallback(), high_water=4 * PIECE, overflow=PsOverflow.DROP_OLDEST, send_timeout=None
    )
    client = ps_client(server)
    session = the_session(server)
    number = fill(session)
    session.post(b"dropped|")
    sender = gevent.spawn(session.send, b"sent|")
    gevent.sleep(0)
    for _ in range(4):
        session.post(b"x" * (PIECE - 1))
    assert session.messages_dropped >= 1
    received = client.receive(session.bytes_sent + session.pending_bytes + 5)
    assert b"dropped" not in received
    assert received.startswith(piece(0))
    assert received.count(b"sent|") == 1
    assert received.endswith(b"sent|" + b"x" * (received.count(b"x")))
    assert number > 0
    sender.get(timeout=5)


@pytest.mark.parametrize("overflow", PsOverflow)
def test_a_message_larger_than_the_mark_is_taken_when_nothing_waits(
    overflow: PsOverflow, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=1, overflow=overflow)
    client = ps_client(server)
    session = the_session(server)
    assert session.post(bytes(MANY * PIECE))
    assert session.pending_bytes > 1
    assert client.receive(MANY * PIECE) == bytes(MANY * PIECE)
    eventually(lambda: session.pending_bytes == 0)


# The end of a session


@pytest.mark.parametrize(
    "end", [PsSession.close, PsSession.send_eof, lambda session: session.owner.shutdown(5)]
)
def test_what_was_posted_comes_before_the_fin(
    end: Callable[[PsSession[Any]], None], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=PLENTY, linger_timeout=5.0)
    client = ps_client(server)
    session = the_session(server)
    for each in PIECES:
        session.post(each)
    assert session.pending_bytes
    ending = gevent.spawn(end, session)
    assert client.receive(MANY * PIECE) == b"".join(PIECES)
    client.expect_eof()
    client.close()
    ending.get(timeout=5)


def test_what_was_posted_is_dropped_when_the_peer_takes_nothing_for_linger_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, high_water=PLENTY, linger_timeout=0.1)
    ps_client(server)
    session = the_session(server)
    fill(session)
    session.close()
    callback.wait_for("on_close")
    eventually(lambda: session.pending_bytes == 0)


@pytest.mark.parametrize("end", [PsSession.close, PsSession.abort, PsSession.send_eof])
def test_a_post_to_a_session_that_ends_is_not_taken(
    end: Callable[[PsSession[Any]], None], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    session = the_session(server)
    end(session)
    assert session.post("late") is False
    client.close()
    eventually(lambda: not server.get_session_count())
    assert session.post("later") is False
    if end is not PsSession.send_eof:
        assert NativeThread(session.post, "by a thread").wait() is False


def test_a_reset_ends_a_session_with_posts_that_wait(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, high_water=PLENTY)
    client = ps_client(server)
    session = the_session(server)
    fill(session)
    client.reset()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    eventually(lambda: session.pending_bytes == 0)


def test_posts_of_a_callback_that_a_shutdown_lets_finish_arrive(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Slow(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            eventually(lambda: not session.is_open)
            session.post("last words")

    callback = Slow()
    server = ps_server(callback)
    client = ps_client(server)
    client.send("x")
    callback.wait_for("on_message")
    server.shutdown()
    client.expect("last words")
    client.expect_eof()


# With a framing, and corked


def test_replies_that_are_posted_leave_together_and_in_order_with_sends(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    written: list[int] = []

    class Mixed(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            before = session.bytes_sent
            if int(message) % 2:
                session.post(message)
            else:
                session.send(message)
            written.append(session.bytes_sent - before)

    client = ps_client(ps_server(Mixed(), framing=Line()))
    lines = b"".join(b"%d\n" % number for number in range(500))
    client.send(lines)
    client.expect(lines)
    assert sum(written) == 0


@pytest.mark.parametrize("overflow", PsOverflow)
def test_replies_that_are_posted_never_hold_up_their_session(
    overflow: PsOverflow, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Posting(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            session.post(bytes(PIECE // 2))

    callback = Posting()
    high_water = 4 * PIECE
    server = ps_server(
        callback, framing=Line(), high_water=high_water, overflow=overflow, send_timeout=0.05
    )
    client = ps_client(server)
    client.send("\n" * 500)
    if overflow is PsOverflow.CLOSE:
        callback.wait_for("on_close")
        assert close_reasons(callback) == [PsCloseReason.FAILED]
    else:
        callback.wait_for("on_message", 500)
        (session,) = server.sessions
        assert session.messages_dropped > 0
        assert session.pending_bytes <= high_water + PIECE + PIECE // 2


def test_sends_among_posts_to_a_slow_peer_wait_and_memory_does_not_grow(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    most = 0

    class Both(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            nonlocal most
            super().on_message(session, message)
            session.send(bytes(PIECE // 2))
            session.post(b"x" * 100)
            most = max(most, session.pending_bytes)

    callback = Both()
    server = ps_server(
        callback,
        framing=Line(),
        high_water=PIECE,
        overflow=PsOverflow.DROP_NEWEST,
        send_timeout=0.2,
    )
    client = ps_client(server)
    client.send("\n" * 2_000)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert most <= 3 * PIECE
    assert len(callback.named("on_message")) < 2_000


def test_a_message_that_the_framing_cannot_carry_is_refused_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), framing=Line(max_size=10))
    client = ps_client(server)
    session = the_session(server)
    with pytest.raises(PsFramingError):
        session.post("x" * 11)
    with pytest.raises(TypeError):
        session.post(5)
    session.post("raw", raw=True)
    session.post("line")
    client.expect("rawline\n")


def test_posts_wake_nobody_in_the_wrong_place(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    # The session's callback waits for something else while its posts leave.
    gate = gevent.event.Event()
    went_on = threading.Event()

    class Waiting(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            for each in PIECES:
                session.post(each)
            gate.wait()
            went_on.set()
            session.post("end")

    client = ps_client(ps_server(Waiting(), high_water=PLENTY))
    client.send("x")
    assert client.receive(MANY * PIECE) == b"".join(PIECES)
    assert not went_on.is_set()
    gate.set()
    client.expect("end")


# What breaks off, and what follows


@pytest.mark.hub_errors
@pytest.mark.parametrize("end", ["close", "kill", "shutdown", "work killed"])
def test_nothing_follows_a_message_that_broke_off(
    end: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(
        PsCallback(), framing=LengthPrefix(max_size=2**30), high_water=PLENTY, linger_timeout=2.0
    )
    client = ps_client(server)
    session = the_session(server)
    big = b"A" * (MANY * PIECE)
    send = session.spawn if end == "work killed" else gevent.spawn
    sender = send(session.send, big, None)
    eventually(lambda: session._send_queue is not None)
    for _ in range(MANY):
        session.post(b"B" * PIECE)
    if end == "kill":
        sender.kill(block=False)
    elif end == "shutdown":
        gevent.spawn(server.shutdown)
    else:
        session.close()
    received = client.receive_until_eof()
    assert received == LengthPrefix(max_size=2**30).encode(big)[: len(received)]
    assert len(received) < len(big)


def test_posts_after_an_overflow_in_a_shutdown_are_refused(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    taken: list[bool] = []

    class Late(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            eventually(lambda: not session.is_open)
            taken.extend(session.post(each * 8 * PIECE * MANY) for each in (b"A", b"B", b"C"))

    callback = Late()
    server = ps_server(callback, high_water=PIECE)
    client = ps_client(server)
    client.send("x")
    callback.wait_for("on_message")
    stopping = gevent.spawn(server.shutdown)
    assert set(client.receive_until_eof()) == set(b"A")
    stopping.get(timeout=5)
    assert taken == [True, False, False]


def test_what_a_thread_posts_before_it_closes_arrives(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())

    def say_goodbye(session: PsSession[Any]) -> None:
        assert session.post("last ")
        server.broadcast("words")
        session.close()

    for _ in range(10):
        client = ps_client(server)
        NativeThread(say_goodbye, the_session(server)).wait()
        client.expect("last words")
        client.expect_eof()
        eventually(lambda: not server.get_session_count())


def test_what_a_thread_posts_before_it_closes_arrives_also_when_the_session_ends_just_then(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def say_goodbye(session: PsSession[Any]) -> None:
        session.post("last words")
        session.close()

    class Blocking(RecordingCallback):
        def on_open(self, session: PsSession[Any]) -> None:
            NativeThread(say_goodbye, session).join()  # the hub does not run meanwhile

    callback = Blocking()
    client = ps_client(ps_server(callback))
    client.expect("last words")
    client.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_posts_arrive_at_a_peer_that_has_closed_its_half(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Reply(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            for each in PIECES:
                session.post(each)

    callback = Reply()
    client = ps_client(ps_server(callback, high_water=PLENTY, linger_timeout=5.0))
    client.send("x")
    client.eof()
    assert client.receive_until_eof() == b"".join(PIECES)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


def test_a_callback_of_another_session_finishes_its_send_behind_posts_at_shutdown(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    sent: list[bool] = []

    class Other(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            eventually(lambda: not first.is_open)
            first.send(b"S" * 3 * MANY * PIECE, None)
            sent.append(True)

    callback = Other()
    server = ps_server(callback, high_water=PLENTY, linger_timeout=5.0, send_timeout=None)
    slow = ps_client(server)
    first = the_session(server)
    other = ps_client(server)
    other.send("x")
    callback.wait_for("on_message")
    for _ in range(MANY):
        first.post(b"P" * PIECE)
    stopping = gevent.spawn(server.shutdown, 10)
    eventually(lambda: first._send_queue is not None and len(first._send_queue._senders) == 2)
    assert slow.receive(MANY * PIECE) == b"P" * MANY * PIECE
    eventually(lambda: first._send_queue is not None and len(first._send_queue._senders) == 1)
    gevent.sleep(0.2)  # longer than it may take to look whether posts are left
    assert slow.receive_until_eof() == b"S" * 3 * MANY * PIECE
    stopping.get(timeout=5)
    assert sent == [True]


def shut_down(session: PsSession[Any]) -> None:
    assert isinstance(session.owner, PsServer)
    gevent.spawn(session.owner.shutdown)


ENDS: dict[str, tuple[Callable[[PsSession[Any], ScriptedClient], object], PsCloseReason]] = {
    "FIN": (lambda _, client: client.eof(), PsCloseReason.PEER_CLOSE),
    "close": (lambda session, _: session.close(), PsCloseReason.SELF_CLOSE),
    "idle": (lambda session, _: session.change_idle_milliseconds(1), PsCloseReason.TIMEOUT),
    "shutdown": (lambda session, _: shut_down(session), PsCloseReason.SHUTDOWN),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_callback_that_waits_behind_posts_keeps_no_session_from_ending(
    end: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Other(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            with contextlib.suppress(PsSendError):
                stalled.send(b"behind the posts", timeout=0.6 if end == "shutdown" else 10)
            gate.wait()

    gate = gevent.event.Event()
    callback = Other()
    server = ps_server(callback, high_water=PLENTY, linger_timeout=0.3, divide=100)
    slow = ps_client(server)
    stalled = the_session(server)
    other = ps_client(server)
    fill(stalled)
    waiting = stalled._send_queue
    assert waiting is not None
    other.send("x")
    eventually(lambda: len(waiting._senders) == 2)
    act, reason = ENDS[end]
    act(stalled, slow)
    closed = callback.wait_for("on_close", timeout=2.5, session=stalled)
    assert [event.value for event in closed] == [reason]
    gate.set()


# Collected, and posted


def test_what_is_collected_in_another_greenlet_leaves_before_the_fin(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    session = the_session(server)

    def collect() -> None:
        with session.corked():
            session.send("sent ")
            session.post("posted")
            gevent.sleep(600)

    collecting = gevent.spawn(collect)
    eventually(lambda: session.pending_bytes)
    session.close()
    client.expect("sent posted")
    client.expect_eof()
    collecting.kill()


def test_a_framed_callback_that_only_posts_is_not_ended_by_send_timeout() -> None:
    class Posting(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            session.post(bytes(PIECE - 100))  # collected
            session.post(bytes(PIECE - 100))  # with this one it is too much
            super().on_message(session, message)

    callback = Posting()
    settings: dict[str, Any] = {"framing": Line(), "high_water": PLENTY, "send_timeout": 0.1}
    with connected_session(callback, **settings) as both:
        session, client = both.session, both.peer
        stall(session)
        client.send("\n")
        callback.wait_for("on_message")
        assert session.pending_bytes
        gevent.sleep(0.4)
        assert session.is_open


def test_what_was_sent_is_never_dropped_to_make_room() -> None:
    settings: dict[str, Any] = {"high_water": PIECE, "overflow": PsOverflow.DROP_OLDEST}
    settings |= {"framing": Line(), "send_timeout": None}
    with connected_session(PsCallback(), **settings) as both:
        session, client = both.session, both.peer
        filled = stall(session)
        with session.corked():
            session.post("posted with it")
            session.send("sent")
            session._uncork_without_waiting()
        for _ in range(5):
            session.post("x" * (PIECE // 2))
        assert session.messages_dropped > 0
        client.receive(filled)
        client.expect("posted with it\nsent\n")


def test_nothing_is_dropped_where_it_would_make_no_room() -> None:
    settings: dict[str, Any] = {"high_water": 20 * PIECE, "overflow": PsOverflow.DROP_OLDEST}
    with connected_session(PsCallback(), **settings) as both:
        session = both.session
        stall(session)
        with session.corked():
            session.send(bytes(PIECE // 2))
            session._uncork_without_waiting()
        for _ in range(30):
            assert session.post(b"x" * 100)
        assert session.post(bytes(20 * PIECE - 100)) is False
        assert session.messages_dropped == 1
        assert session.pending_bytes == PIECE // 2 + 3_000
