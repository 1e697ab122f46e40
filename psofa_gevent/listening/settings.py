"""The settings of servers: `ServerSettings` adds them to `SessionSettings`.

Each is described once. `psofa_gevent.settings` says what uses the descriptions.

Nothing here touches a socket, or switches.
"""

from __future__ import annotations

import ssl
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from psofa_gevent.checks import MAX_BUFFER, check_bool, check_ssl_context
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.listening.binds import DEFAULT_HOST, DEFAULT_PORT, Given
from psofa_gevent.settings import SessionSettings, about, seconds, whole

__all__ = ["ServerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings(SessionSettings):
    """The settings given to a `PsServer`; `PsServer.settings` are those in effect."""

    host: str = field(
        default=DEFAULT_HOST,
        metadata=about(
            check=None,  # with `listener`, by check_binds
            what="the address or name to listen on, or a Unix domain socket: unix:PATH",
            trades="0.0.0.0 is every address of the machine; on IPv6 it becomes ::",
        ),
    )
    port: int = field(
        default=DEFAULT_PORT,
        metadata=about(check=None, what="the port; 0 asks for any free one"),
    )
    listener: Given | Sequence[Given] | None = field(
        default=None,
        metadata=about(
            check=None,
            what="instead of `host` and `port`: one or several addresses, paths, and sockets that "
            "listen already, which the server serves as one",
            trades="`backlog`, `receive_buffer_size` and `unix_mode` are not for given sockets",
            none="`host` and `port`",
        ),
    )
    socket_address_family: PsSocketAddressFamily = field(
        default=PsSocketAddressFamily.IPV4,
        metadata=about(
            check=None,
            what="IPv4, or IPv6, which is dual-stack: on :: IPv4 clients are served by the same "
            "socket",
        ),
    )
    backlog: int = field(
        default=1024,
        metadata=about(
            check=whole(1, MAX_BUFFER),
            what="connections that the kernel holds until they are accepted",
            trades="a burst beyond it waits and retries; Linux allows no more than "
            "net.core.somaxconn",
        ),
    )
    receive_buffer_size: int | None = field(
        default=None,
        metadata=about(
            check=whole(1, MAX_BUFFER, optional=True),
            what="SO_RCVBUF in bytes",
            trades="a number turns the kernel's own tuning off, which is rarely better",
            none="the kernel's own tuning",
        ),
    )
    unix_mode: int | None = field(
        default=None,
        metadata=about(
            check=whole(0, 0o777, optional=True),
            what="the permissions of a Unix socket's file, such as `0o660`",
            none="what the process's umask leaves",
        ),
    )
    reuse_port: bool = field(
        default=False,
        metadata=about(
            check=check_bool,
            what="SO_REUSEPORT: further servers that set it may listen on the same port, and "
            "share its connections",
            trades="a second one that was started by mistake is not noticed",
        ),
    )
    max_sessions: int | None = field(
        default=None,
        metadata=about(
            check=whole(1, MAX_BUFFER, optional=True),
            what="sessions at a time, of all listeners together; further clients wait in the "
            "backlog, or are refused with `refuse_when_full`",
            trades="each session costs about 10 kB",
            none="as many as the process has file descriptors, less a reserve",
        ),
    )
    ssl_context: ssl.SSLContext | None = field(
        default=None,
        metadata=about(
            check=partial(check_ssl_context, server_side=True),
            what="TLS with the certificate of this context",
            none="plain TCP",
        ),
    )
    handshake_timeout: float | None = field(
        default=10.0,
        metadata=about(
            check=seconds(more_than_zero=True),
            what="seconds that a client has for everything before `on_open`: the header of "
            "the PROXY protocol and the TLS handshake",
            trades="a connection under way takes the place of a session",
            none="any time",
        ),
    )
    proxy_protocol: bool = field(
        default=False,
        metadata=about(
            check=check_bool,
            what="every connection begins with the header of the PROXY protocol, in which a load "
            "balancer says who its client is",
            trades="a client without the header is not served",
        ),
    )
    trusted_proxies: Collection[str] = field(
        default=("127.0.0.0/8", "::1/128"),
        metadata=about(
            check=None,  # by Networks
            what="the addresses and networks of load balancers that may send that header",
            trades="a peer in these networks can claim any address for its clients",
        ),
    )
    allowed_networks: Collection[str] | None = field(
        default=None,
        metadata=about(
            check=None,
            what="the addresses and networks of clients that are let in, such as 10.0.0.0/8 or "
            "192.0.2.7",
            trades="peers on Unix sockets are always let in",
            none="all of them",
        ),
    )
    denied_networks: Collection[str] = field(
        default=(),
        metadata=about(
            check=None,
            what="the addresses and networks of clients that are not let in, even if they are "
            "allowed",
        ),
    )
    max_sessions_per_peer: int | None = field(
        default=None,
        metadata=about(
            check=whole(1, MAX_BUFFER, optional=True),
            what="sessions that one address may have at a time",
            trades="many clients may share one address, behind a NAT",
            none="any number",
        ),
    )
    refuse_when_full: bool = field(
        default=False,
        metadata=about(
            check=check_bool,
            what="at `max_sessions`, accept further clients and close them at once",
            trades="they learn soon that they must go elsewhere; without it they wait in the "
            "backlog",
        ),
    )
    farewell: bytes | str | None = field(
        default=None,
        metadata=about(
            check=None,  # by Admission, which makes bytes of it
            what="the text or bytes that clients are sent when they are refused for their number, "
            "4,096 bytes at most",
            trades="not with TLS",
            none="nothing",
        ),
    )
