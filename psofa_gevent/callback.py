"""The callbacks of a server or a client, which the user writes.

One `PsCallback` object serves all sessions of its server or client. So a callback keeps the data of
one session on that session (`PsSession.set_value`). These greenlets run the callbacks:

- ``on_accept``, ``on_open``, ``on_message``, ``on_eof``, ``on_idle``: the session's own greenlet.
  The callbacks of one session run one at a time, those of different sessions side by side. They may
  block, if they do so cooperatively, for as long as they like.
- ``on_close`` and ``on_stop``: the one close greenlet of the server or client. A slow one delays
  other ``on_close`` calls and nothing else.
- ``on_start``: the greenlet that called ``start``, ``connect`` or ``init_bundle``.

The callbacks of a session, ``on_accept`` and ``on_close`` included, run in one `contextvars`
context of that session: the other callbacks of the session see what one of them sets, and no other
session does. The context begins as a copy of the context of the greenlet that called ``start`` or
``connect``. ``on_start`` runs in the caller's context itself, ``on_stop`` in a copy of it.

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
"""The methods of a callback, and the arguments of each, in order."""
PREFIX = "on_"
"""The beginning of the names of callbacks. Other methods must not have it."""
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
"""Names that other libraries use, where a comparison of letters would find the wrong callback."""
METHOD_KINDS = (
    staticmethod,
    classmethod,
    functools.partialmethod,
    functools.singledispatchmethod,
)
"""Types that make a method of a function, and whose objects may not be callable themselves."""


class PsCallback(Generic[M]):
    """Subclass this and override what you need; every method does nothing by default.

    Names that begin with ``on_`` are reserved for the library: a method with such a name that is
    not a callback, even in a base class or a mixin, is taken for a misspelled callback and refused
    (`PsCallbackError`). Give your own methods other names. Only methods are checked: a property may
    have any name, and so may a function that is kept as an attribute of the object.

    An exception in ``on_open``, ``on_message``, ``on_eof`` or ``on_idle`` is logged and closes that
    session with `PsCloseReason.FAILED`; one in ``on_close`` or ``on_stop`` is logged; one in
    ``on_accept`` is logged, and refuses the connection. No other session notices.
    """

    use_async_callback: bool = False
    """True: the ``*_async`` methods are called, and not the others."""

    def on_accept(self, peer: Endpoint | None) -> bool | None:
        """A server has accepted a connection, which is not yet a session: ``False`` refuses it.

        Called before the TLS handshake. No other callback is called for a connection that is
        refused. It may wait, for a database, say: that holds up no other connection. Clients never
        call it.

        Args:
            peer: the peer's endpoint, as in `PsSession.remote_endpoint`; with ``proxy_protocol``
                that of the load balancer's client. ``None`` for a Unix socket without a name.
        """

    def on_open(self, session: PsSession[M]) -> None:
        """A connection was accepted, or made.

        Runs once, before all other callbacks of the session except ``on_accept``.
        """

    def on_message(self, session: PsSession[M], message: M) -> None:
        """Bytes arrived: as many as were there, at most ``read_buffer_size``.

        With a framing: a message arrived, of the type that the framing decodes.

        The next read starts when this returns, so a slow callback slows down the peer that sends,
        and no other session.
        """

    def on_eof(self, session: PsSession[M]) -> None:
        """The peer has sent its FIN, so nothing more will come; the session may still send.

        Only with ``allow_half_open``. The session stays open until it is closed, or until
        `PsSession.send_eof` shuts the other direction as well.
        """

    def on_idle(self, session: PsSession[M]) -> bool | None:
        """No bytes came for the session's idle time: override this to act instead of closing.

        When it returns ``False`` the session closes with TIMEOUT, as it does when this is not
        overridden. Anything else, ``None`` included, lets the session go on, and the idle time
        begins anew. Not called while a callback waits in `PsSession.receive`: there the session
        closes.
        """
        return False

    def on_close(self, session: PsSession[M], close_reason: PsCloseReason) -> None:
        """The session has ended and its socket is released. Runs once, as its last callback."""

    def on_start(self, owner: PsServer[M] | PsClient[M] | PsMultiClient[M]) -> None:
        """The owner starts: called before the first accept or connect.

        An exception undoes the start, and is raised to its caller.
        """

    def on_stop(self, owner: PsServer[M] | PsClient[M] | PsMultiClient[M]) -> None:
        """The owner stops: called after the last ``on_close``.

        Runs before ``shutdown`` (``disconnect``, ``destroy_bundle``) returns, where that waits.
        """

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
        PsCallbackError: `callback` is not an instance of `PsCallback`; a sync method is written
            ``async def``, or an ``*_async`` method is not; a method was overridden by something
            that cannot be called with its arguments; only that one of the sync and the async method
            was overridden that ``use_async_callback`` does not call; or a method has a name that
            begins with ``on_`` and is not a callback.
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
    """Refuse a method whose name looks like that of a callback, and is not one."""
    known = {each for name in METHODS for each in (name, f"{name}_async")}
    for name in dir(kind):
        if not name.startswith(PREFIX) or name in known:
            continue
        # The attribute as the class has it: a property must not be computed.
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
    """Refuse a callback of which only the method that is not called (sync, async) is overridden."""
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
        pass  # it is not written in Python, and has no signature
    except TypeError as exc:
        raise PsCallbackError(
            f"{where} is called with ({', '.join(arguments)}), which it does not take: {exc}"
        ) from None
