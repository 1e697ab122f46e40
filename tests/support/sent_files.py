"""Files that sessions send, and who sends and reads them.

`CONTENT` is more than the buffers of a connection take, so each test with a peer that does not read
has a file in its middle.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import gevent
import gevent.fileobject
import pytest

from acting import ActingCallback, wait_until_stalled
from helpers import stalled_peer
from psofa_gevent import PsSession
from psofa_gevent.testing import ScriptedClient, ServerFactory

SIZE = 12 * 1024 * 1024 + 12_345
CONTENT = b"".join(b"%07d\n" % number for number in range(SIZE // 8 + 1))[:SIZE]
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PIECE = 65_536
SHORT = 0.3
"""Seconds: a timeout that is waited for."""

Outcome: TypeAlias = "gevent.Greenlet[..., BaseException | int]"
ReadInThread: Any = gevent.fileobject.FileObjectThread
Pair = tuple[PsSession[Any], ScriptedClient, ActingCallback]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(CONTENT)
    return made


@pytest.fixture
def pair(ps_server: ServerFactory) -> Iterator[Callable[..., Pair]]:
    """Makes sessions whose peers read when the test does: ``pair(callback, **settings)``."""
    with contextlib.ExitStack() as peers:

        def make(callback: ActingCallback | None = None, **settings: Any) -> Pair:
            callback = callback or ActingCallback()
            server = ps_server(callback, **{"linger_timeout": 0.0, **settings})
            peer = peers.enter_context(stalled_peer(server.address))
            return callback.opened(), peer, callback

        yield make


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What sendfile(2) has sent, call by call."""
    sent: list[int] = []
    sendfile = os.sendfile

    def counting(*args: Any) -> int:
        count = sendfile(*args)
        sent.append(count)
        return count

    monkeypatch.setattr(os, "sendfile", counting)
    return sent


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call it in a greenlet, whose value is what it returned or raised."""

    def body() -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            return error

    return gevent.spawn(body)


def result(outcome: Outcome) -> BaseException | int:
    return outcome.get(timeout=20)


def begin(session: PsSession[Any], file: Any, **kwargs: Any) -> Outcome:
    """A greenlet that sends a file, and waits in its middle."""
    sender = attempt(session.send_file, file, **{"timeout": None, **kwargs})
    wait_until_stalled(session)
    assert not sender.ready()
    return sender


def hashed(peer: ScriptedClient, count: int = SIZE) -> str:
    """Read so many bytes, without keeping them: their digest."""
    digest = hashlib.sha256()
    while count:
        data = peer.receive(min(count, PIECE))
        digest.update(data)
        count -= len(data)
    return digest.hexdigest()


class Reader:
    """An object that has nothing but ``read``."""

    def __init__(self, content: bytes = CONTENT, most: int = SIZE) -> None:
        self._file = io.BytesIO(content)
        self._most = most

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._most))


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs
