"""Marks that several test files need."""

from __future__ import annotations

import sys

import gevent
import gevent.socket
import pytest

__all__ = ["needs_ipv6", "needs_libev_to_destroy", "needs_tracing", "sync_and_async"]


def has_ipv6() -> bool:
    try:
        with gevent.socket.socket(gevent.socket.AF_INET6, gevent.socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")

needs_libev_to_destroy = pytest.mark.skipif(
    "libuv" in type(gevent.get_hub().loop).__module__,
    reason="gevent does not destroy a libuv loop in which something is watched",
)

needs_tracing = pytest.mark.skipif(
    sys.version_info >= (3, 15),
    reason="Python 3.15 crashes when a greenlet raises that was suspended when tracing began "
    "(greenlet 3.5; 368 of its issues)",
)

sync_and_async = pytest.mark.parametrize("use_async_callback", [False, True], ids=["sync", "async"])
