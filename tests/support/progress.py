"""How far a run of the suite is, kept in a file for whoever waits for it: toxfile.py."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

VARIABLE = "PSOFA_TEST_PROGRESS"
"""Names the file, which then holds two numbers: of the tests that ended, and of all."""


class ProgressFile:
    """A plugin of the process that reports: of pytest-xdist's, not the workers."""

    def __init__(self, path: str) -> None:
        # Kept open, and never truncated: who reads it always finds both numbers.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._done = 0
        self._total = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._total = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self._total = len(ids)  # each worker collects all

    def pytest_runtest_logfinish(self) -> None:
        self._done += 1
        os.pwrite(self._file, f"{self._done} {self._total}\n".encode(), 0)

    def pytest_unconfigure(self) -> None:
        os.close(self._file)


def keep_progress(config: pytest.Config) -> None:
    """Register the plugin where the variable asks for it."""
    path = os.environ.pop(VARIABLE, None)  # not for the runs of pytest that tests start
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ProgressFile(path))
