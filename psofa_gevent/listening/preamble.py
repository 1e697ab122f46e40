"""The preamble: the steps of an accepted connection before ``on_open``.

The steps are the header of the PROXY protocol, admission with ``on_accept``, and the TLS handshake,
in this order. They run in the session's own greenlet. One time limit holds for all that the peer
has to do, so a silent peer holds up no one else.

A step that fails closes the session with FAILED and a record in the log: ``on_close`` is called,
without an ``on_open`` before. Neither is called for a session that is refused, that is closed
meanwhile for another reason, or whose peer leaves before the first byte of a step (a load balancer
that checks whether the server is up).

The header is peeked at before it is taken, so it is read to its end, without a byte of what
follows.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub.parking import run_in_greenlet
from psofa_gevent.hub.times import NEVER
from psofa_gevent.proxy_protocol import PsProxyInfo, parse
from psofa_gevent.session import inside
from psofa_gevent.session.starttls import Handshake, SessionParking, wait_for_peer

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["Preamble"]

PEEK_SIZE = 4_096
"""Bytes of a header to peek at in one go; most headers have less than a hundred."""


class Preamble:
    """The preamble of one server: called for each accepted connection."""

    def __init__(
        self,
        ssl_context: Callable[[], ssl.SSLContext | None],
        timeout: float | None,
        admits: Callable[[PsSession[Any]], bool],
        *,
        proxy_protocol: bool,
    ) -> None:
        self._ssl_context = ssl_context
        self._timeout = timeout
        self._admits = admits
        self._proxy_protocol = proxy_protocol

    def __call__(self, session: PsSession[Any]) -> None:
        """Take the steps. Runs in the session's own greenlet, and may switch.

        If a step fails, or the session is refused, its close is requested.
        """
        deadline = NEVER if self._timeout is None else monotonic() + self._timeout
        if self._proxy_protocol and not _read_header(session, deadline):
            return
        asked_at = monotonic()
        if not self._admits(session):
            return
        deadline += monotonic() - asked_at  # the time of ``on_accept`` is not the peer's
        try:
            context = self._ssl_context()
            if context is not None:
                _wait_for_word(session, deadline)
                handshake = Handshake(context, deadline, server_side=True)
                run_in_greenlet(handshake.shake_hands(session, SessionParking(session)))
        except _SilentPeerError:
            inside.request_close(session, PsCloseReason.PEER_CLOSE, linger=False)
        except OSError as exc:
            if session.is_open:
                inside.request_close(session, PsCloseReason.FAILED, exc)
                text = "%r: the TLS handshake failed: %s"
                inside.log_peer(session, "the TLS handshake failed", text, session, exc)


class _SilentPeerError(Exception):
    """The peer has left, by FIN or RST, without a byte of what was due."""


def _read_header(session: PsSession[Any], deadline: float) -> bool:
    """Read the header of the PROXY protocol, and no byte more. False: the session is closing."""
    try:
        _wait_for_word(session, deadline)
        inside.use_proxy(session, _header(session, deadline))
    except _SilentPeerError:
        inside.request_close(session, PsCloseReason.PEER_CLOSE, linger=False)
    except (OSError, ValueError) as exc:
        if session.is_open:
            inside.request_close(session, PsCloseReason.FAILED, exc, linger=False)
            text = "%r: bad PROXY header: %s"
            inside.log_peer(session, "bad PROXY header", text, session, exc)
    return session.is_open


def _wait_for_word(session: PsSession[Any], deadline: float) -> None:
    """Wait for the first byte of a step. Switches while it waits.

    Raises:
        _SilentPeerError: the peer has left before that byte.
        OSError: no byte came by `deadline` (`TimeoutError`), or the session was closed meanwhile.
    """
    try:
        if not _peek(session, deadline, 1):
            raise _SilentPeerError
    except ConnectionResetError as exc:
        raise _SilentPeerError from exc


def _header(session: PsSession[Any], deadline: float) -> PsProxyInfo:
    received = bytearray()
    while True:
        # Peek, as the size of the header is not known before it is parsed.
        seen = _peek(session, deadline, PEEK_SIZE)
        if not seen:
            raise ConnectionResetError("connection closed before the end of the header")
        received += seen
        found = parse(received, session.remote_endpoint)
        left = len(seen) if found is None else found[1] - (len(received) - len(seen))
        while left > 0:
            data = inside.take(session, left)
            if not data:  # some systems drop received bytes when the connection is reset
                raise ConnectionResetError("connection reset before the end of the header")
            left -= len(data)
        if found is not None:
            return found[0]


def _peek(session: PsSession[Any], deadline: float, size: int) -> bytes:
    """The first bytes in the socket, at most `size`; they stay there. Waits for the first one."""
    while True:
        try:
            seen = inside.peek(session, size)
        except BlockingIOError:
            parking = SessionParking(session)
            run_in_greenlet(wait_for_peer(session, deadline, parking, writes=False))
        else:
            return seen
