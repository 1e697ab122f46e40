"""What a user writes: the callbacks of a server or a client.

One `PsCallback` object serves all sessions of its server or client, so what belongs to one session
is kept on the session (`PsSession.set_value`). Which greenlet runs what:

- ``on_accept``, ``on_open``, ``on_message``, ``on_eof``, ``on_idle``: the session's own greenlet,
  one at a time for a session, sessions side by side. They may block, in gevent's way, for as long
  as they like.
- ``on_close`` and ``on_stop``: the one close greenlet of the server or client. A slow one delays
  other ``on_close`` calls and nothing else.
- ``on_start``: the greenlet that called ``start``, ``connect`` or ``init_bundle``.

The callbacks of a session, ``on_accept`` and ``on_close`` included, run in one `contextvars`
context, which is that session's own: what one of them sets, the others see, and no other session
does. It begins as a copy of the context of whoever called ``start`` or ``connect``. ``on_start``
runs in the caller's itself, ``on_stop`` in a copy.

With ``use_async_callback = True`` the ``*_async`` twins are called instead, in the same order and
under the same rules, as tasks of the asyncio loop that runs on this thread's gevent hub.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import TYPE_CHECKING, Any, Generic

from psofa_gevent.errors import PsCallbackError
from psofa_gevent.messages import M
from psofa_gevent.net.sockopts import Endpoint

if TYPE_CHECKING:
    from psofa_gevent.enums import PsCloseReason
    from psofa_gevent.session.session import PsSession
    from psofa_gevent.typing import PsClient, PsMultiClient, PsServer

__all__ = ["PsCallback", "check_callback", "is_overridden"]

METHODS = {
    "on_accept": ("peer",),
    "on_open": ("session",),
    "on_message": ("session", "message"),
    "on_eof": ("session",),
    "on_idle": ("session",),
    "on_close": ("session", "close_reason"),
    "on_start": ("owner",),
    "on_stop": ("owner",),
}
"""The methods, and what they are called with, in this order."""
PREFIX = "on_"
"""What the names of methods begin with that the library calls, and no others."""
ELSEWHERE = {
    "on_connect": "on_open",
    "on_connected": "on_open",
    "on_data": "on_message",
    "on_disconnect": "on_close",
    "on_disconnected": "on_close",
    "on_error": "on_close",
    "on_receive": "on_message",
    "on_timeout": "on_idle",
}
"""What other libraries call them, where a comparison of letters would lead astray."""
METHOD_KINDS = (
    staticmethod,
    classmethod,
    functools.partialmethod,
    functools.singledispatchmethod,
)
"""What makes a method of a function, and can't be called itself."""


class PsCallback(Generic[M]):
    """Subclass this and override what you need; every method does nothing by default.

    Names that begin with ``on_`` are the library's: a method that has one and is none of these, in
    a base class or a mixin too, is taken for a slip of the pen and refused (`PsCallbackError`).
    Call your own ones otherwise. What is no method may have any name: a property, or a function
    that was given to the object and is kept as an attribute of it.

    An exception in ``on_open``, ``on_message``, ``on_eof`` or ``on_idle`` is logged and closes that
    session with `PsCloseReason.FAILED`; one in ``on_close`` or ``on_stop`` is logged; one in
    ``on_accept`` is logged, and refuses the connection. No other session notices.
    """

    use_async_callback: bool = False
    """True: the ``*_async`` methods are called, and the others are not."""

    def on_accept(self, peer: Endpoint | None) -> bool | None:
        """A server has accepted a connection, which is no session yet: ``False`` refuses it.

        Called before the TLS handshake. No other callback hears of one that is refused. It may
        wait, for a database, say: no other connection is held up. Clients never call it.

        Args:
            peer: who it is, as `PsSession.remote_endpoint` will tell; with ``proxy_protocol`` the
                load balancer's client. ``None`` for a Unix socket without a name.
        """

    def on_open(self, session: PsSession[M]) -> None:
        """A connection was accepted, or made. Runs once, before anything else of the session."""

    def on_message(self, session: PsSession[M], message: M) -> None:
        """Bytes arrived: as many as were there, at most ``read_buffer_size``.

        With a framing: a message arrived, of the type that the framing makes of it.

        The next read starts when this returns, so a slow callback slows its sender down, and no
        one else.
        """

    def on_eof(self, session: PsSession[M]) -> None:
        """The peer sent its FIN and nothing more will come; sending goes on.

        Only with ``allow_half_open``. The session stays open until it is closed, or until
        `PsSession.send_eof` shuts the other direction as well.
        """

    def on_idle(self, session: PsSession[M]) -> bool | None:
        """No bytes came for the session's idle time: override this to act instead of closing.

        When it returns ``False`` the session closes with TIMEOUT, as it does without this. Anything
        else, ``None`` included, lets it go on, and the idle time begins anew. Not called while a
        callback waits in `PsSession.receive`: there the session closes.
        """
        return False

    def on_close(self, session: PsSession[M], close_reason: PsCloseReason) -> None:
        """The session ended and its socket is released. Runs once, last of all."""

    def on_start(self, owner: PsServer[M] | PsClient[M] | PsMultiClient[M]) -> None:
        """Before the first accept or connect. An exception undoes the start and is raised there."""

    def on_stop(self, owner: PsServer[M] | PsClient[M] | PsMultiClient[M]) -> None:
        """After the last ``on_close``, before ``shutdown`` (``disconnect``, …) returns."""

    async def on_accept_async(self, peer: Endpoint | None) -> bool | None:
        """`on_accept` for ``use_async_callback``."""

    async def on_open_async(self, session: PsSession[M]) -> None:
        """`on_open` for ``use_async_callback``."""

    async def on_message_async(self, session: PsSession[M], message: M) -> None:
        """`on_message` for ``use_async_callback``."""

    async def on_eof_async(self, session: PsSession[M]) -> None:
        """`on_eof` for ``use_async_callback``."""

    async def on_idle_async(self, session: PsSession[M]) -> bool | None:
        """`on_idle` for ``use_async_callback``."""
        return False

    async def on_close_async(self, session: PsSession[M], close_reason: PsCloseReason) -> None:
        """`on_close` for ``use_async_callback``."""

    async def on_start_async(self, owner: PsServer[M] | PsClient[M] | PsMultiClient[M]) -> None:
        """`on_start` for ``use_async_callback``."""

    async def on_stop_async(self, owner: PsServer[M] | PsClient[M] | PsMultiClient[M]) -> None:
        """`on_stop` for ``use_async_callback``."""


def check_callback(callback: PsCallback[Any]) -> None:
    """Refuse a callback that could never work, before any connection is made.

    Raises:
        PsCallbackError: `callback` is not an instance of `PsCallback`, a sync method is written
            ``async def``, an ``*_async`` one is not, a name was overridden by something that cannot
            be called with its arguments, or in the kind that ``use_async_callback`` does not call;
            or a method is called ``on_…`` and is no callback.
    """
    if isinstance(callback, type):
        raise PsCallbackError(
            f"callback must be an instance, not the class {callback.__name__}: "
            f"pass {callback.__name__}()"
        )
    if not isinstance(callback, PsCallback):
        raise PsCallbackError(
            f"callback must be an instance of a PsCallback subclass, not {callback!r}"
        )
    if not isinstance(callback.use_async_callback, bool):
        raise PsCallbackError(
            f"{type(callback).__name__}.use_async_callback must be True or False, "
            f"not {callback.use_async_callback!r}"
        )
    _check_names(type(callback))
    for name, arguments in METHODS.items():
        _check_method(callback, name, arguments, is_async=False)
        _check_method(callback, f"{name}_async", arguments, is_async=True)
        _check_is_called(callback, name)


def _check_names(kind: type) -> None:
    """Refuse a method whose name looks like that of a callback, and is none."""
    known = {each for name in METHODS for each in (name, f"{name}_async")}
    for name in dir(kind):
        if not name.startswith(PREFIX) or name in known:
            continue
        # As it stands there: a property is not to be asked.
        value = inspect.getattr_static(kind, name)
        if callable(value) or isinstance(value, METHOD_KINDS):
            raise PsCallbackError(
                f"{kind.__name__}.{name} is not a callback, so it would never be called: did you "
                f"mean {_nearest(name)}? A method of your own needs a name that does not begin "
                f"with {PREFIX!r}"
            )


def _nearest(name: str) -> str:
    names = ELSEWHERE | {each: each for each in METHODS}
    meant = {f"{each}{end}": f"{names[each]}{end}" for each in names for end in ("", "_async")}
    (nearest,) = difflib.get_close_matches(name, sorted(meant), n=1, cutoff=0.0)
    return meant[nearest]


def _check_is_called(callback: PsCallback[Any], name: str) -> None:
    """Refuse a method that was overridden in the kind that is not called, and in that only."""
    called, other = f"{name}_async", name
    if not callback.use_async_callback:
        called, other = other, called
    if is_overridden(callback, other) and not is_overridden(callback, called):
        raise PsCallbackError(
            f"{type(callback).__name__}.{other} would never be called: with use_async_callback = "
            f"{callback.use_async_callback} that is {called}"
        )


def is_overridden(callback: PsCallback[Any], name: str) -> bool:
    """Whether `callback` has a method of its own under `name`."""
    method = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(PsCallback, name)


def _check_method(
    callback: PsCallback[Any], name: str, arguments: tuple[str, ...], *, is_async: bool
) -> None:
    method = getattr(callback, name)
    where = f"{type(callback).__name__}.{name}"
    if not callable(method):
        raise PsCallbackError(f"{where} must be a method, not {method!r}")
    written_async = any(
        inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        for function in (method, getattr(method, "__call__", None))  # noqa: B004 - not a test
    )
    if written_async and not is_async:
        raise PsCallbackError(
            f"{where} is written 'async def', but is a sync callback: override "
            f"{name}_async instead and set use_async_callback = True"
        )
    if is_async and not inspect.iscoroutinefunction(method):
        raise PsCallbackError(
            f"{where} must be written 'async def'; for a plain function override "
            f"{name.removesuffix('_async')} and leave use_async_callback False"
        )
    try:
        inspect.signature(method).bind(*arguments)
    except ValueError:
        pass  # not written in Python, and does not tell
    except TypeError as exc:
        raise PsCallbackError(
            f"{where} is called with ({', '.join(arguments)}), which it does not take: {exc}"
        ) from None
