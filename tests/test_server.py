"""`PsServer`: its states, `on_start` and `on_stop`, `wait_for`, its sessions.

Where it listens and how it accepts is in tests/listening, what `shutdown` promises in tests/owner.
"""

from __future__ import annotations

import _socket
import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event

from helpers import LOOPBACK, NativeThread, echo, local_server, run_python
from marks import needs_libev_to_destroy
from psofa_gevent import PsCallback, PsCloseReason, PsServer, PsServerError, PsSession
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)
from reachable import assert_refused, assert_serves, listening, native_clients

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")


def assert_refuses_to_start_again(server: PsServer) -> None:
    with pytest.raises(PsServerError, match="started already"):
        server.start()


# States


def test_started_is_true_from_start_to_shutdown() -> None:
    seen: list[bool] = []

    class Callback(PsCallback):
        def on_open(self, session: PsSession) -> None:
            seen.append(server.started)

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            seen.append(server.started)

    server = local_server(Callback())
    seen.append(server.started)
    server.start()
    seen.append(server.started)
    with ScriptedClient(server.address):
        eventually(lambda: len(seen) == 3)
        server.shutdown()
    seen.append(server.started)
    assert seen == [False, True, True, False, False]


def test_second_start_is_an_error_and_the_first_goes_on(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    address = server.address
    assert_refuses_to_start_again(server)
    assert server.address == address
    assert_serves(server)


@pytest.mark.hub_errors
def test_greenlets_that_start_at_once_start_it_once() -> None:
    server = local_server(echo())
    starters = [gevent.spawn(server.start) for _ in range(3)]
    gevent.joinall(starters, timeout=5)
    assert [starter.successful() for starter in starters] == [True, False, False]
    for starter in starters[1:]:
        assert isinstance(starter.exception, PsServerError)
    assert_serves(server)
    server.shutdown()


def test_start_after_shutdown_listens_again_on_a_new_port() -> None:
    callback = echo()
    server = local_server(callback)
    with server:
        first = server.address
        assert_serves(server)
    # Whoever may have the old port now: it is not asked for again.
    with listening(first[1]), server:
        assert server.address != first
        assert_serves(server)
    assert len(callback.named("on_open")) == len(callback.named("on_close")) == 2
    assert [event.name for event in callback.named("on_start")] == ["on_start"] * 2


def test_fixed_port_is_free_again_at_once_after_shutdown() -> None:
    """Connections in TIME_WAIT are left behind by the sessions that the server closed first."""
    server = local_server(echo())
    with server:
        port = server.address[1]
        with ScriptedClient(server.address) as client:
            client.send("x")
            client.expect("x")
            server.shutdown()
            client.expect_eof()
    again = PsServer(echo(), host=LOOPBACK, port=port)
    for _ in range(3):
        with again:
            assert_serves(again)


def test_with_starts_on_entry_and_shuts_down_on_exit() -> None:
    callback = echo()
    with local_server(callback) as server:
        client = ScriptedClient(server.address)
        callback.wait_for("on_open")
    assert not server.started
    [closed] = callback.named("on_close")
    assert closed.value is PsCloseReason.SHUTDOWN
    client.expect_eof()
    client.close()


def test_with_shuts_down_when_its_body_raises() -> None:
    def fail_while_serving() -> None:
        with server:
            addresses.append(server.address)
            raise ZeroDivisionError

    addresses: list[Any] = []
    server = local_server()
    with pytest.raises(ZeroDivisionError):
        fail_while_serving()
    assert not server.started
    assert_refused(addresses[0])


def test_with_on_a_started_server_shuts_it_down_on_exit() -> None:
    server = local_server(echo())
    server.start()
    with server as entered:
        assert entered is server
        assert_serves(server)
    assert not server.started


def test_repr_tells_address_and_state() -> None:
    server = local_server()
    assert repr(server) == "<PsServer 127.0.0.1:0 stopped>"
    with server:
        assert repr(server) == f"<PsServer 127.0.0.1:{server.address[1]} started>"


class StartsInOnClose(PsCallback):
    """Tries to start its server while that runs, or shuts down."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        assert isinstance(session.owner, PsServer)
        try:
            session.owner.start()
        except PsServerError as error:
            self.errors.append(error)


def test_start_in_on_close_is_an_error_while_running(ps_server: ServerFactory) -> None:
    callback = StartsInOnClose()
    server = ps_server(callback)
    ScriptedClient(server.address).close()
    eventually(lambda: callback.errors)
    assert server.started


def test_start_in_on_close_is_an_error_during_shutdown() -> None:
    callback = StartsInOnClose()
    with local_server(callback) as server, ScriptedClient(server.address):
        eventually(server.get_session_count)
        server.shutdown()
    assert len(callback.errors) == 1
    assert not server.started


def test_start_by_one_who_waited_for_the_shutdown_works() -> None:
    server = local_server(echo())

    def restart() -> None:
        assert server.wait_for(5)
        server.start()

    with server:
        restarter = gevent.spawn(restart)
        gevent.idle()
        server.shutdown()
        restarter.get(timeout=5)
        assert_serves(server)


def test_server_may_be_started_and_shut_down_in_a_callback_of_another(
    ps_server: ServerFactory,
) -> None:
    class Callback(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            with local_server(echo()) as inner:
                assert_serves(inner)
            session.send("done" if not inner.started else "still there")

    server = ps_server(Callback())
    with ScriptedClient(server.address) as client:
        client.send("go")
        client.expect("done")


# on_start and on_stop


def test_on_start_sees_the_address_before_anyone_is_accepted() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            stack.enter_context(native_clients(owner.address, 3))
            gevent.sleep(0.02)  # were they accepted now, their greenlets would run meanwhile
            self.events_at_end = list(self.events)

    callback = Callback()
    with contextlib.ExitStack() as stack, local_server(callback) as server:
        assert [event.name for event in callback.events_at_end] == ["on_start"]
        assert callback.events[0].value is server
        callback.wait_for("on_open", 3)


def test_on_start_comes_first_and_on_stop_last() -> None:
    callback = echo()
    with local_server(callback) as server:
        assert_serves(server)
    names = [event.name for event in callback.events]
    assert names == ["on_start", "on_open", "on_message", "on_close", "on_stop"]
    assert callback.events[-1].value is server


class OnStartFails(RecordingCallback):
    def on_start(self, owner: Any) -> None:
        super().on_start(owner)
        self.address = owner.address
        raise ZeroDivisionError("no start")


def test_exception_in_on_start_undoes_the_start_and_is_raised() -> None:
    callback = OnStartFails()
    server = local_server(callback)
    with pytest.raises(ZeroDivisionError, match="no start"):
        server.start()
    assert not server.started
    assert server.address == (LOOPBACK, 0)
    assert_refused(callback.address)
    assert [event.name for event in callback.events] == ["on_start"]
    assert server.wait_for(0) is True
    server.shutdown()
    assert [event.name for event in callback.events] == ["on_start"]


@pytest.mark.parametrize("error", [gevent.GreenletExit, SystemExit, KeyboardInterrupt])
def test_any_exception_in_on_start_undoes_the_start(error: type[BaseException]) -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            raise error

    server = local_server(Callback())
    with pytest.raises(error):
        server.start()
    assert not server.started


def test_timeout_around_start_undoes_it_while_on_start_runs() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            gevent.sleep(20)

    server = local_server(Callback())
    with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.05):
        server.start()
    assert not server.started


def test_clients_that_came_during_a_failing_on_start_are_never_served() -> None:
    class Callback(OnStartFails):
        def on_start(self, owner: Any) -> None:
            clients.extend(stack.enter_context(native_clients(owner.address, 3)))
            gevent.sleep(0.02)
            super().on_start(owner)

    callback = Callback()
    clients: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        with pytest.raises(ZeroDivisionError):
            local_server(callback).start()
        gevent.sleep(0.02)
        assert [event.name for event in callback.events] == ["on_start"]
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_shutdown_in_on_start_means_that_it_never_accepts() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            addresses.append(owner.address)
            owner.shutdown()

    addresses: list[Any] = []
    callback = Callback()
    server = local_server(callback)
    # Whether start returns or raises then is not promised.
    with contextlib.suppress(PsServerError):
        server.start()
    assert server.wait_for(5)
    assert not server.started
    assert_refused(addresses[0])
    assert callback.named("on_open") == []
    assert len(callback.named("on_start")) == 1


def test_shutdown_in_on_start_that_then_raises_leaves_a_startable_server() -> None:
    class Callback(RecordingCallback):
        fails = True

        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            if self.fails:
                gevent.spawn(owner.shutdown, 1.0, drain=1.0)
                gevent.sleep(0)
                raise ZeroDivisionError

    callback = Callback()
    server = local_server(callback)
    with pytest.raises(ZeroDivisionError):
        server.start()
    callback.fails = False
    server.start()
    gevent.sleep(0.05)
    assert_refuses_to_start_again(server)
    server.shutdown()
    assert not server.started
    assert len(callback.named("on_stop")) == 1


@pytest.mark.hub_errors
def test_shutdown_while_start_looks_up_the_host_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolving, answer = Event(), Event()
    look_up = gevent.socket.getaddrinfo

    def look_up_slowly(*args: Any) -> Any:
        resolving.set()
        answer.wait()
        return look_up(*args)

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", look_up_slowly)
    callback = echo()
    server = PsServer(callback, host="localhost", port=0)
    starter = gevent.spawn(server.start)
    assert resolving.wait(5)
    stopper = gevent.spawn(server.shutdown)
    eventually(lambda: not server.started)
    answer.set()
    starter.join(5)
    stopper.join(5)
    assert starter.dead
    assert stopper.dead
    assert not server.started
    assert server.address == ("localhost", 0)
    names = [event.name for event in callback.events]
    assert names in ([], ["on_start", "on_stop"])
    with server:
        assert_serves(server)


class SlowFirstStart(RecordingCallback):
    """An echo whose first ``on_start`` takes as long as the test likes."""

    def __init__(self) -> None:
        super().__init__(bytes)
        self.go_on = Event()

    def on_start(self, owner: Any) -> None:
        super().on_start(owner)
        if len(self.named("on_start")) == 1:
            self.go_on.wait()


@contextlib.contextmanager
def shut_down_while_it_starts(
    callback: SlowFirstStart,
) -> Iterator[tuple[PsServer, tuple[Any, ...]]]:
    """A server, and its first address, whose shutdown has returned before ``on_start`` does.

    At the end of the block ``on_start`` has returned, and `start` has raised.
    """

    def start() -> None:
        with pytest.raises(PsServerError, match="shut down while it started"):
            server.start()

    server = local_server(callback)
    starting = gevent.spawn(start)
    callback.wait_for("on_start")
    address = server.address
    server.shutdown(timeout=0.05)
    try:
        yield server, address
    finally:
        callback.go_on.set()
        starting.get(timeout=5)


def test_shutdown_does_not_wait_longer_than_its_timeout_for_on_start() -> None:
    callback = SlowFirstStart()
    with shut_down_while_it_starts(callback) as (server, address):
        assert not server.started
        assert server.wait_for(0) is True
        assert_refused(address)
    assert_refused(address)
    assert [event.name for event in callback.events] == ["on_start"]


def test_on_start_that_outlives_a_shutdown_does_not_disturb_the_next_start() -> None:
    callback = SlowFirstStart()
    with shut_down_while_it_starts(callback) as (server, first_address):
        server.start()
    assert server.started
    assert_refused(first_address)
    assert_serves(server)
    server.shutdown()
    assert len(callback.named("on_stop")) == 1


# Waiting


def test_wait_for_returns_true_at_once_when_not_started() -> None:
    assert local_server().wait_for() is True


@needs_libev_to_destroy
def test_a_server_that_went_with_its_hub_is_not_waited_for_and_serves_anew() -> None:
    def serve_in_two_hubs() -> None:
        server = local_server(echo())
        server.start()
        gevent.get_hub().destroy(destroy_loop=True)
        assert server.wait_for(timeout=5)
        server.start()
        gevent.get_hub().destroy(destroy_loop=True)
        gone = server._manager
        serving = gevent.spawn(server.serve_forever)
        eventually(lambda: server._manager is not gone and server.address[1])
        with ScriptedClient(server.address) as client:
            client.send("hello")
            client.expect("hello")
        server.shutdown()
        serving.get(timeout=5)

    NativeThread(serve_in_two_hubs).wait()


def test_wait_for_returns_false_when_its_time_is_over(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    assert server.wait_for(0) is False
    assert server.wait_for(timeout=0.02) is False
    assert_serves(server)


def test_wait_for_returns_true_after_the_last_callback() -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            gevent.sleep(0.05)
            super().on_stop(owner)

    callback = Callback()
    with local_server(callback) as server:
        waiters = [gevent.spawn(server.wait_for, 5.0) for _ in range(3)]
        gevent.idle()
        stopper = gevent.spawn(server.shutdown)
        assert server.wait_for() is True
        assert len(callback.named("on_stop")) == 1
        assert [waiter.get(timeout=1) for waiter in waiters] == [True, True, True]
        stopper.get(timeout=1)


@pytest.mark.parametrize("use_async_callback", [False, True], ids=["sync", "async"])
def test_wait_for_in_a_callback_is_an_error_that_says_so(use_async_callback: bool) -> None:
    class WaitsIn(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            refuse("on_start")

        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            refuse("on_open")

        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            refuse("on_message")

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            self.on_message(session, message)

        def on_eof(self, session: PsSession) -> None:
            super().on_eof(session)
            refuse("on_eof")

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            refuse("on_close")

        def on_stop(self, owner: Any) -> None:
            super().on_stop(owner)
            refuse("on_stop")

    def refuse(method: str) -> None:
        with pytest.raises(PsServerError, match="not in a callback"):
            server.wait_for()
        refused.append(method)

    refused: list[str] = []
    callback = WaitsIn(use_async_callback=use_async_callback)
    server = local_server(callback, allow_half_open=True)
    with server, ScriptedClient(server.address) as client:
        client.send("x")
        client.eof()
        callback.wait_for("on_eof")
    assert refused == ["on_start", "on_open", "on_message", "on_eof", "on_close", "on_stop"]


def test_wait_for_in_another_thread_is_an_error_that_says_so(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    with pytest.raises(PsServerError, match="thread"):
        NativeThread(server.wait_for).join()


# Sessions of a server


def test_sessions_are_a_snapshot_of_the_open_ones(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = echo()
    server = ps_server(callback)
    assert list(server.sessions) == []
    clients = [ps_client(server) for _ in range(3)]
    callback.wait_for("on_open", 3)
    snapshot = list(server.sessions)
    assert len(snapshot) == 3
    for session in server.sessions:
        session.close()
    assert list(server.sessions) == []
    assert len(snapshot) == 3
    for client in clients:
        client.expect_eof()
    eventually(lambda: server.get_session_count() == 0)


def test_session_count_follows_clients_and_is_0_after_shutdown() -> None:
    callback = echo()
    with local_server(callback) as server, contextlib.ExitStack() as stack:
        assert server.get_session_count() == 0
        for count in range(1, 6):
            stack.enter_context(ScriptedClient(server.address))
            callback.wait_for("on_open", count)
            assert server.get_session_count() == count
        server.shutdown()
        assert server.get_session_count() == 0


def test_receive_buffer_size_bounds_what_the_kernel_takes(ps_server: ServerFactory) -> None:
    class Callback(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            go_on.wait()

    def taken(**settings: Any) -> int:
        server = ps_server(Callback(), **settings)
        with _SystemSocket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
            client.connect(server.address)
            client.setblocking(False)
            total = 0
            with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.2):
                while True:
                    try:
                        total += client.send(b"x" * 65_536)
                    except BlockingIOError:
                        gevent.sleep(0.005)
            return total

    go_on = Event()
    try:
        assert taken(receive_buffer_size=4_096) < taken()
    finally:
        go_on.set()


def test_dropped_server_that_was_never_started_is_simply_gone() -> None:
    server = local_server()
    del server
    gc.collect()


PREFORK = """
    import os
    import signal
    import sys

    if "patched" in sys.argv:
        from gevent import monkey
        monkey.patch_all()
    import gevent.os
    from psofa_gevent import PsServer
    from psofa_gevent.testing import RecordingCallback, ScriptedClient

    def serve(pipe):
        server.start()
        # Written when this greenlet waits, its signal handlers set.
        gevent.spawn(lambda: os.write(pipe, b"%d" % server.address[1]))
        signal.alarm(20)  # ends it if its parent has failed
        server.serve_forever()
        names = [event.name for event in callback.events[before:]]
        return names != ["on_start", "on_open", "on_message", "on_close", "on_stop"]

    def talk(client):
        client.send("ping")
        client.expect("ping")

    callback = RecordingCallback(bytes, use_async_callback="async" in sys.argv)
    server = PsServer(callback, host="127.0.0.1", port=0)
    if "used" in sys.argv:
        with server, ScriptedClient(server.address) as client:
            talk(client)
    before = len(callback.events)
    children = {}
    for _ in range(2):
        read, write = os.pipe()
        pid = gevent.os.fork()
        if pid == 0:
            code = 70
            try:
                code = serve(write)
            finally:
                os._exit(code)
        children[pid] = int(os.read(read, 100))
    for port in children.values():
        with ScriptedClient(("127.0.0.1", port)) as client:
            talk(client)
    for pid in children:
        os.kill(pid, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(gevent.os.waitpid(pid, 0)[1]))
    with server, ScriptedClient(server.address) as client:
        talk(client)
    print("done")
"""


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("before", ["new", "used"])
def test_server_made_before_a_fork_may_be_started_in_each_child(
    before: str, kind: str, mode: str
) -> None:
    """As by gunicorn, with an application that is loaded before its workers are forked."""
    # Python warns of a fork in a process with threads, which gevent's resolver has started.
    done = run_python(PREFORK, before, kind, mode, environment={"PYTHONWARNINGS": "ignore"})
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "0\n0\ndone\n"


def test_server_sockets_are_not_inherited_by_child_processes(ps_server: ServerFactory) -> None:
    """A child that kept the listener would keep the port in use after the shutdown."""
    callback = echo()
    server = ps_server(callback)
    with ScriptedClient(server.address):
        callback.wait_for("on_open")
        ours = [
            int(name)
            for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")
            if is_socket_on(int(name), server.address[1])
        ]
        assert len(ours) >= 2
        assert not any(os.get_inheritable(descriptor) for descriptor in ours)


def is_socket_on(descriptor: int, port: int) -> bool:
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return False
    try:
        sock = _socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        return False
    try:
        name = sock.getsockname()
        return isinstance(name, tuple) and len(name) >= 2 and name[1] == port
    finally:
        sock.close()
