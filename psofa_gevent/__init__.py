"""TCP servers and clients on gevent, written as plain synchronous callbacks.

Subclass `PsCallback`, give an instance to `PsServer`, `PsClient` or `PsMultiClient`, and write each
callback as if its connection had the machine for itself. Importing this package patches nothing.
"""

from __future__ import annotations

import logging

from psofa_gevent.aio.coroutines import await_greenlet, hub_loop, run_coroutine, spawn_coroutine
from psofa_gevent.callback import PsCallback
from psofa_gevent.client import PsClient
from psofa_gevent.connecting.reconnect import PsReconnect
from psofa_gevent.enums import PsCloseReason, PsOverflow, PsRefusal, PsSocketAddressFamily
from psofa_gevent.errors import (
    PsCallbackError,
    PsClientError,
    PsClosedError,
    PsError,
    PsFramingError,
    PsKeyTakenError,
    PsMultiClientError,
    PsRequestClosedError,
    PsRequestError,
    PsRequestTimeoutError,
    PsSendError,
    PsServerError,
    PsTlsError,
)
from psofa_gevent.group import PsGroup
from psofa_gevent.handler import PsHandler
from psofa_gevent.multi_client import PsMultiClient, PsMultiClientConnection
from psofa_gevent.proxy_protocol import PsProxyInfo, PsProxyTls
from psofa_gevent.public import publish as _publish
from psofa_gevent.requester import PsRequester
from psofa_gevent.server import PsServer
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import DEFAULT, PsHeartbeat
from psofa_gevent.tls.socket import PsTlsInfo

__version__: str

__all__ = [
    "DEFAULT",
    "PsCallback",
    "PsCallbackError",
    "PsClient",
    "PsClientError",
    "PsCloseReason",
    "PsClosedError",
    "PsError",
    "PsFramingError",
    "PsGroup",
    "PsHandler",
    "PsHeartbeat",
    "PsKeyTakenError",
    "PsMultiClient",
    "PsMultiClientConnection",
    "PsMultiClientError",
    "PsOverflow",
    "PsProxyInfo",
    "PsProxyTls",
    "PsReconnect",
    "PsRefusal",
    "PsRequestClosedError",
    "PsRequestError",
    "PsRequestTimeoutError",
    "PsRequester",
    "PsSendError",
    "PsServer",
    "PsServerError",
    "PsSession",
    "PsSocketAddressFamily",
    "PsTlsError",
    "PsTlsInfo",
    "__version__",
    "await_greenlet",
    "hub_loop",
    "run_coroutine",
    "spawn_coroutine",
]


def __getattr__(name: str) -> str:
    # Computed on first use: importlib.metadata takes a quarter of the package's import time.
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib.metadata  # noqa: PLC0415 - see above

    try:
        return importlib.metadata.version("psofa_gevent")
    except importlib.metadata.PackageNotFoundError:  # the package runs from a checkout
        return "0.0.0"


_publish(__name__, __all__, globals())
logging.getLogger("psofa_gevent").addHandler(logging.NullHandler())
