"""PurpleSofa's first sample, the client: it runs the same callback as the server.

    python examples/counter_client.py             # connects to 127.0.0.1:8710

It ends by itself when one of the two sides has counted past three and closed the connection.
"""

from __future__ import annotations

import argparse
import sys

from gevent.event import Event

from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsSendError,
    PsSession,
)

KEY = "inc"


class CounterCallback(PsCallback):
    """The server's callback, with an event that is set when the one session has closed."""

    def __init__(self) -> None:
        self.closed = Event()

    def on_open(self, session: PsSession) -> None:
        print(f"on_open    {session}", flush=True)
        session.set_value(KEY, 0)
        session.send("inc: 0")

    def on_message(self, session: PsSession, message: bytes) -> None:
        print(f"on_message {session} {message.decode()}", flush=True)
        inc = session.get_value(KEY) + 1
        session.set_value(KEY, inc)
        try:
            session.send(f"inc: {inc}")
        except PsSendError:
            return  # the other side counted past three first and closed
        if inc > 3:
            session.close()

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        inc = session.get_value(KEY)
        print(f"on_close   {session} {close_reason.name}, inc: {inc}", flush=True)
        self.closed.set()


def main() -> None:
    parser = argparse.ArgumentParser(description="Count messages with a counter server.")
    parser.add_argument("--host", default="127.0.0.1", help="server's address (%(default)s)")
    parser.add_argument("--port", type=int, default=8710, help="server's port (%(default)s)")
    args = parser.parse_args()

    callback = CounterCallback()
    try:
        client = PsClient(callback, args.host, args.port)
        client.connect()
    except (ValueError, PsClientError) as error:
        sys.exit(str(error))  # invalid port number; or the error names host, port and cause
    # The callbacks run while this greenlet waits.
    callback.closed.wait()
    client.disconnect()


if __name__ == "__main__":
    main()
