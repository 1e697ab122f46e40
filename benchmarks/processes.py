"""Processes on two cores: the server on one, the load generator and this process on the other."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.peers import Peer

__all__ = [
    "PROJECT",
    "BenchmarkError",
    "Child",
    "Server",
    "load_core",
    "pin_to_load_core",
    "server_core",
    "start_server",
]

PROJECT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0
"""Seconds that a program may take to answer, on a busy machine."""
CPUCLOCK_SCHED = 2
_cores = sorted(os.sched_getaffinity(0))
server_core, load_core = _cores[0], _cores[-1]


class BenchmarkError(Exception):
    """A measurement can't be taken; the text says why."""


def pin_to_load_core() -> None:
    """Keep this process, and by default its children, off the server's core."""
    os.sched_setaffinity(0, {load_core})


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Child:
    """A process that answers with lines of JSON; it is killed at the end of its ``with``."""

    def __init__(
        self, command: Sequence[str | Path], core: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name = Path(command[0]).name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        with _on_core(core):  # children inherit it
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
            )
        self.pid = self._process.pid
        self._stat = psutil.Process(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def answer(self, seconds: float = START_SECONDS) -> dict[str, Any]:
        """The next line of its output, parsed.

        Raises:
            BenchmarkError: the process ended, or did not answer within `seconds`.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._errors.seek(0)
            reason = self._errors.read().decode(errors="replace").strip()[-2000:]
            why = "ended" if ready else f"did not answer within {seconds:g} s"
            raise BenchmarkError(f"{self._name} {why}: {reason or 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def cpu_seconds(self) -> float:
        """The CPU time that the process has used, with the resolution of the scheduler (ns).

        Read from its CPU clock, see clock_getcpuclockid(3): /proc/PID/stat counts ticks of 10 ms.
        """
        return time.clock_gettime((~self.pid << 3) | CPUCLOCK_SCHED)

    def waited_seconds(self) -> float:
        """Seconds that the process was ready to run while another one had its core."""
        _ran, waited, _times = Path(f"/proc/{self.pid}/schedstat").read_text().split()
        return int(waited) / 1e9

    def resident_bytes(self) -> int:
        resident: int = self._stat.memory_info().rss
        return resident


class Server(Child):
    """A server on the server's core, which listens on `port`."""

    def __init__(
        self,
        peer: Peer,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        seconds: float = START_SECONDS,
    ) -> None:
        super().__init__(command, server_core, environment)
        self.peer = peer
        try:
            self.port: int = self.answer(seconds)["port"]
        except BaseException:
            self.__exit__()
            raise


def start_server(
    peer: Peer,
    work: str,
    load_program: Path,
    *,
    under: Sequence[str] = (),
    seconds: float = START_SECONDS,
) -> Server:
    """Start `peer` on the server's core, and wait until it listens.

    Args:
        peer: what serves.
        work: what it does: see `benchmarks.servers`.
        load_program: has the server in C.
        under: the command of a tool that runs the server.
        seconds: the server must listen by then.

    Raises:
        BenchmarkError: it does not listen.
    """
    if not peer.module:
        return Server(peer, [*under, load_program, "serve"], seconds=seconds)
    # -P: the directory in which we are is not searched, so PYTHONPATH chooses the checkout.
    return Server(
        peer,
        [*under, sys.executable, "-P", "-m", "benchmarks.servers", peer.served_as, work],
        environment={**os.environ, "PYTHONPATH": _search_path(peer.checkout)},
        seconds=seconds,
    )


def _search_path(checkout: Path | None) -> str:
    """What PYTHONPATH must be. Without `checkout` an installed psofa_gevent stays the one used."""
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if checkout is None:
        return os.pathsep.join([*filter(None, here), str(PROJECT)])
    return os.pathsep.join([str(checkout), *filter(None, here)])
