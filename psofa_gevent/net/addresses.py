"""Addresses: checked once as users give them, then in the form that sockets take. IPv4, IPv6, Unix.

`check_address` makes a `TcpAddress` or a `UnixAddress` of a host and a port. The package passes
that on, and does not parse the text again. `TcpAddress.resolve` returns addresses for bind and
connect:

- A literal address is read at once, in the caller, by the C library's own rules (getaddrinfo(3)
  with AI_NUMERICHOST): with zones, and with the old forms of inet_aton(3), so "127.1" and "0x7f.1"
  are 127.0.0.1, and "010.0.0.1" is 8.0.0.1. It needs no resolver, so it works while gevent's thread
  pool is busy, while DNS is down, and with each of gevent's resolvers.
- A name goes to gevent's resolver, which switches to the hub meanwhile.

The rules of `PsSocketAddressFamily`: an IPv6 socket is dual-stack, so an IPv4 address becomes an
IPv4-mapped address (RFC 4291, section 2.5.5.2), and the server's 0.0.0.0 becomes ``::``.
"""

from __future__ import annotations

import _socket
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from gevent import socket

from psofa_gevent.checks import MAX_PORT, check_instance, check_int
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.net.unix import UNIX_PREFIX, is_unix, unix_path

__all__ = [
    "Address",
    "SocketAddress",
    "TcpAddress",
    "UnixAddress",
    "check_address",
    "format_address",
    "socket_family",
    "without_zone",
]

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""An address as bind and connect take it."""

# The C library's function: in a patched process `socket.getaddrinfo` is gevent's.
_read_literal = _socket.getaddrinfo


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, which is an address or a name, a port, and the family of the socket."""

    host: str
    port: int
    family: PsSocketAddressFamily

    def __str__(self) -> str:
        return format_address(self.host, self.port)

    def resolve(self) -> list[SocketAddress]:
        """All socket addresses of the host, best first (RFC 6724).

        At once for a literal address; switches while a name is looked up.

        Raises:
            OSError: the name is not known or not valid (`socket.gaierror`), or the resolver failed;
                or the address is of the wrong family, or its zone is not known on this machine.
        """
        is_ipv6 = self.family is PsSocketAddressFamily.IPV6
        if ":" in self.host and not is_ipv6:
            needed = "an IPv6 address needs socket_address_family=PsSocketAddressFamily.IPV6"
            raise socket.gaierror(socket.EAI_NONAME, needed)
        wanted = _socket.AF_UNSPEC if is_ipv6 else _socket.AF_INET
        found = _literal(self.host, self.port, wanted)
        if found is None:
            _check_name(self.host)
            found = socket.getaddrinfo(self.host, self.port, wanted, _socket.SOCK_STREAM)
        addresses: list[SocketAddress] = []
        for found_family, _type, _protocol, _name, found_address in found:
            address = cast("SocketAddress", found_address)
            if is_ipv6 and found_family == _socket.AF_INET:
                address = (f"::ffff:{address[0]}", self.port, 0, 0)
            if address not in addresses:
                addresses.append(address)
        return addresses


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a Unix domain socket."""

    path: str

    def __str__(self) -> str:
        return format_address(self.host, 0)

    @property
    def host(self) -> str:
        """The path in the form of a host: ``unix:`` and the path."""
        return UNIX_PREFIX + self.path


Address: TypeAlias = TcpAddress | UnixAddress


def check_address(host: object, port: object, family: object, *, least_port: int) -> Address:
    """A host and a port as an address that needs no further check.

    Args:
        host: an address, a name, or ``unix:`` and a path.
        port: from `least_port` to 65535; for a Unix socket it has no effect, and may be 0.
        family: the family of the socket.
        least_port: 0 where the system may choose the port, else 1.

    Raises:
        TypeError, ValueError: an argument is not valid; the error names it.
    """
    text = check_instance("host", host, str)
    if not text:
        raise ValueError("host must be an address or a name, not ''; 0.0.0.0 is every address")
    if "\0" in text:
        raise ValueError(f"host must not contain a null character: {text!r}")
    path = unix_path(text)
    check_int("port", port, least_port if path is None else 0, MAX_PORT)
    checked_family = check_instance("socket_address_family", family, PsSocketAddressFamily)
    if path is not None:
        return UnixAddress(path)
    # A plain int: the resolver does not accept a subclass.
    return TcpAddress(text, int(cast("int", port)), checked_family)


def socket_family(family: PsSocketAddressFamily) -> int:
    """The socket module's number for `family`."""
    return _socket.AF_INET6 if family is PsSocketAddressFamily.IPV6 else _socket.AF_INET


def _literal(host: str, port: int, family: int) -> list[Any] | None:
    """The result of getaddrinfo(3) for a literal address, without a resolver; ``None``: a name.

    Raises:
        OSError: `host` is not an address, and not a name either, as it has a colon.
    """
    try:
        return _read_literal(host, port, family, _socket.SOCK_STREAM, 0, _socket.AI_NUMERICHOST)
    except (OSError, UnicodeError) as exc:
        if ":" not in host:
            return None
        reason = "not an IPv6 address"
        address, _, zone = host.partition("%")
        if zone and _is_ipv6(address):
            reason = f"this machine has no interface {zone!r}"
        raise socket.gaierror(socket.EAI_NONAME, reason) from exc


def _check_name(host: str) -> None:
    """Raise `socket.gaierror` for a host that can't be a name."""
    if "/" in host:
        raise socket.gaierror(socket.EAI_NONAME, f"not a host name; a Unix socket is 'unix:{host}'")
    try:
        host.encode("idna")
    except UnicodeError as exc:
        # Checked here, as the resolver would fail in its thread, which prints the error.
        raise socket.gaierror(socket.EAI_NONAME, f"not a host name: {exc}") from exc


def _is_ipv6(host: str) -> bool:
    """Whether `host` is an IPv6 address, without a zone."""
    try:
        _socket.inet_pton(_socket.AF_INET6, host)
    except (OSError, ValueError):
        return False
    return True


def without_zone(host: str) -> str:
    """An IPv6 address without its zone ("%eth0", RFC 4007), which only this machine understands.

    Any other text is returned as it is.
    """
    address, _, zone = host.partition("%")
    return address if zone and _is_ipv6(address) else host


def format_address(host: object, port: object) -> str:
    """``host:port``, with brackets round an IPv6 address (RFC 3986, section 3.2.2).

    A Unix socket has no port. Its name may have been chosen by the peer: if it has unprintable
    characters, they are escaped.
    """
    text = str(host)
    if is_unix(host):
        return text if text.isprintable() else ascii(text)[1:-1]
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
