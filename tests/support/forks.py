"""Programs that fork, for real: pytest's own process has too much to share."""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator

import pytest

from helpers import PythonProcess, python_process
from psofa_gevent.testing import ScriptedClient

PRELUDE = """
    import os, sys, warnings

    from gevent import monkey
    if os.environ["HOW_PATCHED"] == "patched":
        monkey.patch_all()
    import asyncio, contextlib, gc, multiprocessing, signal, threading, traceback
    import gevent, gevent.event, gevent.os, gevent.socket
    from psofa_gevent import *
    from psofa_gevent.framing import Line
    from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork in a process with threads
    HOST = "127.0.0.1"
    PARENT = os.getpid()

    def say(*words):
        "Print a line, in one piece: another process may, too."
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    def leave(code=0):
        "In a child. gevent's os.fork never hears of a first one that ends at once."
        sys.stdout.flush()
        monkey.get_original("time", "sleep")(0.1)
        os._exit(code)

    def run_and_exit(function):
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            leave(code)

    def fork(function, way=os.fork):
        "A child that runs it."
        pid = way()
        if pid == 0:
            run_and_exit(function)
        return pid

    def wait(*pids):
        "Wait until they have ended, while the hub goes on; all well."
        for pid in pids:
            with gevent.Timeout(20):
                while (ended := gevent.os.waitpid(pid, os.WNOHANG))[0] == 0:
                    gevent.sleep(0.01)
            assert ended[1] == 0, ended

    class Who(PsCallback):
        def on_open(self, session):
            session.send(str(os.getpid()))
        def on_message(self, session, message):
            session.send(str(os.getpid()))

    class Peer(ScriptedClient):
        def who(self):
            "Who answers: 'parent', or another process's id."
            line = b""
            while not line.endswith(b"\\n"):
                line += self.receive(1)
            return "parent" if int(line) == PARENT else line.decode().strip()

        def ask(self):
            self.send("who?\\n")
            return self.who()

    def listening():
        "A socket of the program's own."
        sock = gevent.socket.socket()
        sock.bind((HOST, 0))
        sock.listen(5)
        return sock

    def sockets():
        "The inodes of this process's sockets, by descriptor."
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                to = os.readlink(f"/proc/self/fd/{name}")
                if to.startswith("socket:"):
                    found[int(name)] = to
        return found
"""

PATCHED = pytest.mark.parametrize("patched", ["unpatched", "patched"])
NEEDS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")


def run(program: str, patched: str = "unpatched", *arguments: str, code: int = 0) -> list[str]:
    """The lines that a program prints, which ends well and complains of nothing."""
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    with python_process("-c", source, *arguments, environment={"HOW_PATCHED": patched}) as process:
        ended = process.wait()
        text = "\n".join(process.lines)
        assert ended == code, text
        assert "Traceback" not in text, text
        assert "failed to let go" not in text, text
        return process.lines


class Peer(ScriptedClient):
    """A client in pytest's own process."""

    def line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            line += self.receive(1)
        return line.decode().strip()

    def ask(self) -> str:
        self.send("who?\n")
        return self.line()


@contextlib.contextmanager
def serving_program(program: str, patched: str, *arguments: str) -> Iterator[PythonProcess]:
    """A program that runs beside the test."""
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    with python_process("-c", source, *arguments, environment={"HOW_PATCHED": patched}) as process:
        yield process
