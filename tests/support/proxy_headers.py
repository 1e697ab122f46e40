"""Writes headers of the PROXY protocol, as load balancers do: proxy-protocol.txt, section 2."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from typing import Any

from psofa_gevent.proxy_protocol import V2_SIGNATURE, crc32c

__all__ = ["CLIENT", "LOCAL", "SERVER", "tls_tlv", "tlv", "v1", "v2", "with_crc"]

CLIENT = ("203.0.113.7", 50_123)
SERVER = ("198.51.100.1", 443)

INET_STREAM, INET6_STREAM, UNIX_STREAM = 0x11, 0x21, 0x31


def v1(source: tuple[Any, ...] = CLIENT, destination: tuple[Any, ...] = SERVER) -> bytes:
    """A line (section 2.1)."""
    protocol = "TCP6" if ":" in source[0] else "TCP4"
    hosts = f"{source[0]} {destination[0]}"
    return f"PROXY {protocol} {hosts} {source[1]} {destination[1]}\r\n".encode()


def v2(
    source: tuple[Any, ...] | bytes | None = CLIENT,
    destination: tuple[Any, ...] | bytes | None = SERVER,
    tlvs: Iterable[bytes] = (),
    *,
    command: int = 1,
    family: int | None = None,
) -> bytes:
    """A binary header (section 2.2); the endpoints of Unix sockets are their paths."""
    block = b""
    written = 0
    if isinstance(source, bytes):
        assert isinstance(destination, bytes)
        written = UNIX_STREAM
        block = source.ljust(108, b"\0") + destination.ljust(108, b"\0")
    elif source is not None:
        assert isinstance(destination, tuple)
        addresses = [ipaddress.ip_address(each[0]) for each in (source, destination)]
        written = INET_STREAM if addresses[0].version == 4 else INET6_STREAM
        block = b"".join(each.packed for each in addresses)
        block += struct.pack("!HH", source[1], destination[1])
    block += b"".join(tlvs)
    family = written if family is None else family
    return V2_SIGNATURE + struct.pack("!BBH", 0x20 | command, family, len(block)) + block


LOCAL = v2(None, command=0)
"""Of a connection of the balancer's own."""


def tlv(kind: int, value: bytes) -> bytes:
    """A type, a length, a value."""
    return struct.pack("!BH", kind, len(value)) + value


def tls_tlv(client: int, verify: int, *tlvs: bytes) -> bytes:
    """PP2_TYPE_SSL (section 2.2.6)."""
    return tlv(0x20, struct.pack("!BI", client, verify) + b"".join(tlvs))


def with_crc(
    source: tuple[Any, ...] = CLIENT,
    destination: tuple[Any, ...] = SERVER,
    tlvs: Iterable[bytes] = (),
    *,
    command: int = 1,
) -> bytes:
    """`v2` with its checksum as the last TLV (section 2.2.3)."""
    blank = v2(source, destination, [*tlvs, tlv(3, bytes(4))], command=command)
    return blank[:-4] + struct.pack("!I", crc32c(blank))
