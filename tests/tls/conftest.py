"""A fixture of several files of tests here."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from psofa_gevent import PsServer

if TYPE_CHECKING:
    from tls_peers import MakePeer, TlsPeer


@pytest.fixture
def peer() -> Iterator[MakePeer]:
    """Makes TLS peers of a server, and closes them."""
    # Here, as it skips where trustme is not installed.
    from tls_peers import TlsPeer, client_context

    with contextlib.ExitStack() as stack:

        def make(
            server: PsServer[Any], context: ssl.SSLContext | None = None, **kwargs: Any
        ) -> TlsPeer:
            made = TlsPeer(server.address, context or client_context(), **kwargs)
            return stack.enter_context(made)

        yield make
