"""Streams on asyncio's own loop, and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib

from benchmarks.servers.works import BACKLOG, HOST, READ_SIZE, Announce, pongs


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while message := await reader.read(READ_SIZE):
        writer.write(message)
        await writer.drain()
    writer.close()


async def suspend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while message := await reader.read(READ_SIZE):
        await asyncio.sleep(0)
        writer.write(message)
        await writer.drain()
    writer.close()


async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while message := await reader.read(READ_SIZE):
        writer.write(pongs(message))
        await writer.drain()
    writer.close()


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            writer.write(await reader.readuntil(b"\n"))
            await writer.drain()
    writer.close()


async def lengths(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            prefix = await reader.readexactly(4)
            message = await reader.readexactly(int.from_bytes(prefix))
            writer.write(len(message).to_bytes(4) + message)
            await writer.drain()
    writer.close()


HANDLERS = {
    "echo": echo,
    "hold": echo,
    "suspend": suspend,
    "ping": ping,
    "lines": lines,
    "lengths": lengths,
}


async def listen(work: str, announce: Announce) -> None:
    server = await asyncio.start_server(HANDLERS[work], HOST, 0, backlog=BACKLOG)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def serve(variant: str, work: str, announce: Announce) -> None:
    if variant == "uvloop":
        import uvloop

        uvloop.run(listen(work, announce))
    else:
        asyncio.run(listen(work, announce))
