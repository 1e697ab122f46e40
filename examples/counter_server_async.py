"""The counter server with async callbacks: the same conversation, written with ``await``.

    python examples/counter_server_async.py       # listens on 127.0.0.1:8710
    python examples/counter_client_async.py       # or counter_client.py: the bytes are the same

The callbacks run as tasks of one asyncio loop, which runs on gevent's hub. They may await any
asyncio library, and sync servers and clients go on in the same process.
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


class CounterAsyncCallback(PsCallback):
    """With ``use_async_callback`` the ``*_async`` methods are called, and the others are not."""

    use_async_callback = True

    async def on_open_async(self, session: PsSession) -> None:
        print(f"on_open    {session}", flush=True)
        session.set_value(KEY, 0)
        await session.send_async("inc: 0")

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        # One callback at a time for a session: the next read starts when this one has returned.
        print(f"on_message {session} {message.decode()}", flush=True)
        inc = session.get_value(KEY) + 1
        session.set_value(KEY, inc)
        try:
            await session.send_async(f"inc: {inc}")
        except PsSendError:
            return  # the other side counted past three first and closed
        if inc > 3:
            session.close()  # only a request, so there is nothing to await

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        inc = session.get_value(KEY)
        print(f"on_close   {session} {close_reason.name}, inc: {inc}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count messages with every client.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()

    # Starting and stopping stay sync: only the callbacks run on the asyncio loop.
    try:
        server = PsServer(CounterAsyncCallback(), host=args.host, port=args.port)
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    host, port = server.address[:2]
    print(f"listening on {host}:{port}", flush=True)
    server.serve_forever()  # until Ctrl-C or SIGTERM, then shuts down


if __name__ == "__main__":
    main()
