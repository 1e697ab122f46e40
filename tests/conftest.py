"""What holds for every test: it leaves nothing behind, and no error goes unnoticed.

With ``PSOFA_TEST_PATCHED=1`` the whole run is monkey-patched, from here on: the first thing done.

After each test, its fixtures torn down, `leaves_nothing_behind` wants:

- the greenlets that it spawned to be dead;
- the hub's watchers and timers to be stopped (libev counts them, gevent on libuv does not), and on
  libuv none to be dropped that was not closed;
- its file descriptors to be closed;
- no record of level ERROR or above on the loggers ``psofa_gevent`` and ``asyncio``, unless the test
  is marked ``@pytest.mark.logs_errors``;
- no exception that gevent's hub would have printed to stderr, unless the test is marked
  ``@pytest.mark.hub_errors``. It is kept from stderr either way.

A test that still runs after `TEST_SECONDS`, or the ``@pytest.mark.deadline(seconds)`` of its own,
fails where it waits.
"""

from __future__ import annotations

import os
import warnings

if os.environ.get("GEVENT_LOOP") == "libuv":
    # Then gevent warns of a watcher that is dropped and was not closed. On libuv the loop goes on
    # using its memory, and the process crashes at some later time.
    os.environ.setdefault("GEVENT_DEBUG", "debug")
if os.environ.get("PSOFA_TEST_PATCHED") == "1":
    from gevent import monkey

    with warnings.catch_warnings():
        # Plugins of pytest (anyio's) have imported ssl before anyone could patch it.
        warnings.simplefilter("ignore", monkey.MonkeyPatchWarning)
        monkey.patch_all()

import contextlib
import gc
import logging
import resource
import signal
import stat
import sys
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import gevent
import gevent.hub
import gevent.subprocess
import hypothesis
import pytest

from progress import keep_progress
from psofa_gevent.testing import ps_client, ps_server

__all__ = ["ps_client", "ps_server"]

SUPPORT = Path(__file__).parent / "support"
# The asserts in there tell as much as those of tests. (There are none in what is imported already.)
pytest.register_assert_rewrite(*{path.stem for path in SUPPORT.glob("*.py")} - {"progress"})

TEST_SECONDS = 120.0
GRACE_SECONDS = 2.0
"""How long what a test leaves may take to go: a kill or a FIN may be on its way through the hub."""
PATIENCE_WITH_GARBAGE = 0.1
"""Seconds before the garbage collector is asked, which takes 20 ms or more each time."""
WATCHED_LOGGERS = ("psofa_gevent", "asyncio")
EXECUTOR_THREAD = "<Thread(asyncio_"
"""A greenlet in a patched process which the hub's asyncio loop keeps for the next `to_thread`."""
DESCRIPTORS = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
FILE_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFCHR: "device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}

# Not timed: the machine may be busy.
hypothesis.settings.register_profile(
    "psofa",
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("psofa")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job: the programs that tests start and interrupt would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for marker in (
        "logs_errors: the test makes the library log errors",
        "hub_errors: the test makes gevent's hub report exceptions",
        "deadline(seconds): the longest the test may take",
    ):
        config.addinivalue_line("markers", marker)
    keep_progress(config)


class SpawnedGreenlets:
    """The greenlets of the process that were started and did not end.

    gevent tells of each start. (A walk through ``gc.get_objects`` would do as well, and takes 15 to
    40 ms for each test.)
    """

    def __init__(self) -> None:
        self._spawned: weakref.WeakSet[gevent.Greenlet[..., object]] = weakref.WeakSet()
        gevent.Greenlet.add_spawn_callback(self._spawned.add)

    def alive(self) -> set[gevent.Greenlet[..., object]]:
        return {
            greenlet
            for greenlet in list(self._spawned)
            if not greenlet.dead and EXECUTOR_THREAD not in repr(greenlet)
        }


class ErrorRecords(logging.Handler):
    """Collects the records of level ERROR and above that reach the watched loggers."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []
        self.setFormatter(logging.Formatter("%(levelname)s on %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


@contextlib.contextmanager
def error_records() -> Iterator[list[str]]:
    handler = ErrorRecords()
    for name in WATCHED_LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield handler.messages
    finally:
        for name in WATCHED_LOGGERS:
            logging.getLogger(name).removeHandler(handler)


@contextlib.contextmanager
def hub_reports() -> Iterator[list[str]]:
    """Collect what the hubs of all threads would print."""
    reports: list[str] = []

    def collect(
        _hub: gevent.hub.Hub,
        context: object,
        _kind: object,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        reports.append(
            f"gevent's hub: {context!r} failed:\n"
            + "".join(traceback.format_exception(None, exception, trace))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gevent.hub.Hub, "print_exception", collect)
        yield reports


def open_descriptors() -> set[tuple[int, str]]:
    """Every open descriptor of the process, with the type and inode of what it is open on.

    Without those that have no type: the event descriptors that hubs own and never give back.
    """
    descriptors = set()
    for name in os.listdir(DESCRIPTORS):
        # One is gone by now: that which listed the directory.
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if file_type := stat.S_IFMT(status.st_mode):
                descriptors.add((int(name), f"{FILE_TYPES[file_type]} {status.st_ino}"))
    return descriptors


class Leftovers:
    """What the process held when this was made; `new` says what it holds beyond that."""

    def __init__(self, greenlets: SpawnedGreenlets) -> None:
        self._greenlets = greenlets
        self._alive = greenlets.alive()
        self._watchers = gevent.get_hub().loop.activecnt
        self._descriptors = open_descriptors()

    def new(self) -> list[str]:
        began = time.monotonic()
        while found := self._look():
            waited = time.monotonic() - began
            if waited > GRACE_SECONDS:
                return found
            if waited > PATIENCE_WITH_GARBAGE:
                # The traceback that a test kept from pytest.raises holds what its frames hold.
                gc.collect()
            gevent.sleep(0.002)
        return []

    def _look(self) -> list[str]:
        found = [f"greenlet {greenlet!r}" for greenlet in self._greenlets.alive() - self._alive]
        found += [f"descriptor {fd}: {what}" for fd, what in open_descriptors() - self._descriptors]
        watchers = gevent.get_hub().loop.activecnt - self._watchers
        return found + ([f"active watchers of the hub: {watchers} more"] if watchers > 0 else [])


@pytest.fixture(scope="session")
def spawned_greenlets() -> SpawnedGreenlets:
    """Made when the hub has what it makes on first use and keeps: no test is blamed for that."""
    gevent.get_hub().threadpool.apply(int)
    gevent.subprocess.run([sys.executable, "-c", ""], check=True)
    return SpawnedGreenlets()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(
    request: pytest.FixtureRequest, spawned_greenlets: SpawnedGreenlets
) -> Iterator[None]:
    """Fail a test that leaves something running or open, or an error unnoticed."""
    leftovers = Leftovers(spawned_greenlets)
    with error_records() as logged, hub_reports() as reported:
        with deadline_of(request.node):
            yield
        problems = leftovers.new()
    if not request.node.get_closest_marker("logs_errors"):
        problems += logged
    if not request.node.get_closest_marker("hub_errors"):
        problems += reported
    if problems:
        pytest.fail("the test left behind:\n" + "\n".join(problems), pytrace=False)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for 1,000 connections with both their ends in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4_096:
        pytest.skip(f"this process may open no more than {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4_096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def deadline_of(node: pytest.Item) -> Iterator[None]:
    """Throw an error into the test, wherever in gevent it waits, when it takes too long."""
    marker = node.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else TEST_SECONDS
    error = AssertionError(f"the test did not end within {seconds} s")
    with gevent.Timeout(seconds, error):
        yield
