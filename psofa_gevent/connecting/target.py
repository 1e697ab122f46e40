"""The target: what a client connects to, and how, from checked arguments.

Nothing here waits, and nothing looks up a name: a `Connector` does that.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from psofa_gevent.checks import check_hostname, check_instance, check_ssl_context
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.net.addresses import Address, TcpAddress, UnixAddress, check_address

__all__ = ["Target", "check_context"]


@dataclass(frozen=True, slots=True)
class Target:
    """What to connect to, and how: checked, so that an attempt has nothing more to check.

    Attributes:
        endpoints: the addresses to try in turn.
        source_address: the local address to bind to first; ``None``: the system chooses it.
        server_hostname: with TLS, the name that the certificate must be for; ``None``: the host.
        connection_id: the session's id; ``None``: a random one.
    """

    endpoints: tuple[Address, ...]
    source_address: TcpAddress | None
    server_hostname: str | None
    connection_id: uuid.UUID | None = None

    @classmethod
    def checked(
        cls,
        host: str,
        port: int,
        family: PsSocketAddressFamily,
        *,
        endpoints: Sequence[tuple[str, int]],
        source_address: tuple[str, int] | None,
        server_hostname: str | None,
        ssl_context: ssl.SSLContext | None,
    ) -> Target:
        """The target that the arguments of a client, or of its ``connect``, ask for.

        Raises:
            TypeError, ValueError: an argument is not valid.
        """
        target = cls(
            (
                check_address(host, port, family, least_port=1),
                *_check_endpoints(endpoints, family),
            ),
            _check_source_address(source_address, family),
            server_hostname,
        )
        for address in target.endpoints:
            if source_address is not None and isinstance(address, UnixAddress):
                raise ValueError(f"source_address={source_address!r} is for TCP, not for {address}")
            _check_server_hostname(ssl_context, server_hostname, address)
        return target

    def with_id(self, connection_id: object) -> Target:
        """The same target with an id for its session.

        Raises:
            TypeError: the id is neither a `uuid.UUID` nor ``None``.
        """
        if connection_id is not None and not isinstance(connection_id, uuid.UUID):
            raise TypeError(f"connection_id must be a uuid.UUID or None, not {connection_id!r}")
        return replace(self, connection_id=connection_id)

    def __str__(self) -> str:
        return ", ".join(map(str, self.endpoints))


def check_context(ssl_context: ssl.SSLContext | bool | None) -> ssl.SSLContext | None:
    """The TLS context of a client. True: a default one, which trusts the system's certificates.

    Raises:
        TypeError: `ssl_context` is neither a context, True nor ``None``.
        ValueError: it is a context for servers.
    """
    if ssl_context is True:
        return ssl.create_default_context()
    if ssl_context is False:
        raise TypeError("ssl_context must be an ssl.SSLContext, True or None, not False")
    check_ssl_context("ssl_context", ssl_context, server_side=False)
    return ssl_context


def _check_endpoints(endpoints: object, family: PsSocketAddressFamily) -> list[Address]:
    """The further endpoints of a client, as addresses."""
    error = f"endpoints must be hosts and ports, such as [('example.org', 8710)], not {endpoints!r}"
    if not isinstance(endpoints, (list, tuple)):
        raise TypeError(error)
    checked = []
    for endpoint in endpoints:
        if not isinstance(endpoint, tuple) or len(endpoint) != 2:
            raise TypeError(error)
        checked.append(check_address(*endpoint, family, least_port=1))
    return checked


def _check_source_address(
    source_address: object, family: PsSocketAddressFamily
) -> TcpAddress | None:
    """The address that a client connects from, or ``None``."""
    if source_address is None:
        return None
    if not isinstance(source_address, tuple) or len(source_address) != 2:
        raise TypeError(f"source_address must be a host and a port, not {source_address!r}")
    address = check_address(*source_address, family, least_port=0)
    if isinstance(address, UnixAddress):
        raise ValueError(f"source_address={source_address!r} is for TCP")
    return address


def _check_server_hostname(
    ssl_context: ssl.SSLContext | None, server_hostname: object, address: Address
) -> None:
    """Raise for a `server_hostname` that is not valid, is given without TLS, or is missing."""
    if server_hostname is not None:
        check_instance("server_hostname", server_hostname, str)
        if not server_hostname:
            raise ValueError("server_hostname must not be empty")
        if ssl_context is None:
            raise ValueError(f"server_hostname={server_hostname!r} is for TLS: give an ssl_context")
    elif ssl_context is not None and isinstance(address, UnixAddress):
        raise ValueError(f"server_hostname must be given for TLS over {address.host!r}")
    if ssl_context is not None:
        check_hostname("server_hostname", server_hostname or address.host, ssl_context)
