"""PurpleSofa's first sample, the server: both sides count the messages they get.

    python examples/counter_server.py             # listens on 127.0.0.1:8710
    python examples/counter_client.py             # in a second terminal

Each side says "inc: 0" when the connection opens, answers every message with one more, and closes
when it has counted past three. End the server with Ctrl-C or SIGTERM: it shuts down and exits 0.
"""

from __future__ import annotations

import argparse
import sys

from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsSendError,
    PsServer,
    PsServerError,
    PsSession,
)

KEY = "inc"


class CounterCallback(PsCallback):
    """One object serves all sessions, so data that belongs to one session is kept on the session.

    The callbacks of a session run one at a time, so the count needs no lock.
    """

    def on_open(self, session: PsSession) -> None:
        print(f"on_open    {session}", flush=True)
        session.set_value(KEY, 0)
        session.send("inc: 0")

    def on_message(self, session: PsSession, message: bytes) -> None:
        # TCP carries bytes, not messages: two sends in quick succession may arrive as one. For
        # counting this is good enough; chat.py shows how to get whole lines.
        print(f"on_message {session} {message.decode()}", flush=True)
        inc = session.get_value(KEY) + 1
        session.set_value(KEY, inc)
        try:
            session.send(f"inc: {inc}")
        except PsSendError:
            return  # the other side counted past three first and closed
        if inc > 3:
            session.close()  # the last message still arrives: a close lingers

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        inc = session.get_value(KEY)
        print(f"on_close   {session} {close_reason.name}, inc: {inc}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count messages with every client.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()

    try:
        server = PsServer(CounterCallback(), host=args.host, port=args.port)
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    host, port = server.address[:2]
    print(f"listening on {host}:{port}", flush=True)
    server.serve_forever()  # until Ctrl-C or SIGTERM, then shuts down


if __name__ == "__main__":
    main()
