"""How far a run of the suite is, and what tox.ini says of it.

The first is `tests/support/progress.py`, for toxfile.py.
"""

from __future__ import annotations

import configparser
import os
import re
import tomllib
from pathlib import Path

import pytest

from helpers import REPOSITORY, SUPPORT, python_process
from progress import VARIABLE

CONFTEST = """\
import sys

sys.path.append({support!r})
from progress import keep_progress as pytest_configure
"""
THREE_TESTS = """\
import pytest


@pytest.mark.parametrize("number", range(3))
def test_number(number):
    assert number != 1, "one that fails has ended, too"
"""


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "with workers"])
def test_a_run_tells_how_many_of_its_tests_have_ended(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(support=str(SUPPORT)))
    (tmp_path / "test_numbers.py").write_text(THREE_TESTS)
    progress = tmp_path / "progress"
    command = (
        "-m",
        "pytest",
        *options,
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    )
    with python_process(*command, environment={VARIABLE: str(progress)}) as process:
        code = process.wait(100)
    assert code == 1, "\n".join(process.lines)
    assert progress.read_text().split() == ["3", "3"]


def test_tox_knows_each_python_that_is_supported_and_waits_for_each_with_coverage() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(REPOSITORY / "tox.ini")
    pythons = pythons_in(tox["tox"]["env_list"])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    supported = re.findall(r":: (3)\.(\d+)", "\n".join(project["classifiers"]))
    assert pythons >= {major + minor for major, minor in supported}
    assert pythons_in(tox["testenv:coverage"]["depends"]) == pythons


def pythons_in(environments: str) -> set[str]:
    """The numbers of py311, py{312,313} and so on."""
    return {
        number
        for single, several in re.findall(r"\bpy(?:(\d+)|\{([\d,]+)\})", environments)
        for number in [single, *several.split(",")]
        if number
    }
