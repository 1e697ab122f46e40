"""Policies of clients that stay connected, and the servers that they come back to."""

from __future__ import annotations

from collections.abc import Callable

import gevent
import pytest

from helpers import free_port
from psofa_gevent import PsCallback, PsError, PsReconnect, PsServer
from psofa_gevent.connecting.link import Link
from psofa_gevent.testing import RecordingCallback

QUICK = PsReconnect(first_delay=0.02, longest_delay=0.1)
SLOW = PsReconnect(first_delay=60, longest_delay=60, jitter=0)
NO_DELAY = 2.0
"""Seconds: less than a minute, and enough for a busy machine."""


@pytest.fixture
def address() -> tuple[str, int]:
    """Where nobody listens, and a server can be started, again and again."""
    return "127.0.0.1", free_port()


def server_at(address: tuple[str, int], callback: PsCallback | None = None) -> PsServer:
    return PsServer(callback or RecordingCallback(bytes), host=address[0], port=address[1])


def error_of(wait: Callable[[], object]) -> gevent.Greenlet[[], PsError | None]:
    """Wait in a greenlet of its own, whose value is the error that came of it."""

    def catch() -> PsError | None:
        try:
            wait()
        except PsError as exc:
            return exc
        return None

    greenlet = gevent.spawn(catch)
    gevent.idle()
    return greenlet


async def asking(_failures: int, _error: PsError | None) -> bool:
    """What nobody would await."""
    return False


def has_failed(link: Link | None) -> bool:
    """Whether an attempt has failed, and the next one is waited for."""
    return link is not None and link._last_error is not None
