"""The README's programs and commands are run, each program as it stands there."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from helpers import REPOSITORY, free_port, python_process, wait_until_accepting

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
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
