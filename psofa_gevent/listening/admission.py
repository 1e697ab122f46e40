"""Admission: the rules of one server about who may connect, and a count of its refusals.

Rules that need no waiting are applied in the hub, as soon as a connection is accepted
(`Admission.refuses`): before it has a greenlet or a session, so that refusing a flood is cheap.
With the PROXY protocol the rules about the client are applied after the header; ``on_accept`` is
called last. Both happen in the greenlet of the session (`Admission.admits`). A session that is
refused there gets no other callback.

A session counts for its peer for as long as the manager has it, however it ends
(`Admission.opened`, `Admission.ended`).

All of it belongs to the hub's thread. Only `Admission.admits` switches.
"""

from __future__ import annotations

import _socket
import logging
from contextvars import Context
from typing import TYPE_CHECKING, Any

from gevent import GreenletExit

from psofa_gevent.enums import PsCloseReason, PsRefusal
from psofa_gevent.hub.logs import PeerLog
from psofa_gevent.listening.farewell import LONGEST_FAREWELL, Farewells
from psofa_gevent.listening.networks import Networks, peer_address
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.sockopts import Endpoint, end, endpoint
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from psofa_gevent.owner.manager import SessionManager
    from psofa_gevent.session.session import PsSession
    from psofa_gevent.typing import Owner

__all__ = ["Admission"]

TEXTS = {
    PsRefusal.NETWORK: "its address is not allowed",
    PsRefusal.PEER: "its address has max_sessions_per_peer sessions",
    PsRefusal.FULL: "there are max_sessions sessions",
    PsRefusal.CALLBACK: "on_accept has refused it",
    PsRefusal.PROXY: "its address is not in trusted_proxies",
}


class Admission:
    """The rules of one server, and how many connections each rule has refused."""

    def __init__(
        self,
        *,
        allowed_networks: object,
        denied_networks: object,
        max_sessions_per_peer: int | None,
        refuse_when_full: bool,
        farewell: object,
        proxy_protocol: bool,
        trusted_proxies: object,
    ) -> None:
        """Take the settings of `PsServer`.

        Numbers and flags are checked already; networks and the farewell are checked here.

        Raises:
            TypeError, ValueError: the networks or the farewell are not valid.
        """
        self._allowed = None
        if allowed_networks is not None:
            self._allowed = Networks("allowed_networks", allowed_networks)
        self._denied = Networks("denied_networks", denied_networks)
        self._most = max_sessions_per_peer
        self.refuse_when_full = refuse_when_full
        self._farewell = _check_farewell(farewell)
        self.proxy_protocol = proxy_protocol
        self._trusted = Networks("trusted_proxies", trusted_proxies)
        self._has_networks = self._allowed is not None or bool(self._denied)
        self._keys: dict[PsSession[Any], bytes] = {}
        """The sessions that count for a peer, each with the packed address of that peer."""
        self._counts: dict[bytes, int] = {}
        """How many sessions each peer has, by packed address."""
        self._farewells = Farewells()
        self._refused = dict.fromkeys(PsRefusal, 0)

    @property
    def refused(self) -> dict[PsRefusal, int]:
        """How many connections were refused, for each reason."""
        return dict(self._refused)

    @property
    def has_rules(self) -> bool:
        """Whether the hub has to ask this object about accepted connections, or to count them."""
        return (
            self.proxy_protocol
            or self._has_networks
            or self._most is not None
            or self.refuse_when_full
        )

    # In the hub

    def refuses(self, accepted: _socket.socket, address: object, manager: SessionManager) -> bool:
        """Whether the connection, just accepted, is refused. If so, it is closed, now or soon."""
        peer = endpoint(address)
        if self.proxy_protocol:
            proxy = peer_address(peer)
            is_known = proxy is None or proxy in self._trusted
            reason = None if is_known else PsRefusal.PROXY
        else:
            reason = self._why_not(peer)
        if reason is None and self.refuse_when_full and manager.pool.full():
            reason = PsRefusal.FULL
        if reason is None:
            return False
        if self._farewell and reason in (PsRefusal.PEER, PsRefusal.FULL):
            self._farewells.add(accepted, self._farewell, manager.thread)
        else:
            end(accepted)
        self._tell(manager.peer_log, manager.owner, reason, peer)
        return True

    def begin(self) -> None:
        """Forget the counts, as a new manager has no sessions.

        Sessions of the last manager whose hub was destroyed have ended without a call of `ended`.
        """
        self._keys.clear()
        self._counts.clear()

    def opened(self, session: PsSession[Any]) -> None:
        """Count a session that the manager has got.

        With the PROXY protocol the client is not known yet; `admits` counts the session later.
        """
        if not self.proxy_protocol:
            self._count(session)

    def ended(self, session: PsSession[Any]) -> None:
        """Stop counting a session that the manager no longer has."""
        key = self._keys.pop(session, None)
        if key is not None:
            left = self._counts.get(key, 1) - 1  # no count: `_count` ran out of memory
            if left:
                self._counts[key] = left
            else:
                self._counts.pop(key, None)

    def close(self) -> None:
        """Close the connections that still get a farewell: the server has stopped, or its hub."""
        self._farewells.close()

    def let_go(self, *, has_hub: bool) -> None:
        """Forget the counts in a child process, and leave the farewells to the parent."""
        self.begin()
        self._farewells.let_go(has_hub=has_hub)

    def _why_not(self, peer: Endpoint | None) -> PsRefusal | None:
        """The rule about addresses that refuses this client; ``None``: they admit it."""
        if not self._has_networks and self._most is None:
            return None
        address = peer_address(peer)
        if address is None:
            return None
        if self._has_networks:
            is_allowed = self._allowed is None or address in self._allowed
            if not is_allowed or address in self._denied:
                return PsRefusal.NETWORK
        if self._most is not None and self._counts.get(address, 0) >= self._most:
            return PsRefusal.PEER
        return None

    def _count(self, session: PsSession[Any]) -> None:
        if self._most is None:
            return
        key = peer_address(session.remote_endpoint)
        if key is not None:
            self._keys[session] = key
            self._counts[key] = self._counts.get(key, 0) + 1

    # In the greenlet of the session

    def admits(self, session: PsSession[Any]) -> bool:
        """Whether the session, which is open, is admitted. If not, its close is requested.

        May switch, as ``on_accept`` runs.
        """
        reason = None
        peer = session.remote_endpoint
        if self.proxy_protocol:
            reason = self._why_not(peer)
            if reason is None:
                self._count(session)
        if reason is None and not _is_accepted(session):
            reason = PsRefusal.CALLBACK
        if not session.is_open:  # closed meanwhile
            return False
        if reason is None:
            return True
        has_words = reason is PsRefusal.PEER and self._farewell != b""
        if has_words:
            inside.say(session, self._farewell)
        inside.request_close(session, PsCloseReason.SELF_CLOSE, linger=has_words)
        manager = inside.manager_of(session)
        context = inside.context_of(session)
        self._tell(manager.peer_log, manager.owner, reason, peer, context)
        return False

    def _tell(
        self,
        peer_log: PeerLog,
        owner: Owner,
        reason: PsRefusal,
        peer: Endpoint | None,
        context: Context | None = None,
    ) -> None:
        """Count a refusal, and log it."""
        self._refused[reason] += 1
        who = "a peer without a name" if peer is None else format_address(*peer[:2])
        why = TEXTS[reason]
        peer_log.tell(
            owner, f"refused: {why}", "%r: refused %s: %s", owner, who, why, context=context
        )


def _is_accepted(session: PsSession[Any]) -> bool:
    """Ask ``on_accept``, if there is one. An exception from it is logged and refuses the session.

    May switch.
    """
    ask = inside.manager_of(session).callbacks.on_accept
    if ask is None:
        return True
    try:
        return ask(session, session.remote_endpoint) is not False
    except BaseException as exc:
        if isinstance(exc, (KeyboardInterrupt, SystemExit)):
            inside.thread_of(session).raise_in_main(exc)
        if isinstance(exc, GreenletExit) and not session.is_open:
            inside.log(session, logging.WARNING, "%r: on_accept was ended", session, exc_info=exc)
        else:
            inside.log(
                session, logging.ERROR, "%r: on_accept failed: %r", session, exc, exc_info=exc
            )
        return False


def _check_farewell(farewell: object) -> bytes:
    """The setting ``farewell`` as bytes; empty for ``None``."""
    if farewell is None:
        return b""
    if not isinstance(farewell, (str, bytes)):
        raise TypeError(f"farewell must be text, bytes or None, not {farewell!r}")
    try:
        words = farewell.encode() if isinstance(farewell, str) else farewell
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"farewell must be text that UTF-8 can encode, not {farewell!r}: {exc}"
        ) from exc
    if not 1 <= len(words) <= LONGEST_FAREWELL:
        raise ValueError(f"farewell must have 1 to {LONGEST_FAREWELL} bytes, not {farewell!r}")
    return words
