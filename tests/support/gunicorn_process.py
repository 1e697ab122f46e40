"""gunicorn at work, its signals, and load on what it serves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import gevent

from example_process import Address
from helpers import PythonProcess
from psofa_gevent.testing import ScriptedClient, eventually

SOME = 10
"""Times that each kind of load is to be done at least, before and after what the test does."""


def http(address: Address, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Do one HTTP request; return the answer's status and body."""
    head = f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
    with ScriptedClient(address, timeout=20.0) as client:
        client.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer_head, _, answer = client.receive_until_eof().partition(b"\r\n\r\n")
    return int(answer_head.split()[1]), answer


def get(address: Address, path: str) -> tuple[int, bytes]:
    """The same for a GET, done again if the connection is reset before any answer.

    A worker that ends may accept a request and close its listener before the request's greenlet has
    begun, which asks the listener for its name: gunicorn then drops the request (EBADF). A request
    that is idempotent may be sent again (RFC 9110, section 9.2.2).
    """
    try:
        return http(address, "GET", path)
    except AssertionError as error:
        if "got nothing and then a reset" not in str(error):
            raise
        return http(address, "GET", path)


class Repeated:
    """An action that a greenlet does again and again, until it raises something."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.count = 0
        self._action = action
        self._goes_on = True
        self.greenlet = gevent.spawn(self._repeat)

    def _repeat(self) -> None:
        while self._goes_on:
            self._action()
            self.count += 1
            gevent.sleep(0.01)

    def do_some(self) -> None:
        """Wait until it was done some times more."""
        wanted = self.count + SOME
        eventually(lambda: self.count >= wanted or self.greenlet.dead, timeout=30)
        if self.greenlet.dead:
            self.greenlet.get()

    def end(self) -> None:
        self._goes_on = False
        self.greenlet.get(timeout=30)


@contextlib.contextmanager
def under_load(*actions: Callable[[], None]) -> Iterator[None]:
    """Do all `actions` again and again in the ``with`` block, and raise what any of them raises."""
    with contextlib.ExitStack() as ending:
        load = [Repeated(action) for action in actions]
        for each in load:
            ending.callback(each.end)
        for each in load:
            each.do_some()
        yield
        for each in load:
            each.do_some()


def reload_gunicorn(process: PythonProcess) -> None:
    """SIGHUP, and wait until the new worker is there and the old one has ended."""
    process.send_signal(signal.SIGHUP)
    process.expect_line("Booting worker")
    process.expect_line("Worker exiting")
