"""What the servers have in common."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["BACKLOG", "HOST", "PING", "PONG", "READ_SIZE", "TO_ALL", "Announce", "pongs"]

Announce = Callable[[int], None]
"""Tells the benchmark the port."""

HOST = "127.0.0.1"
BACKLOG = 1024
READ_SIZE = 65536
PING = b"PING\r\n"
PONG = b"+PONG\r\n"
TO_ALL = ord(".")


def pongs(message: bytes) -> bytes:
    """Answer as many lines as came, as they may come glued."""
    return PONG if message == PING else PONG * message.count(b"\n")
