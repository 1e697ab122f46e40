"""A session that fails half-way, at whatever line, leaves nothing of it behind.

Memory may be short wherever something is made, so each line with a call is made to fail in turn.
(`leaves_nothing_behind` looks at watchers, greenlets and descriptors after each test.)
"""

from __future__ import annotations

import contextlib
import linecache
import ssl
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import gevent
import gevent.socket
import pytest

from helpers import LOOPBACK, echo, local_server
from marks import needs_tracing
from psofa_gevent import PsCallback, PsMultiClient, PsServer
from psofa_gevent.framing import Line
from psofa_gevent.hub.ready import ReadySessions, ready_sessions
from psofa_gevent.listening.admission import Admission
from psofa_gevent.net.sockopts import endpoint
from psofa_gevent.owner.heartbeat import Heartbeats
from psofa_gevent.owner.idle import IdleTimer
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.session.connection import Connection
from psofa_gevent.session.life import SessionGreenlet, SessionLife
from psofa_gevent.session.session import PsSession
from psofa_gevent.testing import ClientFactory, ScriptedClient, ServerFactory, eventually
from psofa_gevent.tls.socket import TlsSocket, TlsWatcher

MAKING: set[CodeType] = {
    function.__code__
    for function in (
        SessionManager.open,
        SessionLife.__init__,
        Connection.__init__,
        Connection._use_tls,
        SessionGreenlet.__init__,
        TlsWatcher.__init__,
        ReadySessions.register,
        IdleTimer.add,
        Heartbeats.add,
        Admission.opened,
        Admission._count,
    )
}
"""What makes a session, and tells those who must know of it."""


class FailingLine:
    """Raises `MemoryError` at the line `number` of those with calls, in what `MAKING` runs here."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.where = ""

    def _trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        if frame.f_code not in MAKING:
            return None
        if event == "line" and "(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
            self._left -= 1
            if self._left == 0:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise MemoryError(self.where)
        return self._trace

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)


def with_context(sock: Any) -> TlsSocket:
    """A TLS socket whose handshake never comes."""
    context = ssl.create_default_context()
    return TlsSocket(sock._sock, context, server_side=False, server_hostname="localhost")


@needs_tracing
@pytest.mark.parametrize("wrap", [lambda sock: sock._sock, with_context], ids=["plain", "tls"])
def test_a_session_that_fails_at_any_line_is_undone(wrap: Callable[[Any], Any]) -> None:
    ready = ready_sessions()
    registered = ready._registered
    failures = 0
    with PsMultiClient(PsCallback(), framing=Line(), heartbeat=(1_000, "beat")) as bundle:
        of_bundle = bundle._manager
        assert of_bundle is not None
        counter = of_bundle.counter = Admission(
            allowed_networks=None,
            denied_networks=(),
            max_sessions_per_peer=5,
            refuse_when_full=False,
            farewell=None,
            proxy_protocol=False,
            trusted_proxies=(),
        )
        while True:
            with _connected_pair() as (near, far):
                line = FailingLine(failures + 1)
                sock = wrap(near)
                with contextlib.suppress(MemoryError), line.failing():
                    of_bundle.open(sock, sock.getsockname())
                far.close()
                if not line.where:  # there are no more
                    break
                failures += 1
                assert not of_bundle.sessions, line.where
                assert not counter._keys, line.where
                assert not counter._counts, line.where
                assert not any(place.sessions for place in of_bundle._idle._slices), line.where
                assert of_bundle._idle._count == 0, line.where
                assert ready._registered == registered, line.where
                eventually(lambda: not of_bundle.pool, message=line.where)
        assert failures > 20
    assert ready._registered == registered


@contextlib.contextmanager
def _connected_pair() -> Iterator[tuple[gevent.socket.socket, gevent.socket.socket]]:
    with contextlib.ExitStack() as stack:
        accepting = stack.enter_context(gevent.socket.socket())
        accepting.bind((LOOPBACK, 0))
        accepting.listen()
        near = stack.enter_context(gevent.socket.create_connection(accepting.getsockname()))
        far, _ = accepting.accept()
        stack.enter_context(far)
        yield near, far


class NoMemory:
    """In the place of something that a session is made of: raises at the first call."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self._has_raised = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_raised:
            self._has_raised = True
            raise MemoryError
        return self._original(*args, **kwargs)


@pytest.mark.logs_errors
def test_a_server_goes_on_when_an_accepted_connection_could_not_become_a_session(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ps_server(echo(), max_sessions=1)
    monkeypatch.setattr("psofa_gevent.owner.manager.PsSession", NoMemory(PsSession))
    ps_client(server).expect_eof()
    eventually(lambda: "could not be started" in caplog.text)
    assert server.get_session_count() == 0
    client = ps_client(server)
    client.send("hello")
    client.expect("hello")


def test_a_connect_that_could_not_become_a_session_closes_its_socket(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = echo()
    server = ps_server(callback)
    with PsMultiClient(PsCallback()) as bundle:
        of_bundle = bundle._manager
        assert of_bundle is not None
        monkeypatch.setattr(of_bundle, "open", NoMemory(of_bundle.open))
        with pytest.raises(MemoryError):
            bundle.connect(*server.address)
        callback.wait_for("on_close")
        assert bundle.get_session_count() == 0
        bundle.connect(*server.address)


class Undecided(Line):
    """A framing whose decoder can't be made."""

    def decoder(self) -> Any:
        raise LookupError("no decoder")


@pytest.mark.logs_errors
def test_a_framing_that_makes_no_decoder_costs_no_more_than_the_connection(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    registered = ready_sessions()._registered
    server = ps_server(PsCallback(), framing=Undecided())
    for _ in range(3):
        ps_client(server).expect_eof()
    eventually(lambda: caplog.text.count("no decoder") >= 3)
    assert server.get_session_count() == 0
    assert ready_sessions()._registered == registered


def test_a_server_that_fails_at_its_listeners_frees_the_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = local_server()
    monkeypatch.setattr("psofa_gevent.listening.listener.endpoint", NoMemory(endpoint))
    with pytest.raises(MemoryError):
        server.start()
    assert not server.started
    with server, ScriptedClient(server.address):
        assert isinstance(server, PsServer)


@pytest.mark.hub_errors
def test_a_session_that_can_t_end_its_work_ends_all_the_same(
    ps_server: ServerFactory, ps_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("psofa_gevent.session.life.TaskReaper", no_memory)
    callback = echo()
    server = ps_server(callback)
    client = ps_client(server)
    callback.wait_for("on_open")
    work = server.sessions[0].spawn(gevent.sleep, 60)
    client.close()
    callback.wait_for("on_close")
    assert server.get_session_count() == 0
    work.kill()
