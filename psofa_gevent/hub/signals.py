"""SIGINT and SIGTERM while servers are in ``serve_forever``: the first signal ends them gracefully.

The handlers belong to the process, not to a server: the first server installs them, the last one
restores the handlers of before, and a signal asks all servers to shut down. After the first signal
both signals have their default action, so that a second one ends the process at once, whatever
still runs. For process 1, which a container's program often is, the kernel ignores signals with
their default action (pid_namespaces(7)): there a handler ends the process at the second signal,
with the exit code that a shell would report.

A signal that was ignored stays ignored: a shell script's ``server &`` ignores SIGINT, so that a
Ctrl-C for another program does not end it (POSIX, Shell Command Language, 2.11). Other signals are
left to the program: SIGHUP ends the process, unless the program handles it.

The handler of before may be one of `signal.signal`, or one of `gevent.signal_handler`, which Python
does not know: libev and libuv call sigaction(2) themselves, once, when the first watcher of a
signal starts. So the handler of the C level is restored too, with the same call. That needs ctypes;
if Python was built without it, a program must cancel such a handler afterwards and set it anew.

These handlers are Python's, not gevent's. gevent's signals wait until the hub runs, so they could
not end a callback that never lets the hub run. But gevent's loop looks for Python's signals only
before it waits, so a signal that comes between the two would wait with the loop. So Python also
writes each signal to a socket that the loop watches (`signal.set_wakeup_fd`).
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
from psofa_gevent.hub.io_masks import READ
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
"""Bytes for a struct sigaction, which is copied unchanged: Linux needs 152 at most, macOS 16."""


@contextlib.contextmanager
def ask_on_signals(ask: Callable[[str], None]) -> Iterator[None]:
    """Have `ask` called with the signal's name when a signal comes, until the block is left.

    `ask` runs in whichever greenlet of the main thread runs at that moment, or in the hub: it must
    not wait. Outside of the main thread nothing is installed: Python does not handle signals there.
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
        if ask in _asked:  # unless another signal's handler raised before it was added
            _asked.remove(ask)
        if not _asked:
            _installed.close()


def _is_main_thread() -> bool:
    """Whether Python calls the handlers of signals in this thread.

    In the first process it is the thread of gevent's main hub, in a child the thread that forked.
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
        # Installed only now, as the first signal changes the handlers of all of them.
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
    # As a rule Python calls a signal's handler as soon as it runs any code.
    with contextlib.suppress(BlockingIOError):
        watched.recv(4096)
    # This call runs the handlers itself: in a child that another thread than the main one has
    # forked, Python 3.13 does not look for signals between two lines.
    signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _handle(number: int, _frame: FrameType | None) -> None:
    if _asked:  # otherwise the handlers of before are just being restored
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
"""The main thread of a child process; None in the first process."""


@in_child
def _restore() -> None:
    """Restore the handlers of before in a child process, where no server runs."""
    global _main_of_child  # noqa: PLW0603  # a fact about the process
    _main_of_child = get_ident()
    _asked.clear()
    _installed.close()
