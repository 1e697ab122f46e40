"""SIGINT and SIGTERM while servers are in ``serve_forever``: the first one ends them gracefully.

The handlers are the process's, not a server's: the first server installs them, the last one
restores what was there before, and a signal asks all of them. From then on the signals have their
default action, so that a second one ends the process at once, whatever still runs. The kernel takes
none of those from process 1, which a container's program often is (pid_namespaces(7)): there the
second one ends it by a handler, with the exit code that a shell would report.

A signal that was ignored stays ignored: a shell script's ``server &`` ignores SIGINT, so that a
Ctrl-C that is for others does not end it (POSIX, Shell Command Language, 2.11). Other signals are
the program's own: SIGHUP ends the process, unless it does something on it.

What was there before may be a handler of `signal.signal`, or one of `gevent.signal_handler`, which
Python does not know of: libev and libuv call sigaction(2) themselves, once, when a signal's first
watcher starts. So the C level's handler is restored too, with the same call. That takes ctypes;
where Python was built without, a program must cancel such a handler afterwards and set it anew.

They are Python's handlers and not gevent's, whose signals wait until the hub runs: a callback that
never gives way could not be ended by any of them. But gevent's loop looks for Python's signals only
before it waits, and one that comes just then would wait with it. So Python also writes each to a
socket that the loop watches (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import _socket
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from gevent import get_hub

from psofa_gevent.hub.forking import in_child, unwatch, watch
from psofa_gevent.hub.io_events import READ
from psofa_gevent.hub.native import get_ident

try:
    import ctypes
except ImportError:
    HAS_CTYPES = False  # a Python that was built without libffi
else:
    HAS_CTYPES = True

__all__ = ["ask_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LARGEST_SIGACTION = 1024
"""Bytes for a struct sigaction, which is copied as it is: Linux has 152 at most, macOS 16."""


@contextlib.contextmanager
def ask_on_signals(ask: Callable[[str], None]) -> Iterator[None]:
    """Have `ask` called with the signal's name when one comes, until the block is left.

    `ask` runs in whichever greenlet of the main thread runs just then, or in the hub: it must not
    wait. Outside of the main thread nothing is installed: signals are not handled there.
    """
    if not _is_main_thread():
        yield
        return
    try:
        _asked.append(ask)
        if len(_asked) == 1:
            _installed.enter_context(_handlers())
        yield
    finally:
        if ask in _asked:  # unless a handler of the program's own raised before
            _asked.remove(ask)
        if not _asked:
            _installed.close()


def _is_main_thread() -> bool:
    """Whether Python calls the handlers of signals in this thread.

    gevent's main hub is the first process's. In a child it is the thread that has forked.
    """
    if _main_of_child is not None:
        return get_ident() == _main_of_child
    return bool(get_hub().main_hub)


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        taken = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        for each in taken:
            undo.enter_context(_restoring_the_c_handler(each))
            undo.callback(signal.signal, each, signal.getsignal(each) or signal.SIG_DFL)
        # Only now: the first one that comes changes the handlers of all.
        for each in taken:
            signal.signal(each, _handle)
        undo.enter_context(_waking_the_loop())
        yield


@contextlib.contextmanager
def _restoring_the_c_handler(number: signal.Signals) -> Iterator[None]:
    if not HAS_CTYPES:
        yield
        return
    sigaction = ctypes.CDLL(None).sigaction
    before = ctypes.create_string_buffer(LARGEST_SIGACTION)
    known = sigaction(number, None, before) == 0
    try:
        yield
    finally:
        if known:
            sigaction(number, before, None)


@contextlib.contextmanager
def _waking_the_loop() -> Iterator[None]:
    watched, written = _socket.socketpair()
    watched.setblocking(False)
    written.setblocking(False)
    watcher = watch(get_hub().loop.io(watched.fileno(), READ, ref=False))
    watcher.start(_drain, watched)
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        unwatch(watcher)
        watched.close()
        written.close()


def _drain(watched: _socket.socket) -> None:
    # Running Python code is all it takes for the handler to be called, as a rule.
    with contextlib.suppress(BlockingIOError):
        watched.recv(4096)
    # It calls them itself: Python 3.13 does not look for signals between two lines in a child that
    # another thread than the main one has forked.
    signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _handle(number: int, _frame: FrameType | None) -> None:
    if _asked:  # else the handlers of before are being restored just now
        at_once = _end_at_once if os.getpid() == 1 else signal.SIG_DFL
        for each in SIGNALS:
            if signal.getsignal(each) is _handle:
                signal.signal(each, at_once)
    for ask in _asked:
        ask(signal.Signals(number).name)


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


_asked: list[Callable[[str], None]] = []
_installed = contextlib.ExitStack()
_main_of_child: int | None = None
"""The main thread of a process that was forked; None in one that was not."""


@in_child
def _restore() -> None:
    """A child process has the handlers of before: a signal is for it, and no server is."""
    global _main_of_child  # noqa: PLW0603  # a fact about the process
    _main_of_child = get_ident()
    _asked.clear()
    _installed.close()
