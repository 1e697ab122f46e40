"""Servers with several sessions, each with the client at its other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psofa_gevent import PsCallback, PsServer, PsSession
from psofa_gevent.testing import ClientFactory, ScriptedClient, ServerFactory, eventually


class Room:
    """A server, and clients of it, each with its session."""

    def __init__(self, server: PsServer[Any], ps_client: ClientFactory) -> None:
        self.server = server
        self._connect = ps_client
        self.clients: list[ScriptedClient] = []
        self.sessions: list[PsSession[Any]] = []

    def enter(self, count: int) -> None:
        for _ in range(count):
            self.clients.append(self._connect(self.server))
            eventually(lambda: self._session_of(self.clients[-1]))
            self.sessions += self._session_of(self.clients[-1])

    def _session_of(self, client: ScriptedClient) -> list[PsSession[Any]]:
        endpoint = client.local_endpoint
        return [each for each in self.server.sessions if each.remote_endpoint == endpoint]


MakeRoom = Callable[..., Room]


def rooms(ps_server: ServerFactory, ps_client: ClientFactory) -> MakeRoom:
    """Makes rooms with so many clients: ``room(count, **settings)``."""

    def make(count: int, **settings: Any) -> Room:
        made = Room(ps_server(settings.pop("callback", PsCallback()), **settings), ps_client)
        made.enter(count)
        return made

    return make
