"""An address at which another process listens: `start` waits for one that is about to leave it."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from helpers import LOOPBACK, PythonProcess, python_process
from psofa_gevent import PsCallback, PsServer, PsServerError
from psofa_gevent.listening import binds
from psofa_gevent.testing import ScriptedClient, eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who listens")

PROGRAM = """
    import signal, socket, sys
    family = socket.AF_UNIX if sys.argv[1].startswith("/") else socket.AF_INET
    sock = socket.socket(family)
    sock.bind(sys.argv[1] if family == socket.AF_UNIX else (sys.argv[1], 0))
    sock.listen()
    address = sock.getsockname()
    print("listens", address if family == socket.AF_UNIX else address[1], flush=True)
    signal.pause()
"""


@contextlib.contextmanager
def other_process(where: str) -> Iterator[tuple[PythonProcess, str]]:
    with python_process("-c", textwrap.dedent(PROGRAM), where) as process:
        yield process, process.expect_line("listens").split()[1]


@pytest.fixture(params=["TCP", "Unix"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return LOOPBACK if request.param == "TCP" else str(tmp_path / "app.sock")


def server_at(where: str, found: str) -> PsServer[bytes]:
    if where == found:
        return PsServer(PsCallback(), host=f"unix:{found}")
    return PsServer(PsCallback(), host=where, port=int(found))


def test_start_waits_for_another_process_that_leaves_the_address(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    with other_process(where) as (process, found):
        server = server_at(where, found)
        with caplog.at_level(logging.WARNING, "psofa_gevent"):
            starting = gevent.spawn(server.start)
            eventually(lambda: "in use: trying again" in caplog.text)
        assert not starting.ready()
        process.send_signal(signal.SIGKILL)
        starting.get(timeout=30)
        assert caplog.text.count("trying again") == 1
        with server, ScriptedClient(server.address) as client:
            client.eof()
            client.expect_eof()


def test_an_address_that_another_process_keeps_is_an_error_in_the_end(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binds, "BIND_PATIENCE", 0.2)
    with other_process(where) as (_process, found):
        server = server_at(where, found)
        with pytest.raises(
            PsServerError, match=r"in use, by another process for 0\.2 s"
        ) as refused:
            server.start()
        cause = refused.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == errno.EADDRINUSE
        assert not server.started


def test_a_shutdown_ends_a_start_that_waits(where: str) -> None:
    with other_process(where) as (_process, found):
        server = server_at(where, found)

        def start() -> None:
            with pytest.raises(PsServerError):
                server.start()

        starting = gevent.spawn(start)
        eventually(lambda: server._is_starting)
        server.shutdown()
        starting.get(timeout=30)
        assert not server.started


def test_nobody_waits_for_what_this_process_holds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binds, "BIND_PATIENCE", 1_000)
    with PsServer(PsCallback(), host=LOOPBACK, port=0) as first:
        second = PsServer(PsCallback(), host=LOOPBACK, port=first.address[1])
        with pytest.raises(PsServerError, match=r"in use$"):
            second.start()
