"""What an accepted connection goes through before its session opens.

That is the header of the PROXY protocol, the rules about its peer with ``on_accept``, and the TLS
handshake, in this order. It runs in the session's own greenlet, and what the peer has to do has one
time limit, so a silent peer holds up nobody. What fails closes the session with FAILED and a record
in the log; ``on_close`` is told, and ``on_open`` was not. A session that is refused, or closed
meanwhile for another reason, gets neither; nor does one whose peer leaves without having sent a
byte where one is due: a load balancer that looks whether somebody is there.

The first bytes are looked at before they are taken: so the header is read to its end, and not a
byte of what follows.
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
"""Bytes of a header that are looked at in one go; most have less than a hundred."""


class Preamble:
    """The steps of one server, for each accepted connection."""

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
        """Take the steps. In the session's own greenlet; may switch."""
        deadline = NEVER if self._timeout is None else monotonic() + self._timeout
        if self._proxy_protocol and not _read_header(session, deadline):
            return
        asked_at = monotonic()
        if not self._admits(session):
            return
        deadline += monotonic() - asked_at  # which was not the peer's time
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
    """The peer has left, by FIN or RST, and has sent nothing."""


def _read_header(session: PsSession[Any], deadline: float) -> bool:
    """Read the header of the PROXY protocol, and no byte more; whether it is good."""
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
    """Wait for the first byte of what is due.

    Raises:
        _SilentPeerError: none comes.
        OSError: none came by `deadline` (`TimeoutError`), or the session was closed meanwhile.
    """
    try:
        if not _peek(session, deadline, 1):
            raise _SilentPeerError
    except ConnectionResetError as exc:
        raise _SilentPeerError from exc


def _header(session: PsSession[Any], deadline: float) -> PsProxyInfo:
    received = bytearray()
    while True:
        # Looked at first, as only then it is known where the header ends.
        seen = _peek(session, deadline, PEEK_SIZE)
        if not seen:
            raise ConnectionResetError("connection closed before the end of the header")
        received += seen
        found = parse(received, session.remote_endpoint)
        left = len(seen) if found is None else found[1] - (len(received) - len(seen))
        while left > 0:
            data = inside.take(session, left)
            if not data:  # a system that drops what was there at a reset
                raise ConnectionResetError("connection reset before the end of the header")
            left -= len(data)
        if found is not None:
            return found[0]


def _peek(session: PsSession[Any], deadline: float, size: int) -> bytes:
    """What has come, at most `size` bytes, which stay there. Waits for the first one."""
    while True:
        try:
            seen = inside.peek(session, size)
        except BlockingIOError:
            parking = SessionParking(session)
            run_in_greenlet(wait_for_peer(session, deadline, parking, writes=False))
        else:
            return seen
