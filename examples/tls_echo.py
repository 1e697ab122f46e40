r"""TLS both ways: a server with a certificate, and a client that verifies it.

    openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 30 \
        -subj /CN=localhost -addext subjectAltName=DNS:localhost
    python examples/tls_echo.py serve cert.pem key.pem     # on 127.0.0.1:8710
    python examples/tls_echo.py ask cert.pem               # trusts that certificate only
    openssl s_client -connect 127.0.0.1:8710 -quiet        # or by hand

On SIGHUP the server reads its files again: new connections get the new certificate, and the open
ones go on.
"""

from __future__ import annotations

import argparse
import signal
import ssl
import sys

import gevent
from gevent.event import Event

from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsHandler,
    PsServer,
    PsServerError,
    PsSession,
)
from psofa_gevent.framing import Line


class Echo(PsCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


def make_context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def serve(port: int, certificate: str, key: str) -> None:
    server = PsServer(
        Echo(),
        host="127.0.0.1",
        port=port,
        ssl_context=make_context(certificate, key),
        framing=Line(),
    )
    server.start()
    gevent.signal_handler(signal.SIGHUP, lambda: server.reload_tls(make_context(certificate, key)))
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()


def ask(port: int, certificate: str) -> None:
    ended = Event()

    class Talk(PsHandler[bytes]):
        def handle(self, session: PsSession) -> None:
            session.send("hello")
            print(session.receive(timeout=5).decode(), session.tls and session.tls.version)

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            ended.set()

    context = ssl.create_default_context(cafile=certificate)
    client = PsClient(
        Talk(), "127.0.0.1", port, ssl_context=context, server_hostname="localhost", framing=Line()
    )
    client.connect()
    ended.wait()
    client.disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description="An echo over TLS.")
    parser.add_argument("what", choices=("serve", "ask"))
    parser.add_argument("certificate", help="PEM")
    parser.add_argument("key", nargs="?", help="PEM; for serve")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()
    try:
        if args.what == "ask":
            ask(args.port, args.certificate)
        else:
            serve(args.port, args.certificate, args.key)
    except (OSError, ValueError, PsServerError, PsClientError) as error:
        sys.exit(str(error))  # no such file or port; it is in use; or the server is not trusted


if __name__ == "__main__":
    main()
