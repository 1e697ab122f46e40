"""A session as its user sees it: `PsSession`, the public face of a connection.

This file mostly documents public methods. Its base classes, each in a file of this package, and the
parts that they use do the work (`psofa_gevent.session.connection` lists the classes, the state and
the rules). `PsSession.send`, `post` and `corked` are in `psofa_gevent.session.sending`, `receive`
is in `psofa_gevent.session.receiving`.

What may switch in this file: `start_tls`. While any other function runs no other greenlet runs.
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
    """One connection. The library makes sessions and hands them to callbacks; never construct one.

    `send`, `send_file`, `post`, `send_eof`, `close` and `abort` may be called from any greenlet and
    any OS thread; the other methods from any greenlet of the hub's thread.
    """

    __slots__ = ()

    # Information about the session

    @property
    def connection_id(self) -> uuid.UUID:
        """The session's id: random, or what the client chose in ``connect``."""
        chosen = self._connection_id
        if isinstance(chosen, bytes):
            # Another thread that reads the id at the same time makes an equal one.
            chosen = self._connection_id = uuid.UUID(bytes=chosen)
        return chosen

    @property
    def owner(self) -> Owner:
        """The server or client that the session belongs to."""
        return self._manager.owner

    @property
    def local_endpoint(self) -> Endpoint | None:
        """The local end: (host, port), or (host, port, flow info, scope id) on IPv6 sockets.

        Still known after the close. ``None`` for a socket without an address.
        """
        return self._local_endpoint

    @property
    def remote_endpoint(self) -> Endpoint | None:
        """The peer's end, in the form of `local_endpoint`; still known after the close.

        With ``proxy_protocol``, the client's endpoint from the load balancer's header.
        """
        return self._remote_endpoint

    @property
    def proxy(self) -> PsProxyInfo | None:
        """The load balancer's header, with ``proxy_protocol``. Still known after the close."""
        return self._proxy

    @property
    def is_open(self) -> bool:
        """Whether the session is open: false from the moment in which any code requests a close."""
        return self._open

    @property
    def close_cause(self) -> BaseException | None:
        """The exception behind a `PsCloseReason.FAILED`; ``None`` for every other reason.

        It keeps its traceback only until ``on_close`` has returned.
        """
        return self._close_cause

    @property
    def opened_at(self) -> datetime:
        """When the connection was accepted or made, in UTC."""
        return datetime.fromtimestamp(self._opened_at, UTC)

    @property
    def last_received_at(self) -> datetime | None:
        """When the session last read bytes, in UTC; ``None``: it has not read any bytes yet.

        Bytes of an unfinished message count. A FIN, a TLS handshake, a load balancer's header, and
        bytes that wait in the kernel while a callback runs do not count. Sessions that become
        readable at the same time all get the time at which the first of them was read: for a later
        one it is too early by the time that the callbacks of the sessions before it took.
        """
        return datetime.fromtimestamp(self._received_at, UTC) if self._received_at else None

    @property
    def bytes_received(self) -> int:
        """Bytes handed to ``on_message`` or returned by `receive`, including the current message.

        With a framing: all bytes read, including lengths, delimiters and unfinished messages.
        """
        return self._bytes_received

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel took for sending."""
        return self._bytes_sent

    @property
    def messages_received(self) -> int:
        """Messages handed to ``on_message`` or returned by `receive`, including the current one."""
        return self._messages_received

    def __repr__(self) -> str:
        state = "open" if self._open else self.close_reason.name
        return (
            f"<PsSession {self.connection_id} {_format(self._local_endpoint)} - "
            f"{_format(self._remote_endpoint)} {state}>"
        )

    @property
    def tls(self) -> PsTlsInfo | None:
        """What TLS knows about the connection; ``None``: it has no TLS. Known after the close."""
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
        """The framing that cuts the stream into messages; ``None``: the session has none."""
        return None if self._framed is None else self._framed.framing

    def set_framing(self, framing: Framing[Any] | None) -> None:
        """Use another framing from the next byte on: for a handshake, or an upgrade.

        The new framing also gets bytes that were read but not handed over in a message. `send` uses
        it at once. With ``Raw(size)``, the next `size` bytes are received unchanged, and then the
        previous framing is used again; `send` uses the previous framing all the time.

        Must be called in a callback of this session.

        Args:
            framing: the new framing; ``None``: bytes are sent and received unchanged.

        Raises:
            TypeError: `framing` is not a framing.
            RuntimeError: the session waits for bytes, so the caller is not a callback of it.
        """
        if self.waiting_since:
            raise RuntimeError(f"{self!r}: set_framing must be called in a callback of the session")
        if self._framed is None:
            check_framing("framing", framing)
            self._framed = FramedReceiver(Raw())
            self._framed.framing = None
        self._framed.set_framing(framing)
        self._encode = None if self.framing is None else self.framing.encode

    # Session tasks

    def spawn(
        self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> Greenlet[..., Any]:
        """Run `function` in a session task, a greenlet beside the callbacks.

        The task ends with the session. When the session's callbacks have ended, the task is killed
        (`gevent.GreenletExit` where it waits, which cancels a coroutine), again each second until
        it has ended; then ``on_close`` is called. An exception of `function` is logged and closes
        the session with FAILED, as in a callback. ``callback_timeout`` does not count the task. It
        runs in the session's context, so the callbacks see the context variables that it sets. To
        give it a separate context, use
        ``session.spawn(contextvars.copy_context().run, function)``.

        In the hub's thread, in any greenlet or coroutine. Returns at once.

        Args:
            function: a function, or a coroutine function, which runs on the hub's asyncio loop.
            *args: the function's arguments.
            **kwargs: the function's keyword arguments.

        Returns:
            The greenlet, with ``join``, ``kill`` and ``get``. ``get`` returns the result of
            `function`, or ``None`` if it raised.

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
        """Begin TLS in the middle of the session (STARTTLS), and return when it is encrypted.

        Messages sent before the call leave unencrypted, later ones encrypted. Bytes that were read
        but not handed over in a message came before the handshake. An attacker may have inserted
        them (CVE-2011-0411), so they are refused.

        Call it in a sync callback of this session, or in a `PsHandler`; in async callbacks use
        `start_tls_async`. Messages that others send meanwhile leave encrypted, after the handshake.
        If the handshake is not completed, nothing more is sent, not even posts. A handshake that is
        interrupted (by a ``gevent.Timeout``, for example) closes the session with FAILED, because a
        part of it may have left.

        Args:
            ssl_context: for a server, a context with a certificate; for a client, one that verifies
                certificates.
            server_side: whether this end is the server.
            server_hostname: for a client, the name that the certificate must be valid for.
            timeout: seconds for the handshake; ``None``: no limit.

        Raises:
            PsTlsError: the handshake failed, or was not complete in time; or bytes came before it.
                The session closes with FAILED.
            PsSendError: messages sent before the call could not leave.
            RuntimeError: not called in a sync callback of the session, or it has TLS already.
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range or does not fit the others.
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
        """`start_tls` for async callbacks: waits without blocking the asyncio loop.

        Arguments and errors as for `start_tls`. Must be awaited in an async callback of this
        session, and not in another task that the callback makes. Cancelling it interrupts the
        handshake.
        """
        handshake = Handshake.of(ssl_context, server_side, server_hostname, timeout)
        await begin_tls_async(self, handshake)

    # Idle time

    def change_idle_milliseconds(self, idle_milliseconds: int | None) -> None:
        """Change the session's idle time, and restart its clock.

        Args:
            idle_milliseconds: milliseconds, 1 or more; ``None``: no limit.

        Raises:
            TypeError: `idle_milliseconds` is not an int or None.
            ValueError: `idle_milliseconds` is less than 1.
        """
        check_idle("idle_milliseconds", idle_milliseconds)
        self._idle = NEVER if idle_milliseconds is None else idle_milliseconds / 1_000
        self._waited = (0.0, 0)
        if self.waiting_since:
            self.waiting_since = monotonic()
        if self._slice is not None:
            self._slice.due = 0.0  # the new idle time may be shorter than the old one

    # Closing

    def close(self) -> None:
        """Request the close (`PsCloseReason.SELF_CLOSE`), and return at once.

        Messages sent before still reach the peer. A running callback is not interrupted; the
        session ends when it returns. From any greenlet and any OS thread. A second call has no
        effect.
        """
        self._ask_to_close(PsCloseReason.SELF_CLOSE)

    def abort(self) -> None:
        """Reset the connection (RST) at once, without lingering; also ends a linger.

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
