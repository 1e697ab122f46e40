"""A Protocol on asyncio's own loop, and on uvloop."""

from __future__ import annotations

import asyncio
import ssl
import struct
from typing import cast

from benchmarks.servers.works import BACKLOG, HOST, TLS, TO_ALL, Announce, pongs, tls_context

transports: set[asyncio.Transport] = set()


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Ping(Echo):
    def data_received(self, data: bytes) -> None:
        self.transport.write(pongs(data))


class Broadcast(Echo):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transports.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        if data[0] != TO_ALL:
            self.transport.write(data)
            return
        for transport in transports:
            transport.write(data)


class Lines(Echo):
    """Framing written by hand: answers the lines of a read in one write."""

    rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        replies = [self.reply(line) for line in lines]
        if replies:
            self.transport.write(b"\n".join([*replies, b""]))

    def reply(self, line: bytes) -> bytes:
        return line


class Lengths(Echo):
    """Framing written by hand: answers the messages of a read in one write."""

    rest = b""

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        replies = []
        at = 0
        while at + 4 <= len(data):
            (length,) = struct.unpack_from(">I", data, at)
            end = at + 4 + length
            if end > len(data):
                break
            reply = self.reply(data[at + 4 : end])
            replies += [struct.pack(">I", len(reply)), reply]
            at = end
        self.rest = data[at:]
        if replies:
            self.transport.write(b"".join(replies))

    def reply(self, message: bytes) -> bytes:
        return message


PROTOCOLS = {
    "echo": Echo,
    "hold": Echo,
    TLS: Echo,
    "ping": Ping,
    "broadcast": Broadcast,
    "lines": Lines,
    "lengths": Lengths,
}


async def listen(work: str, announce: Announce) -> None:
    loop = asyncio.get_running_loop()
    tls = tls_context(ssl.SSLContext) if work == TLS else None
    server = await loop.create_server(PROTOCOLS[work], HOST, 0, backlog=BACKLOG, ssl=tls)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def serve(variant: str, work: str, announce: Announce) -> None:
    if variant == "uvloop":
        import uvloop

        uvloop.run(listen(work, announce))
    else:
        asyncio.run(listen(work, announce))
