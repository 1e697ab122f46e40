"""The README's programs and commands are run, each program as it stands there."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from example_process import ended_well
from gunicorn_process import get, reload_gunicorn, under_load
from helpers import REPOSITORY, free_port, python_process, wait_until_accepting
from psofa_gevent.testing import ScriptedClient

pytestmark = pytest.mark.programs

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROGRAMS: list[str] = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SNIPPETS: list[str] = re.findall(r"^```py\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
TITLES = [re.sub(r"\W+", "_", program.strip().splitlines()[-1]) for program in PROGRAMS]


def test_the_readme_has_programs() -> None:
    assert len(PROGRAMS) >= 6


@pytest.mark.parametrize("program", PROGRAMS, ids=TITLES)
def test_each_program_of_the_readme_runs_and_ends_without_a_traceback(
    program: str, tmp_path: Path
) -> None:
    port = free_port()
    script = tmp_path / "program.py"
    script.write_text(program.replace("8710", str(port)), encoding="utf-8")
    with python_process(str(script)) as process:
        if "serve_forever()" in program:
            wait_until_accepting(("127.0.0.1", port))
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    output = "\n".join(process.lines)
    assert code == 0, output
    assert "Traceback" not in output, output


def test_the_commands_of_the_first_screen_are_single_lines() -> None:
    for name in ("run", "test"):
        found = re.search(rf"<!-- {name}-command -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert found is not None, name
        assert len(found[1].splitlines()) == 1, name


def test_all_links_of_the_readme_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def block_with(text: str) -> str:
    """The one block of the README, of those that are not programs, in which `text` stands."""
    [found] = [block for block in SNIPPETS if text in block]
    return found


def test_the_fixtures_of_the_readme_work(tmp_path: Path) -> None:
    imports, test = block_with("ps_server").split("\n\n\n", 1)
    echo = next(program for program in PROGRAMS if "connected_session" in program)
    (tmp_path / "conftest.py").write_text(imports, encoding="utf-8")
    (tmp_path / "test_echo.py").write_text(f"{echo}\n\n{test}", encoding="utf-8")
    arguments = ("-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path))
    with python_process(*arguments) as process:
        code = process.wait()
    assert code == 0, "\n".join(process.lines)


GUNICORN_APP = """\
import time

from psofa_gevent import PsCallback


class MyCallback(PsCallback):
    def on_message(self, session, message):
        session.send(message)


def app(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.3)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""


def test_the_gunicorn_settings_of_the_readme_lose_nothing_at_a_reload(tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    (tmp_path / "my_app.py").write_text(GUNICORN_APP, encoding="utf-8")
    settings = tmp_path / "gunicorn.conf.py"
    # The second line leaves nothing in the home directory; older gunicorns ignore it.
    more = f"chdir = {str(tmp_path)!r}\ncontrol_socket_disable = True\n"
    settings.write_text(block_with("post_worker_init") + more, encoding="utf-8")
    ports = ("-b", "127.0.0.1:0", "-b", "127.0.0.1:0")
    command = ("-m", "gunicorn", "-c", str(settings), *ports, "my_app:app")
    with python_process(*command) as process:
        line = process.expect_line("Listening at: ")
        http_address, tcp_address = (
            ("127.0.0.1", int(port)) for port in re.findall(r":(\d{4,5})", line)
        )

        def request(path: str) -> Callable[[], None]:
            def request_it() -> None:
                assert get(http_address, path) == (200, b"ok")

            return request_it

        def exchange() -> None:
            with ScriptedClient(tcp_address, timeout=20.0) as client:
                client.send("hello")
                client.expect("hello")

        with under_load(request("/"), request("/slow"), exchange):
            reload_gunicorn(process)
            process.send_signal(signal.SIGTTIN)
            process.expect_line("Booting worker")
        process.send_signal(signal.SIGTERM)
        ended_well(process)
