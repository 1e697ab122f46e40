"""The command line as a user runs it: in a process of its own, from some directory."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import gevent
import gevent.subprocess

import psofa_gevent
from psofa_gevent.testing import ScriptedClient

WHERE_THE_PACKAGE_IS = str(Path(psofa_gevent.__file__).parent.parent)
SECONDS = 30.0
"""The longest that a process may take for anything."""
APP = """
    from psofa_gevent import PsCallback

    class Upper(PsCallback):
        def on_message(self, session, message):
            session.send(message.upper())

    class Holder:
        callback = Upper()

    def make():
        return Upper()
"""


class Program:
    """``python -m psofa_gevent`` at work."""

    def __init__(self, command: list[str], directory: Path, **streams: Any) -> None:
        self.process = gevent.subprocess.Popen(
            command,
            cwd=directory,
            env=environment(),
            text=True,
            stderr=gevent.subprocess.PIPE,
            **{"stdout": gevent.subprocess.PIPE, **streams},
        )
        self.output: IO[str] = self.process.stdout or io.StringIO()
        self.errors: IO[str] = self.process.stderr or io.StringIO()
        self.log: list[str] = []

    def read_line(self) -> str:
        with gevent.Timeout(SECONDS, AssertionError("no line on the standard output")):
            return self.output.readline().rstrip("\n")

    def read_address(self) -> tuple[str, int]:
        """The address in the first line of ``serve``."""
        match = re.fullmatch(r"Listening on \[?(.+?)\]?:(\d+)", self.read_line())
        assert match, self.errors.read()
        return match[1], int(match[2])

    def read_log(self, containing: str) -> None:
        with gevent.Timeout(SECONDS, AssertionError(f"no log record with {containing!r}")):
            for line in self.errors:
                self.log.append(line)
                if containing in line:
                    return
        raise AssertionError(f"no log record with {containing!r} in {self.log}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        with gevent.Timeout(SECONDS, AssertionError("the program did not end")):
            self.log += self.errors
            code: int = self.process.wait()
            return code

    def end(self) -> None:
        self.process.kill()  # without effect on one that has ended
        self.process.wait()
        self.output.close()
        self.errors.close()


def environment() -> dict[str, str]:
    """Ours, with the package that is being tested, and as with users who set nothing."""
    paths = [WHERE_THE_PACKAGE_IS, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "psofa_gevent", *arguments]


def program(
    directory: Path, *arguments: str, **streams: Any
) -> contextlib.AbstractContextManager[Program]:
    return program_of(command(*arguments), directory, **streams)


@contextlib.contextmanager
def program_of(whole_command: list[str], directory: Path, **streams: Any) -> Iterator[Program]:
    started = Program(whole_command, directory, **streams)
    try:
        yield started
    finally:
        started.end()


def run(directory: Path, *arguments: str) -> gevent.subprocess.CompletedProcess[str]:
    return run_command(directory, command(*arguments))


def run_command(
    directory: Path, whole_command: list[str]
) -> gevent.subprocess.CompletedProcess[str]:
    return gevent.subprocess.run(
        whole_command,
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def write_module(directory: Path, name: str, source: str) -> None:
    path = directory / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))


def assert_echoes(address: tuple[str, int], sent: str = "hello", expected: str = "hello") -> None:
    with ScriptedClient(address) as client:
        client.send(sent)
        client.expect(expected)
