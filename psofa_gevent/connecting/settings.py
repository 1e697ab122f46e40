"""The settings of clients: `ConnectingSettings` and `ClientSettings` add them to `SessionSettings`.

Each is described once. `psofa_gevent.settings` says what uses the descriptions. They are checked
where addresses, a context or a policy is made from them. Nothing here touches a socket, or
switches.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field

from psofa_gevent.connecting.reconnect import PsReconnect
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.settings import SessionSettings, about

__all__ = ["ClientSettings", "ConnectingSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectingSettings(SessionSettings):
    """The settings given to a `PsMultiClient`; `PsMultiClient.settings` are those in effect."""

    ssl_context: ssl.SSLContext | bool | None = field(
        default=None,
        metadata=about(
            check=None,
            what="TLS: a context of yours, or `True` for one that verifies the server's "
            "certificate and its name",
            trades="`True` trusts the authorities of the system",
            none="plain TCP",
        ),
    )
    reconnect: PsReconnect | bool | None = field(
        default=None,
        metadata=about(
            check=None,
            what="connect again whenever a session ends: `True`, or a `PsReconnect` that says when",
            trades="a server that is down is tried again and again, at growing intervals",
            none="not by itself",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings(ConnectingSettings):
    """The settings given to a `PsClient`; `PsClient.settings` are those in effect."""

    host: str = field(
        metadata=about(
            check=None,
            what="the address or name to connect to, or a Unix domain socket: unix:PATH",
        ),
    )
    port: int = field(
        metadata=about(check=None, what="the port, 1 to 65535; 0 for a Unix domain socket"),
    )
    socket_address_family: PsSocketAddressFamily = field(
        default=PsSocketAddressFamily.IPV4,
        metadata=about(check=None, what="IPv4, or IPv6, which reaches IPv4 hosts too"),
    )
    server_hostname: str | None = field(
        default=None,
        metadata=about(
            check=None,
            what="with TLS, the name that the certificate must be for",
            none="the host",
        ),
    )
    source_address: tuple[str, int] | None = field(
        default=None,
        metadata=about(
            check=None,
            what="the host and port to connect from",
            trades="a fixed port can be in one connection to a server at a time",
            none="whatever the system chooses",
        ),
    )
    endpoints: Sequence[tuple[str, int]] = field(
        default=(),
        metadata=about(
            check=None,
            what="more hosts and ports, tried in turn when those before do not answer",
            trades="they share the time of a connect",
        ),
    )
