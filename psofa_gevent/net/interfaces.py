"""The addresses of this machine: where a server that is bound to all of them can be reached.

They are read by the `ifaddr` library, which comes with the extra ``network``. Only the command line
needs it, so no other file of the package imports it. Reading the interfaces is a short system call,
which never waits for the network.
"""

from __future__ import annotations

import ipaddress
import os

from psofa_gevent.enums import PsSocketAddressFamily

__all__ = ["local_addresses"]


def local_addresses(family: PsSocketAddressFamily) -> list[str]:
    """The addresses of this machine's interfaces, loopback included, in the system's order.

    An IPv6 link-local address has no meaning without its interface, so its zone is added
    (RFC 4007), as in ``fe80::1%eth0``. `socket.getaddrinfo` and ``nc`` accept that form.

    Args:
        family: the family of the addresses. For a dual-stack server call it for both.

    Raises:
        ImportError: the extra ``network`` is not installed.
        OSError: the system does not tell its interfaces.
    """
    try:
        import ifaddr  # noqa: PLC0415 - an optional extra
    except ImportError as exc:
        raise ImportError(
            "the machine's addresses are read by the 'ifaddr' library, which is not installed: "
            'pip install "psofa_gevent[network]"',
            name="ifaddr",
        ) from exc
    addresses: list[str] = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            if isinstance(ip.ip, str):
                if family is PsSocketAddressFamily.IPV4:
                    addresses.append(ip.ip)
            elif family is PsSocketAddressFamily.IPV6:
                address, _, scope_id = ip.ip
                addresses.append(_with_zone(address, scope_id, adapter.name))
    return addresses


def _with_zone(address: str, scope_id: int, interface: str) -> str:
    if not ipaddress.IPv6Address(address).is_link_local:
        return address
    # The names of Windows' interfaces are GUIDs; its zones are numbers.
    return f"{address}%{interface if os.name == 'posix' else scope_id}"
