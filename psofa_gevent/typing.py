"""The owners as types, for type checkers: the only file that imports from packages above it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from psofa_gevent.client import PsClient
    from psofa_gevent.multi_client import PsMultiClient
    from psofa_gevent.server import PsServer

    Owner: TypeAlias = PsServer[Any] | PsClient[Any] | PsMultiClient[Any]
else:
    Owner = PsClient = PsMultiClient = PsServer = Any

__all__ = ["Owner", "PsClient", "PsMultiClient", "PsServer"]
