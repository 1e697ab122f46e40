"""A session as its user sees it: `PsSession`, the public face of a connection.

Mostly contract: the work is done by the classes below it, each in a file of this package
(`psofa_gevent.session.connection` has the chain, the state and the rules), and by the parts that
these use. `PsSession.send`, `post` and `corked` are in `psofa_gevent.session.sending`, `receive` in
`psofa_gevent.session.receiving`.

What may switch: `start_tls`. All else returns without another greenlet in between.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec, overload

from psofa_gevent.checks import check_instance
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsClosedError
from psofa_gevent.framing import Framing, Raw
from psofa_gevent.hub.thread import get_ident
from psofa_gevent.hub.times import NEVER
from psofa_gevent.messages import M
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.sockopts import Endpoint
from psofa_gevent.proxy_protocol import PsProxyInfo
from psofa_gevent.session.framed import FramedReceiver
from psofa_gevent.session.life import SessionLife
from psofa_gevent.session.starttls import Handshake, begin_tls, begin_tls_async
from psofa_gevent.session.tasks import spawn_task
from psofa_gevent.settings import check_framing, check_idle
from psofa_gevent.tls.socket import PsTlsInfo

if TYPE_CHECKING:
    from gevent import Greenlet

    from psofa_gevent.typing import Owner

__all__ = ["PsSession"]

P = ParamSpec("P")


class PsSession(SessionLife[M]):
    """One connection. The library makes it and hands it to every callback; never construct one.

    `send`, `send_file`, `post`, `send_eof`, `close` and `abort` may be called from any greenlet and
    any OS thread, the other methods from any greenlet of the hub's thread.
    """

    __slots__ = ()

    # What a callback asks

    @property
    def connection_id(self) -> uuid.UUID:
        """The session's id: random, or what the client chose in ``connect``."""
        chosen = self._connection_id
        if isinstance(chosen, bytes):
            # Another thread that asks just now makes an equal one.
            chosen = self._connection_id = uuid.UUID(bytes=chosen)
        return chosen

    @property
    def owner(self) -> Owner:
        """The server or client that the session belongs to."""
        return self._manager.owner

    @property
    def local_endpoint(self) -> Endpoint | None:
        """This end: (host, port), or (host, port, flow info, scope id) on IPv6 sockets.

        Still known after the close. ``None`` for a socket without an address.
        """
        return self._local_endpoint

    @property
    def remote_endpoint(self) -> Endpoint | None:
        """The peer's end, in the form of `local_endpoint`; still known after the close.

        With ``proxy_protocol`` it is the client's, as the load balancer has told.
        """
        return self._remote_endpoint

    @property
    def proxy(self) -> PsProxyInfo | None:
        """What the load balancer's header says, with ``proxy_protocol``. Known after the close."""
        return self._proxy

    @property
    def is_open(self) -> bool:
        """Turns false in the moment in which a close is requested, by whomever."""
        return self._open

    @property
    def close_cause(self) -> BaseException | None:
        """The exception behind a `PsCloseReason.FAILED`; ``None`` for every other reason.

        It has its traceback until ``on_close`` has returned, not longer.
        """
        return self._close_cause

    @property
    def opened_at(self) -> datetime:
        """When the connection was accepted or made, in UTC."""
        return datetime.fromtimestamp(self._opened_at, UTC)

    @property
    def last_received_at(self) -> datetime | None:
        """When the session last read bytes, in UTC; ``None``: it has read none yet.

        Bytes of a message that is not whole count, a FIN, a TLS handshake and the header of a load
        balancer do not; nor do bytes that wait in the kernel while a callback runs. Of the sessions
        that have become readable at the same time all have the moment in which the first of them
        was read: it is early by what the callbacks of those before it took.
        """
        return datetime.fromtimestamp(self._received_at, UTC) if self._received_at else None

    @property
    def bytes_received(self) -> int:
        """Bytes handed to ``on_message``, the current message included.

        With a framing, what was read: with lengths and delimiters, and of messages not whole yet.
        """
        return self._bytes_received

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel took for sending."""
        return self._bytes_sent

    @property
    def messages_received(self) -> int:
        """Calls of ``on_message``, the current one included."""
        return self._messages_received

    def __repr__(self) -> str:
        state = "open" if self._open else self.close_reason.name
        return (
            f"<PsSession {self.connection_id} {_format(self._local_endpoint)} - "
            f"{_format(self._remote_endpoint)} {state}>"
        )

    @property
    def tls(self) -> PsTlsInfo | None:
        """What TLS says of the connection; ``None``: it is not encrypted. Known after the close."""
        return None if self._tls is None else self._tls.info

    # A user's values

    def set_value(self, name: str, value: object) -> None:
        """Keep `value`, of any type, with the session under `name`."""
        if self._values is None:
            self._values = {}
        self._values[check_instance("name", name, str)] = value

    @overload
    def get_value(self, name: str) -> Any: ...
    @overload
    def get_value(self, name: str, default: object) -> Any: ...
    def get_value(self, name: str, default: object = None) -> Any:
        """The value kept under `name`, or `default`."""
        return default if self._values is None else self._values.get(name, default)

    def clear_value(self, name: str) -> None:
        """Forget the value kept under `name`, if there is one."""
        if self._values is not None:
            self._values.pop(name, None)

    # Messages

    @property
    def framing(self) -> Framing[Any] | None:
        """What cuts the stream into messages; ``None``: nothing does."""
        return None if self._framed is None else self._framed.framing

    def set_framing(self, framing: Framing[Any] | None) -> None:
        """Go on with another framing, from the next byte on: for a handshake, or an upgrade.

        What was read already, and belongs to no message that was handed over, is the new framing's.
        `send` takes it at once. With ``Raw(size)`` the next `size` bytes come as they are, then the
        framing of before goes on; sending stays with that.

        To be called in a callback of this session.

        Args:
            framing: ``None``: bytes come and go as they are.

        Raises:
            TypeError: that is no framing.
            RuntimeError: the session waits for bytes, so this is no callback of it.
        """
        if self.waiting_since:
            raise RuntimeError(f"{self!r}: set_framing must be called in a callback of the session")
        if self._framed is None:
            check_framing("framing", framing)
            self._framed = FramedReceiver(Raw())
            self._framed.framing = None
        self._framed.set_framing(framing)
        self._encode = None if self.framing is None else self.framing.encode

    # What belongs to it

    def spawn(
        self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> Greenlet[..., Any]:
        """Run `function` beside the callbacks, as work of this session, which ends with it.

        When the session's callbacks are through it is killed (`gevent.GreenletExit` where it waits,
        which cancels a coroutine), again each second until it has ended, and then ``on_close``
        comes. What it raises is logged and closes the session with FAILED, as in a
        callback. ``callback_timeout`` does not count it. It runs in the session's own context: what
        it sets there, the callbacks see. A context of its own is
        ``session.spawn(contextvars.copy_context().run, function)``.

        In the hub's thread, in any greenlet or coroutine. Returns at once.

        Args:
            function: a function, or a coroutine function, which runs on the hub's asyncio loop.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            The greenlet, for ``join``, ``kill`` and ``get``, which gives what `function` returned,
            or ``None`` if it raised.

        Raises:
            PsClosedError: the session is closed.
            RuntimeError: called in another thread.
            TypeError: `function` can't be called.
        """
        if not callable(function):
            raise TypeError(f"function must be a function, not {function!r}")
        if get_ident() != self._thread_ident:
            raise RuntimeError(f"{self!r}: spawn belongs to the thread of the session's hub")
        if not self._open:
            raise PsClosedError(f"{self!r}: the session is closed: it cannot spawn")
        return spawn_task(self, partial(function, *args, **kwargs))

    # TLS

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout: float | None = 10.0,
    ) -> None:
        """Go over to TLS in the middle of the session (STARTTLS), and return when it is encrypted.

        What was sent before leaves unencrypted, what comes afterwards is encrypted. Bytes that were
        read already and belong to no message that was handed over came before the handshake: an
        attacker may have put them there (CVE-2011-0411), so they are refused.

        In a sync callback of this session, or a `PsHandler`; in async callbacks `start_tls_async`.
        What others send meanwhile is sent encrypted, after the handshake; if that is not completed
        nothing more is sent, also not of what was posted. A handshake that is broken off (by a
        ``gevent.Timeout``, say) closes the session with FAILED, as a part of it may have left.

        Args:
            ssl_context: for a server one with a certificate, for a client one that verifies it.
            server_side: whether this end is the server.
            server_hostname: at the client, the name that the certificate must be for.
            timeout: seconds for the handshake; ``None``: any time.

        Raises:
            PsTlsError: the handshake failed, or was not complete in time; or there were bytes
                before it. The session closes with FAILED.
            PsSendError: what was sent before could not leave.
            RuntimeError: called elsewhere, or the session has TLS already.
            TypeError, ValueError: an argument is not what it should be.
        """
        begin_tls(self, Handshake.of(ssl_context, server_side, server_hostname, timeout))

    async def start_tls_async(
        self,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout: float | None = 10.0,
    ) -> None:
        """`start_tls` for async callbacks: waits without holding up the loop.

        Arguments and errors as for `start_tls`. To be awaited in an async callback of this session
        itself: not in another task that the callback makes. Cancelling it breaks the handshake off.
        """
        handshake = Handshake.of(ssl_context, server_side, server_hostname, timeout)
        await begin_tls_async(self, handshake)

    # Idle time

    def change_idle_milliseconds(self, idle_milliseconds: int | None) -> None:
        """Change after how long a wait for bytes the session closes, and restart that clock.

        Args:
            idle_milliseconds: milliseconds, 1 or more; ``None``: never.

        Raises:
            TypeError: not a whole number.
            ValueError: less than 1.
        """
        check_idle("idle_milliseconds", idle_milliseconds)
        self._idle = NEVER if idle_milliseconds is None else idle_milliseconds / 1_000
        self._waited = (0.0, 0)
        if self.waiting_since:
            self.waiting_since = monotonic()
        if self._slice is not None:
            self._slice.due = 0.0  # it may be shorter than what was before

    # Closing

    def close(self) -> None:
        """Ask for the close (`PsCloseReason.SELF_CLOSE`) and return at once.

        What was sent before still reaches the peer. A callback that runs is not interrupted; the
        session ends when it returns. From any greenlet and any OS thread; again without effect.
        """
        self._ask_to_close(PsCloseReason.SELF_CLOSE)

    def abort(self) -> None:
        """Reset the connection (RST) at once: nothing is drained, also while a close lingers.

        The session ends in its own greenlet with `PsCloseReason.SELF_CLOSE`, unless it was closed
        for another reason before. From any greenlet and any OS thread.
        """
        if get_ident() != self._thread_ident:
            self._abort_asked = True
            self._note_asked(PsCloseReason.SELF_CLOSE)
            self._manager.thread.call_soon(self._abort)
        else:
            self._abort()


def _format(address: Endpoint | None) -> str:
    if address is None:
        return "?"
    return format_address(*address[:2])
