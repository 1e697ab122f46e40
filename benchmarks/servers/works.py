"""Constants and functions that the servers share."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TypeVar

__all__ = [
    "BACKLOG",
    "HOST",
    "PING",
    "PONG",
    "READ_SIZE",
    "TLS",
    "TO_ALL",
    "Announce",
    "pongs",
    "tls_context",
]

Context = TypeVar("Context", bound=ssl.SSLContext)

Announce = Callable[[int], None]
"""Reports the port to the benchmark."""

HOST = "127.0.0.1"
BACKLOG = 1024
READ_SIZE = 65536
PING = b"PING\r\n"
PONG = b"+PONG\r\n"
TO_ALL = ord(".")
TLS = "tls"
"""The name of the work that uses TLS."""


def pongs(message: bytes) -> bytes:
    """The answers to all lines of `message`: lines may come glued together."""
    return PONG if message == PING else PONG * message.count(b"\n")


def tls_context(kind: type[Context]) -> Context:
    """A context for TLS 1.3, with a certificate made just now by an unknown authority."""
    import trustme

    context = kind(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    trustme.CA().issue_cert("localhost", HOST).configure_cert(context)
    return context
