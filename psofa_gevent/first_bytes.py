"""The first bytes of an accepted connection, which are looked at before they are taken.

So the header of the PROXY protocol is read to its end, and not a byte of what follows; and a peer
that leaves without a word is told from one that fails: a load balancer that looks whether somebody
is there does nothing else.

Runs in the session's own greenlet, before its TLS handshake, and switches where it waits.
"""

from __future__ import annotations

import _socket
import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.proxy_protocol import PsProxyInfo, parse

if TYPE_CHECKING:
    from psofa_gevent.session import PsSession

__all__ = ["SilentPeerError", "read_header", "wait_for_word"]

logger = logging.getLogger("psofa_gevent")

PEEK_SIZE = 4_096
"""Bytes of a header that are looked at in one go; most have less than a hundred."""
SHORTEST_TIMER = 0.001
"""Seconds: libuv knows no shorter timer, and warns of one."""
NEVER = float("inf")


class SilentPeerError(Exception):
    """The peer has left, by FIN or RST, and has sent nothing."""


def read_header(session: PsSession[Any], deadline: float) -> bool:
    """Read the header of the PROXY protocol, and no byte more; whether it is good."""
    try:
        wait_for_word(session, deadline)
        session._use_proxy(_header(session, deadline))
    except SilentPeerError:
        session._request_close(PsCloseReason.PEER_CLOSE, linger=False)
    except (OSError, ValueError) as exc:
        if session._open:
            session._request_close(PsCloseReason.FAILED, exc, linger=False)
            logger.warning("%r: the PROXY protocol header failed: %s", session, exc)
    return session._open


def wait_for_word(session: PsSession[Any], deadline: float) -> None:
    """Wait for the first byte of what is due.

    Raises:
        SilentPeerError: none comes.
        OSError: none came by `deadline` (`TimeoutError`), or the session was closed meanwhile.
    """
    try:
        if not _peek(session, deadline, 1):
            raise SilentPeerError
    except ConnectionResetError as exc:
        raise SilentPeerError from exc


def _header(session: PsSession[Any], deadline: float) -> PsProxyInfo:
    received = bytearray()
    while True:
        # Looked at first, as only then it is known where the header ends.
        seen = _peek(session, deadline, PEEK_SIZE)
        if not seen:
            raise ConnectionResetError("the peer closed the connection in it")
        received += seen
        found = parse(received, session._remote_endpoint)
        left = len(seen) if found is None else found[1] - (len(received) - len(seen))
        while left > 0:
            data = session._sock.recv(left)
            if not data:  # a system that drops what was there at a reset
                raise ConnectionResetError("the peer reset the connection in it")
            left -= len(data)
        if found is not None:
            return found[0]


def _peek(session: PsSession[Any], deadline: float, size: int) -> bytes:
    """What has come, at most `size` bytes, which stay there. Waits for the first one."""
    while True:
        try:
            seen: bytes = session._sock.recv(size, _socket.MSG_PEEK)
        except BlockingIOError:
            _wait(session, deadline)
        else:
            return seen


def _wait(session: PsSession[Any], deadline: float) -> None:
    """Wait until something may have come."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("it was not complete in time")
    session._watcher.start(session._resume)
    try:
        session._wait_until_woken(None if left == NEVER else max(left, SHORTEST_TIMER))
    finally:
        if not session._released:
            session._watcher.stop()
    if not session._open:
        raise ConnectionAbortedError("the session was closed meanwhile")
