"""Accepting in trouble: no descriptors, connections that are gone, errors of accept."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import textwrap
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import monkey

import psofa_gevent.listening.sockets
from helpers import LOOPBACK, PythonProcess, echo, local_server, python_process
from psofa_gevent.hub import logs
from psofa_gevent.testing import ScriptedClient, ServerFactory, eventually
from reachable import assert_serves

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")


# Descriptors

SERVER_THAT_REPORTS = textwrap.dedent(
    """
    import logging, os, resource, sys, time

    limit, cap = (int(argument) for argument in sys.argv[1:])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    os.close(0)

    import gevent
    from psofa_gevent import PsCallback, PsServer

    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    logging.getLogger("psofa_gevent").addHandler(Keep(logging.WARNING))

    def warnings():
        return len(records)

    def most_serious():
        return max((record.levelno for record in records), default=0)

    def spare():
        taken = []
        try:
            while len(taken) < 1000:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for descriptor in taken:
            os.close(descriptor)
        return len(taken)

    class Report(PsCallback):
        def on_message(self, session, message):
            question = message.decode()
            if question == "cpu":
                session.send(str(time.process_time()))
            elif question == "count":
                session.send(str(server.get_session_count()))
            elif question in ("warnings", "most_serious", "spare"):
                session.send(str(globals()[question]()))
            else:
                session.send(message)

        def on_close(self, session, close_reason):
            if close_reason.name == "FAILED":
                print("FAILED", session.close_cause, flush=True)

    server = PsServer(Report(), host="127.0.0.1", port=0, max_sessions=cap or None,
                      idle_milliseconds=None)
    server.start()
    print("port", server.address[1], flush=True)
    server.wait_for()
    """
)


@contextlib.contextmanager
def limited_server(limit: int, cap: int) -> Iterator[tuple[tuple[Any, ...], PythonProcess]]:
    """A server in a process with few descriptors; `cap` 0 stands for the default one."""
    with python_process("-c", SERVER_THAT_REPORTS, str(limit), str(cap)) as process:
        port = int(process.expect_line("port").split()[1])
        yield (LOOPBACK, port), process


def ask(client: ScriptedClient, question: str) -> float:
    client.send(question)
    client.socket.settimeout(5.0)
    return float(client.socket.recv(100))


def is_served(client: ScriptedClient) -> bool:
    """Whether the greeting that was sent before has been answered."""
    client.socket.settimeout(0.001)
    try:
        return bool(client.socket.recv(100, socket.MSG_PEEK))
    except TimeoutError:
        return False


def connect_many(
    stack: contextlib.ExitStack, address: tuple[Any, ...], count: int
) -> list[ScriptedClient]:
    clients = []
    for _ in range(count):
        client = stack.enter_context(ScriptedClient(address))
        client.send("hello")
        clients.append(client)
    return clients


def test_out_of_descriptors_no_session_suffers_and_it_heals() -> None:
    with limited_server(100, 100_000) as (address, process), contextlib.ExitStack() as stack:
        first, *others = connect_many(stack, address, 140)
        first.expect("hello")
        served = eventually(lambda: 50 < sum(map(is_served, others)) < 100)
        assert served
        before = ask(first, "cpu")
        gevent.sleep(1.0)  # the time that is measured
        spent = ask(first, "cpu") - before
        assert spent < 0.25, f"{spent} s of CPU time in a second of waiting"
        assert ask(first, "warnings") == 1
        waiting = [client for client in others if not is_served(client)]
        open_ones = [client for client in others if client not in waiting]
        assert len(waiting) > 30
        for client in open_ones:
            client.expect("hello")
            client.send("and you?")
            client.expect("and you?")
        # A slow send needs the hub, a watcher and a timer: none of them a descriptor.
        first.send("x" * 3_000_000)
        first.expect("x" * 3_000_000)
        for client in open_ones:
            client.close()
        for client in waiting:
            client.expect("hello")
        assert ask(first, "most_serious") == logging.WARNING
        assert ask(first, "count") == 1 + len(waiting)
        for client in waiting:
            client.close()
        eventually(lambda: ask(first, "count") == 1)
        assert all("FAILED" not in line for line in process.lines)


def test_out_of_descriptors_each_that_leaves_lets_one_in() -> None:
    with limited_server(100, 100_000) as (address, _process), contextlib.ExitStack() as stack:
        clients = connect_many(stack, address, 120)
        for client in clients:
            client.expect("hello")
            client.close()
        with ScriptedClient(address) as last:
            eventually(lambda: ask(last, "count") == 1)


def test_default_cap_leaves_descriptors_to_others() -> None:
    with limited_server(200, 0) as (address, _process), contextlib.ExitStack() as stack:
        clients = connect_many(stack, address, 210)
        first = clients[0]
        first.expect("hello")
        eventually(lambda: ask(first, "count") >= 100)
        gevent.sleep(0.1)
        assert ask(first, "count") < 200
        assert ask(first, "spare") >= 20
        assert ask(first, "warnings") == 0
        for client in clients[1:]:
            client.expect("hello")
            client.close()


@pytest.mark.parametrize("limit", [20, 64])
def test_default_cap_is_at_least_one(limit: int) -> None:
    with limited_server(limit, 0) as (address, _process), ScriptedClient(address) as client:
        client.send("hello")
        client.expect("hello")


# Errors of accept


class FailingAccept:
    """Makes the listeners' accept fail, with what `codes` says; each call is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        self.always: int | None = None
        self.calls = 0
        test = self

        class Listening(_SystemSocket):  # type: ignore[misc, valid-type]  # known at run time
            def _accept(self) -> tuple[int, Any]:
                test.calls += 1
                code = test.codes.pop(0) if test.codes else test.always
                if code is not None:
                    raise OSError(code, os.strerror(code))
                accepted: tuple[int, Any] = super()._accept()
                return accepted

        monkeypatch.setattr(psofa_gevent.listening.sockets, "_SystemSocket", Listening)


@pytest.fixture
def failing_accept(monkeypatch: pytest.MonkeyPatch) -> FailingAccept:
    return FailingAccept(monkeypatch)


@pytest.mark.parametrize(
    "name",
    [
        "ECONNABORTED",
        "EPROTO",
        "ENETDOWN",
        "ENETUNREACH",
        "EHOSTUNREACH",
        "ETIMEDOUT",
        "EPERM",
        "EMFILE",
        "ENFILE",
        "ENOBUFS",
        "ENOMEM",
    ],
)
def test_accept_that_fails_some_times_costs_nobody_anything(
    failing_accept: FailingAccept,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    caplog.set_level(logging.WARNING, "psofa_gevent")
    server = ps_server(echo())
    with ScriptedClient(server.address) as open_one:
        open_one.send("before")
        open_one.expect("before")
        failing_accept.codes = [getattr(errno, name)] * 3
        assert_serves(server)
        open_one.send("after")
        open_one.expect("after")
    assert failing_accept.codes == []
    assert len(caplog.records) <= 1


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EPERM], ids=["EMFILE", "EPERM"])
def test_accept_that_always_fails_makes_no_busy_loop(
    failing_accept: FailingAccept, ps_server: ServerFactory, code: int
) -> None:
    server = ps_server(echo())
    failing_accept.always = code
    with ScriptedClient(server.address) as client:
        client.send("hello")
        eventually(lambda: failing_accept.calls)
        calls = failing_accept.calls
        gevent.sleep(0.5)  # the time that is measured
        assert failing_accept.calls - calls < 50
        failing_accept.always = None
        client.expect("hello")


def test_server_at_its_descriptor_limit_warns_once_a_minute(
    failing_accept: FailingAccept,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, "psofa_gevent")
    server = ps_server(echo())
    levels = []
    for is_a_minute_later in (False, False, True, False):
        monkeypatch.setattr(logs, "WARNING_PERIOD", 0.0 if is_a_minute_later else 60.0)
        if is_a_minute_later:
            server._peer_log._end_window("cannot accept")
            [count] = (record for record in caplog.records if "1 more" in record.message)
            assert count.levelname == "WARNING"
            caplog.clear()
        failing_accept.codes = [errno.EMFILE] * 3
        assert_serves(server)  # it has healed
        [record] = (record for record in caplog.records if "cannot accept" in record.message)
        assert str(server.address[1]) in record.message
        assert os.strerror(errno.EMFILE) in record.message
        levels.append(record.levelname)
        caplog.clear()
    assert levels == ["WARNING", "DEBUG", "WARNING", "DEBUG"]


def test_several_listeners_that_can_not_accept_warn_once(
    failing_accept: FailingAccept, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="psofa_gevent")
    server = ps_server(echo(), listener=[("127.0.0.1", 0), ("127.0.0.1", 0)])
    failing_accept.always = errno.EMFILE
    with ScriptedClient(server.addresses[0]) as one, ScriptedClient(server.addresses[1]) as other:
        eventually(lambda: failing_accept.calls > 3)
        failing_accept.always = None
        for client in (one, other):
            client.send("x")
            client.expect("x")
    [record] = caplog.records
    assert "cannot accept" in record.message


def test_reset_connection_at_accept_does_not_hold_back_the_warning_of_a_shortage(
    failing_accept: FailingAccept, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "psofa_gevent")
    server = ps_server(echo())
    for code in (errno.ECONNABORTED, errno.EMFILE):
        failing_accept.codes = [code]
        assert_serves(server)
    [record] = caplog.records
    assert os.strerror(errno.EMFILE) in record.getMessage()


def test_paused_server_stays_paused_when_descriptors_are_back(
    failing_accept: FailingAccept, ps_server: ServerFactory
) -> None:
    callback = echo()
    server = ps_server(callback)
    failing_accept.always = errno.EMFILE
    with ScriptedClient(server.address) as client:
        client.send("hello")
        eventually(lambda: failing_accept.calls)
        server.stop_accepting()
        failing_accept.always = None
        client.expect_nothing(0.2)
        assert callback.named("on_open") == []
        server.resume_accepting()
        client.expect("hello")


def test_shutdown_while_out_of_descriptors_leaves_no_timer(failing_accept: FailingAccept) -> None:
    with local_server(echo()) as server:
        failing_accept.always = errno.EMFILE
        with ScriptedClient(server.address):
            eventually(lambda: failing_accept.calls)
            server.shutdown()


@pytest.mark.logs_errors
@pytest.mark.parametrize("name", ["EBADF", "EINVAL", "ENOTSOCK"])
def test_listener_that_is_gone_is_logged_and_costs_no_session(
    failing_accept: FailingAccept,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    code = getattr(errno, name)
    server = ps_server(echo())
    with ScriptedClient(server.address) as open_one:
        open_one.send("before")
        open_one.expect("before")
        failing_accept.always = code
        with ScriptedClient(server.address):
            eventually(lambda: caplog.records)
            calls = failing_accept.calls
            open_one.send("after")
            open_one.expect("after")
            gevent.sleep(0.1)
            assert failing_accept.calls - calls < 10
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert os.strerror(code) in record.getMessage()


class KillsSessionsUnstarted:
    """Kills the first `count` greenlets of sessions before they run."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, greenlet: gevent.Greenlet[..., Any]) -> None:
        if self.left and type(greenlet).__name__ == "SessionGreenlet":
            self.left -= 1
            greenlet.kill(block=False)


def test_session_that_is_killed_before_it_starts_is_gone_unheard(
    ps_server: ServerFactory,
) -> None:
    """Its function never runs, no finally of it either: the place must be free all the same."""
    callback = echo()
    server = ps_server(callback, max_sessions=2)
    killing = KillsSessionsUnstarted(5)
    gevent.Greenlet.add_spawn_callback(killing)
    try:
        for _ in range(5):
            with ScriptedClient(server.address) as client, contextlib.suppress(ConnectionError):
                client.receive_until_eof()
    finally:
        gevent.Greenlet.remove_spawn_callback(killing)
    assert killing.left == 0
    assert server.get_session_count() == 0
    assert callback.named("on_open") == callback.named("on_close") == []
    assert_serves(server)


def test_connection_that_is_gone_before_it_begins_costs_nothing(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        monkeypatch.undo()
        raise OSError(errno.EINVAL, "Invalid argument")  # what macOS says of a reset one

    server = ps_server(echo())
    caplog.set_level(logging.INFO, "psofa_gevent")
    monkeypatch.setattr("psofa_gevent.owner.manager.PsSession", fail)
    with ScriptedClient(server.address) as client:
        client.receive_until_eof()
    assert server.get_session_count() == 0
    assert_serves(server)
    assert caplog.records == []


@pytest.mark.logs_errors
def test_connection_that_cannot_be_started_is_logged_and_costs_no_other(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        monkeypatch.undo()
        raise MemoryError

    server = ps_server(echo())
    with ScriptedClient(server.address) as open_one:
        open_one.send("before")
        open_one.expect("before")
        monkeypatch.setattr("psofa_gevent.session.connection.random_bytes", fail)
        with ScriptedClient(server.address) as client:
            client.receive_until_eof()
        assert server.get_session_count() == 1
        open_one.send("after")
        open_one.expect("after")
    assert_serves(server)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info
    assert record.exc_info[0] is MemoryError


def test_clients_that_reset_before_they_are_accepted_cost_nothing(
    ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = echo()
    server = ps_server(callback)
    caplog.set_level(logging.INFO, "psofa_gevent")
    for _ in range(50):
        client = _SystemSocket(socket.AF_INET, socket.SOCK_STREAM)
        client.connect(server.address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert_serves(server)
    eventually(lambda: server.get_session_count() == 0)
    eventually(lambda: len(callback.named("on_open")) == len(callback.named("on_close")))
    assert caplog.records == []
