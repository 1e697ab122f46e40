"""How a record comes to be: where, how long, in which process and context."""

from __future__ import annotations

import ast
import contextvars
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from gevent import monkey

import psofa_gevent
from helpers import Keeping, attached, run_python
from log_handlers import Holding, messages
from marks import sync_and_async
from psofa_gevent import PsCloseReason, PsSession
from psofa_gevent.framing import Line
from psofa_gevent.hub import logs
from psofa_gevent.testing import ClientFactory, RecordingCallback, ServerFactory, eventually

LONGEST = 1_000
HUGE = 1_000_000


# One place


def test_only_one_module_makes_records() -> None:
    folder = Path(psofa_gevent.__file__).parent
    methods = {"debug", "info", "warning", "error", "exception", "critical", "log"}
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="logger" | "logging"), attr=name)
                ) if name in methods:
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


# Length


class UnbearableError(Exception):
    """As a `UnicodeDecodeError`: what it says of a message has all of it, several times over."""

    def __str__(self) -> str:
        return "x\0\n" * (HUGE // 10)  # lines that traceback goes through one by one

    __repr__ = __str__


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def with_note() -> Exception:
    error = ValueError("short")
    error.add_note("y" * HUGE)
    return error


def with_notes() -> Exception:
    error = ValueError("short")
    for number in range(500):
        error.add_note(f"{number} " + "y" * 900)
    return error


def with_cause() -> Exception:
    error = ValueError("short")
    error.__cause__ = UnbearableError()
    return error


def of_syntax() -> Exception:
    try:
        compile("(" + "z" * HUGE + "]", "what a peer sent", "eval")
    except SyntaxError as error:
        return error
    raise AssertionError


ERRORS: list[Callable[[], BaseException]] = [
    UnbearableError,
    UnspeakableError,
    with_note,
    with_notes,
    with_cause,
    of_syntax,
    lambda: ExceptionGroup("several", [UnbearableError(), ValueError("w" * HUGE)]),
    lambda: ValueError("v" * 900),
]


@pytest.mark.logs_errors
@pytest.mark.parametrize("make_error", ERRORS)
def test_a_failure_is_told_shortly_whatever_the_exception_says(
    make_error: Callable[[], BaseException],
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    keeping: Keeping,
) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            raise error

    error = make_error()
    callback = Callback()
    client = ps_client(ps_server(callback))
    client.send("x")
    (closed,) = callback.wait_for("on_close")
    (record,) = (each for each in keeping.records if each.levelno == logging.ERROR)
    assert closed.session is not None
    assert str(closed.session.connection_id) in record.getMessage()
    assert len(record.getMessage()) <= LONGEST
    assert record.getMessage().isprintable()
    text = logging.Formatter().format(record)
    assert "Traceback (most recent call last)" in text
    assert "in on_message" in text
    assert len(text) < 6_000
    assert type(error).__name__ in text
    # Neither the record nor the session has lost anything.
    assert record.exc_info is not None
    assert record.exc_info[1] is error is closed.session.close_cause


@pytest.mark.logs_errors
def test_a_traceback_of_many_frames_keeps_both_its_ends(
    ps_server: ServerFactory, ps_client: ClientFactory, keeping: Keeping
) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            self.down(400)

        def down(self, left: int) -> None:
            if left:
                self.again(left - 1)
            raise ValueError("at the bottom")

        def again(self, left: int) -> None:
            self.down(left)

    callback = Callback()
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_close")
    (record,) = (each for each in keeping.records if each.levelno == logging.ERROR)
    text = logging.Formatter().format(record)
    assert "in on_message" in text
    assert text.endswith("ValueError: at the bottom")
    assert "more\n" in text
    assert len(text) < 50_000


def test_a_malformed_message_is_told_shortly_and_its_cause_is_complete(
    ps_server: ServerFactory, ps_client: ClientFactory, keeping: Keeping
) -> None:
    def decode(message: bytes) -> object:
        if message.startswith(b"\xff"):
            return json.loads(message)
        raise ValueError(message.decode())

    callback = RecordingCallback()
    server = ps_server(callback, framing=Line().typed(decode, bytes))
    for noise in (b"\xff" * 900_000, b"\x1b[2J\rforged" + b"x" * 900_000):
        ps_client(server).send(noise + b"\n")
    closed = callback.wait_for("on_close", 2)
    told = [each for each in messages(keeping) if "malformed message" in each]
    assert len(told) == 2
    for message in told:
        assert len(message) <= LONGEST
        assert message.isprintable()
    assert r"\x1b[2J\rforged" in "".join(told)
    causes = [each.session.close_cause.__cause__ for each in closed if each.session is not None]  # type: ignore[union-attr]  # each has a cause
    assert {type(cause) for cause in causes} == {UnicodeDecodeError, ValueError}
    for cause in causes:
        assert max(len(str(part)) for part in cause.args) >= 900_000  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [10, LONGEST, LONGEST + 1, 3 * LONGEST, HUGE])
@pytest.mark.parametrize("letter", ["x", "\0", "\U0001f40d"])
def test_a_message_has_both_ends_of_what_was_too_long(
    size: int, letter: str, keeping: Keeping
) -> None:
    logs.log(logging.INFO, "begins %s ends", letter * size)
    (message,) = messages(keeping)
    assert message.startswith("begins ")
    assert message.endswith(" ends")
    assert len(message) <= LONGEST
    assert ("…" in message) == (len(f"begins {ascii(letter)[1:-1] * size} ends") > LONGEST) or (
        letter == "\U0001f40d"
    )


def test_a_short_message_keeps_its_format_for_those_who_group_by_it(keeping: Keeping) -> None:
    logs.log(logging.INFO, "%r: %d", "someone", 7)
    (record,) = keeping.records
    assert (record.msg, record.args) == ("%r: %d", ("someone", 7))
    assert record.getMessage() == "'someone': 7"


# Threads, processes


def test_a_thread_without_a_hub_logs_by_itself_under_its_own_name(keeping: Keeping) -> None:
    def act() -> None:
        logs.log(logging.INFO, "there")

    native = monkey.get_original("threading", "Thread")
    if native is not threading.Thread:
        pytest.skip("threads have no names of their own in a patched process")
    thread = threading.Thread(target=act, name="a thread of its own")
    thread.start()
    thread.join()
    (record,) = keeping.records
    assert record.threadName == "a thread of its own"
    assert record.funcName == "act"


AT_THE_END = """
    import logging
    import sys

    if "patched" in sys.argv:
        from gevent import monkey
        monkey.patch_all()
    import gevent
    from psofa_gevent import PsCallback, PsServer
    from psofa_gevent.testing import ScriptedClient

    class Slow(logging.Handler):
        def emit(self, record):
            gevent.sleep(0.02)
            print(record.getMessage().split(": ")[-1].split(",")[0], flush=True)

    logging.getLogger("psofa_gevent").addHandler(Slow())
    logging.getLogger("psofa_gevent").setLevel(logging.INFO)
    if "with" in sys.argv:
        with PsServer(PsCallback(), host="127.0.0.1", port=0):
            pass
    else:
        PsServer(PsCallback(), host="127.0.0.1", port=0).start()
"""


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
@pytest.mark.parametrize("how", ["with", "left"])
def test_what_waits_at_the_end_of_the_process_is_handed_over(mode: str, how: str) -> None:
    done = run_python(AT_THE_END, mode, how)
    expected = ["listening", *(["stopped"] if how == "with" else [])]
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (expected, "", 0)


FORKED = """
    import logging
    import os
    import gevent
    from psofa_gevent.hub import logs

    class Slow(logging.Handler):
        def emit(self, record):
            gevent.sleep(0.05)
            os.write(1, f"{os.getpid() == first} {record.getMessage()}\\n".encode())

    first = os.getpid()
    hub = gevent.get_hub()
    logging.getLogger("psofa_gevent").addHandler(Slow())
    logging.getLogger("psofa_gevent").setLevel(logging.INFO)
    for number in range(4):
        logs.log(logging.INFO, "%d", number)
    child = os.fork()
    if child == 0:
        hub.loop.reinit()
        logs.log(logging.INFO, "mine")
        logs.flush(10)
        os._exit(0)
    logs.flush(10)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(os.environ.get("GEVENT_LOOP") == "libuv", reason="its loop can't be forked")
def test_a_forked_child_hands_over_its_own_records_only() -> None:
    done = run_python(FORKED, environment={"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("True")] == [f"True {n}" for n in range(4)]
    assert "False mine" in lines
    assert not {f"False {n}" for n in (1, 2, 3)} & set(lines)


# Context


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="nothing")


class Seeing(logging.Filter):
    """Notes what a context variable is where a record is filtered."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.seen = VARIABLE.get()
        return True


def test_filters_see_the_callers_context_variables_or_those_it_gives(holding: Holding) -> None:
    holding.addFilter(Seeing())
    context = contextvars.copy_context()
    context.run(VARIABLE.set, "given")
    for _ in range(2):  # one that is handed over at once, and one that waits
        logs.log(logging.INFO, "", context=context)
        context.run(logs.log, logging.INFO, "")
        logs.log(logging.INFO, "")
        context.run(logs.log, logging.INFO, "", context=context)  # while it is entered
    holding.go_on.set()
    eventually(lambda: len(holding.ended) == 8)
    seen = [record.seen for record in holding.ended]  # type: ignore[attr-defined]  # the filter's
    assert seen == ["given", "given", "nothing", "given"] * 2


@pytest.mark.logs_errors
@sync_and_async
def test_filters_see_the_context_variables_of_the_session_that_a_record_is_about(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Callback(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            VARIABLE.set(str(session.connection_id))
            super().on_open(session)

        def on_message(self, session: PsSession, message: bytes) -> None:
            raise ValueError("mine")

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            raise ValueError("mine")

        async def on_open_async(self, session: PsSession) -> None:
            VARIABLE.set(str(session.connection_id))
            await super().on_open_async(session)

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            raise ValueError("mine")

        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            await super().on_close_async(session, close_reason)
            raise ValueError("mine")

    handler = Keeping()
    handler.addFilter(Seeing())
    callback = Callback(use_async_callback=use_async_callback)
    with attached(handler):
        server = ps_server(callback)
        clients = [ps_client(server) for _ in range(3)]
        callback.wait_for("on_open", 3)
        for client in clients:
            client.send("x")
        callback.wait_for("on_close", 3)
        eventually(lambda: len([m for m in messages(handler) if "on_close failed" in m]) == 3)
    for ending in (": failed: ", ": closed", ": on_close failed"):
        about = [each for each in handler.records if ending in each.getMessage()]
        assert len(about) == 3
        for record in about:
            assert record.seen in record.getMessage()  # type: ignore[attr-defined]
