"""The text that ``serve`` prints: where the server can be reached, and how to try it.

Its first line, ``Listening on HOST:PORT``, is for scripts, too.
"""

from __future__ import annotations

import ipaddress
import socket

from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.interfaces import local_addresses
from psofa_gevent.net.unix import unix_path

__all__ = ["where_to_reach"]

HEADER_BY_HAND = r"(printf 'PROXY UNKNOWN\r\n'; cat) | "
"""A shell command that sends first what a load balancer would send: a PROXY header."""


def where_to_reach(
    *addresses: tuple[object, ...], serving: str, has_tls: bool = False, has_header: bool = False
) -> str:
    """Return the text for these addresses; its first line is for scripts, too."""
    header = HEADER_BY_HAND if has_header else ""
    address, *others = addresses
    lines = [f"Listening on {_where(address)}"]
    lines += [_row("" if row else "and on", _where(other)) for row, other in enumerate(others)]
    lines.append(_row("serving", serving))
    path = unix_path(str(address[0]))
    if path is not None:
        attempt = f"{header}nc -U {path}"
        if has_tls:
            attempt = f"openssl s_client -quiet -unix {path}"
    else:
        host, port = _host_with_zone(address), address[1]
        nearest = host
        if ipaddress.ip_address(host).is_unspecified:
            nearest = "::1" if ":" in host else "127.0.0.1"
            lines += _reached_at(host, port)
        attempt = f"{header}nc {nearest} {port}"
        if has_tls:
            attempt = f"openssl s_client -quiet -connect {format_address(nearest, port)}"
    if has_tls and has_header:
        attempt = "through the load balancer: openssl s_client sends no PROXY header"
    lines += [_row("try", attempt), _row("stop", "Ctrl-C")]
    return "\n".join(lines)


def _where(address: tuple[object, ...]) -> str:
    return format_address(_host_with_zone(address), address[1])


def _reached_at(wildcard: str, port: object) -> list[str]:
    """Rows with the machine's addresses, or with a hint if the extra ``network`` is missing."""
    try:
        addresses = local_addresses(PsSocketAddressFamily.IPV4)
        if ":" in wildcard:  # dual-stack: both
            addresses = local_addresses(PsSocketAddressFamily.IPV6) + addresses
    except ImportError:
        hint = 'all addresses of this machine; to see them: pip install "psofa_gevent[network]"'
        return [_row("reached at", hint)]
    except OSError as exc:
        return [_row("reached at", f"all addresses of this machine ({exc})")]
    endpoints = [format_address(address, port) for address in addresses]
    return [_row("" if row else "reached at", text) for row, text in enumerate(endpoints)]


def _row(label: str, text: str) -> str:
    return f"  {label:10}  {text}"


def _host_with_zone(address: tuple[object, ...]) -> str:
    """The host of a socket address; a link-local one with its zone, which the tuple has apart."""
    host = str(address[0])
    scope_id = address[3] if len(address) > 3 else 0
    if not isinstance(scope_id, int) or scope_id == 0:
        return host
    return f"{host.partition('%')[0]}%{socket.if_indextoname(scope_id)}"
