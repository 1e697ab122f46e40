"""Forks of programs that listen: daemons take over the sockets, and workers have their own."""

from __future__ import annotations

import os
import re
import signal
import textwrap
from pathlib import Path

import gevent
import pytest

from forks import PATCHED, PRELUDE, run, serving_program
from helpers import LOOPBACK, REPOSITORY, PythonProcess, free_port, python_process
from psofa_gevent.testing import ScriptedClient, eventually

DAEMONS = {
    "wait_for": "server.wait_for()",
    "serve_forever": "server.serve_forever()",
    "start": "server.start(); server.wait_for()",
    "with": "server.__enter__().wait_for()",
}


def daemon(where: str, serves: str, body: str = "") -> str:
    return (
        textwrap.dedent(PRELUDE)
        + textwrap.dedent(
            f"""
        class Starts(Who):
            def on_start(self, owner):
                say("on_start", os.getpid())
            def on_stop(self, owner):
                say("on_stop", os.getpid())
        server = PsServer(Starts(), framing=Line(), {where})
        server.start()
        print("port", server.address[1], flush=True)
        """
        )
        + body
        + textwrap.dedent(
            """
        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        with open(sys.argv[1], "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1], sys.argv[1] + ".pid")
        """
        )
        + textwrap.dedent(serves)
    )


def daemon_pid(process: PythonProcess, folder: Path) -> int:
    """The daemon's id, when it has written it and its parents have ended."""
    file = folder / "daemon.pid"
    eventually(file.exists, 20)
    return int(file.read_text())


@PATCHED
@pytest.mark.parametrize("how", DAEMONS)
@pytest.mark.parametrize("where", ['host="127.0.0.1", port=0', 'host="localhost", port=0'])
def test_a_program_that_starts_and_then_becomes_a_daemon_serves(
    how: str, where: str, patched: str, tmp_path: Path
) -> None:
    source = daemon(where, DAEMONS[how])
    with python_process(
        "-c", source, str(tmp_path / "daemon"), environment={"HOW_PATCHED": patched}
    ) as process:
        port = int(process.expect_line("port").split()[1])
        pid = daemon_pid(process, tmp_path)
        try:
            process.expect_line(f"on_start {pid}")
            with ScriptedClient((LOOPBACK, port)) as client:
                client.send("who?\n")
                client.expect(f"{pid}\n{pid}\n")
        finally:
            os.kill(pid, signal.SIGTERM)
        process.wait()
        text = "\n".join(process.lines)
        assert f"on_start {pid}" in text
        assert "Traceback" not in text, text
        if how == "serve_forever":
            assert f"on_stop {pid}" in text


def test_a_daemon_takes_over_with_clients_on_their_way(tmp_path: Path) -> None:
    """They had a session, or waited for one: it ends with the parent, and the next one is here."""
    body = """
def connect():
    clients.append(gevent.socket.create_connection(server.address))
    gevent.sleep(0.05)
clients = []
connect()
server.stop_accepting()
connect()
"""
    source = daemon('host="127.0.0.1", port=0', DAEMONS["wait_for"], body)
    with python_process(
        "-c", source, str(tmp_path / "daemon"), environment={"HOW_PATCHED": "unpatched"}
    ) as process:
        port = int(process.expect_line("port").split()[1])
        pid = daemon_pid(process, tmp_path)
        try:
            process.expect_line(f"on_start {pid}")
            with ScriptedClient((LOOPBACK, port)) as client:
                client.expect(f"{pid}\n")
        finally:
            os.kill(pid, signal.SIGTERM)
        process.wait()
        assert "Traceback" not in "\n".join(process.lines)


@pytest.mark.parametrize("kind", ["path", "inherited"])
def test_a_daemon_takes_over_other_sockets(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    where = f'listener="unix:{path}"' if kind == "path" else "listener=own"
    source = daemon(where, DAEMONS["wait_for"]).replace(
        "class Starts", "own = listening()\nclass Starts"
    )
    with python_process(
        "-c", source, str(tmp_path / "daemon"), environment={"HOW_PATCHED": "unpatched"}
    ) as process:
        port = int(process.expect_line("port").split()[1])
        pid = daemon_pid(process, tmp_path)
        try:
            if kind == "inherited":
                with ScriptedClient((LOOPBACK, port)) as client:  # with no gap
                    client.expect(f"{pid}\n")
            else:
                process.expect_line(f"on_start {pid}")
                with gevent.socket.socket(gevent.socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    assert sock.recv(100) == b"%d\n" % pid
        finally:
            os.kill(pid, signal.SIGTERM)
        process.wait()
        assert "Traceback" not in "\n".join(process.lines)


def test_a_child_may_not_serve_what_its_parent_goes_on_to_serve() -> None:
    program = """
        from psofa_gevent.listening import binds

        binds.BIND_PATIENCE = 0.5
        server = PsServer(Who(), host=HOST, port=0, framing=Line())
        server.start()
        address = server.address

        def child():
            for _ in range(2):
                try:
                    server.wait_for()
                except PsServerError as exc:
                    print(exc, flush=True)
                assert not server.started and server.address == address

        wait(fork(child))
        assert Peer(address).who() == "parent"
        print("ids", address[1], os.getpid())
        server.shutdown()
    """
    first, second, ids = run(program)
    _, port, process = ids.split()
    assert first == second
    for part in (f"127.0.0.1:{port}", f"rocess {process} ", "PsServer(listener=sock)", "0.5 s"):
        assert part in first


def test_the_workers_of_the_readme_serve_and_end(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [snippet] = [
        block
        for block in re.findall(r"^```py\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
        if "os.fork()" in block
    ]
    port = free_port()
    snippet = snippet.replace("8710", str(port)).replace(
        "signal.sigwait(", 'print("forked", flush=True)\nsignal.sigwait('
    )
    assert "print" in snippet
    with serving_program(snippet, "unpatched") as process:
        process.expect_line("forked")
        with ScriptedClient((LOOPBACK, port)) as client:
            client.send("x")
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        assert process.lines == ["forked"]
