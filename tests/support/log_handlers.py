"""Handlers that keep the records of the library, or hold them up."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from gevent.event import Event

from helpers import Keeping, attached
from psofa_gevent.hub import logs


class Holding(logging.Handler):
    """Waits in its first record until `go_on` is set. Notes each record's beginning and end."""

    def __init__(self, level: int = logging.DEBUG) -> None:
        super().__init__(level)
        self.go_on = Event()
        self.begun: list[logging.LogRecord] = []
        self.ended: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.begun.append(record)
        self.go_on.wait()
        self.ended.append(record)

    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.ended]


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    """A handler that keeps all records of the library."""
    handler = Keeping()
    with attached(handler):
        yield handler


@pytest.fixture
def holding() -> Iterator[Holding]:
    """A handler that waits."""
    handler = Holding()
    with attached(handler):
        yield handler
        handler.go_on.set()
        logs.flush()


def messages(keeping: Keeping, least: int = logging.DEBUG) -> list[str]:
    return [record.getMessage() for record in keeping.records if record.levelno >= least]
