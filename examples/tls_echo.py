r"""TLS both ways: a server with a certificate, and a client that verifies it.

    openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 30 \
        -subj /CN=localhost -addext subjectAltName=DNS:localhost
    python examples/tls_echo.py serve cert.pem key.pem     # on 127.0.0.1:8710
    python examples/tls_echo.py ask cert.pem               # trusts that certificate only
    openssl s_client -connect 127.0.0.1:8710 -quiet        # or by hand

On SIGHUP the server reads its files again: new connections get the new certificate, and open
connections go on. If the files can't be used, it says so and goes on with the old certificate.

With ``--name b.example b.pem b.key`` the server has another certificate for clients that ask for
that name (SNI). With ``--clients ca.pem`` its clients need a certificate signed by that authority,
and it greets them by the name in it; ``ask ca.pem --identity device.pem device.key`` shows one.
"""

from __future__ import annotations

import argparse
import signal
import ssl
import sys

import gevent
from gevent.event import AsyncResult

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
    def on_open(self, session: PsSession) -> None:
        assert session.tls is not None
        for names in session.tls.peer.get("subject", ()):  # empty, unless it was verified
            for kind, name in names:
                if kind == "commonName":
                    session.send(f"welcome, {name}")

    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


def make_context(args: argparse.Namespace) -> ssl.SSLContext:
    """The context of the first certificate; by SNI it switches to those of the other names."""

    def load(certificate: str, key: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        if args.clients is not None:
            context.load_verify_locations(args.clients)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def choose(connection: ssl.SSLObject, name: str | None, _first: ssl.SSLContext) -> None:
        if name in others:
            connection.context = others[name]

    others = {name: load(certificate, key) for name, certificate, key in args.name}
    first = load(args.certificate, args.key)
    first.sni_callback = choose
    return first


def serve(args: argparse.Namespace) -> None:
    server = PsServer(
        Echo(),
        host="127.0.0.1",
        port=args.port,
        ssl_context=make_context(args),
        framing=Line(),
    )

    def reload() -> None:
        try:
            server.reload_tls(make_context(args))
        except (OSError, ValueError) as error:  # a file is missing, or only half written
            print("not reloaded:", error, flush=True)

    server.start()
    gevent.signal_handler(signal.SIGHUP, reload)
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()


def ask(args: argparse.Namespace) -> None:
    ended: AsyncResult[BaseException | None] = AsyncResult()

    class Talk(PsHandler[bytes]):
        def handle(self, session: PsSession) -> None:
            session.send("hello")
            for line in session:
                print(line.decode(), session.tls and session.tls.version)
                if line == b"hello":
                    break

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            ended.set(session.close_cause)

    context = ssl.create_default_context(cafile=args.certificate)
    if args.identity:
        context.load_cert_chain(*args.identity)
    client = PsClient(
        Talk(),
        "127.0.0.1",
        args.port,
        ssl_context=context,
        server_hostname=args.server,
        framing=Line(),
    )
    client.connect()
    failure = ended.get()  # a TLS 1.3 server that refuses our certificate says so only now
    client.disconnect()
    if failure is not None:
        sys.exit(str(failure))


def main() -> None:
    parser = argparse.ArgumentParser(description="An echo over TLS.")
    parser.add_argument("what", choices=("serve", "ask"))
    parser.add_argument("certificate", help="PEM; for ask, the authority's, or the server's own")
    parser.add_argument("key", nargs="?", help="PEM; for serve")
    files = ("CERTIFICATE", "KEY")
    parser.add_argument("--name", nargs=3, action="append", default=[], metavar=("NAME", *files))
    parser.add_argument("--clients", metavar="CA", help="serve only clients with its certificates")
    parser.add_argument("--server", default="localhost", metavar="NAME", help="for ask")
    parser.add_argument("--identity", nargs=2, metavar=files, help="for ask")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()
    try:
        if args.what == "ask":
            ask(args)
        else:
            serve(args)
    except (OSError, ValueError, PsServerError, PsClientError) as error:
        sys.exit(str(error))  # a wrong file or port, port in use, or the server is not trusted


if __name__ == "__main__":
    main()
