r"""The PROXY protocol: the header in which a load balancer says who its client is.

Versions 1 and 2, as in HAProxy's proxy-protocol.txt, whose sections are named here. Bytes in, a
header out: nothing here touches a socket, waits, or raises anything but `ValueError`.

Version 1 (section 2.1) is a line of text. Version 2 (section 2.2) is a signature that no text has,
a length, addresses, and then TLVs: types, lengths and values of further facts from the balancer. A
header is accepted or refused as a whole, as early as possible. Nothing is guessed, and the bytes
after the header are never looked at.
"""

from __future__ import annotations

import _socket
import ipaddress
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from psofa_gevent.net.sockopts import Endpoint
from psofa_gevent.net.unix import unix_endpoint

__all__ = ["PsProxyInfo", "PsProxyTls", "parse"]

V1_START = b"PROXY "
V1_LONGEST = 107
"""Bytes of the longest header, with the CR LF (section 2.1)."""
V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2_FIXED = 16
"""Bytes up to the end of the length (section 2.2)."""
VERSION_2 = 0x20
LOCAL, PROXY = 0, 1
UNSPEC, INET, INET6, UNIX = 0, 1, 2, 3
ADDRESS_SIZES = {UNSPEC: 0, INET: 12, INET6: 36, UNIX: 216}
UNIX_PATH = 108
LAST_TRANSPORT = 2
"""The transports are UNSPEC, STREAM and DGRAM."""

ALPN = 0x01
AUTHORITY = 0x02
CRC32C = 0x03
UNIQUE_ID = 0x05
SSL = 0x20
SSL_VERSION = 0x21
SSL_CN = 0x22
SSL_CIPHER = 0x23
SSL_FIXED = 5
"""Bytes of PP2_TYPE_SSL before its own TLVs (section 2.2.6)."""
WRONG_CHECKSUM = "a PROXY header with a wrong checksum"
CLIENT_SSL = 0x01
CLIENT_HAS_CERTIFICATE = 0x02 | 0x04
"""The client has shown a certificate on this connection, or earlier in its TLS session."""

_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_LAST_PORT = 65_535

Tlvs = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class PsProxyTls:
    """The TLS that ended at the load balancer (PP2_TYPE_SSL, section 2.2.6).

    Attributes:
        version: the version of TLS: "TLSv1.3". ``None``, here and below: the header does not say.
        cipher: the cipher's name.
        cn: the common name in the client's certificate. Trust it only if `verified`.
        verified: the client has shown a certificate, and the balancer has verified it.
    """

    version: str | None
    cipher: str | None
    cn: str | None
    verified: bool


@dataclass(frozen=True, slots=True)
class PsProxyInfo:
    """What the header of the PROXY protocol says of a connection.

    Attributes:
        version: the version of the protocol, 1 or 2.
        is_local: the connection is the balancer's own, such as a health check (LOCAL), or the
            balancer can't say whose it is (UNKNOWN, UNSPEC). Then `source` and `destination` are
            ``None``, and the session's `remote_endpoint` is the balancer's.
        source: the client's endpoint; ``None`` also for a Unix socket without a name.
        destination: the endpoint of the balancer to which the client has connected; ``None`` also
            for a Unix socket without a name.
        proxy_endpoint: the balancer's end of its connection to this server.
        tlvs: pairs of a type and a value, in the order of the header (section 2.2).
    """

    version: int
    is_local: bool
    source: Endpoint | None
    destination: Endpoint | None
    proxy_endpoint: Endpoint | None = None
    tlvs: Tlvs = ()

    def get_tlv(self, kind: int) -> bytes | None:
        """The value of the first TLV of type `kind`; ``None``: there is none."""
        return _find(self.tlvs, kind)

    @property
    def authority(self) -> str | None:
        """The host name that the client has asked for: its SNI (section 2.2.2)."""
        return _text(self.get_tlv(AUTHORITY))

    @property
    def alpn(self) -> str | None:
        """The protocol that the balancer and the client agreed on (section 2.2.1)."""
        return _text(self.get_tlv(ALPN))

    @property
    def unique_id(self) -> bytes | None:
        """The balancer's id of the connection, also used in its log (section 2.2.5)."""
        return self.get_tlv(UNIQUE_ID)

    @property
    def tls(self) -> PsProxyTls | None:
        """The TLS between client and balancer; ``None``: no TLS, or the header does not say."""
        value = self.get_tlv(SSL)
        if value is None or not value[0] & CLIENT_SSL:
            return None
        tlvs = tuple(_tlvs_of(value[SSL_FIXED:]))
        is_verified = not any(value[1:SSL_FIXED]) and value[0] & CLIENT_HAS_CERTIFICATE != 0
        return PsProxyTls(
            version=_text(_find(tlvs, SSL_VERSION)),
            cipher=_text(_find(tlvs, SSL_CIPHER)),
            cn=_text(_find(tlvs, SSL_CN)),
            verified=is_verified,
        )


def parse(
    data: bytes | bytearray, proxy_endpoint: Endpoint | None = None
) -> tuple[PsProxyInfo, int] | None:
    """Parse the header at the beginning of `data`.

    Args:
        data: all bytes that have come so far.
        proxy_endpoint: the endpoint from which they have come, for `PsProxyInfo`.

    Returns:
        The header, and its length in bytes; ``None``: `data` is the beginning of a header, and more
        must come.

    Raises:
        ValueError: `data` does not begin with a header, or with a malformed one.
    """
    if data.startswith(V1_START):
        return _parse_v1(data, proxy_endpoint)
    if data.startswith(V2_SIGNATURE):
        return _parse_v2(data, proxy_endpoint)
    if V1_START.startswith(data) or V2_SIGNATURE.startswith(data):
        return None
    raise ValueError(f"no PROXY protocol: it begins with {bytes(data[:16])!r}")


# Version 1


def _parse_v1(
    data: bytes | bytearray, proxy_endpoint: Endpoint | None
) -> tuple[PsProxyInfo, int] | None:
    start = bytes(data[:V1_LONGEST])
    line, separator, _ = start.partition(b"\r\n")
    # Neither CR nor LF alone ends the line, and neither may be in it.
    broken = b"\n" in line or b"\r" in (line if separator else line[:-1])
    if broken or (not separator and len(start) == V1_LONGEST):
        raise ValueError(f"a PROXY line must end with CR LF within 107 bytes: {start!r}")
    if not separator:
        return None
    try:
        source, destination = _endpoints_of(line.decode("latin-1"))
    except ValueError as exc:
        raise ValueError(f"a bad PROXY line: {line!r}: {exc}") from exc
    info = PsProxyInfo(1, source is None, source, destination, proxy_endpoint)
    return info, len(line) + 2


def _endpoints_of(line: str) -> tuple[Endpoint | None, Endpoint | None]:
    _, protocol, *fields = line.split(" ")
    if protocol == "UNKNOWN":
        return None, None
    if protocol not in ("TCP4", "TCP6"):
        raise ValueError("it must be TCP4, TCP6 or UNKNOWN")
    if len(fields) != 4:
        raise ValueError("it must have two addresses and two ports")
    read_address = _v4_address if protocol == "TCP4" else _v6_address
    addresses = [read_address(text) for text in fields[:2]]
    ports = [_port(text) for text in fields[2:]]
    source, destination = (
        (address, port) if protocol == "TCP4" else (address, port, 0, 0)
        for address, port in zip(addresses, ports, strict=True)
    )
    return source, destination


def _v4_address(text: str) -> str:
    return str(ipaddress.IPv4Address(text))  # refuses leading zeros


def _v6_address(text: str) -> str:
    if "%" in text:
        raise ValueError(f"an address with a zone: {text}")
    return _socket.inet_ntop(_socket.AF_INET6, ipaddress.IPv6Address(text).packed)


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > _LAST_PORT:
        raise ValueError(f"not a port: {text}")
    return int(text)


# Version 2


def _parse_v2(
    data: bytes | bytearray, proxy_endpoint: Endpoint | None
) -> tuple[PsProxyInfo, int] | None:
    command = _command(data[12]) if len(data) > 12 else PROXY
    if command != LOCAL and len(data) > 13:
        _check_family(data[13])
    if len(data) < V2_FIXED:
        return None
    family = data[13] >> 4
    size = V2_FIXED + int.from_bytes(data[14:16], "big")
    if command != LOCAL and size - V2_FIXED < ADDRESS_SIZES[family]:
        raise ValueError(f"a PROXY header too short for its addresses: {bytes(data[:16])!r}")
    if len(data) < size:
        return None
    header = bytes(data[:size])
    if command == LOCAL or family == UNSPEC or not data[13] & 0xF:
        tlvs = _tlvs_if_any(header, family)
        return PsProxyInfo(2, True, None, None, proxy_endpoint, tlvs), size
    source, destination = _addresses(header, family)
    tlvs = _read_tlvs(header, V2_FIXED + ADDRESS_SIZES[family])
    if _has_right_crc(header, tlvs) is False:
        raise ValueError(WRONG_CHECKSUM)
    return PsProxyInfo(2, False, source, destination, proxy_endpoint, tlvs), size


def _command(byte: int) -> int:
    if byte & 0xF0 != VERSION_2 or byte & 0xF not in (LOCAL, PROXY):
        raise ValueError(f"a PROXY header of an unknown version or command: 0x{byte:02x}")
    return byte & 0xF


def _check_family(byte: int) -> None:
    if byte >> 4 not in ADDRESS_SIZES or byte & 0xF > LAST_TRANSPORT:
        raise ValueError(f"a PROXY header of an unknown family or transport: 0x{byte:02x}")


def _addresses(header: bytes, family: int) -> tuple[Endpoint | None, Endpoint | None]:
    block = header[V2_FIXED:]
    if family == UNIX:
        return _path(block[:UNIX_PATH]), _path(block[UNIX_PATH : 2 * UNIX_PATH])
    kind, size = (_socket.AF_INET, 4) if family == INET else (_socket.AF_INET6, 16)
    hosts = [_socket.inet_ntop(kind, block[at : at + size]) for at in (0, size)]
    ports = struct.unpack_from("!HH", block, 2 * size)
    more = () if family == INET else (0, 0)
    return (hosts[0], ports[0], *more), (hosts[1], ports[1], *more)


def _path(field: bytes) -> Endpoint | None:
    if field.startswith(b"\0"):  # a name in Linux's abstract namespace, or no name
        return unix_endpoint(field.rstrip(b"\0"))
    return unix_endpoint(os.fsdecode(field.partition(b"\0")[0]))


def _read_tlvs(header: bytes, begin: int) -> Tlvs:
    tlvs = tuple(_tlvs_of(header[begin:]))
    for kind, value in tlvs:
        if kind == SSL:
            if len(value) < SSL_FIXED:
                raise ValueError("a PROXY header with a TLV of TLS that is too short")
            for _ in _tlvs_of(value[SSL_FIXED:]):
                pass  # this only checks that the TLVs inside are well-formed
    return tlvs


def _tlvs_if_any(header: bytes, family: int) -> Tlvs:
    """The TLVs of a header whose family and addresses do not count; none if there are none.

    Some balancers leave the addresses out although the family says that there are some: AWS's do so
    in health checks. Then the TLVs begin where the addresses would. So both places are tried. A
    right checksum decides; otherwise the place that the family implies wins, if TLVs are there. In
    the middle of zeros, bytes look like TLVs of type 0, a type that does not exist: such a result
    comes last.

    Raises:
        ValueError: each place that has TLVs has a wrong checksum among them.
    """
    found: Tlvs | None = None
    is_wrong = False
    behind_addresses = V2_FIXED + ADDRESS_SIZES.get(family, 0)
    for begin in dict.fromkeys((behind_addresses, V2_FIXED)):
        try:
            if begin > len(header):
                continue
            tlvs = _read_tlvs(header, begin)
            has_right_crc = _has_right_crc(header, tlvs)
        except ValueError:
            continue  # there are no TLVs at this place
        if has_right_crc:
            return tlvs
        if has_right_crc is False:
            is_wrong = True
        elif found is None or (_find(found, 0) is not None and _find(tlvs, 0) is None):
            found = tlvs
    if found is None and is_wrong:
        raise ValueError(WRONG_CHECKSUM)
    return found or ()


def _tlvs_of(block: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(block):
        end = at + 3 + int.from_bytes(block[at + 1 : at + 3], "big")
        if at + 3 > len(block) or end > len(block):
            raise ValueError("a PROXY header with a TLV that goes beyond its end")
        yield block[at], block[at + 3 : end]
        at = end


def _find(tlvs: Tlvs, kind: int) -> bytes | None:
    return next((value for each, value in tlvs if each == kind), None)


def _text(value: bytes | None) -> str | None:
    """Decode UTF-8. The client may cause other bytes: they become visible as escapes."""
    return None if value is None else value.decode("utf-8", "backslashreplace")


# The checksum (section 2.2.3)


def _has_right_crc(header: bytes, tlvs: Tlvs) -> bool | None:
    """Whether the checksum among `tlvs`, which end the header, is right; ``None``: there is none.

    Raises:
        ValueError: the checksum has another size, or there are several.
    """
    sums = [value for kind, value in tlvs if kind == CRC32C]
    if not sums:
        return None
    if len(sums) > 1 or len(sums[0]) != 4:
        raise ValueError("a PROXY header with a malformed checksum")
    at = len(header) - sum(len(value) + 3 for _, value in tlvs)
    for kind, value in tlvs:
        at += 3
        if kind == CRC32C:
            break
        at += len(value)
    return crc32c(header[:at] + bytes(4) + header[at + 4 :]) == int.from_bytes(sums[0], "big")


def crc32c(data: bytes) -> int:
    """Return the checksum of RFC 4960, appendix B: Castagnoli's polynomial, reflected."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFF_FFFF


def _table_entry(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc


_TABLE = [_table_entry(byte) for byte in range(256)]
