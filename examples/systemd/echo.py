"""An echo server for systemd: socket activation, readiness, a watchdog, restarts that lose nobody.

    python examples/systemd/echo.py                      # by hand, on 127.0.0.1:8710
    systemd-socket-activate -l 127.0.0.1:8710 python examples/systemd/echo.py

With the units echo.socket and echo.service beside it, systemd listens, starts this program for the
first client, and gives it the sockets. On a restart the sockets stay open: new clients wait for the
new process, and the old process serves its own clients for up to half a minute.
"""

from __future__ import annotations

import argparse
import sys

from psofa_gevent import PsCallback, PsServer, PsServerError, PsSession, systemd


class Echo(PsCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


def main() -> None:
    parser = argparse.ArgumentParser(description="Echo, under systemd or by hand.")
    parser.add_argument("--port", type=int, default=8710, help="by hand; 0: a free one")
    args = parser.parse_args()

    try:
        # Started by hand, the program gets no sockets.
        listener = systemd.listen_sockets() or ("127.0.0.1", args.port)
        server = PsServer(Echo(), listener=listener)
        server.start()
    except (OSError, ValueError, PsServerError) as error:
        sys.exit(str(error))
    for host, port, *_ in server.addresses:
        where = host if host.startswith("unix:") else f"{host}:{port}"
        print(f"listening on {where}", flush=True)
    # Tells systemd that the server is ready, feeds the watchdog, and tells it of the stop.
    server.serve_forever(drain=30)


if __name__ == "__main__":
    main()
