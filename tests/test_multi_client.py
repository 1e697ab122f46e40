"""`PsMultiClient`: many connections that share one idle timer and one close greenlet."""

from __future__ import annotations

import contextlib
import resource
import socket
import uuid
from collections import Counter
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent.event import Event

from helpers import (
    LOOPBACK,
    NativeThread,
    ScriptedServer,
    black_hole,
    close_reasons,
    echo,
    free_port,
    living_greenlets,
    takes,
)
from marks import needs_libev_to_destroy
from psofa_gevent import (
    PsCallback,
    PsClientError,
    PsCloseReason,
    PsMultiClient,
    PsMultiClientConnection,
    PsMultiClientError,
    PsSession,
    PsSocketAddressFamily,
)
from psofa_gevent.testing import RecordingCallback, ServerFactory, eventually


def always(answer: bytes) -> RecordingCallback:
    return RecordingCallback(lambda _message: answer)


def failed_connect(
    bundle: PsMultiClient, address: tuple[Any, ...], **arguments: Any
) -> PsMultiClientError:
    with pytest.raises(PsMultiClientError) as failed:
        bundle.connect(*address, **arguments)
    return failed.value


# Many connections


@pytest.mark.usefixtures("many_descriptors")
def test_1000_connections_share_one_timer_and_one_close_greenlet(
    ps_server: ServerFactory,
) -> None:
    class OnCloseGreenlets(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            greenlets.add(gevent.getcurrent())

    server = ps_server(echo(), max_sessions=2_000)
    callback = OnCloseGreenlets()
    greenlets: set[object] = set()
    with PsMultiClient(callback) as bundle:
        before = living_greenlets()
        for number in range(1_000):
            connection = bundle.connect(*server.address)
            connection.session.send(str(number))
        assert bundle.get_session_count() == len(list(bundle.sessions)) == 1_000
        callback.wait_for("on_message", 1_000, timeout=30)
        # A greenlet per session here and at the server; beyond that each side's timer.
        new = living_greenlets() - before
        of_sessions = [greenlet for greenlet in new if type(greenlet).__name__ == "SessionGreenlet"]
        assert len(of_sessions) == 2_000
        assert len(new) - len(of_sessions) <= 4
        for session in list(bundle.sessions)[:500]:
            session.close()
        callback.wait_for("on_close", 500, timeout=30)
        assert bundle.get_session_count() == 500
        with takes(most=3):
            bundle.destroy_bundle(timeout=30)
    assert Counter(close_reasons(callback)) == {PsCloseReason.SELF_CLOSE: 1_000}
    assert len(greenlets) == 1
    assert callback.events[-1].name == "on_stop"
    eventually(lambda: server.get_session_count() == 0, 10)


def test_connections_are_made_side_by_side(ps_server: ServerFactory) -> None:
    callback = echo()
    with PsMultiClient(callback) as bundle, black_hole() as nowhere:
        silent = [gevent.spawn(failed_connect, bundle, nowhere, timeout=0.5) for _ in range(3)]
        address = ps_server(RecordingCallback()).address
        with takes(most=0.3):
            connections = [gevent.spawn(bundle.connect, *address) for _ in range(20)]
            gevent.joinall(connections, timeout=5, raise_error=True)
        assert bundle.get_session_count() == 20
        gevent.joinall(silent, timeout=5, raise_error=True)
        assert bundle.get_session_count() == 20


def test_one_bundle_talks_to_many_servers(ps_server: ServerFactory) -> None:
    answers = [b"one", b"two", b"three"]
    servers = [ps_server(always(answer)) for answer in answers]
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        sessions = [bundle.connect(*server.address).session for server in servers]
        for session in sessions:
            session.send("who?")
        callback.wait_for("on_message", 3)
        assert [callback.received(session) for session in sessions] == answers


# One connection


def test_connection_has_its_session_host_and_port(ps_server: ServerFactory) -> None:
    port = ps_server(echo()).address[1]
    chosen = uuid.uuid4()
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        connection = bundle.connect("localhost", port, connection_id=chosen)
        assert isinstance(connection, PsMultiClientConnection)
        assert connection.session.is_open
        assert connection.session.connection_id == chosen
        assert connection.session.owner is bundle
        assert (connection.host, connection.port) == ("localhost", port)
        assert list(bundle.sessions) == [connection.session]
        [opened] = callback.wait_for("on_open")
        assert opened.session is connection.session


def test_connection_ids_are_random_unless_chosen(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    with PsMultiClient(PsCallback()) as bundle:
        ids = {bundle.connect(*address).session.connection_id for _ in range(10)}
    assert len(ids) == 10


def test_same_chosen_id_may_be_used_by_two_connections(ps_server: ServerFactory) -> None:
    """It is the caller's: a proxy gives the id of its front session to each of its back ends."""
    address = ps_server(echo()).address
    chosen = uuid.uuid4()
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        first, second = [bundle.connect(*address, connection_id=chosen) for _ in range(2)]
        assert bundle.get_session_count() == 2
        bundle.disconnect(first)
        callback.wait_for("on_close")
        assert list(bundle.sessions) == [second.session]
    assert len(close_reasons(callback)) == 2


def test_ipv6_family_is_chosen_for_each_connection(ps_server: ServerFactory) -> None:
    """IPv4 hosts are reached through it too."""
    callback = RecordingCallback()
    address = ps_server(echo()).address
    with PsMultiClient(callback) as bundle:
        try:
            connection = bundle.connect(*address, socket_address_family=PsSocketAddressFamily.IPV6)
        except PsMultiClientError as error:
            pytest.skip(f"no IPv6 here: {error}")
        assert connection.session.remote_endpoint is not None
        assert connection.session.remote_endpoint[0] == "::ffff:127.0.0.1"
        plain = bundle.connect(*address)
        assert plain.session.remote_endpoint == address


# Disconnecting one


def test_disconnect_closes_that_one_and_returns_at_once(ps_server: ServerFactory) -> None:
    class SlowOnClose(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            go_on.wait()
            super().on_close(session, close_reason)

    go_on = Event()
    callback = SlowOnClose()
    with PsMultiClient(callback) as bundle:
        address = ps_server(echo()).address
        first, second, third = [bundle.connect(*address) for _ in range(3)]
        callback.wait_for("on_open", 3)
        with takes(most=0):
            bundle.disconnect(second)
        assert not second.session.is_open
        assert list(bundle.sessions) == [first.session, third.session]
        go_on.set()
        [closed] = callback.wait_for("on_close")
        assert closed.session is second.session
        assert closed.value is PsCloseReason.SELF_CLOSE
        first.session.send("still here")
        callback.wait_for("on_message")


def test_disconnect_again_has_no_effect(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    address = ps_server(echo()).address
    with PsMultiClient(callback) as bundle:
        connection = bundle.connect(*address)
        bundle.disconnect(connection)
        bundle.disconnect(connection)
        callback.wait_for("on_close")
        bundle.disconnect(connection)
    bundle.disconnect(connection)
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_disconnect_from_callbacks_and_threads(ps_server: ServerFactory) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            bundle.disconnect(connections[0])

    callback = Callback()
    address = ps_server(echo()).address
    with PsMultiClient(callback) as bundle:
        connections = [bundle.connect(*address) for _ in range(2)]
        connections[0].session.send("disconnect me")
        callback.wait_for("on_close")
        NativeThread(bundle.disconnect, connections[1]).join()
        callback.wait_for("on_close", 2)
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE] * 2


@pytest.mark.parametrize("value", [None, 7, uuid.uuid4(), "connection", object()])
def test_disconnect_of_anything_else_is_a_type_error(value: Any) -> None:
    with (
        PsMultiClient(PsCallback()) as bundle,
        pytest.raises(TypeError, match="connection"),
    ):
        bundle.disconnect(value)


def test_disconnect_refuses_what_belongs_to_another_owner(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback())
    with (
        PsMultiClient(PsCallback()) as mine,
        PsMultiClient(PsCallback()) as other,
        PsMultiClient(PsCallback(), reconnect=True) as staying,
    ):
        connections = [other.connect(*server.address), staying.connect(*server.address)]
        eventually(lambda: len(server.sessions) == 2)
        sessions = [connection.session for connection in connections]
        for foreign in list[Any]([*connections, *sessions, server.sessions[0]]):
            with pytest.raises(ValueError, match="belongs to") as caught:
                mine.disconnect(foreign)
            assert repr(foreign) in str(caught.value)
            assert repr(mine) in str(caught.value)
        assert all(session.is_open for session in (*sessions, *server.sessions))
        staying.disconnect(sessions[1])
        eventually(lambda: len(server.sessions) == 1)


def test_disconnect_takes_a_session_too(ps_server: ServerFactory) -> None:
    """As a callback has no more than that."""
    callback = RecordingCallback()
    address = ps_server(echo()).address
    with PsMultiClient(callback) as bundle:
        session = bundle.connect(*address).session
        bundle.disconnect(session)
        assert not session.is_open
        callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


# Destroying all


def test_destroy_bundle_closes_all_and_returns_after_on_stop(ps_server: ServerFactory) -> None:
    class Slow(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            gevent.sleep(0.01)
            super().on_close(session, close_reason)

        def on_stop(self, owner: Any) -> None:
            gevent.sleep(0.01)
            super().on_stop(owner)

    callback = Slow()
    address = ps_server(echo()).address
    bundle = PsMultiClient(callback)
    bundle.init_bundle()
    for _ in range(10):
        bundle.connect(*address)
    bundle.destroy_bundle()
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE] * 10
    assert len(callback.named("on_open")) == 10, "connect and destroy at once skips no on_open"
    assert callback.events[0].name == "on_start"
    assert callback.events[-1].name == "on_stop"
    assert callback.events[-1].value is bundle
    assert bundle.get_session_count() == 0
    assert list(bundle.sessions) == []


def test_destroy_bundle_in_a_callback_returns_at_once(ps_server: ServerFactory) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            with takes(most=0):
                bundle.destroy_bundle(timeout=20)

    callback = Callback()
    address = ps_server(echo()).address
    with PsMultiClient(callback) as bundle:
        first, _second = [bundle.connect(*address).session for _ in range(2)]
        first.send("destroy")
        callback.wait_for("on_stop")
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE] * 2


def test_destroy_bundle_ends_attempts_that_are_under_way() -> None:
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle, black_hole() as nowhere:
        attempts = [gevent.spawn(failed_connect, bundle, nowhere, timeout=30) for _ in range(5)]
        gevent.sleep(0.05)
        with takes(most=0.3):
            bundle.destroy_bundle()
            gevent.joinall(attempts, timeout=5, raise_error=True)
        for attempt in attempts:
            assert str(nowhere[1]) in str(attempt.get())
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


def test_with_destroys_on_exit_also_when_its_body_raises(ps_server: ServerFactory) -> None:
    def fail_while_connected() -> None:
        with bundle:
            bundle.connect(*address)
            raise ZeroDivisionError

    address = ps_server(echo()).address
    callback = RecordingCallback()
    bundle = PsMultiClient(callback)
    with pytest.raises(ZeroDivisionError):
        fail_while_connected()
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]
    assert bundle.get_session_count() == 0


# States


def test_connect_before_init_bundle_is_an_error_that_says_so(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    callback = RecordingCallback()
    bundle = PsMultiClient(callback)
    with pytest.raises(PsMultiClientError, match="init_bundle"):
        bundle.connect(*address)
    assert callback.events == []
    assert bundle.get_session_count() == 0
    assert list(bundle.sessions) == []
    bundle.destroy_bundle()
    assert callback.events == []


def test_with_initialises_anew_what_went_with_its_hub(ps_server: ServerFactory) -> None:
    def destroy_hub() -> None:
        bundle.init_bundle()
        gevent.get_hub().destroy(destroy_loop=True)

    bundle = PsMultiClient(PsCallback())
    NativeThread(destroy_hub).wait()
    with bundle:
        assert bundle.connect(*ps_server(echo()).address).session.is_open


@needs_libev_to_destroy
def test_connect_of_one_that_went_with_its_hub_is_an_error(ps_server: ServerFactory) -> None:
    def connect_in_the_next_hub() -> None:
        bundle.init_bundle()
        bundle.connect(*address)
        gevent.get_hub().destroy(destroy_loop=True)
        with pytest.raises(PsMultiClientError, match="init_bundle"):
            bundle.connect(*address)

    address = ps_server(echo()).address
    bundle = PsMultiClient(PsCallback())
    NativeThread(connect_in_the_next_hub).wait()


def test_connect_after_destroy_bundle_is_an_error(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    bundle = PsMultiClient(PsCallback())
    with bundle:
        bundle.connect(*address)
    with pytest.raises(PsMultiClientError, match="init_bundle"):
        bundle.connect(*address)


def test_connect_while_it_is_destroyed_is_an_error(ps_server: ServerFactory) -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            try:
                bundle.connect(*address)
            except PsMultiClientError as error:
                errors.append(error)

    address = ps_server(echo()).address
    errors: list[PsMultiClientError] = []
    with PsMultiClient(Callback()) as bundle:
        bundle.connect(*address)
    assert len(errors) == 1
    assert bundle.get_session_count() == 0


def test_second_init_bundle_is_an_error_and_changes_nothing(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        session = bundle.connect(*address).session
        with pytest.raises(PsMultiClientError, match="already"):
            bundle.init_bundle()
        assert session.is_open
        assert len(callback.named("on_start")) == 1


def test_destroyed_bundle_can_be_initialised_again(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    callback = RecordingCallback()
    bundle = PsMultiClient(callback)
    for count in range(1, 4):
        with bundle:
            bundle.connect(*address).session.send("hello")
            callback.wait_for("on_message", count)
            assert bundle.get_session_count() == 1
    assert len(callback.named("on_start")) == len(callback.named("on_stop")) == 3


def test_repr_tells_the_state(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    bundle = PsMultiClient(PsCallback())
    assert "not initialised" in repr(bundle)
    with bundle:
        bundle.connect(*address)
        assert "1 session" in repr(bundle)


def test_exception_in_on_start_undoes_the_init_and_is_raised() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            raise ZeroDivisionError("no start")

    callback = Callback()
    bundle = PsMultiClient(callback)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="no start"):
            bundle.init_bundle()
        with pytest.raises(PsMultiClientError, match="init_bundle"):
            bundle.connect(LOOPBACK, 9)
    bundle.destroy_bundle()
    assert [event.name for event in callback.events] == ["on_start"] * 2


@pytest.mark.parametrize("timeout", [0.05, 5.0])
def test_init_that_a_destroy_overtook_is_an_error(timeout: float) -> None:
    """Whether the destroy waits for ``on_start``, or is over before it."""

    class Slow(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            go_on.wait()

    def init() -> None:
        with pytest.raises(PsMultiClientError, match="destroyed while it started"):
            bundle.init_bundle()

    go_on = gevent.event.Event()
    callback = Slow()
    bundle = PsMultiClient(callback)
    starting = gevent.spawn(init)
    callback.wait_for("on_start")
    destroying = gevent.spawn(bundle.destroy_bundle, timeout)
    if timeout < 1:
        destroying.get(timeout=5)
    else:
        eventually(lambda: not bundle.started)
    go_on.set()
    starting.get(timeout=5)
    destroying.get(timeout=5)
    with bundle:
        assert bundle.started


@pytest.mark.hub_errors
def test_nobody_connects_before_on_start_has_ended(ps_server: ServerFactory) -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            go_on.wait()

    go_on = Event()
    callback = Callback()
    address = ps_server(echo()).address
    bundle = PsMultiClient(callback)
    initialising = gevent.spawn(bundle.init_bundle)
    callback.wait_for("on_start")
    connecting = gevent.spawn(bundle.connect, *address)
    connecting.join(0.2)
    assert bundle.get_session_count() == 0
    assert callback.named("on_open") == []
    go_on.set()
    initialising.get(timeout=5)
    connecting.join(5)
    assert connecting.successful() or isinstance(connecting.exception, PsMultiClientError)
    bundle.destroy_bundle()


# Failing


def test_refused_says_host_port_and_cause_and_costs_no_other(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    port = free_port()
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        session = bundle.connect(*address).session
        for _ in range(3):
            with pytest.raises(PsMultiClientError, match=f"{LOOPBACK}:{port}.*refused") as failed:
                bundle.connect(LOOPBACK, port)
            assert isinstance(failed.value.__cause__, ConnectionRefusedError)
        assert not isinstance(failed.value, PsClientError)
        assert bundle.get_session_count() == 1
        session.send("still here")
        callback.wait_for("on_message")
    assert len(callback.named("on_stop")) == 1


def test_timed_out_says_host_port_and_cause() -> None:
    with (
        PsMultiClient(PsCallback()) as bundle,
        black_hole() as (host, port),
        takes(0.2, most=0.2),
        pytest.raises(PsMultiClientError, match=f"{host}:{port}.*timed out"),
    ):
        bundle.connect(host, port, timeout=0.2)


def test_unreachable_and_unknown_say_host_port_and_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def know_nothing(*_args: object) -> None:
        raise gevent.socket.gaierror(gevent.socket.EAI_NONAME, "Name or service not known")

    with PsMultiClient(PsCallback()) as bundle:
        with pytest.raises(PsMultiClientError, match=r"224\.0\.0\.1:9.*unreachable"):
            bundle.connect("224.0.0.1", 9)
        monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", know_nothing)
        with pytest.raises(PsMultiClientError, match=r"no-such-host\.example:9.*not known"):
            bundle.connect("no-such-host.example", 9)


def test_one_that_the_peer_closes_costs_no_other() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as server, PsMultiClient(callback) as bundle:
        connections = [bundle.connect(*server.address) for _ in range(3)]
        peers = {peer.socket.getpeername(): peer for peer in [server.accept() for _ in range(3)]}
        first, second, third = [
            peers[connection.session.local_endpoint]
            for connection in connections
            if connection.session.local_endpoint is not None
        ]
        first.close()
        second.reset()
        callback.wait_for("on_close", 2)
        assert Counter(close_reasons(callback)) == {
            PsCloseReason.PEER_CLOSE: 1,
            PsCloseReason.FAILED: 1,
        }
        assert list(bundle.sessions) == [connections[2].session]
        third.send("still here")
        callback.wait_for("on_message")


@pytest.mark.logs_errors
def test_failing_on_open_costs_no_other(ps_server: ServerFactory) -> None:
    class Callback(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            if len(self.named("on_open")) == 1:
                raise ZeroDivisionError

    address = ps_server(echo()).address
    callback = Callback()
    with PsMultiClient(callback) as bundle:
        bundle.connect(*address)
        callback.wait_for("on_close")
        assert close_reasons(callback) == [PsCloseReason.FAILED]
        bundle.connect(*address).session.send("hello")
        callback.wait_for("on_message")


def test_out_of_descriptors_is_an_error_of_that_connect_only(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle, contextlib.ExitStack() as stack:
        session = bundle.connect(*address).session
        session.send("warm up: no one looks a name up or opens a file for the first time below")
        callback.wait_for("on_message")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.closing(socket.socket()) as probe:
            resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno(), hard))
        with pytest.raises(PsMultiClientError, match=f"{address[1]}.*[Tt]oo many open files"):
            bundle.connect(*address)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        session.send("still here")
        eventually(lambda: callback.received().endswith(b"still here"))
        bundle.connect(*address)
        assert bundle.get_session_count() == 2


# Threads


def test_connect_in_another_thread_is_a_clear_error(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    with PsMultiClient(PsCallback()) as bundle:
        with pytest.raises(PsMultiClientError, match="thread"):
            NativeThread(bundle.connect, *address).wait()
        assert bundle.get_session_count() == 0


def test_destroy_bundle_in_another_thread_returns_after_on_stop(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()

    def destroy() -> str:
        bundle.destroy_bundle()
        return callback.events[-1].name

    address = ps_server(echo()).address
    with PsMultiClient(callback) as bundle:
        for _ in range(3):
            bundle.connect(*address)
        assert NativeThread(destroy).wait() == "on_stop"
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE] * 3


# Idle


def test_idle_connections_time_out_and_busy_ones_do_not(ps_server: ServerFactory) -> None:
    address = ps_server(echo()).address
    callback = RecordingCallback()
    with PsMultiClient(callback, idle_milliseconds=1_000) as bundle:
        busy, idle = bundle.connect(*address).session, bundle.connect(*address).session

        def talk() -> None:
            while busy.is_open:
                busy.send("ping")
                gevent.sleep(0.05)

        talking = gevent.spawn(talk)
        [closed] = callback.wait_for("on_close")
        assert closed.session is idle
        assert closed.value is PsCloseReason.TIMEOUT
        assert busy.is_open
        busy.close()
        talking.get(timeout=5)
