"""Addresses and networks for the rules of admission: a peer's address, and sets of networks.

An IPv4-mapped address (RFC 4291, section 2.5.5.2), as on a dual-stack socket, counts as its IPv4
address, and a network of such addresses as an IPv4 network. Peers on Unix sockets have no address.

Nothing here waits. The cost of a rule depends on the number of different prefix lengths among its
networks, not on the number of networks.
"""

from __future__ import annotations

import _socket
import ipaddress
from collections.abc import Collection

from psofa_gevent.net.sockopts import Endpoint
from psofa_gevent.net.unix import is_unix

__all__ = ["Networks", "peer_address"]

MAPPED = bytes(10) + b"\xff\xff"
MAPPED_BITS = 96


def peer_address(endpoint: Endpoint | None) -> bytes | None:
    """The packed address of a peer, 4 or 16 bytes; ``None`` for a Unix socket."""
    if endpoint is None or is_unix(endpoint[0]):
        return None
    host: str = endpoint[0]
    if ":" not in host:
        return _socket.inet_aton(host)
    packed = _socket.inet_pton(_socket.AF_INET6, host.partition("%")[0])
    return packed[12:] if packed.startswith(MAPPED) else packed


class Networks:
    """A set of networks, IPv4 and IPv6."""

    __slots__ = ("_by_size",)

    def __init__(self, name: str, networks: object) -> None:
        """Take the value of a setting.

        Args:
            name: the name of the setting, for errors.
            networks: addresses, and networks in CIDR notation. A network with bits set after the
                prefix ("10.0.0.1/8") is an error, as it could mean the address or the network.

        Raises:
            TypeError: `networks` is not a collection of strings.
            ValueError: one of the strings is neither an address nor a network.
        """
        if isinstance(networks, (str, bytes, bytearray)) or not isinstance(networks, Collection):
            raise TypeError(
                f"{name} must be a collection of addresses and networks, such as "
                f"('192.0.2.7', '10.0.0.0/8'), not {networks!r}"
            )
        self._by_size: dict[int, dict[int, set[int]]] = {4: {}, 16: {}}
        """The prefixes, by the size of the address and then by how many bits follow the prefix."""
        for text in networks:
            if not isinstance(text, str):
                raise TypeError(
                    f"{name} must have strings in it, such as '10.0.0.0/8', not {text!r}: "
                    f"{networks!r}"
                )
            try:
                if "%" in text:
                    raise ValueError("it has a zone, and peers are matched by address only")
                self._add(ipaddress.ip_network(text))
            except ValueError as exc:
                raise ValueError(
                    f"{name} must have addresses and networks in it, such as '192.0.2.7' or "
                    f"'10.0.0.0/8', not {text!r} ({exc}): {networks!r}"
                ) from exc

    def _add(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> None:
        packed, bits = network.network_address.packed, network.prefixlen
        if packed.startswith(MAPPED) and bits >= MAPPED_BITS:
            packed, bits = packed[12:], bits - MAPPED_BITS
        left = 8 * len(packed) - bits
        prefix = int.from_bytes(packed, "big") >> left
        self._by_size[len(packed)].setdefault(left, set()).add(prefix)

    def __contains__(self, address: bytes) -> bool:
        number = int.from_bytes(address, "big")
        return any(
            number >> left in prefixes for left, prefixes in self._by_size[len(address)].items()
        )

    def __bool__(self) -> bool:
        return any(self._by_size.values())
