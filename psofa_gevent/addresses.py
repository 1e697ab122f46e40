"""From a host and a port to socket addresses, for servers and clients, IPv4 and dual-stack IPv6.

Names are resolved by gevent's resolver, which switches to the hub meanwhile. The rules of
`PsSocketAddressFamily`: an IPv6 socket is dual-stack, so an IPv4 address becomes an IPv4-mapped one
(RFC 4291, section 2.5.5.2), and the server's 0.0.0.0 becomes ``::``.
"""

from __future__ import annotations

import _socket
from typing import cast

from gevent import socket

from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.settings import MAX_PORT, check_instance, check_int
from psofa_gevent.unix_sockets import is_unix, unix_path

__all__ = [
    "SocketAddress",
    "check_address_family",
    "check_host",
    "check_port",
    "format_address",
    "resolve",
    "socket_family",
]

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""What bind and connect take."""


def check_host(host: object) -> str:
    """Return `host`, or raise `TypeError` or `ValueError`: not text, or empty."""
    text = check_instance("host", host, str)
    if not text:
        raise ValueError("host must be an address or a name, not ''; 0.0.0.0 is every address")
    if "\0" in text:
        raise ValueError(f"host must not contain a null character: {text!r}")
    unix_path(text)
    return text


def check_port(port: object, *, least: int) -> int:
    """Return `port`, or raise `TypeError` or `ValueError`: not a number from `least` to 65535."""
    check_int("port", port, least, MAX_PORT)
    return int(check_instance("port", port, int))  # a subclass is not what the resolver takes


def check_address_family(family: object) -> PsSocketAddressFamily:
    """Return `family`, or raise `TypeError`."""
    return check_instance("socket_address_family", family, PsSocketAddressFamily)


def socket_family(family: PsSocketAddressFamily) -> int:
    """The socket module's number for `family`."""
    return _socket.AF_INET6 if family is PsSocketAddressFamily.IPV6 else _socket.AF_INET


def resolve(host: str, port: int, family: PsSocketAddressFamily) -> list[SocketAddress]:
    """All socket addresses of `host`, best first (RFC 6724). Switches while a name is looked up.

    Raises:
        OSError: the name is not known (`socket.gaierror`), or the resolver failed.
    """
    if ":" in host and family is not PsSocketAddressFamily.IPV6:
        needed = "an IPv6 address needs socket_address_family=PsSocketAddressFamily.IPV6"
        raise socket.gaierror(socket.EAI_NONAME, needed)
    if "/" in host:
        raise socket.gaierror(socket.EAI_NONAME, f"not a host name; a Unix socket is 'unix:{host}'")
    try:
        host.encode("idna")
    except UnicodeError as exc:
        # Here, for the resolver would fail in its thread, which prints.
        raise socket.gaierror(socket.EAI_NONAME, f"not a host name: {exc}") from exc
    wanted = _socket.AF_UNSPEC if family is PsSocketAddressFamily.IPV6 else _socket.AF_INET
    found = socket.getaddrinfo(host, port, wanted, _socket.SOCK_STREAM)
    addresses: list[SocketAddress] = []
    for found_family, _type, _protocol, _name, found_address in found:
        address = cast("SocketAddress", found_address)
        if family is PsSocketAddressFamily.IPV6 and found_family == _socket.AF_INET:
            address = (f"::ffff:{address[0]}", port, 0, 0)
        if address not in addresses:
            addresses.append(address)
    return addresses


def format_address(host: object, port: object) -> str:
    """``host:port``, with brackets round an IPv6 address (RFC 3986, section 3.2.2).

    A Unix socket has no port. What can't be printed of its name, which its peer has chosen, is
    escaped.
    """
    text = str(host)
    if is_unix(host):
        return text if text.isprintable() else ascii(text)[1:-1]
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
