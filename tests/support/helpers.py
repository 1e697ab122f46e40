"""What several of our own tests need and users of the library do not.

Processes, real OS threads, awkward peers, descriptor limits. As in `psofa_gevent.testing` all
waiting goes through gevent's hub and ends at a deadline, except for `NativeThread.join`, whose
point it is to block the hub.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import gevent
import gevent.socket
import gevent.subprocess
from gevent import monkey

import psofa_gevent
from psofa_gevent import PsCallback, PsServer
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

P = ParamSpec("P")
T = TypeVar("T")

SUPPORT = Path(__file__).resolve().parent
"""The directory of this file, where programs of tests are started: they may import from it."""
REPOSITORY = SUPPORT.parent.parent
LOOPBACK = "127.0.0.1"
TINY_BUFFER = 4_096
SLACK = 2.0
"""Seconds: how late this machine may be, beside the time in which others have its cores."""
SCHEDULER_STATISTICS = Path("/proc/thread-self/schedstat")
PORTS = range(20_000, 32_000)
"""Below those that systems give away: from 32768 on Linux, from 49152 elsewhere."""
PORTS_OF_A_PROCESS = 100
EARLY = 0.02
"""Seconds: how early timers may fire; both of gevent's loops count in milliseconds."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on which nobody listens: for a program that must be told one, and for none.

    It is none of those that the system gives to clients, and to who asks for port 0: another test,
    in another process, could have it a moment later, and a client that tries one of them again and
    again where nobody listens is connected with itself in the end.

    In our own processes ask for port 0 instead, which no one else can take in between.
    """
    family = gevent.socket.AF_INET6 if ":" in host else gevent.socket.AF_INET
    for port in _ports:
        with contextlib.suppress(OSError), gevent.socket.socket(family) as sock:
            sock.bind((host, port))
            return port
    raise AssertionError(f"no port of {PORTS} is free")


def _own_ports() -> Iterator[int]:
    """Those of this process: each begins elsewhere, as far as there are not very many."""
    first = os.getpid() * PORTS_OF_A_PROCESS
    for number in range(len(PORTS)):
        yield PORTS[(first + number) % len(PORTS)]


_ports = _own_ports()


def accepts_connections(address: tuple[Any, ...]) -> bool:
    """Whether a connection to `address` can be made now."""
    try:
        ScriptedClient(address, timeout=1.0).close()
    except OSError:
        return False
    return True


def wait_until_accepting(address: tuple[Any, ...], timeout: float = 10.0) -> None:
    """Wait until a server, in another process for example, takes connections at `address`."""
    eventually(
        lambda: accepts_connections(address), timeout, f"nobody accepts connections at {address}"
    )


def stalled_peer(address: tuple[Any, ...]) -> ScriptedClient:
    """A client with a tiny receive buffer: as long as its script doesn't read, sends to it stall.

    The sender's own buffer takes up to some megabytes before they do. A stalled sender's kernel
    looks again after longer and longer pauses whether the peer reads (RFC 9293, section 3.8.6.1),
    so on a busy machine what comes next may take many seconds.
    """
    return ScriptedClient(address, receive_buffer_size=TINY_BUFFER, timeout=30.0)


def echo() -> RecordingCallback:
    """A callback that sends back what it gets."""
    return RecordingCallback(lambda message: message)


def local_server(callback: PsCallback | None = None, **settings: Any) -> PsServer:
    """A server on a free port, not started."""
    return PsServer(callback or PsCallback(), host=LOOPBACK, port=0, **settings)


class Keeping(logging.Handler):
    """Keeps the records."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """The library's logger with one more handler, for all levels."""
    logger = logging.getLogger("psofa_gevent")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def close_reasons(callback: RecordingCallback) -> list[object]:
    """The reasons of all ``on_close`` calls so far; no session had two of them."""
    closed = callback.named("on_close")
    sessions = [event.session for event in closed]
    assert len(sessions) == len(set(sessions)), "a session got on_close twice"
    return [event.value for event in closed]


def living_greenlets() -> set[gevent.Greenlet[..., Any]]:
    """Every greenlet of gevent's that has not ended, wherever it is held."""
    gc.collect()
    return {
        item for item in gc.get_objects() if isinstance(item, gevent.Greenlet) and not item.dead
    }


def waited_for_a_core() -> float:
    """Seconds in which this thread could have run, and others had the cores, since it began.

    Linux tells (Documentation/scheduler/sched-stats.rst); elsewhere it is 0.
    """
    try:
        nanoseconds = SCHEDULER_STATISTICS.read_text().split()[1]
    except OSError:
        return 0.0
    return int(nanoseconds) / 1e9


class Stopwatch:
    """How many seconds something takes, for tests that run on machines that are busy.

    At least so many are those of the clock; at most so many are those that the same takes on a
    machine that has nothing else to do, give or take `SLACK`.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._had_waited = waited_for_a_core()

    def check(self, least: float = 0.0, *, most: float) -> None:
        """Check that from its making until now it is so many."""
        self.check_moment(time.monotonic(), least, most=most)

    def check_moment(self, moment: float, least: float = 0.0, *, most: float) -> None:
        """The same until a moment of the monotonic clock, not long ago."""
        spent = moment - self._began
        lost = waited_for_a_core() - self._had_waited
        assert least - EARLY <= spent, f"{spent:.3f} s, not {least} s at least"
        assert spent - lost <= most + SLACK, (
            f"{spent:.3f} s, of which others had the cores for {lost:.3f} s: not {most} s at most"
        )


@contextlib.contextmanager
def takes(least: float = 0.0, *, most: float) -> Iterator[None]:
    """Check that the ``with`` block takes so many seconds, as `Stopwatch` counts them."""
    stopwatch = Stopwatch()
    yield
    stopwatch.check(least, most=most)


@contextlib.contextmanager
def black_hole() -> Iterator[tuple[Any, ...]]:
    """An address at which a connect waits: the kernel drops what its full backlog can't take."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(gevent.socket.socket())
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        fillers = [stack.enter_context(gevent.socket.socket()) for _ in range(10)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        eventually(lambda: any(map(is_connected, fillers)))
        yield listener.getsockname()


def is_connected(sock: gevent.socket.socket) -> bool:
    """Whether the kernel has connected `sock` by now."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


class ScriptedServer:
    """A listener that a test plays the server on, for tests of clients.

    As a context manager it closes the listener, and the connections it accepted.
    """

    def __init__(self, host: str = "127.0.0.1", backlog: int = 128) -> None:
        family = gevent.socket.AF_INET6 if ":" in host else gevent.socket.AF_INET
        self._listener = gevent.socket.socket(family, gevent.socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(backlog)
        self._accepted = contextlib.ExitStack()
        self.address: tuple[Any, ...] = self._listener.getsockname()
        self.port: int = self.address[1]

    def accept(self, timeout: float = 5.0) -> ScriptedClient:
        """The server's end of the next connection, as a script."""
        self._listener.settimeout(timeout)
        sock, _address = self._listener.accept()
        return self._accepted.enter_context(ScriptedClient.from_socket(sock, timeout=timeout))

    def close(self) -> None:
        """Close the listener: further connections are refused."""
        self._listener.close()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._accepted.close()
        self.close()


native_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")
"""Blocks the OS thread, its hub included, in a patched process too."""


class NativeThread(Generic[T]):
    """A real OS thread, in a monkey-patched process too, running `function` once.

    It starts at once. Where `function` makes gevent create a hub for the thread, that is destroyed.
    """

    destroys_hub = True

    def __init__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._running = monkey.get_original("_thread", "allocate_lock")()
        self._running.acquire()

        def body() -> None:
            try:
                self._results.append(function(*args, **kwargs))
            except BaseException as error:
                self._errors.append(error)
            finally:
                if self.destroys_hub:
                    # Of no use if there was none; but gevent has no public way to ask.
                    gevent.get_hub().destroy(destroy_loop=True)
                self._running.release()

        monkey.get_original("_thread", "start_new_thread")(body, ())

    @property
    def ended(self) -> bool:
        return not self._running.locked()

    def join(self, timeout: float = 10.0) -> T:
        """Block this thread, its hub included, until `function` is done; return what it returned.

        What it raised is raised here.
        """
        if not self._running.acquire(True, timeout):
            raise AssertionError(f"the thread did not end within {timeout} s")
        self._running.release()
        return self._outcome()

    def wait(self, timeout: float = 10.0) -> T:
        """The same, while the hub goes on."""
        eventually(lambda: self.ended, timeout, "the thread did not end")
        return self._outcome()

    def _outcome(self) -> T:
        if self._errors:
            raise self._errors[0]
        return self._results[0]


def child_environment(additional: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a program that is to import the same psofa_gevent as this process.

    That may be an installed one: so no program is started in the repository's own directory, which
    `python -c` and `python -m` would look into first.
    """
    package_folder = Path(psofa_gevent.__file__).resolve().parent.parent
    path = [str(package_folder), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        **(additional or {}),
    }


class PythonProcess:
    """A Python program at work in a process of its own, its output read line by line."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None) -> None:
        self._process = gevent.subprocess.Popen(
            [sys.executable, *arguments],
            stdin=gevent.subprocess.DEVNULL,
            stdout=gevent.subprocess.PIPE,
            stderr=gevent.subprocess.STDOUT,
            cwd=SUPPORT,
            env=child_environment(environment),
            text=True,
        )
        output = self._process.stdout
        assert output is not None
        self._output = output
        self.pid: int = self._process.pid
        self.lines: list[str] = []

    def expect_line(self, containing: str, timeout: float = 40.0) -> str:
        """Read lines until one contains `containing`, and return that."""
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(timeout):
            for line in self._output:
                self.lines.append(line.rstrip("\n"))
                if containing in line:
                    return self.lines[-1]
        raise AssertionError(self._what_came(f"no line with {containing!r}", timeout))

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def send_signals_until_the_end(
        self, number: signal.Signals, every: float, most: int = 10
    ) -> None:
        """Send a signal, another one after `every` seconds, and so on while the process runs."""
        for _ in range(most):
            self._process.send_signal(number)
            with contextlib.suppress(gevent.subprocess.TimeoutExpired):
                self._process.wait(timeout=every)
                return

    def wait(self, timeout: float = 60.0) -> int:
        """Read the output to its end, wait for the process and return its exit code."""
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(timeout):
            for line in self._output:
                self.lines.append(line.rstrip("\n"))
            code: int = self._process.wait()
            return code
        raise AssertionError(self._what_came("the process did not end", timeout))

    def _what_came(self, wanted: str, timeout: float) -> str:
        return "\n".join([f"{wanted} within {timeout} s; it printed:", *self.lines])

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal's number; `None` while the process runs."""
        code: int | None = self._process.returncode
        return code

    def end(self) -> None:
        """Kill the process if it is still there, and release its pipes."""
        # It may have ended just now. (Not poll(): on libuv that warns of its tiny sleep.)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._output.close()


@contextlib.contextmanager
def python_process(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[PythonProcess]:
    """A running ``python *arguments``, killed at the end if it did not end by itself.

    Its working directory is `SUPPORT`: name a file by its whole path.
    """
    process = PythonProcess(arguments, environment)
    try:
        yield process
    finally:
        process.end()


def run_python(
    source: str,
    *arguments: str,
    timeout: float = 60.0,
    descriptor_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> gevent.subprocess.CompletedProcess[str]:
    """Run Python source in a process of its own, in the directory `SUPPORT`.

    Args:
        source: the program, indented as you like.
        *arguments: its ``sys.argv[1:]``.
        timeout: seconds, after which it is killed.
        descriptor_limit: its soft RLIMIT_NOFILE.
        environment: additional variables.

    Returns:
        Exit code and output; nothing of it is checked.

    Raises:
        AssertionError: It did not end within `timeout`.
    """
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    if descriptor_limit is not None:
        command = ["sh", "-c", 'ulimit -Sn "$0" && exec "$@"', str(descriptor_limit), *command]
    try:
        return gevent.subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=SUPPORT,
            env=child_environment(environment),
        )
    except gevent.subprocess.TimeoutExpired as error:
        raise AssertionError(
            f"the program did not end within {timeout} s; it printed {error.output!r} "
            f"and {error.stderr!r}"
        ) from error
