"""A Twisted Protocol, on the reactor that Twisted chooses: epoll."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.basic import Int32StringReceiver, LineOnlyReceiver
from twisted.python.failure import Failure

from benchmarks.servers.works import BACKLOG, HOST, TO_ALL, Announce, pongs

# zope.interface's interfaces are not types.
reactor: Any = installed_reactor
protocols: set[Broadcast] = set()


class Echo(Protocol):
    transport: Any

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class Ping(Echo):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(pongs(data))


class Broadcast(Echo):
    def connectionMade(self) -> None:
        protocols.add(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        protocols.discard(self)

    def dataReceived(self, data: bytes) -> None:
        for each in protocols if data[0] == TO_ALL else (self,):
            each.transport.write(data)


class Lines(LineOnlyReceiver):
    delimiter = b"\n"

    def lineReceived(self, line: bytes) -> None:
        self.sendLine(line)  # type: ignore[no-untyped-call]  # Twisted is not typed there


class Lengths(Int32StringReceiver):
    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)  # type: ignore[no-untyped-call]  # Twisted is not typed there


PROTOCOLS: dict[str, Any] = {
    "echo": Echo,
    "hold": Echo,
    "ping": Ping,
    "broadcast": Broadcast,
    "lines": Lines,
    "lengths": Lengths,
}


def serve(_variant: str, work: str, announce: Announce) -> None:
    factory = Factory.forProtocol(PROTOCOLS[work])
    factory.noisy = False
    port = reactor.listenTCP(0, factory, backlog=BACKLOG, interface=HOST)
    announce(port.getHost().port)
    reactor.run()
