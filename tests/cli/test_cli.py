"""The command line, run as a user runs it: in a process of its own, from some directory."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import re
import resource
import shutil
import signal
import ssl
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import gevent
import gevent.socket
import gevent.subprocess
import pytest
from gevent import monkey

import helpers
import psofa_gevent
from marks import needs_ipv6
from psofa_gevent import (
    PsClient,
    PsHeartbeat,
    PsOverflow,
    PsServer,
    PsSocketAddressFamily,
)
from psofa_gevent.cli import demo, main, options, reach, serve
from psofa_gevent.listening.settings import ServerSettings
from psofa_gevent.settings import described
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

pytestmark = pytest.mark.programs

WHERE_THE_PACKAGE_IS = str(Path(psofa_gevent.__file__).parent.parent)
SECONDS = 30.0
"""The longest that a process may take for anything."""
APP = """
    from psofa_gevent import PsCallback

    class Upper(PsCallback):
        def on_message(self, session, message):
            session.send(message.upper())

    class Holder:
        callback = Upper()

    def make():
        return Upper()
"""
ROW = re.compile(
    r"^ *(?P<seconds>\d+\.\d{3})  (?P<who>server|client \d) *  (?P<session>[0-9a-f]{8}|-) *"
    r"  (?P<callback>on_\w+) *  (?P<what>.+)$"
)


class Program:
    """``python -m psofa_gevent`` at work."""

    def __init__(self, command: list[str], directory: Path, **streams: Any) -> None:
        self.process = gevent.subprocess.Popen(
            command,
            cwd=directory,
            env=environment(),
            text=True,
            stderr=gevent.subprocess.PIPE,
            **{"stdout": gevent.subprocess.PIPE, **streams},
        )
        self.output: IO[str] = self.process.stdout or io.StringIO()
        self.errors: IO[str] = self.process.stderr or io.StringIO()
        self.log: list[str] = []

    def read_line(self) -> str:
        with gevent.Timeout(SECONDS, AssertionError("no line on the standard output")):
            return self.output.readline().rstrip("\n")

    def read_address(self) -> tuple[str, int]:
        """The address in the first line of ``serve``."""
        match = re.fullmatch(r"Listening on \[?(.+?)\]?:(\d+)", self.read_line())
        assert match, self.errors.read()
        return match[1], int(match[2])

    def read_log(self, containing: str) -> None:
        with gevent.Timeout(SECONDS, AssertionError(f"no log record with {containing!r}")):
            for line in self.errors:
                self.log.append(line)
                if containing in line:
                    return
        raise AssertionError(f"no log record with {containing!r} in {self.log}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        with gevent.Timeout(SECONDS, AssertionError("the program did not end")):
            self.log += self.errors
            code: int = self.process.wait()
            return code

    def end(self) -> None:
        self.process.kill()  # without effect on one that has ended
        self.process.wait()
        self.output.close()
        self.errors.close()


def environment() -> dict[str, str]:
    """Ours, with the package that is being tested, and as with users who set nothing."""
    paths = [WHERE_THE_PACKAGE_IS, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "psofa_gevent", *arguments]


def program(
    directory: Path, *arguments: str, **streams: Any
) -> contextlib.AbstractContextManager[Program]:
    return program_of(command(*arguments), directory, **streams)


@contextlib.contextmanager
def program_of(whole_command: list[str], directory: Path, **streams: Any) -> Iterator[Program]:
    started = Program(whole_command, directory, **streams)
    try:
        yield started
    finally:
        started.end()


def run(directory: Path, *arguments: str) -> gevent.subprocess.CompletedProcess[str]:
    return run_command(directory, command(*arguments))


def run_command(
    directory: Path, whole_command: list[str]
) -> gevent.subprocess.CompletedProcess[str]:
    return gevent.subprocess.run(
        whole_command,
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def write_module(directory: Path, name: str, source: str) -> None:
    path = directory / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))


def assert_echoes(address: tuple[str, int], sent: str = "hello", expected: str = "hello") -> None:
    with ScriptedClient(address) as client:
        client.send(sent)
        client.expect(expected)


# -- demo


def rows_of(output: str) -> list[dict[str, str]]:
    return [match.groupdict() for match in map(ROW.match, output.splitlines()) if match]


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What ``demo`` prints into a pipe."""
    result = run(tmp_path_factory.mktemp("demo"), "demo")
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_demo_tells_the_whole_life_of_every_session_and_ends_by_itself(demo_output: str) -> None:
    assert "\033" not in demo_output
    rows = rows_of(demo_output)
    assert [rows[0]["callback"], rows[-1]["callback"]] == ["on_start", "on_stop"]
    lives: dict[str, list[dict[str, str]]] = {}
    for row in rows[1:-1]:
        lives.setdefault(row["session"], []).append(row)
    assert len(lives) == 10
    for life in lives.values():
        assert len({row["who"] for row in life}) == 1
        first, *messages, last = [row["callback"] for row in life]
        assert (first, last) == ("on_open", "on_close")
        assert set(messages) == {"on_message"}
    ends = sorted((life[0]["who"], life[-1]["what"]) for life in lives.values())
    assert ends == [
        *((f"client {number}", "SELF_CLOSE, inc: 4") for number in range(1, 5)),
        ("client 5", "SELF_CLOSE, inc: 2"),
        ("server", "PEER_CLOSE, inc: 2"),
        *[("server", "SELF_CLOSE, inc: 4")] * 4,
    ]
    assert re.search(r"SELF_CLOSE +9 .*\n +PEER_CLOSE +1 ", demo_output)


def test_demo_shows_which_two_sessions_belong_together(demo_output: str) -> None:
    rows = rows_of(demo_output)
    ports: dict[str, list[str]] = {}
    for row in rows:
        if row["callback"] == "on_open":
            ports.setdefault(row["what"].split(",")[0], []).append(row["who"])
    assert sorted(sorted(pair) for pair in ports.values()) == [
        [f"client {number}", "server"] for number in range(1, 6)
    ]


def test_demo_aligns_its_columns(demo_output: str) -> None:
    lines = demo_output.splitlines()
    heading = next(line for line in lines if line.startswith("seconds"))
    starts = [heading.index(name) for name in heading.split()][1:]
    for line in filter(ROW.match, lines):
        for start in starts:
            assert line[start - 2 : start] == "  "
            assert line[start] != " "


def test_demo_says_what_to_try_next(demo_output: str) -> None:
    _, _, hints = demo_output.partition("What next\n")
    assert "python -m psofa_gevent serve " in hints
    assert "README" in hints


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_demo_has_colours_on_a_terminal_whose_user_wants_them(
    monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    assert demo.run("psofa", out) == 0
    assert ("\033[" in out.getvalue()) is coloured
    plain = re.sub(r"\033\[\d+m", "", out.getvalue())
    assert len(rows_of(plain)) == len(re.findall(r"  on_\w+", plain))


@pytest.mark.logs_errors  # the callbacks of the sessions that it cuts short
def test_demo_that_comes_to_a_standstill_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENCE", 0.01)
    out = io.StringIO()
    assert demo.run("psofa", out) == 1
    assert "not how it should end" in out.getvalue()


def test_demo_whose_reader_has_gone_ends_quietly(tmp_path: Path) -> None:
    with program(tmp_path, "demo") as started:
        started.read_line()
        started.output.close()
        assert started.wait() == 1
        assert started.log == []


def test_ctrl_c_ends_the_demo_quietly(tmp_path: Path) -> None:
    with program(tmp_path, "demo") as started:
        while "on_message" not in started.read_line():
            pass
        assert started.stop(signal.SIGINT) == 130
        assert started.log == []


# -- serve


def test_serve_echoes_on_the_loopback_address_that_it_prints_first(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        host, port = started.read_address()
        assert host == "127.0.0.1"
        assert_echoes((host, port))
        assert started.stop() == 0


@pytest.mark.skipif(shutil.which("nc") is None, reason="no nc here")
def test_nc_talks_to_serve(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        host, port = started.read_address()
        pipe = gevent.subprocess.PIPE
        with gevent.subprocess.Popen(
            ["nc", host, str(port)], stdin=pipe, stdout=pipe, text=True
        ) as nc:
            assert nc.stdin is not None
            assert nc.stdout is not None
            nc.stdin.write("hello\n")
            nc.stdin.flush()
            with gevent.Timeout(SECONDS, AssertionError("no answer")):
                assert nc.stdout.readline() == "hello\n"
            assert started.stop() == 0
            nc.kill()


def test_resets_cost_serve_nothing(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        address = started.read_address()
        for _ in range(100):
            client = ScriptedClient(address)
            client.send("hello")
            client.expect("hello")
            client.reset()
        assert_echoes(address)
        assert started.stop() == 0
        assert "Traceback" not in "".join(started.log)


@pytest.mark.parametrize("attribute", ["Upper", "make", "Holder.callback"])
def test_serve_takes_a_class_a_factory_and_an_instance(tmp_path: Path, attribute: str) -> None:
    write_module(tmp_path, "app", APP)
    with program(tmp_path, "serve", f"app:{attribute}", "--port", "0") as started:
        assert_echoes(started.read_address(), "hello", "HELLO")
        assert started.stop() == 0


def test_serve_listens_in_several_places(tmp_path: Path) -> None:
    with gevent.socket.create_server(("127.0.0.1", 0)) as inherited:
        number = inherited.fileno()
        places = ["127.0.0.1:0", f"unix:{tmp_path}/echo.sock", f"fd:{number}"]
        arguments = [word for place in places for word in ("--listener", place)]
        with program(tmp_path, "serve", *arguments, pass_fds=[number]) as started:
            assert_echoes(started.read_address())
            assert started.read_line() == f"  and on      unix:{tmp_path}/echo.sock"
            assert started.read_line() == f"              127.0.0.1:{inherited.getsockname()[1]}"
            assert started.read_line() == "  serving     an echo"
            assert_echoes(inherited.getsockname())
            assert started.stop() == 0
    assert os.listdir(tmp_path) == []


def test_serve_takes_a_module_in_a_package(tmp_path: Path) -> None:
    write_module(tmp_path, "company/__init__", "")
    write_module(tmp_path, "company/app", APP)
    with program(tmp_path, "serve", "company.app:Upper", "--port", "0") as started:
        assert_echoes(started.read_address(), "hello", "HELLO")


def test_the_script_looks_in_the_current_directory_too(tmp_path: Path) -> None:
    write_module(tmp_path, "app", APP)
    script = (
        "import sys; from psofa_gevent.__main__ import main; sys.argv[0] = '/bin/psofa'; "
        "sys.exit(main())"
    )
    # -P: as for an installed script, the current directory is not where Python looks.
    as_script = [sys.executable, "-P", "-c", script, "serve", "app:Upper", "--port", "0"]
    with program_of(as_script, tmp_path) as started:
        assert_echoes(started.read_address(), "hello", "HELLO")
        assert started.stop() == 0


def test_a_served_callback_may_use_blocking_libraries(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import time
        from psofa_gevent import PsCallback

        class Sleeper(PsCallback):
            def on_message(self, session, message):
                if message == b"sleep":
                    time.sleep(1000)
                session.send(message)
        """,
    )
    with program(
        tmp_path, "serve", "app:Sleeper", "--port", "0", "--shutdown-timeout", "0.1"
    ) as started:
        address = started.read_address()
        with ScriptedClient(address) as sleeper:
            sleeper.send("sleep")
            assert_echoes(address)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_shuts_serve_down_and_exits_0(tmp_path: Path, number: signal.Signals) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        with ScriptedClient(started.read_address()) as client:
            client.send("hello")
            client.expect("hello")
            assert started.stop(number) == 0
            client.expect_eof()
        assert "Traceback" not in "".join(started.log)


HANGS = """
    import gevent
    from psofa_gevent import PsCallback

    class Hangs(PsCallback):
        def on_message(self, session, message):
            session.send("begun")
            gevent.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_serve_at_once(tmp_path: Path, number: signal.Signals) -> None:
    write_module(tmp_path, "app", HANGS)
    arguments = ["serve", "app:Hangs", "--port", "0", "--shutdown-timeout", "none"]
    with program(tmp_path, *arguments) as started:
        address = started.read_address()
        client = ScriptedClient(address)
        client.send("begin")
        client.expect("begun")
        started.process.send_signal(number)
        eventually(lambda: not helpers.accepts_connections(address))
        assert started.stop(number) == -number
        client.close()


def test_shutdown_timeout_bounds_what_a_callback_may_take(tmp_path: Path) -> None:
    write_module(tmp_path, "app", HANGS)
    with (
        program(
            tmp_path, "serve", "app:Hangs", "--port", "0", "--shutdown-timeout", "0.1"
        ) as started,
        ScriptedClient(started.read_address()) as client,
    ):
        client.send("begin")
        client.expect("begun")
        assert started.stop() == 0


def test_drain_lets_sessions_end_by_themselves(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0", "--drain", "1000") as started:
        address = started.read_address()
        with ScriptedClient(address) as client:
            client.send("before")
            client.expect("before")
            started.process.send_signal(signal.SIGTERM)
            started.read_log("shutting down")
            eventually(lambda: not helpers.accepts_connections(address))
            client.send("after")
            client.expect("after")
        assert started.wait() == 0


def test_a_callback_may_shut_serve_down_with_times_of_its_own(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        from psofa_gevent import PsCallback

        class Once(PsCallback):
            def on_message(self, session, message):
                session.owner.shutdown(5.0, drain=0.0)
        """,
    )
    with program(tmp_path, "serve", "app:Once", "--port", "0", "--drain", "1000") as started:
        with ScriptedClient(started.read_address()) as client:
            client.send("stop")
            client.expect_eof()
        assert started.wait() == 0


def test_serve_raises_the_descriptor_limit_to_the_hard_one(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import resource
        from psofa_gevent import PsCallback

        class Limit(PsCallback):
            def on_message(self, session, message):
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                session.send("raised" if soft == hard else f"{soft} of {hard}")
        """,
    )
    limited = ["sh", "-c", 'ulimit -Sn 200 && exec "$@"', "sh"]
    with program_of([*limited, *command("serve", "app:Limit", "--port", "0")], tmp_path) as started:
        assert_echoes(started.read_address(), "limit?", "raised")
        assert started.stop() == 0
        assert "raised from 200 to" in "".join(started.log)


# -- serve: SIGHUP


@pytest.fixture
def certificate_files(tmp_path: Path) -> Callable[[str], ssl.SSLContext]:
    """Writes cert.pem and key.pem for a name, and returns a client's context that trusts them."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()

    def write(name: str) -> ssl.SSLContext:
        certificate = authority.issue_cert("127.0.0.1", common_name=name)
        certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context

    return write


def name_in_certificate(address: tuple[str, int], context: ssl.SSLContext) -> object:
    # In the thread of a pool: Python's own sockets block.
    def ask() -> object:
        native: Any = monkey.get_original("socket", "socket")()
        with native, context.wrap_socket(native, server_hostname="127.0.0.1") as sock:
            sock.connect(address)
            certificate: Any = sock.getpeercert()
            return dict(pair for (pair,) in certificate["subject"])["commonName"]

    return gevent.get_hub().threadpool.apply(ask)


TLS_FILES = ("--certificate", "cert.pem", "--key", "key.pem")


def test_sighup_reads_the_certificate_again_and_the_sessions_go_on(
    tmp_path: Path, certificate_files: Callable[[str], ssl.SSLContext]
) -> None:
    context = certificate_files("first")
    with program(tmp_path, "serve", "--port", "0", *TLS_FILES) as started:
        address = started.read_address()
        assert name_in_certificate(address, context) == "first"
        with PsClient(RecordingCallback(), *address, ssl_context=context) as client:
            certificate_files("second")
            started.process.send_signal(signal.SIGHUP)
            started.read_log("SIGHUP: read cert.pem again")
            assert name_in_certificate(address, context) == "second"
            assert client.session is not None
            client.session.send("still here")
            eventually(lambda: client.session is not None and client.session.bytes_received)
        assert started.stop() == 0


@pytest.mark.parametrize("wrong", ["cert.pem", "key.pem"])
@pytest.mark.parametrize("how", ["garbage", "missing"])
def test_sighup_with_files_that_can_not_be_used_keeps_the_certificate(
    wrong: str,
    how: str,
    tmp_path: Path,
    certificate_files: Callable[[str], ssl.SSLContext],
) -> None:
    context = certificate_files("first")
    with program(tmp_path, "serve", "--port", "0", *TLS_FILES) as started:
        address = started.read_address()
        if how == "missing":
            (tmp_path / wrong).unlink()
        else:
            (tmp_path / wrong).write_text("no certificate")
        started.process.send_signal(signal.SIGHUP)
        started.read_log("SIGHUP: the certificate stays as it was: cannot serve TLS with cert.pem")
        assert "ERROR" in started.log[-1]
        assert name_in_certificate(address, context) == "first"
        certificate_files("second")
        started.process.send_signal(signal.SIGHUP)
        started.read_log("SIGHUP: read cert.pem again")
        assert name_in_certificate(address, context) == "second"
        assert started.stop() == 0


@pytest.mark.parametrize("is_ignored", [False, True], ids=["by default", "under nohup"])
def test_sighup_with_nothing_to_reload_is_told_and_ignored(
    is_ignored: bool, tmp_path: Path
) -> None:
    whole_command = command("serve", "--port", "0")
    if is_ignored:
        whole_command = ["sh", "-c", """trap '' HUP; exec "$@" """, "sh", *whole_command]
    with program_of(whole_command, tmp_path) as started:
        address = started.read_address()
        with ScriptedClient(address) as client:
            started.process.send_signal(signal.SIGHUP)
            started.read_log("SIGHUP: ignored")
            client.send("still here")
            client.expect("still here")
            assert started.stop() == 0


def test_sighup_is_left_to_the_application_where_that_has_a_handler(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import signal
        from psofa_gevent import PsCallback

        class Callback(PsCallback):
            pass

        signal.signal(signal.SIGHUP, lambda number, frame: print("the application's", flush=True))
        """,
    )
    with program(tmp_path, "serve", "app:Callback", "--port", "0") as started:
        started.read_address()
        for _ in range(3):
            started.read_line()
        started.process.send_signal(signal.SIGHUP)
        assert started.read_line() == "the application's"
        assert started.stop() == 0
        assert "SIGHUP" not in "".join(started.log)


# -- serve: logging


SETS_UP_LOGGING = {
    "basicConfig": "logging.basicConfig(level=logging.INFO, format='OURS %(message)s')",
    "root": """
handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter('OURS %(message)s'))
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel(logging.INFO)
""",
    "dictConfig": """
import logging.config
logging.config.dictConfig({
    "version": 1,
    "formatters": {"ours": {"format": "OURS %(message)s"}},
    "handlers": {"ours": {"class": "logging.StreamHandler", "formatter": "ours"}},
    "loggers": {"psofa_gevent": {"handlers": ["ours"], "level": "INFO"}},
})
""",
}
APP_THAT_LOGS = """
import logging
from psofa_gevent import PsCallback

def make():
    {}
    return PsCallback()
"""


@pytest.mark.parametrize("how", SETS_UP_LOGGING)
@pytest.mark.parametrize("where", ["imported", "called"])
def test_logging_that_the_application_has_set_up_is_left_alone(
    how: str, where: str, tmp_path: Path
) -> None:
    set_up = SETS_UP_LOGGING[how].strip()
    if where == "imported":
        source = APP_THAT_LOGS.format("pass") + set_up
    else:
        source = APP_THAT_LOGS.format(textwrap.indent(set_up, "    ").strip())
    (tmp_path / "app.py").write_text(source)
    with program(tmp_path, "serve", "app:make", "--port", "0") as started:
        started.read_address()
        assert started.stop() == 0
    ours = [line for line in started.log if line.startswith("OURS ")]
    assert ours == started.log  # each record once, and in the application's way
    assert "listening" in ours[-3]
    assert "SIGTERM: shutting down" in ours[-2]
    assert "stopped" in ours[-1]


def test_the_log_level_is_that_of_our_logger_where_the_application_has_set_up_logging(
    tmp_path: Path,
) -> None:
    set_up = SETS_UP_LOGGING["basicConfig"]
    (tmp_path / "app.py").write_text(APP_THAT_LOGS.format("pass") + set_up)
    options = ["--port", "0", "--log-level", "debug"]
    with program(tmp_path, "serve", "app:make", *options) as started:
        ScriptedClient(started.read_address()).close()
        started.read_log(": closed")
        assert started.stop() == 0
    assert all(line.startswith("OURS ") for line in started.log)


def test_a_level_that_the_application_has_given_to_the_root_logger_stays(tmp_path: Path) -> None:
    set_up = "logging.getLogger().setLevel(logging.ERROR)"
    (tmp_path / "app.py").write_text(APP_THAT_LOGS.format("pass") + set_up)
    with program(tmp_path, "serve", "app:make", "--port", "0") as started:
        started.read_address()
        assert started.stop() == 0
    assert started.log == []
    with program(tmp_path, "serve", "app:make", "--port", "0", "--log-level", "info") as started:
        started.read_address()
        assert started.stop() == 0
    assert "INFO    psofa_gevent: <PsServer" in "".join(started.log)


@pytest.mark.parametrize("level", [None, "debug", "warning"])
def test_without_logging_of_the_application_serve_logs_at_its_level(
    level: str | None, tmp_path: Path
) -> None:
    options = [] if level is None else ["--log-level", level]
    with program(tmp_path, "serve", "--port", "0", *options) as started:
        with ScriptedClient(started.read_address()) as client:
            client.send("x")
            client.expect("x")
        assert started.stop() == 0
    text = "".join(started.log)
    assert (": opened" in text) == (level == "debug")
    assert ("INFO    psofa_gevent: <PsServer" in text) == (level != "warning")


def test_what_goes_wrong_while_the_application_is_imported_is_seen(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import logging
        from psofa_gevent import PsCallback
        from psofa_gevent.hub import logs

        logging.getLogger("app").error("of the application")
        logs.log(logging.ERROR, "of the library")
        logging.basicConfig(format="OURS %(message)s")
        logs.log(logging.ERROR, "of the library, later")
        """,
    )
    with program(tmp_path, "serve", "app:PsCallback", "--port", "0") as started:
        started.read_address()
        assert started.stop() == 0
    assert started.log == [
        "of the application\n",
        "of the library\n",
        "OURS of the library, later\n",
    ]


def test_serve_serves_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    port = helpers.free_port()
    try:
        with program(tmp_path, "serve", "--port", str(port), stdout=writer) as started:
            helpers.wait_until_accepting(("127.0.0.1", port))
            assert_echoes(("127.0.0.1", port))
            assert started.stop() == 0
            assert "Traceback" not in "".join(started.log)
    finally:
        os.close(writer)


# -- where serve can be reached


@needs_ipv6
@pytest.mark.parametrize("arguments", [["--ipv6"], ["--host", "::1"]])
def test_serve_listens_on_the_ipv6_loopback(tmp_path: Path, arguments: list[str]) -> None:
    with program(tmp_path, "serve", "--port", "0", *arguments) as started:
        host, port = started.read_address()
        assert host == "::1"
        assert_echoes((host, port))


@needs_ipv6
def test_serve_on_the_ipv6_wildcard_serves_ipv4_clients_too(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0", "--host", "::") as started:
        _, port = started.read_address()
        assert_echoes(("127.0.0.1", port))
        assert_echoes(("::1", port))


PRETENDED_IFADDR = """
    from types import SimpleNamespace

    def get_adapters():
        ips = ["192.0.2.7", ("2001:db8::7", 0, 0)]
        return [SimpleNamespace(name="eth0", ips=[SimpleNamespace(ip=ip) for ip in ips])]
"""


def reached_at(directory: Path, host: str) -> tuple[int, str]:
    """What ``serve`` prints after its first line, and the port."""
    with program(directory, "serve", "--port", "0", "--host", host) as started:
        _, port = started.read_address()
        lines: list[str] = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(started.read_line())
        assert_echoes(("127.0.0.1", port))
        assert started.stop() == 0
        return port, "\n".join(lines)


def test_serve_on_every_address_lists_them(tmp_path: Path) -> None:
    write_module(tmp_path, "ifaddr", PRETENDED_IFADDR)
    port, text = reached_at(tmp_path, "0.0.0.0")
    assert f"reached at  192.0.2.7:{port}" in text
    assert "2001:db8::7" not in text


@needs_ipv6
def test_serve_on_the_ipv6_wildcard_lists_the_addresses_of_both_families(tmp_path: Path) -> None:
    write_module(tmp_path, "ifaddr", PRETENDED_IFADDR)
    port, text = reached_at(tmp_path, "::")
    assert f"[2001:db8::7]:{port}" in text
    assert f"192.0.2.7:{port}" in text


@pytest.mark.parametrize(
    ("ifaddr", "said"),
    [
        ("raise ImportError", 'pip install "psofa_gevent[network]"'),
        ("def get_adapters():\n    raise OSError('not told')", "not told"),
    ],
)
def test_serve_on_every_address_says_so_when_it_cannot_list_them(
    tmp_path: Path, ifaddr: str, said: str
) -> None:
    write_module(tmp_path, "ifaddr", ifaddr)
    _, text = reached_at(tmp_path, "0.0.0.0")
    assert "all addresses of this machine" in text
    assert said in text


def test_a_link_local_address_is_printed_with_its_interface() -> None:
    index, name = gevent.socket.if_nameindex()[0]
    text = reach.where_to_reach(("fe80::7", 8710, 0, index), serving="an echo")
    assert text.startswith(f"Listening on [fe80::7%{name}]:8710\n")
    assert f"nc fe80::7%{name} 8710" in text


# -- errors


def assert_one_line(output: str, error: str, said: str) -> None:
    assert output == ""
    assert re.fullmatch(r"python -m psofa_gevent( \w+)?: error: .+\n", error)
    assert said in error


@pytest.fixture
def directory_of_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module `app`, for a command line in our own process."""
    write_module(tmp_path, "app", BROKEN_APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["psofa_gevent/__main__.py"])
    monkeypatch.setattr(gevent.get_hub(), "NOT_ERROR", gevent.get_hub().NOT_ERROR)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    yield tmp_path
    sys.modules.pop("app", None)


BROKEN_APP = """
    from psofa_gevent import PsCallback

    class Unrelated:
        pass

    class NeedsArguments(PsCallback):
        def __init__(self, colour):
            self.colour = colour

    class WrittenAsync(PsCallback):
        async def on_message(self, session, message):
            pass

    def make_nothing():
        return None

    async def make_async():
        return PsCallback()

    number = 7
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demonstrate"], "demonstrate"),
        (["demo", "--port", "1"], "--port"),
        (["serve", "--prot", "1"], "--prot"),
        (["serve", "--port", "http"], "--port: invalid int value: 'http'"),
        (["serve", "--port", "70000"], " --port must be from 0 to 65535, not 70000"),
        (["serve", "--idle-milliseconds", "never"], "invalid int or 'none' value: 'never'"),
        (["serve", "--idle-milliseconds", "0"], " --idle-milliseconds must be from 1 to "),
        (["serve", "--callback-timeout", "0"], " --callback-timeout must be"),
        (["serve", "--send-timeout", "-1"], "invalid seconds or 'none' value: '-1'"),
        (["serve", "--drain", "inf"], "--drain: invalid seconds value: 'inf'"),
        (["serve", "--drain", "1e10"], "--drain: invalid seconds value: '1e10'"),
        (["serve", "--drain", "nan"], "--drain: invalid seconds value: 'nan'"),
        (["serve", "--max-sessions", "0"], " --max-sessions must be"),
        (["serve", "--listener", "8710"], " --listener must be HOST:PORT, "),
        (["serve", "--listener", "::1:8710"], "brackets round an IPv6 address, not '::1:8710'"),
        (["serve", "--listener", "a:http"], " --listener must be HOST:PORT, "),
        (["serve", "--listener", "a:70000"], "('a', 70000): port must be from 0 to 65535"),
        (["serve", "--listener", "fd:x"], " --listener must be HOST:PORT, "),
        (["serve", "--listener", "fd:0"], " --listener must be a listening socket, not 0"),
        (["serve", "--listener", "systemd"], "no sockets to this process (LISTEN_FDS)"),
        (["serve", "--port", "0", "--listener", "a:2"], "besides a --port (0)"),
        (["serve", "--host", "0.0.0.0", "--listener", "a:2"], "besides a --host (0.0.0.0)"),
        (["serve", "--unix-mode", "999"], "--unix-mode: invalid permissions value: '999'"),
        (["serve", "--reuse-port", "--host", "unix:/tmp/x"], " --reuse-port must not be True"),
        (["serve", "--trusted-proxy", "10.0.0.1"], "--trusted-proxy needs --proxy-protocol"),
        (["serve", "--heartbeat", "30000"], "must be MILLISECONDS,TEXT, such as 30000,ping, not"),
        (["serve", "--heartbeat", "x,ping"], "must be MILLISECONDS,TEXT, such as 30000,ping, not"),
        (
            ["serve", "--raw-heartbeat", "30000"],
            "must be MILLISECONDS,HEX, such as 30000,fff1, not",
        ),
        (
            ["serve", "--raw-heartbeat", "5,ping"],
            "must be MILLISECONDS,HEX, such as 30000,fff1, not",
        ),
        (["serve", "--heartbeat", "5,x", "--raw-heartbeat", "5,00"], "not allowed with argument"),
        (["serve", "--no-delay", "maybe"], "--no-delay"),
        (["serve", "app"], "'app' is not of the form module:attribute"),
        (["serve", "app.py:Upper"], "'app.py:Upper' is not of the form module:attribute"),
        (["serve", "../app:Upper"], "'../app:Upper' is not of the form module:attribute"),
        (["serve", "nowhere:Upper"], "no module named 'nowhere'"),
        (["serve", "app.inner:Upper"], "no module named 'app.inner'"),
        (["serve", "app:Missing"], "module 'app' has no attribute 'Missing'"),
        (["serve", "app:number.real.away"], "no attribute 'number.real.away'"),
        (["serve", "app:number"], "not a value of the type int"),
        (["serve", "app:Unrelated"], "not the class Unrelated"),
        (["serve", "app:NeedsArguments"], "missing a required argument: 'colour'"),
        (["serve", "app:WrittenAsync"], "on_message_async"),
        (["serve", "app:make_nothing"], "it returned a value of the type NoneType"),
        (["serve", "app:make_async"], "not an async function"),
        (["serve", "builtins:dir"], "it returned a value of the type list"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    directory_of_app: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        sys.exit(main.main(arguments))
    assert exit_.value.code == 2
    output, error = capsys.readouterr()
    assert_one_line(output, error, said)


@pytest.mark.parametrize("arguments", [["serve", "--port", "http"], ["serve", "nowhere:Upper"]])
def test_a_wrong_command_line_ends_the_process_with_2(tmp_path: Path, arguments: list[str]) -> None:
    result = run(tmp_path, *arguments)
    assert result.returncode == 2
    assert_one_line(result.stdout, result.stderr, arguments[-1].partition(":")[0])


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["--bogus"], ""), (["demo", "--port", "1"], " demo"), (["serve", "--prot", "1"], " serve")],
)
def test_an_unknown_option_refers_to_the_help_of_the_command(
    directory_of_app: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], command: str
) -> None:
    with pytest.raises(SystemExit):
        main.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"python -m psofa_gevent{command}: error: unrecognized arguments: --")
    assert error.endswith(f"(see python -m psofa_gevent{command} --help)\n")


def test_a_port_in_use_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with helpers.ScriptedServer() as taken:
        result = run(tmp_path, "serve", "--log-level", "error", "--port", str(taken.port))
    assert result.returncode == 1
    assert_one_line(result.stdout, result.stderr, f"127.0.0.1:{taken.port}")


def test_a_host_of_another_machine_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    arguments = ["--log-level", "error", "--host", "203.0.113.1", "--port", "0"]
    result = run(tmp_path, "serve", *arguments)
    assert result.returncode == 1
    assert_one_line(result.stdout, result.stderr, "203.0.113.1")


@pytest.mark.parametrize(
    ("source", "frames", "said"),
    [
        ("import missing_dependency", [1], "No module named 'missing_dependency'"),
        ("def go():\n    1 / 0\ngo()", [3, 2], "ZeroDivisionError: division by zero"),
        ("def Upper():\n    raise RuntimeError('no luck')", [2], "RuntimeError: no luck"),
        ("1 +", [1], "SyntaxError: invalid syntax"),
        (
            "from psofa_gevent import PsServer, PsCallback\nPsServer(PsCallback(), divide='3')",
            [2],
            "TypeError: divide must be a whole number, not '3'",
        ),
    ],
    ids=["import", "error", "factory", "syntax", "library"],
)
def test_an_error_in_the_served_module_comes_with_its_traceback_and_exit_code_1(
    tmp_path: Path, source: str, frames: list[int], said: str
) -> None:
    write_module(tmp_path, "app", source)
    result = run(tmp_path, "serve", "app:Upper")
    assert (result.stdout, result.returncode) == ("", 1)
    # It begins with the module's own frames: how we came to it is of no use to its author.
    places = re.findall(r'^  File "(.+)", line (\d+)', result.stderr, re.MULTILINE)
    ours = [(str(tmp_path / "app.py"), str(line)) for line in frames]
    assert places[: len(ours)] == ours
    assert said in result.stderr.splitlines()[-1]


def test_ctrl_c_while_the_module_is_imported_ends_quietly(tmp_path: Path) -> None:
    # In short sleeps: libev may notice a Python signal only when it wakes up anyway.
    write_module(
        tmp_path,
        "app",
        """
        import time

        while True:
            time.sleep(0.05)
            print("here", flush=True)
        """,
    )
    with program(tmp_path, "serve", "app:Upper") as started:
        assert started.read_line() == "here"
        assert started.stop(signal.SIGINT) == 130
        assert started.log == []


# -- help


def test_help_shows_what_there_is_and_how_to_talk_to_it(tmp_path: Path) -> None:
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    for text in ("psofa_gevent demo", "psofa_gevent serve app:Callback", "curl telnet://", "nc "):
        assert text in result.stdout


def test_the_script_is_named_so_that_it_can_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `psofa` only where that is found: not in a virtual environment that is not activated."""
    script = tmp_path / "psofa"
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [".venv/bin/psofa", "demo"])
    monkeypatch.setenv("PATH", os.devnull)
    assert main.program_name() == ".venv/bin/psofa"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.program_name() == "psofa"


def test_no_command_prints_the_help_as_an_error(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == run(tmp_path, "--help").stdout


def test_version_names_the_package_and_what_it_runs_on(tmp_path: Path) -> None:
    result = run(tmp_path, "--version")
    assert result.returncode == 0
    assert re.match(r"psofa_gevent \S.*, gevent \d+\.\d+.*, CPython 3\.\d+", result.stdout)


def test_help_of_serve_names_every_option_with_its_default(tmp_path: Path) -> None:
    text = " ".join(run(tmp_path, "serve", "--help").stdout.split())
    for name in [*server_settings(), "certificate", "key"]:
        if name not in ("socket_address_family", "ssl_context"):
            assert re.search(rf"{options.FLAGS[name]}\s", text)
    for setting in described(ServerSettings).values():
        if setting.name not in ("socket_address_family", "ssl_context", "framing", "heartbeat"):
            beginning = setting.what.partition(",")[0].partition("`")[0].partition(":")[0]
            assert setting.name in ("host", "listener") or beginning in text, setting.name
    for default in ("8710", "1024", "65536", "60000", "1.5", "5.0"):
        assert f"(default: {default}" in text
    assert "usage: python -m psofa_gevent serve [options] [module:attribute]" in text


def test_behind_a_load_balancer_serve_tells_how_to_try_it_without_one() -> None:
    text = reach.where_to_reach(("127.0.0.1", 8710), serving="an echo", has_header=True)
    assert r"(printf 'PROXY UNKNOWN\r\n'; cat) | nc 127.0.0.1 8710" in text
    assert "printf" not in reach.where_to_reach(("127.0.0.1", 8710), serving="an echo")


def test_with_tls_serve_tells_a_way_to_try_it_that_works() -> None:
    tcp, unix = ("127.0.0.1", 8710), ("unix:/run/a.sock", 0)
    text = reach.where_to_reach(tcp, serving="an echo", has_tls=True)
    assert "try         openssl s_client -quiet -connect 127.0.0.1:8710\n" in text
    text = reach.where_to_reach(unix, serving="an echo", has_tls=True)
    assert "try         openssl s_client -quiet -unix /run/a.sock\n" in text
    text = reach.where_to_reach(tcp, serving="an echo", has_tls=True, has_header=True)
    assert "try         through the load balancer: " in text


# -- options and settings


def server_settings() -> dict[str, Any]:
    """The settings of `PsServer`, with their defaults."""
    parameters = inspect.signature(PsServer).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "callback"}


def settings_from(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What ``serve *arguments`` gives to `PsServer`."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        PsServer, "__init__", lambda _self, _callback, **settings: given.update(settings)
    )
    serve.make_server(serve.EchoCallback(), parsed("serve", *arguments))
    return given


def parsed(*arguments: str) -> argparse.Namespace:
    return main.build_parser("psofa").parse_args(arguments)


def test_the_defaults_are_those_of_the_server_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {**server_settings(), "host": "127.0.0.1"}
    assert settings_from(monkeypatch) == expected
    shutdown = inspect.signature(PsServer.shutdown).parameters
    assert parsed("serve").shutdown_timeout == shutdown["timeout"].default
    assert parsed("serve").drain == shutdown["drain"].default


def test_every_setting_of_the_server_has_an_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trustme = pytest.importorskip("trustme")
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    expected = {
        "host": "0.0.0.0",  # for --listener
        "port": 8710,  # the same
        "socket_address_family": PsSocketAddressFamily.IPV6,
        "backlog": 2,
        "receive_buffer_size": 3,
        "max_sessions": 4,
        "read_buffer_size": 5,
        "divide": 6,
        "idle_milliseconds": 7,
        "send_timeout": 8.5,
        "callback_timeout": 9.5,
        "linger_timeout": 10.5,
        "no_delay": False,
        "allow_half_open": True,
        "framing": options.FRAMINGS["line"],
        "frame_timeout": 11.5,
        "high_water": 12,
        "overflow": PsOverflow.DROP_OLDEST,
        "send_buffer_size": 17,
        "unsent_low_water": 18,
        "handshake_timeout": 13.5,
        "keep_alive": 14.5,
        "user_timeout": 15.5,
        "heartbeat": (16, "é\n".encode()),
        "unix_mode": 0o660,
        "ssl_context": None,
        "proxy_protocol": True,
        "trusted_proxies": ["10.0.0.1", "10.0.0.2"],
        "allowed_networks": ["10.0.0.0/8", "::1"],
        "denied_networks": ["10.1.0.0/16"],
        "max_sessions_per_peer": 16,
        "refuse_when_full": True,
        "farewell": "busy",
        "listener": [16],
        "reuse_port": True,
    }
    assert expected.keys() == server_settings().keys()  # none is forgotten
    words = ["--ipv6", "--no-delay", "off", "--allow-half-open", "--framing", "line"]
    files = ["--certificate", str(tmp_path / "cert.pem"), "--key", str(tmp_path / "key.pem")]
    arguments = [*words, "--overflow", "drop-oldest", "--unix-mode", "660", *files]
    arguments += ["--heartbeat", r"16,é\n"]
    arguments += ["--listener", "fd:16", "--reuse-port"]
    for name, value in expected.items():
        option = options.FLAGS.get(name, "")
        if type(value) in (int, float, str) and name not in ("host", "port", "unix_mode"):
            arguments += [option, str(value)]
        elif isinstance(value, list) and name != "listener":
            arguments += [text for each in value for text in (option, each)]
    arguments += ["--proxy-protocol", "--refuse-when-full"]
    settings = settings_from(monkeypatch, *arguments)
    assert isinstance(settings["ssl_context"], ssl.SSLContext)
    assert {**settings, "ssl_context": None} == expected
    assert settings_from(monkeypatch, "--port", "1")["port"] == 1
    raw = settings_from(monkeypatch, "--framing", "line", "--raw-heartbeat", "16,fff1")
    assert raw["heartbeat"] == PsHeartbeat(16, b"\xff\xf1", raw=True)


def test_listeners_are_written_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["127.0.0.1:0", "[::1]:80", "[fe80::1%eth0]:80", "localhost:8080", "unix:/a:b:c"]
    arguments = [word for text in texts for word in ("--listener", text)]
    settings = settings_from(monkeypatch, *arguments)
    assert settings["listener"] == [
        ("127.0.0.1", 0),
        ("::1", 80),
        ("fe80::1%eth0", 80),
        ("localhost", 8080),
        "unix:/a:b:c",
    ]
    assert settings["host"] == "0.0.0.0"


@pytest.mark.parametrize(
    "files", [["--certificate", "/nowhere/cert.pem"], ["--key", "key"], ["--certificate", __file__]]
)
def test_a_certificate_that_cannot_be_used_is_told_in_one_line(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", "--port", "0", *files]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert files[1] in output or "--certificate" in output
    assert ("--key must name the key" in output) == (__file__ in files)  # it was read, and had none


@pytest.mark.parametrize("word", ["none", "None"])
def test_a_word_switches_a_limit_off(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    names = (
        *("idle_milliseconds", "send_timeout", "callback_timeout", "frame_timeout"),
        *("handshake_timeout", "keep_alive", "user_timeout", "max_sessions_per_peer"),
    )
    arguments = [text for name in names for text in (f"--{name.replace('_', '-')}", word)]
    settings = settings_from(monkeypatch, *arguments)
    assert [settings[name] for name in names] == [None] * len(names)


# -- the limit of open files


class PretendedLimit:
    """RLIMIT_NOFILE of a system that refuses some values."""

    def __init__(self, soft: int, hard: int, refused: set[int]) -> None:
        self.soft, self.hard, self.refused = soft, hard, refused

    def getrlimit(self, _kind: int) -> tuple[int, int]:
        return self.soft, self.hard

    def setrlimit(self, _kind: int, limits: tuple[int, int]) -> None:
        assert limits[1] == self.hard
        if limits[0] in self.refused:
            raise ValueError("current limit exceeds maximum limit")
        self.soft = limits[0]


UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "refused", "raised_to"),
    [
        (256, 4096, set(), 4096),
        (4096, 4096, {4096}, 4096),
        (256, UNLIMITED, set(), UNLIMITED),
        (256, UNLIMITED, {UNLIMITED}, serve.OPEN_MAX),  # macOS
        (256, UNLIMITED, {UNLIMITED, serve.OPEN_MAX}, 256),
        (20_000, UNLIMITED, {UNLIMITED}, 20_000),
        (UNLIMITED, UNLIMITED, {UNLIMITED}, UNLIMITED),
    ],
)
def test_the_descriptor_limit_is_raised_as_far_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, refused: set[int], raised_to: int
) -> None:
    limit = PretendedLimit(soft, hard, refused)
    monkeypatch.setattr(resource, "getrlimit", limit.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limit.setrlimit)
    serve.raise_descriptor_limit()
    assert limit.soft == raised_to


# -- monkey-patching


def test_importing_the_command_line_patches_nothing(tmp_path: Path) -> None:
    source = """
import psofa_gevent.__main__, psofa_gevent.cli.main, psofa_gevent.cli.demo, psofa_gevent.cli.load
import psofa_gevent.cli.options, psofa_gevent.cli.reach, psofa_gevent.cli.serve
from gevent import monkey
print([name for name in ("socket", "time", "threading") if monkey.is_module_patched(name)])
"""
    result = run_command(tmp_path, [sys.executable, "-c", source])
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_the_command_line_warns_of_nothing(tmp_path: Path) -> None:
    # Patching late, after ssl for example was imported, would be a warning.
    result = run_command(
        tmp_path, [sys.executable, "-W", "error", "-m", "psofa_gevent", "--version"]
    )
    assert (result.returncode, result.stderr) == (0, "")
