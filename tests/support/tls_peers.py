"""TLS peers of servers, and contexts that trust each other.

Who imports this is skipped where trustme is not installed.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from psofa_gevent import PsSession
from psofa_gevent.testing import RecordingCallback, ScriptedClient

trustme = pytest.importorskip("trustme")

BIG = 8 * 1024 * 1024
"""Bytes: more than the buffers of a connection take."""
CA = trustme.CA()
CERTIFICATE = CA.issue_cert("localhost", "127.0.0.1")
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def server_context(certificate: Any = CERTIFICATE) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    # Early 3.11s set it, and let a stream that was cut off pass for one that ended.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


class TlsPeer(ScriptedClient):
    """A scripted client over TLS, by the standard library, whose wire can be cut."""

    def __init__(self, address: tuple[Any, ...], context: ssl.SSLContext, **kwargs: Any) -> None:
        super().__init__(address, **kwargs)
        self.go_over(context)

    def go_over(self, context: ssl.SSLContext) -> None:
        """Shake hands."""
        self.plain = self.socket
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self._until_done(self.tls.do_handshake)

    def _until_done(self, step: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.plain.recv(65536)
                if data:
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if self.outgoing.pending:
            self.plain.sendall(self.outgoing.read())

    def say(self, data: bytes) -> None:
        """Send as many records as it takes."""
        view = memoryview(data)
        while view:
            view = view[self._until_done(self.tls.write, view) :]

    def hear(self, count: int) -> bytes:
        """Read so many bytes, or less: up to the clean end."""
        received = b""
        while len(received) < count:
            try:
                data = self._until_done(self.tls.read, count - len(received))
            except ssl.SSLZeroReturnError:  # it has said close_notify itself
                break
            if not data:
                break
            received += data
        return received

    def close_notify(self) -> None:
        """Say that this is the end."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self._flush()


class Echo(RecordingCallback):
    def on_message(self, session: PsSession[Any], message: Any) -> None:
        super().on_message(session, message)
        session.send(message)


MakePeer = Callable[..., TlsPeer]
