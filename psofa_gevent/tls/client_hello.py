"""The name that a TLS client asks for (SNI, RFC 6066), read from its first message.

Python's ``ssl`` gives a server this name only in `ssl.SSLContext.sni_callback`, which belongs to
the application. So it is read here, from the bytes of the handshake that OpenSSL has accepted.
`server_name` raises nothing, whatever the bytes are. Nothing here waits.
"""

from __future__ import annotations

__all__ = ["LONGEST_HELLO", "server_name"]

LONGEST_HELLO = 16_384
"""Bytes at the start of a connection in which to look for the name. A ClientHello has 300 to 2,000.
"""
HANDSHAKE_RECORD = 22
CLIENT_HELLO = 1
SERVER_NAME = 0
HOST_NAME = 0


def server_name(data: bytes) -> str | None:
    """The name in the ClientHello at the start of `data`; ``None``: it has no name."""
    try:
        return _server_name(_Reader(_handshake(_Reader(data))))
    except (EOFError, UnicodeDecodeError):
        return None


class _Reader:
    """Takes data apart that consists of numbers, and of bytes with their count before them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            EOFError: fewer bytes are left.
        """
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise EOFError
        self._at += count
        return taken

    def number(self, size: int) -> int:
        """The next number, of `size` bytes. Raises `EOFError`."""
        return int.from_bytes(self.take(size))

    def counted(self, size: int) -> bytes:
        """The next bytes that have their count before them, in `size` bytes. Raises `EOFError`."""
        return self.take(self.number(size))


def _handshake(records: _Reader) -> bytes:
    """The handshake messages in the whole records, up to the first record of another type."""
    messages = b""
    try:
        while records.number(1) == HANDSHAKE_RECORD:
            records.take(2)  # version
            messages += records.counted(2)
    except EOFError:
        pass
    return messages


def _server_name(messages: _Reader) -> str | None:
    if messages.number(1) != CLIENT_HELLO:
        return None
    hello = _Reader(messages.counted(3))
    hello.take(2 + 32)  # version, random
    hello.counted(1)  # session id
    hello.counted(2)  # cipher suites
    hello.counted(1)  # compression methods
    extensions = _Reader(hello.counted(2))
    while not extensions.is_at_end:
        kind, extension = extensions.number(2), extensions.counted(2)
        if kind == SERVER_NAME:
            names = _Reader(_Reader(extension).counted(2))
            return names.counted(2).decode("ascii") if names.number(1) == HOST_NAME else None
    return None
