"""Unix domain sockets: servers that listen on a path, and clients that connect to it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.subprocess
import pytest

from helpers import close_reasons, python_process, run_python
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsServer,
    PsServerError,
)
from psofa_gevent.framing import Line
from psofa_gevent.net import unix
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually


def echo() -> RecordingCallback:
    return RecordingCallback(lambda message: message)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.sock"


def connect(path: Path) -> ScriptedClient:
    sock = gevent.socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return ScriptedClient.from_socket(sock)


def test_a_server_listens_on_a_path_and_removes_it(path: Path) -> None:
    callback = echo()
    with PsServer(callback, host=f"unix:{path}") as server:
        assert server.address == (f"unix:{path}", 0)
        assert repr(server) == f"<PsServer unix:{path} started>"
        with connect(path) as client:
            client.send("hello")
            client.expect("hello")
            (session,) = server.sessions
            assert session.local_endpoint == (f"unix:{path}", 0)
            assert session.remote_endpoint is None
            assert f"unix:{path} - ?" in repr(session)
        callback.wait_for("on_close")
    assert not path.exists()
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


def test_a_scripted_client_reaches_a_path(path: Path) -> None:
    with PsServer(echo(), host=f"unix:{path}") as server:
        assert server.address == (f"unix:{path}", 0)
        with ScriptedClient(server.address) as client:
            assert client.local_endpoint is None
            client.send("hello")
            client.expect("hello")
            with pytest.raises(ValueError, match="a Unix socket has no RST"):
                client.reset()
            client.eof()
            client.expect_eof()


def test_clients_connect_to_a_path(path: Path) -> None:
    with PsServer(echo(), host=f"unix:{path}") as server:
        callback = RecordingCallback()
        host, port = server.address[:2]
        with PsClient(callback, host, port) as client:
            assert repr(client) == f"<PsClient unix:{path} connected>"
            assert client.session is not None
            assert client.session.remote_endpoint == (f"unix:{path}", 0)
            client.session.send("one")
            callback.wait_for("on_message")
        with PsMultiClient(callback) as bundle:
            bundle.connect(host, port).session.send("two")
            callback.wait_for("on_message", 2)


def test_1000_connections_over_a_path(path: Path) -> None:
    came: list[bytes] = []

    def talk(session: Any) -> None:
        session.send("x")
        came.append(session.receive(timeout=20))

    with (
        PsServer(echo(), host=f"unix:{path}", framing=Line()),
        PsMultiClient(PsHandler(talk), framing=Line()) as bundle,
    ):
        for _ in range(1_000):
            bundle.connect(f"unix:{path}", 0)
        eventually(lambda: len(came) == 1_000, 20)


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_the_mode_that_was_asked_for(mode: int, path: Path) -> None:
    with PsServer(PsCallback(), host=f"unix:{path}", unix_mode=mode):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_start_that_fails_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str, _mode: int) -> None:
        raise PermissionError("not for you")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(PsServerError, match="not for you"):
        PsServer(PsCallback(), host=f"unix:{path}", unix_mode=0o600).start()
    assert not path.exists()


def test_a_server_starts_again_on_its_path(path: Path) -> None:
    server = PsServer(echo(), host=f"unix:{path}")
    for _ in range(3):
        with server, connect(path) as client:
            client.send("x")
            client.expect("x")
        assert not path.exists()


def test_a_file_that_was_left_is_replaced(path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.listen()
    left.close()
    assert path.exists()
    with PsServer(echo(), host=f"unix:{path}"), connect(path) as client:
        client.send("x")
        client.expect("x")


def test_a_file_on_which_a_server_listens_is_refused(path: Path) -> None:
    with PsServer(echo(), host=f"unix:{path}"):
        with pytest.raises(PsServerError, match=r"cannot listen on unix:.*in use"):
            PsServer(echo(), host=f"unix:{path}").start()
        with connect(path) as client:
            client.send("still here")
            client.expect("still here")


def test_of_servers_that_start_at_the_same_time_one_listens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one comes when the first has its file, and does not listen yet."""
    chmod = os.chmod
    second = PsServer(PsCallback(), host=f"unix:{path}")
    starting: list[gevent.Greenlet[..., None]] = []

    def start_second() -> None:
        with pytest.raises(PsServerError, match="in use"):
            second.start()

    def slow_chmod(path: str, mode: int) -> None:
        starting.append(gevent.spawn(start_second))
        gevent.sleep(0.05)
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", slow_chmod)
    with PsServer(echo(), host=f"unix:{path}", unix_mode=0o600):
        starting[0].get()
        with connect(path) as client:
            client.send("x")
            client.expect("x")


@pytest.mark.parametrize("is_unlocked", [False, True])
def test_a_directory_that_somebody_has_locked_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_unlocked: bool
) -> None:
    """As a program may that has a directory of its own in /tmp (systemd-tmpfiles(8))."""
    monkeypatch.setattr(unix, "MOST_LOCK_TRIES", 1_000 if is_unlocked else 2)
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    unlocking = gevent.spawn_later(0.02 if is_unlocked else 1_000, os.close, directory)
    with PsServer(echo(), host=f"unix:{tmp_path}/app.sock"), connect(tmp_path / "app.sock") as one:
        one.send("x")
        one.expect("x")
        assert unlocking.ready() is is_unlocked
    if not is_unlocked:
        unlocking.kill()
        os.close(directory)


def test_a_server_whose_backlog_is_full_is_alive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(5)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(str(path))
        with pytest.raises(PsServerError, match="in use"):
            PsServer(echo(), host=f"unix:{path}").start()
        for each in waiting:
            each.close()
        assert path.exists()


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(PsServerError, match="the path exists and is not a socket"):
        PsServer(echo(), host=f"unix:{path}").start()
    assert path.read_text() == "precious"


def test_a_file_that_another_server_has_put_there_is_left(path: Path) -> None:
    first = PsServer(echo(), host=f"unix:{path}")
    first.start()
    path.unlink()
    with PsServer(echo(), host=f"unix:{path}"):
        first.shutdown()
        with connect(path) as client:
            client.send("x")
            client.expect("x")


def test_a_path_that_is_not_there_is_told(tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/nowhere/app.sock"
    with pytest.raises(PsServerError, match=r"cannot listen on unix:.*No such file"):
        PsServer(echo(), host=nowhere).start()
    with pytest.raises(PsClientError, match=r"cannot connect to unix:.*No such file"):
        PsClient(PsCallback(), nowhere, 0).connect()


def test_a_refused_connection_is_told(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        with pytest.raises(PsClientError, match="Connection refused"):
            PsClient(PsCallback(), f"unix:{path}", 0).connect()


@pytest.mark.parametrize("make", [PsServer, lambda callback, host: PsClient(callback, host, 0)])
def test_a_path_that_there_cannot_be_is_refused_at_once(make: Callable[..., Any]) -> None:
    for host in ("unix:", "unix:/" + "x" * 107, "unix:/tmp/\0"):
        with pytest.raises(ValueError, match="host must"):
            make(PsCallback(), host=host)


def test_a_forked_child_leaves_its_parents_file(path: Path) -> None:
    program = """
        import os, sys, gevent
        from psofa_gevent import PsCallback, PsServer
        server = PsServer(PsCallback(), host=f"unix:{sys.argv[1]}")
        server.start()
        if os.fork() == 0:
            server.shutdown()
            sys.exit()
        os.wait()
        print(os.path.exists(sys.argv[1]))
        server.shutdown()
        print(os.path.exists(sys.argv[1]))
    """
    result = run_python(program, str(path))
    assert result.stdout.split() == ["True", "False"], result.stderr


def test_psofa_serve_listens_on_a_path(path: Path) -> None:
    arguments = ("-m", "psofa_gevent", "serve", "--host", f"unix:{path}", "--unix-mode", "600")
    with python_process(*arguments) as process:
        process.expect_line(f"Listening on unix:{path}")
        process.expect_line(f"nc -U {path}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with connect(path) as client:
            client.send("hello")
            client.expect("hello")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert not path.exists()
    assert os.listdir(path.parent) == []
