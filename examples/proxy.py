"""PurpleSofa's second sample: a TCP proxy, with many back ends in turn.

    python examples/proxy.py LISTEN_HOST:PORT BACKEND_HOST:PORT [BACKEND_HOST:PORT ...]
    python examples/proxy.py 127.0.0.1:6380 127.0.0.1:6379      # in front of a Redis
    python examples/proxy.py '[::]:8080' '[::1]:8000' '[::1]:8001'

An address in brackets is IPv6 (``[localhost]:80`` is a name, looked up in that family); the
listening socket is then dual-stack. Every client that connects, the *front*, is paired with a
connection of its own to a back end, the *back*. All backs belong to one `PsMultiClient`. A back has
the connection id of its front, so the two find each other.

Bytes that come before the back is connected
    stay in the kernel. ``on_open`` of the front returns only when the back is connected, and the
    front is not read until ``on_open`` has returned. The socket's receive buffer is the bound;
    the proxy has no buffer of its own.
Back-pressure
    comes in the same way. The send inside ``on_message`` waits until the other side takes the
    bytes, and until then the sender is not read. So the sender finds the connection as slow as the
    reader on the other end. Only this pair waits. At most one message per direction is in memory.
Half-close
    The FIN of one side is passed on as a FIN to the other, after all bytes that came before it. The
    other direction goes on until it has ended as well.
A reset
    is passed on as a reset, so that half an answer is not taken for a whole one. The proxy has by
    then sent on all bytes that it received before the reset; bytes that the other side has not
    taken from the kernel by then may be lost, as with any reset.
A back end that can't be reached
    is skipped, and for a few seconds is tried only when no other one can be reached. If no back end
    can be reached, the client is reset: the nearest thing to a refused connection.

Idle sessions stay open, because the two ends know better when to give up. So if a peer vanished
without a FIN or a reset, its pair stays until the proxy sends something to that peer.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import signal
import sys
import time
import uuid
from collections import deque
from typing import NamedTuple

import gevent
from gevent.event import Event

from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsMultiClient,
    PsMultiClientError,
    PsSendError,
    PsServer,
    PsServerError,
    PsSession,
    PsSocketAddressFamily,
)

logger = logging.getLogger("proxy")

CONNECT_TIMEOUT = 3.0
"""Seconds for the connect to one back end, while the client waits; a dead network takes minutes."""

QUARANTINE = 5.0
"""Seconds in which a back end that failed is tried last: about the time of a restart."""

STALL_TIMEOUT = 600.0
"""Seconds in which one side may accept nothing before its pair is closed. Long, because a reader
may have its reasons to pause; not endless, because the other side may be gone, and this is not
noticed while its callback waits for this side."""

SPARE_DESCRIPTORS = 64
"""Descriptors for the rest of the process."""

PEER = "peer"


class Address(NamedTuple):
    """An address to listen on or to connect to."""

    host: str
    port: int
    family: PsSocketAddressFamily

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``host:port`` or ``[ipv6-host]:port``; the host may be a name.

        Raises:
            argparse.ArgumentTypeError: `text` is neither.
        """
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        family = PsSocketAddressFamily.IPV6 if bracketed else PsSocketAddressFamily.IPV4
        host = host[1:-1] if bracketed else host
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
        if ":" in host and not bracketed:
            raise argparse.ArgumentTypeError(f"{text!r}: put the IPv6 address in [brackets]")
        return cls(host, int(port), family)

    def __str__(self) -> str:
        if self.family is PsSocketAddressFamily.IPV6:
            return f"[{self.host}]:{self.port}"
        return f"{self.host}:{self.port}"


class Backends:
    """The back ends, in turn; those that failed recently come last."""

    def __init__(self, addresses: list[Address]) -> None:
        self._turn = deque(addresses)
        self._dead_until = dict.fromkeys(addresses, 0.0)

    def in_order(self) -> list[Address]:
        """Every back end once, in the order in which the next client should try them."""
        order = list(self._turn)
        self._turn.rotate(-1)
        now = time.monotonic()
        return sorted(order, key=lambda address: self._dead_until[address] > now)  # a stable sort

    def failed(self, address: Address, error: Exception) -> None:
        logger.warning("back end %s skipped for %g s: %s", address, QUARANTINE, error)
        self._dead_until[address] = time.monotonic() + QUARANTINE

    def answered(self, address: Address) -> None:
        self._dead_until[address] = 0.0


class Relay(PsCallback):
    """The callback of both sides of a pair: passes on everything to the other side.

    A send fails when the other side has ended meanwhile. Then the bytes have nowhere to go, and the
    other side's ``on_close`` ends this one.
    """

    def on_message(self, session: PsSession, message: bytes) -> None:
        peer = find_peer(session)
        if peer is not None:
            with contextlib.suppress(PsSendError):
                peer.send(message)  # waits until the peer takes it: see back-pressure above

    def on_eof(self, session: PsSession) -> None:
        peer = find_peer(session)
        if peer is not None:
            peer.send_eof()  # comes after all bytes: on_message has returned for each of them

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        logger.debug("%s closed: %s", session, close_reason.name)
        peer = find_peer(session)
        session.clear_value(PEER)  # they refer to each other: free both now, not at a later gc
        if peer is None:
            return
        if close_reason is PsCloseReason.FAILED:
            peer.abort()
        else:
            peer.close()  # both directions have ended, or we are shutting down


def pair(front: PsSession, back: PsSession) -> None:
    front.set_value(PEER, back)
    back.set_value(PEER, front)


def find_peer(session: PsSession) -> PsSession | None:
    peer: PsSession | None = session.get_value(PEER)
    return peer


class Back(Relay):
    """The callback of the side of the back ends."""

    def __init__(self) -> None:
        self.fronts: dict[uuid.UUID, PsSession] = {}  # by connection id, until they close

    def on_open(self, session: PsSession) -> None:
        # connect may not have returned to the front, and the back end may speak first.
        front = self.fronts.get(session.connection_id)
        if front is None:
            session.abort()  # its front was closed while it waited for this back
        else:
            pair(front, session)


class Front(Relay):
    """The callback of the side of the clients."""

    def __init__(self, backends: Backends, back: Back, bundle: PsMultiClient) -> None:
        self.backends = backends
        self.back = back
        self.bundle = bundle

    def on_open(self, session: PsSession) -> None:
        self.back.fronts[session.connection_id] = session
        self.connect(session)  # the front is not read before this has returned

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.back.fronts.pop(session.connection_id, None)
        super().on_close(session, close_reason)

    def connect(self, session: PsSession) -> None:
        for address in self.backends.in_order():
            if not session.is_open:
                return  # we are shutting down
            try:
                connection = self.bundle.connect(
                    address.host,
                    address.port,
                    connection_id=session.connection_id,
                    socket_address_family=address.family,
                    timeout=CONNECT_TIMEOUT,
                )
            except PsMultiClientError as error:
                self.backends.failed(address, error)
            else:
                self.backends.answered(address)
                logger.debug("%s goes to %s", session, address)
                pair(session, connection.session)  # its on_open may not have run yet
                return
        logger.error("no back end can be reached for %s", session)
        session.abort()


def stop_signal() -> Event:
    """An event that Ctrl-C and SIGTERM set from now on."""
    stopping = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopping.set)
    return stopping


def most_pairs() -> int:
    """How many pairs the process has descriptors for; further clients wait in the backlog.

    A pair has two descriptors, and the server's own default would count the fronts only.
    """
    limit, _hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (limit - SPARE_DESCRIPTORS) // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="A TCP proxy.")
    parser.add_argument("listen", type=Address.parse, metavar="LISTEN_HOST:PORT")
    parser.add_argument("backends", type=Address.parse, nargs="+", metavar="BACKEND_HOST:PORT")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every session")
    args = parser.parse_args()
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )

    back = Back()
    bundle = PsMultiClient(
        back, allow_half_open=True, idle_milliseconds=None, send_timeout=STALL_TIMEOUT
    )
    server = PsServer(
        Front(Backends(args.backends), back, bundle),
        host=args.listen.host,
        port=args.listen.port,
        socket_address_family=args.listen.family,
        max_sessions=most_pairs(),
        allow_half_open=True,
        idle_milliseconds=None,
        send_timeout=STALL_TIMEOUT,
    )
    stopping = stop_signal()
    try:
        with bundle, server:
            host, port = server.address[:2]
            print(f"listening on {Address(host, port, args.listen.family)}", flush=True)
            stopping.wait()
            # Not serve_forever: it shuts down only the server, and gives running callbacks time.
            # Here a callback may wait for the other side to accept data, so both sides close now.
            server.stop_accepting()
            for session in (*server.sessions, *bundle.sessions):
                session.close()
    except PsServerError as error:
        sys.exit(str(error))  # the address to listen on is in use, or not ours


if __name__ == "__main__":
    main()
