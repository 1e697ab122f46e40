"""``psofa demo``: what it tells, and how it ends."""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from command_line import program, run
from psofa_gevent.cli import demo

pytestmark = pytest.mark.programs
ROW = re.compile(
    r"^ *(?P<seconds>\d+\.\d{3})  (?P<who>server|client \d) *  (?P<session>[0-9a-f]{8}|-) *"
    r"  (?P<callback>on_\w+) *  (?P<what>.+)$"
)


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
