"""The package as something installed and imported: what it brings, and what it leaves alone."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.resources
import inspect
import logging
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import psofa_gevent
from helpers import REPOSITORY

API_NAMES = {
    "PsCallback",
    "PsCallbackError",
    "PsClient",
    "PsClientError",
    "PsCloseReason",
    "PsError",
    "PsMultiClient",
    "PsMultiClientConnection",
    "PsMultiClientError",
    "PsSendError",
    "PsServer",
    "PsServerError",
    "PsSession",
    "PsSocketAddressFamily",
}
"""The names that programs outside this repository rely on."""

IMPORT_EVERYTHING = """\
import importlib, pkgutil
import psofa_gevent
for module in pkgutil.iter_modules(psofa_gevent.__path__, "psofa_gevent."):
    # __main__ is a program: it patches its own process. testing is for where pytest is installed.
    if module.name not in {"psofa_gevent.__main__", "psofa_gevent.testing"}:
        importlib.import_module(module.name)
"""

BLOCK_ALL_BUT_RUNTIME_DEPENDENCIES = """\
import importlib.abc, sys

# coverage measures this process too, and gevent's libuv loop needs cffi.
ALLOWED = sys.stdlib_module_names | {
    "gevent", "greenlet", "zope", "psofa_gevent", "coverage", "cffi", "_cffi_backend"
}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds the same package as this one."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        cwd=Path(psofa_gevent.__file__).parent.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def assert_silent_success(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_patches_nothing_and_prints_nothing() -> None:
    code = """\
        from gevent import monkey
        assert not monkey.saved, sorted(monkey.saved)
        import socket, threading, time
        assert (socket.socket.__module__, time.sleep.__module__) == ("socket", "time")
        assert threading.active_count() == 1, threading.enumerate()
    """
    assert_silent_success(run_python(IMPORT_EVERYTHING + textwrap.dedent(code)))


def test_core_needs_nothing_but_gevent_and_greenlet() -> None:
    assert_silent_success(run_python(BLOCK_ALL_BUT_RUNTIME_DEPENDENCIES + IMPORT_EVERYTHING))


def test_logger_prints_nothing_where_the_application_configured_no_logging() -> None:
    code = """\
        import logging, psofa_gevent
        logging.getLogger("psofa_gevent").error("not to be seen")
        logging.getLogger("psofa_gevent.session.session").critical("nor this")
    """
    assert_silent_success(run_python(code))


def test_logger_has_a_null_handler_and_no_level_of_its_own() -> None:
    logger = logging.getLogger("psofa_gevent")
    assert [type(handler) for handler in logger.handlers].count(logging.NullHandler) == 1
    assert logger.level == logging.NOTSET
    assert logger.propagate


def test_every_name_of_the_contract_is_exported() -> None:
    assert set(psofa_gevent.__all__) >= API_NAMES


def test_all_lists_each_exported_name_once_and_nothing_else() -> None:
    exported = psofa_gevent.__all__
    assert len(set(exported)) == len(exported)
    public = {
        name
        for name, value in vars(psofa_gevent).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert set(exported) - {"__version__"} == public


@pytest.mark.parametrize("name", sorted(API_NAMES))
def test_exported_class_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(psofa_gevent, name))


def test_version_is_that_of_the_installed_package() -> None:
    assert re.match(r"\d+\.\d+", psofa_gevent.__version__)
    try:
        installed = importlib.metadata.version("psofa-gevent")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert psofa_gevent.__version__ == installed


def test_type_checkers_find_the_marker() -> None:
    assert importlib.resources.files("psofa_gevent").joinpath("py.typed").is_file()


def test_oldest_environment_pins_the_declared_lower_bounds() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = dict(requirement.split(">=") for requirement in project["dependencies"])
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(REPOSITORY / "tox.ini")
    pinned = dict(
        requirement.split("==")
        for requirement in tox["testenv:oldest"]["deps"].split()
        if "==" in requirement
    )
    assert {name: pinned.get(name) for name in declared} == declared
