"""The common base of the two clients: they connect, and may stay connected.

`ConnectingOwner` makes one `Connector` for each attempt, and one `Link` for each connection that is
made again and again. It keeps the connectors and links at work, so that a shutdown can end them.

`_connect` and the functions that it calls run in the greenlet that called ``connect``, or in that
of a link, and switch. `_start` may switch, as it runs ``on_start``. Nothing else here switches. All
of it belongs to the hub's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from psofa_gevent.callback import PsCallback
from psofa_gevent.connecting.connector import Connector
from psofa_gevent.connecting.link import Link
from psofa_gevent.connecting.reconnect import PsReconnect, check_reconnect
from psofa_gevent.connecting.settings import ConnectingSettings
from psofa_gevent.connecting.target import Target, check_context
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.errors import PsError
from psofa_gevent.hub.forking import keep
from psofa_gevent.messages import M
from psofa_gevent.net.addresses import Address
from psofa_gevent.net.sockopts import end
from psofa_gevent.owner.base import SessionOwner
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.session.session import PsSession

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.typing import Owner

__all__ = ["ConnectingOwner"]


class ConnectingOwner(SessionOwner[M]):
    """The base of `PsClient` and `PsMultiClient`."""

    def __init__(
        self,
        callback: PsCallback[M],
        settings: ConnectingSettings,
        error: type[PsError],
    ) -> None:
        super().__init__(callback, settings)
        self._error = error
        self._ssl_context = check_context(settings.ssl_context)
        self._reconnect = check_reconnect(settings.reconnect)
        self._connectors: set[Connector] = set()
        self._links: set[Link] = set()

    def _target(
        self,
        host: str,
        port: int,
        family: PsSocketAddressFamily,
        *,
        endpoints: Sequence[tuple[str, int]],
        source_address: tuple[str, int] | None,
        server_hostname: str | None,
    ) -> Target:
        """The target that the arguments ask for, with this client's TLS (`Target.checked`)."""
        return Target.checked(
            host,
            port,
            family,
            endpoints=endpoints,
            source_address=source_address,
            server_hostname=server_hostname,
            ssl_context=self._ssl_context,
        )

    def _start(self) -> SessionManager:
        """Make a manager, and run ``on_start``, whose exception undoes the start. May switch."""
        manager = self._manager = self._new_manager()
        with self._starting(manager):
            manager.callbacks.on_start(cast("Owner", self))
            manager.has_started = True
        return manager

    def _connect(
        self,
        manager: SessionManager,
        target: Target,
        timeout: float | None,
        each: float | None = None,
    ) -> PsSession[Any]:
        """Connect to the first endpoint that answers. Switches.

        Args:
            manager: gets the session.
            target: the endpoints, tried in turn.
            timeout: seconds for all endpoints, of which each gets a share; ``None``: no limit.
            each: without a `timeout`, seconds for each endpoint; ``None``: no limit.
        """
        self._check_thread(manager)
        began = monotonic()
        errors: list[PsError] = []
        try:
            with manager.starting():
                for untried in range(len(target.endpoints), 0, -1):
                    share, limit = each, f"after {each:g} s" if each is not None else ""
                    if timeout is not None:
                        share = max(timeout - monotonic() + began, 0.0) / untried
                        is_alone = len(target.endpoints) == 1
                        limit = f"after {'' if is_alone else 'its share of '}{timeout:g} s"
                    try:
                        endpoint = target.endpoints[-untried]
                        return self._connect_to(manager, target, endpoint, share, limit)
                    except self._error as exc:
                        errors.append(exc)
                        if not self._is_still_wanted(manager):
                            raise
            if len(errors) == 1:
                raise errors[0]
            raise self._error("; ".join(str(error) for error in errors)) from errors[-1]
        finally:
            # The errors and the frames of this function and its callers would keep each other
            # alive, and with them the session of a later endpoint.
            errors.clear()

    def _check_thread(self, manager: SessionManager) -> None:
        if not manager.thread.is_current():
            raise self._error(f"{self!r}: connect belongs to the thread in which it was started")

    def _connect_to(
        self,
        manager: SessionManager,
        target: Target,
        endpoint: Address,
        timeout: float | None,
        limit: str,
    ) -> PsSession[Any]:
        connector = Connector(endpoint, target.source_address, self._settings, self._error)
        if self._ssl_context is not None:
            connector.use_tls(self._ssl_context, target.server_hostname or endpoint.host)
        self._connectors.add(connector)
        where = str(endpoint)
        try:
            self._check_still_wanted(manager, where)
            sock, address = connector.connect(timeout, limit)
        finally:
            self._connectors.discard(connector)
        try:
            self._check_still_wanted(manager, where)
            return manager.open(sock, address, target.connection_id)
        except BaseException as exc:
            end(sock)
            if isinstance(exc, OSError):
                raise self._error(f"cannot connect to {where}: {exc.strerror or exc}") from exc
            raise

    def _new_link(self, manager: SessionManager, target: Target, policy: PsReconnect) -> Link:
        """A link that stays connected to `target`, and has begun to connect."""
        self._check_thread(manager)
        self._check_still_wanted(manager, str(target))

        def connect(timeout: float | None) -> PsSession[Any]:
            return self._connect(manager, target, None, timeout)

        link = Link(manager, policy, self._error, str(target), connect, self._link_ended)
        self._links.add(link)
        link.start()
        return link

    def _link_ended(self, link: Link) -> None:
        """Forget a link that connects no more. Does not switch."""
        self._links.discard(link)

    def _is_still_wanted(self, manager: SessionManager) -> bool:
        return self._manager is manager and manager.shutdown is None

    def _check_still_wanted(self, manager: SessionManager, where: str) -> None:
        if not self._is_still_wanted(manager):
            raise self._error(f"cannot connect to {where}: disconnected meanwhile")

    def _let_go(self, hub: Hub | None) -> None:
        super()._let_go(hub)
        for connector in self._connectors:
            connector.let_go(has_hub=hub is connector.hub)
        keep(*self._connectors, *self._links)
        self._connectors.clear()
        for link in list(self._links):
            link.let_go()
            self._link_ended(link)

    def _stop_admitting(self) -> None:
        for link in list(self._links):
            link.stop()
        for connector in list(self._connectors):
            connector.abort()

    def _close_listeners_or_attempts(self) -> None:
        self._stop_admitting()

    def _stopped(self) -> None:
        super()._stopped()
        for link in list(self._links):  # the hub was destroyed, and their greenlets with it
            link.has_ended = True
            self._link_ended(link)
