"""`PsServer` from `start` to the last accept; what `shutdown` promises is in test_shutdown.py."""

from __future__ import annotations

import _socket
import contextlib
import errno
import gc
import logging
import os
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event

import psofa_gevent.listening.sockets
from helpers import (
    LOOPBACK,
    NativeThread,
    PythonProcess,
    echo,
    local_server,
    python_process,
    run_python,
)
from marks import needs_ipv6, needs_libev_to_destroy
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsServer,
    PsServerError,
    PsSession,
    PsSocketAddressFamily,
)
from psofa_gevent.hub import logs
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

IPV6 = PsSocketAddressFamily.IPV6
NOT_OURS = "203.0.113.7"
"""RFC 5737: an address for documentation, which no machine has."""

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[tuple[Any, ...]]:
    """A listener that has nothing to do with the library, and its address."""
    with _SystemSocket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((LOOPBACK, port))
        sock.listen()
        yield sock.getsockname()


@contextlib.contextmanager
def native_clients(address: tuple[Any, ...], count: int) -> Iterator[list[socket.socket]]:
    """Connections that the kernel has made and nobody can have accepted: the hub never ran."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(_SystemSocket(socket.AF_INET, socket.SOCK_STREAM))
            client.settimeout(5.0)
            client.connect(address)
            clients.append(client)
        yield clients


def assert_serves(server: PsServer) -> None:
    with ScriptedClient(server.address) as client:
        client.send("are you there?")
        client.expect("are you there?")


def assert_refused(address: tuple[Any, ...]) -> None:
    with pytest.raises(ConnectionRefusedError):
        ScriptedClient(address).close()


def assert_refuses_to_start_again(server: PsServer) -> None:
    with pytest.raises(PsServerError, match="started already"):
        server.start()


# Where it listens


def test_port_0_listens_on_a_free_port_which_address_tells(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    host, port = server.address
    assert host == LOOPBACK
    assert port != 0
    assert_serves(server)


def test_address_is_what_was_asked_for_while_stopped() -> None:
    server = local_server()
    assert server.address == (LOOPBACK, 0)
    with server:
        assert server.address[1] != 0
    assert server.address == (LOOPBACK, 0)


def test_two_servers_in_one_process_do_not_mix(ps_server: ServerFactory) -> None:
    callbacks = [RecordingCallback(lambda _message: b"0"), RecordingCallback(lambda _message: b"1")]
    servers = [ps_server(callback) for callback in callbacks]
    assert servers[0].address != servers[1].address
    for number, server in enumerate(servers):
        with ScriptedClient(server.address) as client:
            client.send("which?")
            client.expect(str(number))
    for callback in callbacks:
        callback.wait_for("on_close")
        assert len(callback.named("on_open")) == 1


def test_one_callback_object_serves_two_servers(ps_server: ServerFactory) -> None:
    callback = echo()
    first, second = ps_server(callback), ps_server(callback)
    assert_serves(first)
    assert_serves(second)
    callback.wait_for("on_close", 2)
    assert [event.session.owner for event in callback.named("on_open") if event.session] == [
        first,
        second,
    ]


def test_host_may_be_a_name(ps_server: ServerFactory) -> None:
    assert_serves(ps_server(echo(), host="localhost"))


def test_server_can_be_reached_when_start_returns() -> None:
    """The kernel answers, before the hub has run once more."""
    server = local_server(echo())
    server.start()
    try:
        with native_clients(server.address, 1) as [client]:
            client.sendall(b"early")
            gevent.sleep(0)
            eventually(lambda: server.get_session_count() == 1)
            gevent.socket.wait_read(client.fileno(), timeout=5.0)
            assert client.recv(100) == b"early"
    finally:
        server.shutdown()


# What start refuses


def test_port_in_use_is_an_error_that_names_it() -> None:
    with listening() as (host, port):
        server = PsServer(PsCallback(), host=host, port=port)
        with pytest.raises(PsServerError, match=rf"{host}:{port}.*in use") as refused:
            server.start()
    cause = refused.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EADDRINUSE
    assert not server.started


def test_start_works_once_the_port_is_free() -> None:
    with listening() as (host, port):
        server = PsServer(echo(), host=host, port=port)
        with pytest.raises(PsServerError):
            server.start()
    with server:
        assert server.address == (host, port)
        assert_serves(server)


def test_port_of_another_server_of_ours_is_in_use(ps_server: ServerFactory) -> None:
    first = ps_server(echo())
    second = PsServer(PsCallback(), host=LOOPBACK, port=first.address[1])
    with pytest.raises(PsServerError, match="in use"):
        second.start()
    assert_serves(first)


def test_host_that_is_not_ours_is_an_error_that_names_it() -> None:
    server = PsServer(PsCallback(), host=NOT_OURS, port=0)
    with pytest.raises(PsServerError, match=rf"{NOT_OURS}.*not an address of this machine"):
        server.start()
    assert not server.started


def test_unknown_host_name_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def know_nothing(*_args: object) -> None:
        raise gevent.socket.gaierror(gevent.socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", know_nothing)
    server = PsServer(PsCallback(), host="no-such-host.example", port=0)
    with pytest.raises(PsServerError, match=r"no-such-host\.example.*not known"):
        server.start()
    assert not server.started


@pytest.mark.parametrize(
    "host",
    ["a" * 300, "a..b", "\udcff", "\N{SNOWMAN}" * 80],
    ids=["long label", "empty label", "surrogate", "long IDNA label"],
)
def test_host_that_cannot_be_a_name_is_an_error_and_prints_nothing(host: str) -> None:
    server = PsServer(PsCallback(), host=host, port=0)
    with pytest.raises(PsServerError, match="cannot listen on"):
        server.start()


def test_ipv6_host_on_the_ipv4_family_is_an_error_that_names_it() -> None:
    server = PsServer(PsCallback(), host="::1", port=0)
    with pytest.raises(PsServerError, match=r"\[::1\]:0"):
        server.start()


def ports_are_privileged() -> bool:
    first_free = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return not first_free.exists() or int(first_free.read_text()) > 1


@pytest.mark.skipif(not ports_are_privileged(), reason="every user may listen on port 1 here")
def test_privileged_port_is_an_error_that_names_it() -> None:
    outcome = run_python(
        """
        import os
        from psofa_gevent import PsCallback, PsServer, PsServerError

        # What gevent imports on first use may be in folders of root's.
        with PsServer(PsCallback(), host="127.0.0.1", port=0):
            pass
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            PsServer(PsCallback(), host="127.0.0.1", port=1).start()
        except PsServerError as error:
            print(error)
        if was_root:
            os.seteuid(0)  # for what is written at the end: coverage's data
        """
    )
    assert "127.0.0.1:1" in outcome.stdout
    assert "ermission" in outcome.stdout
    assert outcome.stderr == ""


def test_failed_start_runs_no_callback() -> None:
    callback = RecordingCallback()
    with pytest.raises(PsServerError):
        PsServer(callback, host=NOT_OURS, port=0).start()
    assert callback.events == []


def test_failed_start_logs_no_stop(caplog: pytest.LogCaptureFixture) -> None:
    """An operator who reads 'stopped' looks for the start that was before it."""
    with (
        caplog.at_level(logging.INFO, "psofa_gevent"),
        pytest.raises(PsServerError),
    ):
        PsServer(PsCallback(), host=NOT_OURS, port=0).start()
    assert caplog.messages == []


def test_failed_start_ends_the_wait_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving, answer = Event(), Event()

    def fail_late(*_args: object) -> None:
        resolving.set()
        answer.wait()
        raise gevent.socket.gaierror(gevent.socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", fail_late)
    server = PsServer(PsCallback(), host="localhost", port=0)
    starter = gevent.spawn(pytest.raises, PsServerError, server.start)
    assert resolving.wait(5)
    waiter = gevent.spawn(server.wait_for, 20.0)
    gevent.idle()
    answer.set()
    starter.get(timeout=5)
    assert waiter.get(timeout=5) is True


# Dual-stack IPv6


@needs_ipv6
def test_ipv6_server_is_reached_by_ipv6(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback, socket_address_family=IPV6)
    assert server.address[0] == "::1"
    assert_serves(server)
    [opened] = callback.named("on_open")
    assert opened.session is not None
    assert opened.session.remote_endpoint is not None
    assert opened.session.remote_endpoint[0] == "::1"


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
def test_ipv6_server_on_every_address_is_reached_by_both(
    ps_server: ServerFactory, host: str
) -> None:
    callback = echo()
    server = ps_server(callback, host=host, socket_address_family=IPV6)
    assert server.address[0] == "::"
    port = server.address[1]
    for loopback in (LOOPBACK, "::1"):
        with ScriptedClient((loopback, port)) as client:
            client.send(loopback)
            client.expect(loopback)
    remotes = {
        event.session.remote_endpoint[0]
        for event in callback.named("on_open")
        if event.session is not None and event.session.remote_endpoint is not None
    }
    assert remotes == {"::ffff:127.0.0.1", "::1"}


@needs_ipv6
def test_ipv4_host_on_the_ipv6_family_is_reached_by_ipv4(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), host=LOOPBACK, socket_address_family=IPV6)
    assert server.address[0] == "::ffff:127.0.0.1"
    with ScriptedClient((LOOPBACK, server.address[1])) as client:
        client.send("mapped")
        client.expect("mapped")


@pytest.mark.parametrize(
    ("host", "says"),
    [("::1", "needs socket_address_family"), ("/run/app.sock", "'unix:/run/app.sock'")],
)
def test_host_of_another_kind_is_an_error_that_says_what_would_be_right(
    host: str, says: str
) -> None:
    with pytest.raises(PsServerError, match=says):
        PsServer(PsCallback(), host=host).start()


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT])
def test_machine_without_ipv6_gets_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class OnlyIpv4(_SystemSocket):  # type: ignore[misc, valid-type]  # a class known at run time
        def __init__(self, family: int = -1, *args: Any, **kwargs: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(code, os.strerror(code))
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr(psofa_gevent.listening.sockets, "_SystemSocket", OnlyIpv4)
    server = PsServer(PsCallback(), host="::", port=0, socket_address_family=IPV6)
    with pytest.raises(PsServerError, match=r"\[::\]:0.*no IPv6"):
        server.start()
    assert not server.started
    with serving(echo()) as ipv4_server:
        assert_serves(ipv4_server)


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


# The cap


class Counting(RecordingCallback):
    """An echo that notes the most sessions it ever saw at a time."""

    def __init__(self) -> None:
        super().__init__(lambda message: message)
        self.most = 0

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self.most = max(self.most, session.owner.get_session_count())


def test_at_the_cap_clients_wait_and_are_served_as_one_leaves(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=2)
    first, second, third = [ps_client(server) for _ in range(3)]
    callback.wait_for("on_open", 2)
    third.send("served at last")
    third.expect_nothing(0.1)
    assert server.get_session_count() == 2
    second.send("still here")
    second.expect("still here")
    first.close()
    third.expect("served at last")
    assert callback.most == 2


@pytest.mark.parametrize("cap", [1, 3])
def test_all_who_wait_at_the_cap_are_served_in_the_end(ps_server: ServerFactory, cap: int) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=cap)
    with native_clients(server.address, 40) as clients:
        for client in clients:
            client.sendall(b"hello")
        for number, client in enumerate(clients):
            gevent.socket.wait_read(client.fileno(), timeout=5.0)
            assert client.recv(100) == b"hello", number
            client.close()
    callback.wait_for("on_close", 40)
    assert callback.most == cap


def leave_by_fin(client: ScriptedClient, _session: PsSession) -> None:
    client.close()


def leave_by_reset(client: ScriptedClient, _session: PsSession) -> None:
    client.reset()


def leave_by_close(_client: ScriptedClient, session: PsSession) -> None:
    session.close()


def leave_by_abort(_client: ScriptedClient, session: PsSession) -> None:
    session.abort()


def leave_by_idleness(_client: ScriptedClient, session: PsSession) -> None:
    session.change_idle_milliseconds(1)


@pytest.mark.parametrize(
    "leave", [leave_by_fin, leave_by_reset, leave_by_close, leave_by_abort, leave_by_idleness]
)
def test_whichever_way_one_leaves_the_next_is_served(
    ps_server: ServerFactory, ps_client: ClientFactory, leave: Any
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=1)
    first = ps_client(server)
    [opened] = callback.wait_for("on_open")
    second = ps_client(server)
    second.send("next")
    leave(first, opened.session)
    second.expect("next")
    assert callback.most == 1


@pytest.mark.logs_errors
def test_failing_on_open_frees_its_place(ps_server: ServerFactory) -> None:
    class Callback(Counting):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            if len(self.named("on_open")) <= 20:
                raise ZeroDivisionError

    callback = Callback()
    server = ps_server(callback, max_sessions=2)
    with native_clients(server.address, 20):
        callback.wait_for("on_close", 20)
    assert_serves(server)
    assert callback.most <= 2


def test_slow_on_close_takes_no_place(ps_server: ServerFactory) -> None:
    class Callback(Counting):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            go_on.wait()
            super().on_close(session, close_reason)

    go_on = Event()
    callback = Callback()
    server = ps_server(callback, max_sessions=1)
    for _ in range(3):
        assert_serves(server)
    assert callback.named("on_close") == []
    go_on.set()
    callback.wait_for("on_close", 3)


def test_pausing_at_the_cap_holds_when_one_leaves(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=1)
    first = ps_client(server)
    callback.wait_for("on_open")
    second = ps_client(server)
    second.send("next")
    second.expect_nothing(0.02)
    server.stop_accepting()
    first.close()
    callback.wait_for("on_close")
    second.expect_nothing(0.1)
    server.resume_accepting()
    second.expect("next")


def test_resuming_at_the_cap_does_not_exceed_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=1)
    first = ps_client(server)
    callback.wait_for("on_open")
    second = ps_client(server)
    second.send("next")
    for _ in range(5):
        server.stop_accepting()
        server.resume_accepting()
        gevent.sleep(0.01)
    second.expect_nothing(0.05)
    assert server.get_session_count() == 1
    first.close()
    second.expect("next")
    assert callback.most == 1


def test_cap_counts_anew_after_a_restart() -> None:
    callback = Counting()
    server = local_server(callback, max_sessions=1)
    for _ in range(3):
        with server, ScriptedClient(server.address) as client:
            client.send("hello")
            client.expect("hello")
    assert callback.most == 1


# Descriptors

SERVER_THAT_REPORTS = textwrap.dedent(
    """
    import logging, os, resource, sys, time

    limit, cap = (int(argument) for argument in sys.argv[1:])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    os.close(0)

    import gevent
    from psofa_gevent import PsCallback, PsServer

    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    logging.getLogger("psofa_gevent").addHandler(Keep(logging.WARNING))

    def warnings():
        return len(records)

    def most_serious():
        return max((record.levelno for record in records), default=0)

    def spare():
        taken = []
        try:
            while len(taken) < 1000:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for descriptor in taken:
            os.close(descriptor)
        return len(taken)

    class Report(PsCallback):
        def on_message(self, session, message):
            question = message.decode()
            if question == "cpu":
                session.send(str(time.process_time()))
            elif question == "count":
                session.send(str(server.get_session_count()))
            elif question in ("warnings", "most_serious", "spare"):
                session.send(str(globals()[question]()))
            else:
                session.send(message)

        def on_close(self, session, close_reason):
            if close_reason.name == "FAILED":
                print("FAILED", session.close_cause, flush=True)

    server = PsServer(Report(), host="127.0.0.1", port=0, max_sessions=cap or None,
                      idle_milliseconds=None)
    server.start()
    print("port", server.address[1], flush=True)
    server.wait_for()
    """
)


@contextlib.contextmanager
def limited_server(limit: int, cap: int) -> Iterator[tuple[tuple[Any, ...], PythonProcess]]:
    """A server in a process with few descriptors; `cap` 0 stands for the default one."""
    with python_process("-c", SERVER_THAT_REPORTS, str(limit), str(cap)) as process:
        port = int(process.expect_line("port").split()[1])
        yield (LOOPBACK, port), process


def ask(client: ScriptedClient, question: str) -> float:
    client.send(question)
    client.socket.settimeout(5.0)
    return float(client.socket.recv(100))


def is_served(client: ScriptedClient) -> bool:
    """Whether the greeting that was sent before has been answered."""
    client.socket.settimeout(0.001)
    try:
        return bool(client.socket.recv(100, socket.MSG_PEEK))
    except TimeoutError:
        return False


def connect_many(
    stack: contextlib.ExitStack, address: tuple[Any, ...], count: int
) -> list[ScriptedClient]:
    clients = []
    for _ in range(count):
        client = stack.enter_context(ScriptedClient(address))
        client.send("hello")
        clients.append(client)
    return clients


def test_out_of_descriptors_no_session_suffers_and_it_heals() -> None:
    with limited_server(100, 100_000) as (address, process), contextlib.ExitStack() as stack:
        first, *others = connect_many(stack, address, 140)
        first.expect("hello")
        served = eventually(lambda: 50 < sum(map(is_served, others)) < 100)
        assert served
        before = ask(first, "cpu")
        gevent.sleep(1.0)  # the time that is measured
        spent = ask(first, "cpu") - before
        assert spent < 0.25, f"{spent} s of CPU time in a second of waiting"
        assert ask(first, "warnings") == 1
        waiting = [client for client in others if not is_served(client)]
        open_ones = [client for client in others if client not in waiting]
        assert len(waiting) > 30
        for client in open_ones:
            client.expect("hello")
            client.send("and you?")
            client.expect("and you?")
        # A slow send needs the hub, a watcher and a timer: none of them a descriptor.
        first.send("x" * 3_000_000)
        first.expect("x" * 3_000_000)
        for client in open_ones:
            client.close()
        for client in waiting:
            client.expect("hello")
        assert ask(first, "most_serious") == logging.WARNING
        assert ask(first, "count") == 1 + len(waiting)
        for client in waiting:
            client.close()
        eventually(lambda: ask(first, "count") == 1)
        assert all("FAILED" not in line for line in process.lines)


def test_out_of_descriptors_each_that_leaves_lets_one_in() -> None:
    with limited_server(100, 100_000) as (address, _process), contextlib.ExitStack() as stack:
        clients = connect_many(stack, address, 120)
        for client in clients:
            client.expect("hello")
            client.close()
        with ScriptedClient(address) as last:
            eventually(lambda: ask(last, "count") == 1)


def test_default_cap_leaves_descriptors_to_others() -> None:
    with limited_server(200, 0) as (address, _process), contextlib.ExitStack() as stack:
        clients = connect_many(stack, address, 210)
        first = clients[0]
        first.expect("hello")
        eventually(lambda: ask(first, "count") >= 100)
        gevent.sleep(0.1)
        assert ask(first, "count") < 200
        assert ask(first, "spare") >= 20
        assert ask(first, "warnings") == 0
        for client in clients[1:]:
            client.expect("hello")
            client.close()


@pytest.mark.parametrize("limit", [20, 64])
def test_default_cap_is_at_least_one(limit: int) -> None:
    with limited_server(limit, 0) as (address, _process), ScriptedClient(address) as client:
        client.send("hello")
        client.expect("hello")


# Errors of accept


class FailingAccept:
    """Makes the listeners' accept fail, with what `codes` says; each call is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        self.always: int | None = None
        self.calls = 0
        test = self

        class Listening(_SystemSocket):  # type: ignore[misc, valid-type]  # known at run time
            def _accept(self) -> tuple[int, Any]:
                test.calls += 1
                code = test.codes.pop(0) if test.codes else test.always
                if code is not None:
                    raise OSError(code, os.strerror(code))
                accepted: tuple[int, Any] = super()._accept()
                return accepted

        monkeypatch.setattr(psofa_gevent.listening.sockets, "_SystemSocket", Listening)


@pytest.fixture
def failing_accept(monkeypatch: pytest.MonkeyPatch) -> FailingAccept:
    return FailingAccept(monkeypatch)


@pytest.mark.parametrize(
    "name",
    [
        "ECONNABORTED",
        "EPROTO",
        "ENETDOWN",
        "ENETUNREACH",
        "EHOSTUNREACH",
        "ETIMEDOUT",
        "EPERM",
        "EMFILE",
        "ENFILE",
        "ENOBUFS",
        "ENOMEM",
    ],
)
def test_accept_that_fails_some_times_costs_nobody_anything(
    failing_accept: FailingAccept,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    caplog.set_level(logging.WARNING, "psofa_gevent")
    server = ps_server(echo())
    with ScriptedClient(server.address) as open_one:
        open_one.send("before")
        open_one.expect("before")
        failing_accept.codes = [getattr(errno, name)] * 3
        assert_serves(server)
        open_one.send("after")
        open_one.expect("after")
    assert failing_accept.codes == []
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EPERM], ids=["EMFILE", "EPERM"])
def test_accept_that_always_fails_makes_no_busy_loop(
    failing_accept: FailingAccept, ps_server: ServerFactory, code: int
) -> None:
    server = ps_server(echo())
    failing_accept.always = code
    with ScriptedClient(server.address) as client:
        client.send("hello")
        eventually(lambda: failing_accept.calls)
        calls = failing_accept.calls
        gevent.sleep(0.5)  # the time that is measured
        assert failing_accept.calls - calls < 50
        failing_accept.always = None
        client.expect("hello")


def test_server_at_its_descriptor_limit_warns_once_a_minute(
    failing_accept: FailingAccept,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, "psofa_gevent")
    server = ps_server(echo())
    levels = []
    for is_a_minute_later in (False, False, True, False):
        monkeypatch.setattr(logs, "WARNING_PERIOD", 0.0 if is_a_minute_later else 60.0)
        if is_a_minute_later:
            server._peer_log._end_window("cannot accept")
            [count] = (record for record in caplog.records if "1 more" in record.message)
            assert count.levelname == "WARNING"
            caplog.clear()
        failing_accept.codes = [errno.EMFILE] * 3
        assert_serves(server)  # it has healed
        [record] = (record for record in caplog.records if "cannot accept" in record.message)
        assert str(server.address[1]) in record.message
        assert os.strerror(errno.EMFILE) in record.message
        levels.append(record.levelname)
        caplog.clear()
    assert levels == ["WARNING", "DEBUG", "WARNING", "DEBUG"]


def test_several_listeners_that_can_not_accept_warn_once(
    failing_accept: FailingAccept, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="psofa_gevent")
    server = ps_server(echo(), listener=[("127.0.0.1", 0), ("127.0.0.1", 0)])
    failing_accept.always = errno.EMFILE
    with ScriptedClient(server.addresses[0]) as one, ScriptedClient(server.addresses[1]) as other:
        eventually(lambda: failing_accept.calls > 3)
        failing_accept.always = None
        for client in (one, other):
            client.send("x")
            client.expect("x")
    [record] = caplog.records
    assert "cannot accept" in record.message


def test_reset_connection_at_accept_does_not_hold_back_the_warning_of_a_shortage(
    failing_accept: FailingAccept, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "psofa_gevent")
    server = ps_server(echo())
    for code in (errno.ECONNABORTED, errno.EMFILE):
        failing_accept.codes = [code]
        assert_serves(server)
    [record] = caplog.records
    assert os.strerror(errno.EMFILE) in record.getMessage()


def test_paused_server_stays_paused_when_descriptors_are_back(
    failing_accept: FailingAccept, ps_server: ServerFactory
) -> None:
    callback = echo()
    server = ps_server(callback)
    failing_accept.always = errno.EMFILE
    with ScriptedClient(server.address) as client:
        client.send("hello")
        eventually(lambda: failing_accept.calls)
        server.stop_accepting()
        failing_accept.always = None
        client.expect_nothing(0.2)
        assert callback.named("on_open") == []
        server.resume_accepting()
        client.expect("hello")


def test_shutdown_while_out_of_descriptors_leaves_no_timer(failing_accept: FailingAccept) -> None:
    with local_server(echo()) as server:
        failing_accept.always = errno.EMFILE
        with ScriptedClient(server.address):
            eventually(lambda: failing_accept.calls)
            server.shutdown()


@pytest.mark.logs_errors
@pytest.mark.parametrize("name", ["EBADF", "EINVAL", "ENOTSOCK"])
def test_listener_that_is_gone_is_logged_and_costs_no_session(
    failing_accept: FailingAccept,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    code = getattr(errno, name)
    server = ps_server(echo())
    with ScriptedClient(server.address) as open_one:
        open_one.send("before")
        open_one.expect("before")
        failing_accept.always = code
        with ScriptedClient(server.address):
            eventually(lambda: caplog.records)
            calls = failing_accept.calls
            open_one.send("after")
            open_one.expect("after")
            gevent.sleep(0.1)
            assert failing_accept.calls - calls < 10
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert os.strerror(code) in record.getMessage()


class KillsSessionsUnstarted:
    """Kills the first `count` greenlets of sessions before they run."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, greenlet: gevent.Greenlet[..., Any]) -> None:
        if self.left and type(greenlet).__name__ == "SessionGreenlet":
            self.left -= 1
            greenlet.kill(block=False)


def test_session_that_is_killed_before_it_starts_is_gone_unheard(
    ps_server: ServerFactory,
) -> None:
    """Its function never runs, no finally of it either: the place must be free all the same."""
    callback = echo()
    server = ps_server(callback, max_sessions=2)
    killing = KillsSessionsUnstarted(5)
    gevent.Greenlet.add_spawn_callback(killing)
    try:
        for _ in range(5):
            with ScriptedClient(server.address) as client, contextlib.suppress(ConnectionError):
                client.receive_until_eof()
    finally:
        gevent.Greenlet.remove_spawn_callback(killing)
    assert killing.left == 0
    assert server.get_session_count() == 0
    assert callback.named("on_open") == callback.named("on_close") == []
    assert_serves(server)


def test_connection_that_is_gone_before_it_begins_costs_nothing(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        monkeypatch.undo()
        raise OSError(errno.EINVAL, "Invalid argument")  # what macOS says of a reset one

    server = ps_server(echo())
    caplog.set_level(logging.INFO, "psofa_gevent")
    monkeypatch.setattr("psofa_gevent.owner.manager.PsSession", fail)
    with ScriptedClient(server.address) as client:
        client.receive_until_eof()
    assert server.get_session_count() == 0
    assert_serves(server)
    assert caplog.records == []


@pytest.mark.logs_errors
def test_connection_that_cannot_be_started_is_logged_and_costs_no_other(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        monkeypatch.undo()
        raise MemoryError

    server = ps_server(echo())
    with ScriptedClient(server.address) as open_one:
        open_one.send("before")
        open_one.expect("before")
        monkeypatch.setattr("psofa_gevent.session.connection.random_bytes", fail)
        with ScriptedClient(server.address) as client:
            client.receive_until_eof()
        assert server.get_session_count() == 1
        open_one.send("after")
        open_one.expect("after")
    assert_serves(server)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info
    assert record.exc_info[0] is MemoryError


def test_clients_that_reset_before_they_are_accepted_cost_nothing(
    ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = echo()
    server = ps_server(callback)
    caplog.set_level(logging.INFO, "psofa_gevent")
    for _ in range(50):
        client = _SystemSocket(socket.AF_INET, socket.SOCK_STREAM)
        client.connect(server.address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert_serves(server)
    eventually(lambda: server.get_session_count() == 0)
    eventually(lambda: len(callback.named("on_open")) == len(callback.named("on_close")))
    assert caplog.records == []


# Stop and resume accepting


def test_paused_server_lets_clients_wait_and_serves_them_when_resumed(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = echo()
    server = ps_server(callback)
    before = ps_client(server)
    callback.wait_for("on_open")
    server.stop_accepting()
    waiting = [ps_client(server) for _ in range(5)]
    for client in waiting:
        client.send("hello")
    waiting[0].expect_nothing(0.1)
    before.send("still served")
    before.expect("still served")
    assert len(callback.named("on_open")) == 1
    assert server.started
    server.resume_accepting()
    for client in waiting:
        client.expect("hello")
    assert_serves(server)


def test_pause_takes_effect_at_once(ps_server: ServerFactory) -> None:
    """Also for those whom the hub would accept in its very next turn."""
    callback = echo()
    server = ps_server(callback)
    with native_clients(server.address, 3):
        server.stop_accepting()
        gevent.sleep(0.05)
        assert callback.named("on_open") == []
        server.resume_accepting()
        callback.wait_for("on_open", 3)


def test_one_who_waited_and_left_meanwhile_is_still_told_right(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback)
    server.stop_accepting()
    with ScriptedClient(server.address) as client:
        client.send("last words")
    server.resume_accepting()
    [closed] = callback.wait_for("on_close")
    assert callback.received() == b"last words"
    # Nobody is there to take the echo: whichever the kernel tells first.
    assert closed.value in (PsCloseReason.PEER_CLOSE, PsCloseReason.FAILED)


def test_pausing_and_resuming_twice_is_the_same_as_once(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    server.stop_accepting()
    server.stop_accepting()
    server.resume_accepting()
    server.resume_accepting()
    assert_serves(server)


def test_pause_and_resume_without_a_turn_of_the_hub_between_them(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    server.stop_accepting()
    server.resume_accepting()
    assert_serves(server)
    server.stop_accepting()
    server.resume_accepting()
    server.stop_accepting()
    with ScriptedClient(server.address) as client:
        client.send("x")
        client.expect_nothing(0.1)
        server.resume_accepting()
        client.expect("x")


def test_pausing_a_server_that_is_not_started_has_no_effect() -> None:
    server = local_server(echo())
    server.stop_accepting()
    server.resume_accepting()
    server.stop_accepting()
    with server:
        assert_serves(server)
        server.stop_accepting()
    server.resume_accepting()
    server.stop_accepting()
    with server:
        assert_serves(server)


def test_pausing_in_on_start_begins_paused() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            owner.stop_accepting()

    callback = Callback(lambda message: message)
    with local_server(callback) as server, ScriptedClient(server.address) as client:
        client.send("hello")
        client.expect_nothing(0.1)
        server.resume_accepting()
        client.expect("hello")


def test_another_thread_may_pause_and_resume(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    NativeThread(server.stop_accepting).join()
    with ScriptedClient(server.address) as client:
        client.send("hello")
        client.expect_nothing(0.1)
        NativeThread(server.resume_accepting).join()
        client.expect("hello")


def test_shutdown_of_a_paused_server_ends_its_sessions() -> None:
    callback = echo()
    with (
        local_server(callback) as server,
        ScriptedClient(server.address) as served,
    ):
        callback.wait_for("on_open")
        server.stop_accepting()
        with native_clients(server.address, 1):
            server.shutdown()
        served.expect_eof()
    assert len(callback.named("on_open")) == len(callback.named("on_close")) == 1


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
