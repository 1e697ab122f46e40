"""What the servers have in common."""

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
"""Tells the benchmark the port."""

HOST = "127.0.0.1"
BACKLOG = 1024
READ_SIZE = 65536
PING = b"PING\r\n"
PONG = b"+PONG\r\n"
TO_ALL = ord(".")
TLS = "tls"
"""The work that goes over TLS."""


def pongs(message: bytes) -> bytes:
    """Answer as many lines as came, as they may come glued."""
    return PONG if message == PING else PONG * message.count(b"\n")


def tls_context(kind: type[Context]) -> Context:
    """For TLS 1.3, with a certificate that nobody knows, made for the occasion."""
    import trustme

    context = kind(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    trustme.CA().issue_cert("localhost", HOST).configure_cert(context)
    return context
