"""One server for IPv6 and IPv4, and clients that reach it over both.

    python examples/ipv6.py                       # runs three clients and ends by itself

With `PsSocketAddressFamily.IPV6` every socket is dual-stack. A server then listens on ``::`` (its
default host 0.0.0.0 becomes that) and sees an IPv4 client as ``::ffff:127.0.0.1``; a client
reaches IPv4 hosts through its IPv6 socket in the same way.
"""

from __future__ import annotations

import argparse
import sys

from gevent.queue import Queue

from psofa_gevent import (
    PsCallback,
    PsClient,
    PsServer,
    PsServerError,
    PsSession,
    PsSocketAddressFamily,
)


class WhoAmI(PsCallback):
    """Tells every client its own address."""

    def on_open(self, session: PsSession) -> None:
        assert session.remote_endpoint is not None  # a TCP session always has one
        session.send(f"you are {session.remote_endpoint[0]}")


class Listen(PsCallback):
    """Hands the answers to the greenlet that asked."""

    def __init__(self) -> None:
        self.answers: Queue[str] = Queue()

    def on_message(self, session: PsSession, message: bytes) -> None:
        self.answers.put(message.decode())


def ask(host: str, port: int, family: PsSocketAddressFamily) -> str:
    """Connect, wait for the server's message, and disconnect."""
    callback = Listen()
    client = PsClient(callback, host, port, socket_address_family=family)
    client.connect()
    try:
        return callback.answers.get(timeout=5)
    finally:
        client.disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description="A dual-stack server and three clients.")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()

    ipv6 = PsSocketAddressFamily.IPV6
    try:
        server = PsServer(WhoAmI(), port=args.port, socket_address_family=ipv6)
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, port in use, or no IPv6 on this machine
    try:
        host, port = server.address[:2]
        print(f"listening on [{host}]:{port}", flush=True)
        for client_host, family in (
            ("::1", PsSocketAddressFamily.IPV6),
            ("127.0.0.1", PsSocketAddressFamily.IPV4),
            ("127.0.0.1", PsSocketAddressFamily.IPV6),
        ):
            answer = ask(client_host, port, family)
            print(f"{family.name} client to {client_host}: {answer}", flush=True)
    finally:
        server.shutdown()


if __name__ == "__main__":
    main()
