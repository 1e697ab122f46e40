"""Who is let in, and who is refused: what tests of admission ask a server and its clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psofa_gevent import PsRefusal, PsServer
from psofa_gevent.testing import RecordingCallback, ScriptedClient

ELSEWHERE = ["192.0.2.0/24"]
"""No client of these tests is there."""
HERE = ["127.0.0.0/8"]


def is_closed(client: ScriptedClient) -> bool:
    """Whether the server closes the connection, by FIN or RST, without a byte."""
    client.socket.settimeout(5)
    try:
        return client.socket.recv(100) == b""
    except ConnectionResetError:
        return True


def refusals(server: PsServer) -> dict[PsRefusal, int]:
    """How often it refused, without the reasons that did not come up."""
    return {reason: count for reason, count in server.refused.items() if count}


def counted_peers(server: PsServer) -> dict[bytes, int]:
    """What the server keeps for max_sessions_per_peer."""
    admission = server._admission
    assert sum(admission._counts.values()) == len(admission._keys)
    return dict(admission._counts)


def ask(client: ScriptedClient) -> None:
    client.send("x")
    client.expect("x")


class Door(RecordingCallback):
    """Sync or async, asks `answer` about each peer."""

    def __init__(self, answer: Callable[[Any], Any], *, use_async_callback: bool = False) -> None:
        super().__init__(lambda message: message)
        self.use_async_callback = use_async_callback
        self.answer = answer
        self.peers: list[Any] = []

    def on_accept(self, peer: Any) -> Any:
        self.peers.append(peer)
        return self.answer(peer)

    async def on_accept_async(self, peer: Any) -> Any:
        self.peers.append(peer)
        answer = self.answer(peer)
        return await answer if hasattr(answer, "__await__") else answer
