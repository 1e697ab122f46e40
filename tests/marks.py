"""Marks that several test files need."""

from __future__ import annotations

import gevent.socket
import pytest

__all__ = ["needs_ipv6", "sync_and_async"]


def has_ipv6() -> bool:
    try:
        with gevent.socket.socket(gevent.socket.AF_INET6, gevent.socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")

sync_and_async = pytest.mark.parametrize("use_async_callback", [False, True], ids=["sync", "async"])
