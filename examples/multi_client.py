"""Many connections, to different servers, that share one `PsMultiClient`.

    python examples/multi_client.py               # servers on 8710, 8711, 8712; ends by itself

The connections of a `PsMultiClient` share one callback, one idle timer and one close greenlet:
thousands of them cost little more than their sockets. Here the three
servers run in the same process.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from contextlib import ExitStack

from gevent.event import Event

from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsMultiClient,
    PsServer,
    PsServerError,
    PsSession,
)

SERVERS = 3


class Echo(PsCallback):
    """The servers' callback."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


class CountToThree(PsCallback):
    """The clients' callback: sends 1, 2 and 3, each when the one before came back."""

    def __init__(self, connections: int) -> None:
        self.remaining = connections
        self.all_closed = Event()

    def on_open(self, session: PsSession) -> None:
        session.send("1")

    def on_message(self, session: PsSession, message: bytes) -> None:
        assert session.remote_endpoint is not None  # a TCP session always has one
        print(f"port {session.remote_endpoint[1]} answered {message.decode()}", flush=True)
        number = int(message)
        if number == 3:
            session.close()
        else:
            session.send(str(number + 1))

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        # The one close greenlet makes all on_close calls, one after the other.
        print(f"{session.connection_id} closed: {close_reason.name}", flush=True)
        self.remaining -= 1
        if self.remaining == 0:
            self.all_closed.set()


def main() -> None:
    parser = argparse.ArgumentParser(description="Three servers and one multi client.")
    parser.add_argument(
        "--port", type=int, default=8710, help="the first of three; 0: free ones (%(default)s)"
    )
    args = parser.parse_args()

    with ExitStack() as stack:
        ports = []
        for number in range(SERVERS):
            port = args.port + number if args.port else 0
            try:
                server = stack.enter_context(PsServer(Echo(), host="127.0.0.1", port=port))
            except (ValueError, PsServerError) as error:
                sys.exit(str(error))  # invalid port number, or port in use
            ports.append(server.address[1])
            print(f"listening on 127.0.0.1:{ports[-1]}", flush=True)

        callback = CountToThree(connections=len(ports))
        # The bundle is initialised on entry, and closes all open connections on exit.
        bundle = stack.enter_context(PsMultiClient(callback))
        for port in ports:
            # You may choose the id, to find the session again (proxy.py pairs sessions by it).
            connection = bundle.connect("127.0.0.1", port, connection_id=uuid.uuid4())
            print(f"{connection.session.connection_id} is connected to port {port}", flush=True)
        callback.all_closed.wait()


if __name__ == "__main__":
    main()
