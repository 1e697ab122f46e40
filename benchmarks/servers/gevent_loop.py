"""gevent's `StreamServer` with the loop that its users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gevent import ssl
from gevent.server import StreamServer
from gevent.socket import socket

from benchmarks.servers.works import (
    BACKLOG,
    HOST,
    READ_SIZE,
    TLS,
    TO_ALL,
    Announce,
    pongs,
    tls_context,
)

connections: set[socket] = set()


def echo(connection: socket, _address: object) -> None:
    while message := connection.recv(READ_SIZE):
        connection.sendall(message)


def ping(connection: socket, _address: object) -> None:
    while message := connection.recv(READ_SIZE):
        connection.sendall(pongs(message))


def broadcast(connection: socket, _address: object) -> None:
    connections.add(connection)
    try:
        while message := connection.recv(READ_SIZE):
            for each in list(connections) if message[0] == TO_ALL else (connection,):
                each.sendall(message)
    finally:
        connections.remove(connection)


HANDLERS: dict[str, Callable[[socket, object], None]] = {
    "echo": echo,
    "hold": echo,
    TLS: echo,
    "ping": ping,
    "broadcast": broadcast,
}


def serve(_variant: str, work: str, announce: Announce) -> None:
    tls: dict[str, Any] = {"ssl_context": tls_context(ssl.SSLContext)} if work == TLS else {}
    server = StreamServer((HOST, 0), HANDLERS[work], backlog=BACKLOG, **tls)
    server.start()
    announce(int(server.address[1]))
    server.serve_forever()
