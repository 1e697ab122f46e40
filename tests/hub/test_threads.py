"""Calls from other OS threads (design, point 7): they arrive, they return, they never deadlock.

The threads are real ones, in a monkey-patched process too. ``wait`` lets the hub go on until a
thread has ended. ``join`` blocks the hub as the main thread of an unpatched program does: a call
that joins in time has returned without the hub's help.
"""

from __future__ import annotations

import asyncio

import gevent
import gevent.event
import pytest

from calling_threads import AT_ONCE, ActsInMessage, InThread, in_each_kind_of_thread, only_session
from helpers import NativeThread, ScriptedServer, close_reasons, native_sleep, run_python
from psofa_gevent import (
    PsClient,
    PsClientError,
    PsCloseReason,
    PsMultiClient,
    PsMultiClientError,
    PsSendError,
    PsServerError,
    PsSession,
)
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

# Sending


@in_each_kind_of_thread
@pytest.mark.parametrize("size", [0, 1, 8 * 1024 * 1024])
def test_send_from_a_thread_arrives_and_returns(
    size: int, call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)
    sending = gevent.spawn(call, session.send, bytes(size), None)
    assert client.receive(size) == bytes(size)
    sending.get(timeout=5)
    assert session.bytes_sent == size
    client.expect_nothing(0.01)


@in_each_kind_of_thread
def test_errors_of_send_reach_the_thread(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback, linger_timeout=0.0))
    session = only_session(callback)
    with pytest.raises(TypeError):
        call(session.send, 1)
    with pytest.raises(ValueError, match="timeout"):
        call(session.send, "x", -1)
    with pytest.raises(PsSendError, match=r"accepted no data for 0\.2 s"):
        call(session.send, bytes(64 * 1024 * 1024), 0.2)
    assert callback.wait_for("on_close")[0].value is PsCloseReason.FAILED
    with pytest.raises(PsSendError, match="closed"):
        call(session.send, "x")


def test_sends_of_many_threads_never_interleave_and_keep_each_threads_order(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback), receive_buffer_size=16_384)
    session = only_session(callback)
    size, count = 20_000, 10

    def send_all(letter: str) -> None:
        for number in range(count):
            session.send(f"{letter}{number}" * (size // 2), timeout=None)

    letters = "abcdefgh"
    threads = [NativeThread(send_all, letter) for letter in letters]
    received = client.receive(size * count * len(letters)).decode()
    for thread in threads:
        thread.wait()
    messages = [received[start : start + size] for start in range(0, len(received), size)]
    for letter in letters:
        mine = [message for message in messages if message.startswith(letter)]
        assert mine == [f"{letter}{number}" * (size // 2) for number in range(count)]


def test_send_from_a_thread_on_a_closed_session_needs_no_hub(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback))
    session = only_session(callback)
    session.close()
    with pytest.raises(PsSendError):
        NativeThread(session.send, "x").join(AT_ONCE)


def test_thread_whose_send_waits_is_released_by_the_close(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback, linger_timeout=0.0))
    session = only_session(callback)
    thread = NativeThread(session.send, bytes(64 * 1024 * 1024), None)
    eventually(lambda: session.bytes_sent > 0)
    session.close()
    with pytest.raises(PsSendError):
        thread.wait()
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_thread_whose_send_waits_is_released_by_the_shutdown_and_may_be_joined_natively(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=0.0)
    ps_client(server)
    session = only_session(callback)
    thread = NativeThread(session.send, bytes(64 * 1024 * 1024), None)
    eventually(lambda: session.bytes_sent > 0)
    server.shutdown()
    with pytest.raises(PsSendError):
        thread.join(AT_ONCE)
    assert close_reasons(callback) == [PsCloseReason.SHUTDOWN]


# Calls that return at once, whatever the hub does


@in_each_kind_of_thread
def test_close_from_a_thread_closes(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)

    def close() -> bool:
        session.close()
        return session.is_open

    assert call(close) is False
    client.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_abort_from_a_thread_resets(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)
    call(session.abort)
    client.expect_reset()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_send_eof_from_a_thread_half_closes_after_its_sends(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)

    def send_and_end() -> None:
        session.send("last")
        session.send_eof()
        with pytest.raises(PsSendError):
            session.send("more")

    call(send_and_end)
    assert client.receive_until_eof() == b"last"
    assert session.is_open
    client.send("heard")
    callback.wait_for("on_message")


def test_send_eof_of_a_thread_does_not_overtake_a_send_that_another_has_begun(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)
    # The hub stands still meanwhile, so nothing of both is done yet.
    sending = NativeThread(session.send, "begun before")
    native_sleep(0.1)  # nothing tells, without the hub, that it has begun
    NativeThread(session.send_eof).join(AT_ONCE)
    assert client.receive_until_eof() == b"begun before"
    sending.wait()


def test_calls_that_never_wait_return_while_the_hub_stands_still(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    session = only_session(callback)
    for call in (
        server.stop_accepting,
        server.resume_accepting,
        session.send_eof,
        session.close,
        session.close,
        session.abort,
        session.abort,
    ):
        NativeThread(call).join(AT_ONCE)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_disconnect_of_a_multi_client_from_a_thread_returns_at_once() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener, PsMultiClient(callback) as bundle:
        connection = bundle.connect(*listener.address)
        kept = bundle.connect(*listener.address)
        NativeThread(bundle.disconnect, connection).join(AT_ONCE)
        assert not connection.session.is_open
        callback.wait_for("on_close", session=connection.session)
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]
        assert kept.session.is_open


@pytest.mark.logs_errors
def test_close_from_a_thread_wins_over_what_fails_after_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def close_and_fail(session: PsSession) -> None:
        NativeThread(session.close).join(AT_ONCE)
        assert not session.is_open
        raise ValueError("later than the close")

    callback = ActsInMessage(close_and_fail)
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_close_from_a_thread_wins_over_a_shutdown_after_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    session = only_session(callback)
    NativeThread(session.close).join(AT_ONCE)
    server.shutdown()
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_abort_from_a_thread_resets_also_when_the_callback_returns_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsInMessage(lambda session: NativeThread(session.abort).join(AT_ONCE))
    client = ps_client(ps_server(callback))
    client.send("x")
    client.expect_reset()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_accepting_stops_and_resumes_from_threads(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback(reply=bytes)
    server = ps_server(callback)
    before = ps_client(server)
    callback.wait_for("on_open")
    for round_number in range(1, 4):
        call(server.stop_accepting)
        waiting = ps_client(server)
        waiting.send("x")
        waiting.expect_nothing(0.05)
        before.send("x")
        before.expect("x")
        assert len(callback.named("on_open")) == round_number
        call(server.resume_accepting)
        waiting.expect("x")


# What belongs to the hub's thread


def test_wait_for_in_another_thread_is_refused(ps_server: ServerFactory) -> None:
    server = ps_server(RecordingCallback())
    with pytest.raises(PsServerError, match="thread"):
        NativeThread(server.wait_for).join(AT_ONCE)


def test_connect_in_another_thread_than_the_first_is_refused() -> None:
    with ScriptedServer() as listener:
        client = PsClient(RecordingCallback(), *listener.address)
        session = client.connect()
        session.close()
        eventually(lambda: client.session is None)
        with pytest.raises(PsClientError, match="thread"):
            NativeThread(client.connect).join(AT_ONCE)
        client.disconnect()
        with (
            PsMultiClient(RecordingCallback()) as bundle,
            pytest.raises(PsMultiClientError, match="thread"),
        ):
            NativeThread(bundle.connect, *listener.address).join(AT_ONCE)


# A whole program, patched and not


PROGRAM = """
    import sys
    if sys.argv[1] == "patched":
        from gevent import monkey
        monkey.patch_all()
    import gevent
    from helpers import NativeThread, ScriptedServer
    from psofa_gevent import PsClient, PsCloseReason, PsMultiClient, PsServer
    from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

    def say(word):
        print(word, flush=True)

    callback = RecordingCallback(reply=bytes)
    server = PsServer(callback, host="127.0.0.1", port=0)
    server.start()
    clients = [ScriptedClient(server.address) for _ in range(4)]
    sessions = [event.session for event in callback.wait_for("on_open", 4)]

    big = bytes(8 * 1024 * 1024)
    thread = NativeThread(sessions[0].send, big)
    assert clients[0].receive(len(big)) == big
    thread.join(5)
    say("send")

    NativeThread(sessions[1].send_eof).join(5)
    clients[1].expect_eof()
    say("send_eof")

    NativeThread(sessions[2].close).join(5)
    clients[2].expect_eof()
    say("close")

    NativeThread(sessions[3].abort).join(5)
    clients[3].expect_reset()
    say("abort")

    NativeThread(server.stop_accepting).join(5)
    waiting = ScriptedClient(server.address)
    waiting.send("x")
    waiting.expect_nothing(0.05)
    NativeThread(server.resume_accepting).join(5)
    waiting.expect("x")
    say("accepting")

    thread = NativeThread(server.shutdown)
    assert server.wait_for()
    thread.join(5)
    reasons = [event.value for event in callback.named("on_close")]
    assert reasons.count(PsCloseReason.SHUTDOWN) == 3, reasons
    assert reasons.count(PsCloseReason.SELF_CLOSE) == 2, reasons
    say("shutdown")

    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address)
        client.connect()
        thread = NativeThread(client.disconnect)
        client.disconnect()
        thread.join(5)
        say("disconnect")

        bundle = PsMultiClient(callback)
        bundle.init_bundle()
        connections = [bundle.connect(*listener.address) for _ in range(2)]
        NativeThread(bundle.disconnect, connections[0]).join(5)
        thread = NativeThread(bundle.destroy_bundle)
        bundle.destroy_bundle()
        thread.join(5)
        say("destroy_bundle")
    for each in [*clients, waiting]:
        each.close()
    # An ordinary pool: its threads are native ones, or greenlets where they are patched.
    import concurrent.futures
    server.start()
    session_of = {}
    with ScriptedClient(server.address) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        (session,) = eventually(lambda: server.sessions)
        futures = [pool.submit(session.send, "x") for _ in range(20)]
        client.expect("x" * 20)
        futures += [pool.submit(server.shutdown) for _ in range(4)]
        assert server.wait_for()
        for future in futures:
            future.result(5)
    say("pool")
"""


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
def test_program_whose_main_thread_joins_native_threads_does_not_deadlock(mode: str) -> None:
    done = run_python(PROGRAM, mode, timeout=40.0)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.split() == [
        "send",
        "send_eof",
        "close",
        "abort",
        "accepting",
        "shutdown",
        "disconnect",
        "destroy_bundle",
        "pool",
    ]


def test_thread_may_send_until_the_server_is_gone_and_be_joined_natively(
    ps_server: ServerFactory,
) -> None:
    def send_until_closed(session: PsSession) -> int:
        sent = 0
        try:
            while True:
                session.send("x")
                sent += 1
        except PsSendError:
            return sent

    callback = RecordingCallback()
    server = ps_server(callback)
    for count in range(1, 6):
        with ScriptedClient(server.address) as client:
            session = callback.wait_for("on_open", count)[-1].session
            assert session is not None
            threads = [NativeThread(send_until_closed, session) for _ in range(4)]
            client.receive(100)
            server.shutdown()
            assert server.wait_for(5)
            sent = sum(thread.join(AT_ONCE) for thread in threads)
            assert session.bytes_sent == sent
        server.start()


def test_what_was_over_for_the_caller_does_not_run_later() -> None:
    ran: list[str] = []
    thread = HubThread()

    def run() -> bool:
        return thread.run(lambda: True, ran.append, "run")

    def run_async() -> bool:
        asked = thread.run_async(lambda: True, ran.append, "run_async")
        has_run: bool = asyncio.run(asked)
        return has_run

    # The hub does nothing while this thread waits natively.
    assert [NativeThread(each).join() for each in (run, run_async)] == [False, False]
    has_come_to_it = gevent.event.Event()
    thread.call_soon(has_come_to_it.set)  # after what the two have asked for
    assert has_come_to_it.wait(5)
    assert ran == []
