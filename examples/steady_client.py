"""A client that survives the restarts of its server.

    psofa serve --framing line --port 8710           # in one terminal: stop it, start it again
    python examples/steady_client.py                 # in another one
    python examples/steady_client.py 127.0.0.1:8711  # a second server, for when the first is away

The client says hello whenever it is connected. A heartbeat keeps the connection busy. If the server
sends nothing for ten seconds, the client asks once whether it is there, and then leaves it. Ctrl-C
ends the client, also while it waits for the server.
"""

from __future__ import annotations

import argparse
import signal

import gevent
from gevent.event import Event

from psofa_gevent import PsCallback, PsClient, PsCloseReason, PsReconnect, PsSession
from psofa_gevent.framing import Line


class Steady(PsCallback):
    def on_open(self, session: PsSession) -> None:
        host, port = (session.remote_endpoint or ("?", 0))[:2]
        print(f"connected to {host}:{port}", flush=True)
        session.send("hello")

    def on_message(self, session: PsSession, message: bytes) -> None:
        session.set_value("asked", False)
        if message != b"ping":
            print("received", message.decode(errors="replace"), flush=True)

    def on_idle(self, session: PsSession) -> bool:
        if session.get_value("asked"):
            return False  # the session closes with TIMEOUT, and the client connects again
        session.set_value("asked", True)
        session.send("ping")
        return True

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        print("lost" if session.owner.started else "closed", close_reason.name, flush=True)


def endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main() -> None:
    parser = argparse.ArgumentParser(description="A client that stays connected.")
    parser.add_argument("others", nargs="*", type=endpoint, metavar="HOST:PORT")
    parser.add_argument("--port", type=int, default=8710, help="of 127.0.0.1 (%(default)s)")
    args = parser.parse_args()
    client = PsClient(
        Steady(),
        "127.0.0.1",
        args.port,
        endpoints=args.others,
        reconnect=PsReconnect(first_delay=0.2, longest_delay=5, steady_after=2),
        heartbeat=(3_000, b"ping"),
        idle_milliseconds=10_000,
        framing=Line(),
    )
    stopped = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopped.set)
    print("connecting, until Ctrl-C", flush=True)
    client.connect_in_background()
    stopped.wait()
    client.disconnect()


if __name__ == "__main__":
    main()
