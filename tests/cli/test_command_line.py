"""The command line: what is wrong with it in one line, and its help."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

import helpers
from command_line import program, run, run_command, write_module
from psofa_gevent.cli import main, reach

pytestmark = pytest.mark.programs


# Errors


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


# Help


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


# Monkey-patching


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
