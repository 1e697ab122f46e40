"""Servers that can be reached or not, and clients that they cannot have accepted yet."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from gevent import monkey

from helpers import LOOPBACK
from psofa_gevent import PsServer
from psofa_gevent.testing import ScriptedClient

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[tuple[Any, ...]]:
    """A listener that has nothing to do with the library, and its address."""
    with _SystemSocket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((LOOPBACK, port))
        sock.listen()
        yield sock.getsockname()


@contextlib.contextmanager
def native_clients(address: tuple[Any, ...], count: int) -> Iterator[list[socket.socket]]:
    """Connections that the kernel has made and nobody can have accepted: the hub never ran."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(_SystemSocket(socket.AF_INET, socket.SOCK_STREAM))
            client.settimeout(5.0)
            client.connect(address)
            clients.append(client)
        yield clients


def assert_serves(server: PsServer) -> None:
    with ScriptedClient(server.address) as client:
        client.send("are you there?")
        client.expect("are you there?")


def assert_refused(address: tuple[Any, ...]) -> None:
    with pytest.raises(ConnectionRefusedError):
        ScriptedClient(address).close()
