"""A server that knows its clients although all connections come from a load balancer.

    python examples/behind_haproxy.py              # on 127.0.0.1:8710
    haproxy -db -f examples/haproxy.cfg            # on 127.0.0.1:8700, in front of it
    nc 127.0.0.1 8700

Each connection begins with a header of the PROXY protocol, in which HAProxy names the client. The
server trusts the header because it comes from this machine (`trusted_proxies`), and closes a
connection to 8710 that has none. The limit of sessions for each address counts the sessions of
clients, not those of HAProxy.
"""

from __future__ import annotations

import argparse
import logging
import sys

from psofa_gevent import PsCallback, PsServer, PsServerError, PsSession
from psofa_gevent.framing import Line


class WhoAmI(PsCallback):
    def on_open(self, session: PsSession) -> None:
        proxy = session.proxy
        if proxy is None or proxy.is_local:  # a health check
            session.close()
            return
        host, port = session.remote_endpoint[:2] if session.remote_endpoint else ("nowhere", 0)
        session.send(f"you are {host} port {port}")
        if proxy.unique_id is not None:
            session.send(f"in HAProxy's log you are {proxy.unique_id.decode()}")

    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(b"you said " + message)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tells the clients of HAProxy who they are.")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    parser.add_argument("--sessions-per-client", type=int, default=100, metavar="SESSIONS")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        server = PsServer(
            WhoAmI(),
            host="127.0.0.1",
            port=args.port,
            framing=Line(),
            proxy_protocol=True,
            trusted_proxies=["127.0.0.1"],
            max_sessions_per_peer=args.sessions_per_client,
            farewell="there are too many of you\n",
        )
        server.start()
        print("listening on {}:{}".format(*server.address), flush=True)
        server.serve_forever()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    refused = {reason.name: count for reason, count in server.refused.items() if count}
    print("refused:", refused or "nobody")


if __name__ == "__main__":
    main()
