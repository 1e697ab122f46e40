"""systemd: the sockets that it gives (LISTEN_FDS), and what it is told (NOTIFY_SOCKET)."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.subprocess
import pytest

from example_process import EXAMPLES, ended_well
from helpers import (
    LOOPBACK,
    PythonProcess,
    close_reasons,
    echo,
    free_port,
    local_server,
    python_process,
    wait_until_accepting,
)
from psofa_gevent import PsCallback, PsCloseReason, PsServer, PsServerError, PsSession, systemd
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

FIRST = 200
"""Where the tests have what systemd has from 3 on."""
needs_socket_activate = pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="no systemd-socket-activate here"
)


class Manager:
    """The manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = gevent.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0"))
        self.address = address
        self.told: list[str] = []

    def next(self, timeout: float = 20.0) -> str:
        self.socket.settimeout(timeout)
        self.told.append(self.socket.recv(4096).decode())
        return self.told[-1]

    def expect(self, state: str, timeout: float = 20.0) -> str:
        """Wait for what begins with `state`."""
        with gevent.Timeout(timeout, AssertionError(f"no {state} among {self.told}")):
            while not self.next(timeout).startswith(state):
                pass
        return self.told[-1]

    def expect_silence(self, seconds: float) -> None:
        """Wait until nothing has come for so long."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.next(seconds)

    def expect_nothing(self, seconds: float) -> None:
        with pytest.raises(TimeoutError):
            self.next(seconds)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    started = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", started.address)
    with started.socket:
        yield started


# The sockets


Give = Callable[..., list[socket.socket]]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Iterator[Give]:
    """Gives listening sockets, or other descriptors, to this process, as systemd does."""
    monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", FIRST)
    with contextlib.ExitStack() as stack:

        def give(*given: int | None, names: str | None = None) -> list[socket.socket]:
            sockets = []
            for place, descriptor in enumerate(given, FIRST):
                if descriptor is None:
                    sock = stack.enter_context(socket.create_server((LOOPBACK, 0)))
                    sockets.append(sock)
                os.dup2(sock.fileno() if descriptor is None else descriptor, place)
                stack.callback(os.close, place)
            monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
            monkeypatch.setenv("LISTEN_FDS", str(len(given)))
            monkeypatch.delenv("LISTEN_FDNAMES", raising=False)
            if names is not None:
                monkeypatch.setenv("LISTEN_FDNAMES", names)
            return sockets

        yield give


def ports(name: str | None = None) -> list[int]:
    """The ports of what `listen_sockets` returns."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(sock) for sock in systemd.listen_sockets(name)]
        return [sock.getsockname()[1] for sock in found]


def test_the_sockets_of_systemd_come_in_their_order_and_again(give: Give) -> None:
    expected = [sock.getsockname()[1] for sock in give(None, None, None)]
    assert ports() == expected
    assert ports() == expected
    assert ports("unknown") == expected
    assert os.environ["LISTEN_FDS"] == "3"


def test_sockets_of_systemd_are_found_by_their_names(give: Give) -> None:
    expected = [
        sock.getsockname()[1] for sock in give(None, None, None, names="echo:admin.socket:echo")
    ]
    assert ports() == expected
    assert ports("echo") == [expected[0], expected[2]]
    assert ports("admin.socket") == [expected[1]]
    assert ports("") == []
    assert ports("unknown") == []


def test_descriptors_of_systemd_are_not_passed_on(give: Give) -> None:
    give(None, None, names="a:b")
    assert os.get_inheritable(FIRST)
    for sock in systemd.listen_sockets("a"):
        assert not sock.get_inheritable()
        sock.close()
    assert not os.get_inheritable(FIRST)
    assert not os.get_inheritable(FIRST + 1)


def test_there_are_no_sockets_for_other_processes(
    give: Give, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(None)
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    assert systemd.listen_sockets() == []
    monkeypatch.delenv("LISTEN_PID")
    assert systemd.listen_sockets() == []


def test_without_listen_fds_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert systemd.listen_sockets() == []
    monkeypatch.setenv("LISTEN_FDS", "0")
    monkeypatch.setenv("LISTEN_FDNAMES", "")
    assert systemd.listen_sockets() == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LISTEN_PID", "me"),
        ("LISTEN_FDS", "-1"),
        ("LISTEN_FDS", "two"),
        ("LISTEN_FDS", ""),
        ("LISTEN_FDS", "1" * 5_000),
        ("LISTEN_FDNAMES", "one:two"),
    ],
)
def test_an_environment_that_is_none_of_systemds_is_refused(
    give: Give, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    give(None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable) as refused:
        systemd.listen_sockets()
    assert repr(value) in str(refused.value)


def test_what_is_no_socket_is_told_unless_others_are_asked_for(give: Give) -> None:
    with open(os.devnull) as file:
        [sock] = give(None, file.fileno(), names="echo:fifo")
    with pytest.raises(ValueError, match=r"'fifo', is not a socket"):
        systemd.listen_sockets()
    assert ports("echo") == [sock.getsockname()[1]]


@pytest.mark.parametrize("count", ["2", "9" * 20])
def test_a_descriptor_that_is_not_open_is_told(
    give: Give, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    give(None)
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(OSError, match="Bad file descriptor"):
        systemd.listen_sockets()


@pytest.mark.parametrize("name", [b"echo", 1, ["echo"]])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="name must be"):
        systemd.listen_sockets(name)


def test_a_server_takes_the_sockets_of_systemd_as_they_come(give: Give) -> None:
    addresses = [sock.getsockname() for sock in give(None, None)]
    sockets = systemd.listen_sockets()
    server = PsServer(echo(), listener=sockets)
    for _ in range(2):
        with server:
            assert server.addresses == addresses
            for address in addresses:
                with ScriptedClient(address) as client:
                    client.send("x")
                    client.expect("x")
    for sock in sockets:
        sock.close()


ACTIVATE = """
    import os, socket, sys

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for number, sock in enumerate(sockets, 3):
        print("socket", sock.getsockname()[1], flush=True)
        copy = os.dup(os.dup(os.dup(sock.fileno())))  # out of the way
        sock.close()
        os.dup2(copy, 50 + number)
    for number in (3, 4):
        os.dup2(50 + number, number)
    os.environ.update(
        LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="echo.socket:admin.socket"
    )
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_psofa_serve_serves_the_sockets_of_systemd(tmp_path: Path) -> None:
    program = tmp_path / "activate.py"
    program.write_text(textwrap.dedent(ACTIVATE))
    arguments = ("-m", "psofa_gevent", "serve", "--listener", "systemd")
    with python_process(str(program), *arguments) as process:
        found = [int(process.expect_line("socket").split()[1]) for _ in range(2)]
        process.expect_line(f"Listening on 127.0.0.1:{found[0]}")
        process.expect_line(f"and on      127.0.0.1:{found[1]}")
        for port in found:
            with ScriptedClient((LOOPBACK, port)) as client:
                client.send("hello")
                client.expect("hello")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


@contextlib.contextmanager
def socket_activated(
    *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[PythonProcess, int]]:
    """A Python program under systemd-socket-activate, which starts it when a client comes."""
    port = free_port()
    passed = ["PYTHONPATH", "PYTHONUNBUFFERED", *(environment or {})]
    command = [
        *("systemd-socket-activate", "--listen", f"{LOOPBACK}:{port}", "--fdname", "echo"),
        *(f"--setenv={name}" for name in passed),
        *(sys.executable, *arguments),
    ]
    run = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    with python_process("-c", run, *command, environment=environment) as process:
        process.expect_line("Listening on")
        yield process, port


@needs_socket_activate
def test_a_client_starts_psofa_serve_by_way_of_systemd_and_is_served() -> None:
    with socket_activated("-m", "psofa_gevent", "serve", "--listener", "systemd") as (
        process,
        port,
    ):
        with ScriptedClient((LOOPBACK, port), timeout=20) as client:
            client.send("are you there?")
            process.expect_line(f"Listening on {LOOPBACK}:{port}")
            client.expect("are you there?")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


# The example


@needs_socket_activate
def test_the_example_is_started_for_its_first_client(manager: Manager) -> None:
    program = str(EXAMPLES / "systemd" / "echo.py")
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000000"}
    with socket_activated(program, environment=environment) as (process, port):
        with ScriptedClient((LOOPBACK, port), timeout=20) as client:
            client.send("first")
            client.expect("first")
            process.expect_line(f"listening on {LOOPBACK}:{port}")
            assert manager.expect("READY=1").endswith(f"STATUS=Listening on {LOOPBACK}:{port}")
            manager.expect("WATCHDOG=1")
            process.send_signal(signal.SIGTERM)
            manager.expect("STOPPING=1")
            client.send("still served")
            client.expect("still served")
        ended_well(process)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_units_of_the_example_are_as_systemd_wants_them(tmp_path: Path) -> None:
    for name in ("echo.socket", "echo.service"):
        text = (EXAMPLES / "systemd" / name).read_text()
        program = str(EXAMPLES / "systemd" / "echo.py")
        installed = text.replace("@PYTHON@", sys.executable).replace("@PROGRAM@", program)
        (tmp_path / name).write_text(installed)
    assert f"ExecStart={sys.executable} {program}\n" in installed
    command = ["systemd-analyze", "--man=no", "verify", "./echo.socket", "./echo.service"]
    result = gevent.subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    ours = [line for line in result.stderr.splitlines() if "echo." in line]
    assert ours == []


# Telling


def test_notify_tells_the_manager(manager: Manager) -> None:
    assert systemd.notify("READY=1\nSTATUS=Fine: ü")
    assert manager.next() == "READY=1\nSTATUS=Fine: ü"


@pytest.mark.skipif(sys.platform != "linux", reason="a namespace of Linux's")
def test_notify_knows_the_abstract_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Manager(f"@psofa-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", started.address)
    with started.socket:
        assert systemd.notify("READY=1")
        assert started.next() == "READY=1"


@pytest.mark.parametrize(
    "address", ["", "notify", "/", "@", "vsock:2:1234", "/nowhere/notify", "/" + "x" * 200, "@gone"]
)
def test_where_nobody_is_notify_says_so(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notify("READY=1")


def test_without_a_manager_notify_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")


def test_notify_does_not_wait_for_a_manager_that_does_not_read(manager: Manager) -> None:
    with gevent.Timeout(10):
        while systemd.notify("STATUS=" + "x" * 4_000):
            pass
    assert not systemd.notify("READY=1")
    manager.next()
    assert systemd.notify("READY=1")


def test_a_state_that_is_no_text_is_refused() -> None:
    state: Any
    for state in (b"READY=1", None, 1):
        with pytest.raises(TypeError, match="state must be"):
            systemd.notify(state)


def test_the_watchdog_is_for_the_process_that_systemd_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert systemd.watchdog_timeout() is None
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    assert systemd.watchdog_timeout() == 1.5
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert systemd.watchdog_timeout() == 1.5
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert systemd.watchdog_timeout() is None
    for wrong in ("soon", "9" * 500):
        monkeypatch.setenv("WATCHDOG_USEC", wrong)
        with pytest.raises(ValueError, match=f"WATCHDOG_USEC must be a number, not '{wrong}'"):
            systemd.watchdog_timeout()


# serve_forever


@contextlib.contextmanager
def serving(server: PsServer) -> Iterator[gevent.Greenlet[..., Any]]:
    """`serve_forever` in a greenlet; at the end of the block the server shuts down."""
    greenlet = gevent.spawn(server.serve_forever)
    try:
        yield greenlet
    finally:
        server.shutdown()
        greenlet.get()


def test_serve_forever_tells_when_clients_can_come_and_when_it_stops(manager: Manager) -> None:
    server = PsServer(echo(), listener=[(LOOPBACK, 0), (LOOPBACK, 0)])
    with serving(server):
        told = manager.next()
        where = ", ".join(f"{LOOPBACK}:{address[1]}" for address in server.addresses)
        assert told == f"READY=1\nSTATUS=Listening on {where}"
        with ScriptedClient(server.address) as client:
            client.send("x")
            client.expect("x")
        manager.expect_nothing(0.05)
    assert manager.next().startswith("STOPPING=1\n")
    manager.expect_nothing(0.05)
    with serving(server):
        assert manager.next().startswith("READY=1")


def test_a_server_that_was_started_before_is_ready_at_once(manager: Manager) -> None:
    server = local_server()
    with server:
        manager.expect_nothing(0.02)
        with serving(server):
            assert manager.next().startswith("READY=1")


def test_stopping_is_told_when_the_shutdown_begins(manager: Manager) -> None:
    callback = RecordingCallback()
    server = local_server(callback)
    with serving(server) as greenlet:
        manager.expect("READY=1")
        with ScriptedClient(server.address):
            callback.wait_for("on_open")
            stop = gevent.spawn(server.shutdown, drain=30)
            manager.expect("STOPPING=1")
            assert server.get_session_count() == 1
            assert not greenlet.dead
        stop.get()
        greenlet.get()
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


def test_a_shutdown_from_a_callback_is_told(manager: Manager) -> None:
    class Stops(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            assert isinstance(session.owner, PsServer)
            session.owner.shutdown()

    server = local_server(Stops())
    with serving(server):
        manager.expect("READY=1")
        with ScriptedClient(server.address) as client:
            client.send("stop")
            manager.expect("STOPPING=1")


def test_a_signal_is_told_as_stopping(manager: Manager) -> None:
    arguments = ("--port", "0", "--drain", "30")
    with python_process("-m", "psofa_gevent", "serve", *arguments) as process:
        address = process.expect_line("Listening on ").rpartition(":")
        status = manager.expect("READY=1").split("\n")[1]
        assert status == f"STATUS=Listening on {LOOPBACK}:{address[2]}"
        with ScriptedClient((LOOPBACK, int(address[2]))) as client:
            client.send("x")
            client.expect("x")
            process.send_signal(signal.SIGTERM)
            manager.expect("STOPPING=1")
            client.send("still served, to drain")
            client.expect("still served, to drain")
        assert process.wait() == 0


def test_a_shutdown_in_the_middle_of_telling_is_told_too(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a handler of `signal.signal`, which may run between any two lines."""
    server = local_server()
    send = systemd.send

    def interrupted(state: str, sending: Any) -> bool:
        if state.startswith("READY=1"):
            monkeypatch.setattr(systemd, "send", send)
            server._begin_shutdown(server._manager, PsCloseReason.SHUTDOWN, 5.0, 0.0)  # type: ignore[arg-type]  # it has one
        return send(state, sending)

    monkeypatch.setattr(systemd, "send", interrupted)
    server.serve_forever()
    manager.expect("READY=1")
    manager.expect("STOPPING=1")


@pytest.mark.logs_errors
def test_a_start_that_fails_tells_nothing(manager: Manager) -> None:
    class Fails(PsCallback):
        def on_start(self, owner: Any) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        local_server(Fails()).serve_forever()
    with local_server() as taken, pytest.raises(PsServerError):
        PsServer(PsCallback(), host=LOOPBACK, port=taken.address[1]).serve_forever()
    manager.expect_nothing(0.05)


def test_the_last_of_two_servers_tells_that_it_stops(manager: Manager) -> None:
    first, second = local_server(), local_server()
    with serving(first):
        manager.expect("READY=1")
        with serving(second):
            manager.expect("READY=1")
        manager.expect_nothing(0.05)
    assert manager.next().startswith("STOPPING=1")


def test_two_greenlets_in_serve_forever_of_a_server_tell_once(manager: Manager) -> None:
    server = local_server()
    with serving(server):
        manager.expect("READY=1")
        second = gevent.spawn(server.serve_forever)
        manager.expect_nothing(0.05)
    second.get()
    assert manager.next().startswith("STOPPING=1")
    manager.expect_nothing(0.05)


def test_what_the_manager_does_not_take_at_once_is_told_later(manager: Manager) -> None:
    while systemd.notify("STATUS=" + "x" * 4_000):
        pass
    server = local_server()
    with serving(server):
        eventually(lambda: server.started)
        manager.expect("READY=1")
    manager.expect("STOPPING=1")


@pytest.mark.parametrize("address", ["/nowhere/notify", "@gone", "vsock:2:1234"])
def test_a_manager_that_is_not_there_is_no_harm(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    server = local_server(echo())
    with serving(server):
        eventually(lambda: server.started)
        gevent.sleep(0.05)
        with ScriptedClient(server.address) as client:
            client.send("x")
            client.expect("x")


def test_the_watchdog_is_fed_as_long_as_the_server_serves_and_drains(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    callback = RecordingCallback()
    server = local_server(callback)
    with serving(server):
        manager.expect("READY=1")
        began = time.monotonic()
        for _ in range(6):
            assert manager.next() == "WATCHDOG=1"
        assert time.monotonic() - began >= 0.2
        with ScriptedClient(server.address):
            callback.wait_for("on_open")
            stop = gevent.spawn(server.shutdown, drain=30)
            manager.expect("STOPPING=1")
            manager.expect("WATCHDOG=1")
        stop.get()
    manager.expect_silence(0.2)


def test_the_watchdog_is_fed_by_a_server_that_is_out_of_descriptors(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    with serving(local_server()), contextlib.ExitStack() as stack:
        manager.expect("READY=1")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with socket.socket() as probe:
            resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno(), hard))
        for _ in range(6):  # some of them may have been told before
            assert manager.next(timeout=5) == "WATCHDOG=1"


def test_the_watchdog_of_another_process_is_not_fed(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    with serving(local_server()):
        manager.expect("READY=1")
        manager.expect_nothing(0.1)


def test_a_watchdog_time_that_is_none_is_told_and_no_harm(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    with serving(local_server()), caplog.at_level(logging.WARNING):
        manager.expect("READY=1")
        eventually(lambda: "WATCHDOG_USEC must be a number, not 'soon'" in caplog.text)


def test_a_blocked_hub_lets_the_watchdog_starve(manager: Manager) -> None:
    program = """
        import sys, time
        from psofa_gevent import PsCallback, PsServer

        class Blocks(PsCallback):
            def on_message(self, session, message):
                time.sleep(float(message))
                session.send("woke up")

        PsServer(Blocks(), host="127.0.0.1", port=int(sys.argv[1])).serve_forever()
    """
    port = free_port()
    environment = {"WATCHDOG_USEC": "100000"}
    arguments = ("-c", textwrap.dedent(program), str(port))
    with python_process(*arguments, environment=environment) as process:
        manager.expect("READY=1")
        manager.expect("WATCHDOG=1")
        wait_until_accepting((LOOPBACK, port))
        with ScriptedClient((LOOPBACK, port), timeout=20) as client:
            client.send("0.8")
            manager.expect_silence(0.4)
            client.expect("woke up")
        manager.expect("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        manager.expect("STOPPING=1")
        assert process.wait() == 0
