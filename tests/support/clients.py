"""Clients that a test connects, and the addresses that names have for them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psofa_gevent import PsCallback, PsClient


@contextlib.contextmanager
def client_of(
    address: tuple[Any, ...], callback: PsCallback | None = None, **settings: Any
) -> Iterator[PsClient]:
    """A client that is not connected yet; disconnected at the end."""
    client = PsClient(callback or PsCallback(), address[0], address[1], **settings)
    try:
        yield client
    finally:
        client.disconnect()


AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]


def look_up(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], list[str]]) -> None:
    """Let every name have the addresses that `answer` returns, in the greenlet that asks."""

    def getaddrinfo(_host: str, port: int, *_args: object) -> list[AddressInfo]:
        return [
            (
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
                if ":" in address
                else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            )
            for address in answer()
        ]

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", getaddrinfo)
