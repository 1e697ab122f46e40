"""Straight-line style: one function that handles a session from its beginning to its end.

The function runs in the session's own greenlet, in the place of ``on_open``. It asks for the
messages (`PsSession.receive`, or a loop over the session) instead of being called with them. When
it returns, the session closes. The function may switch, as any callback may.

Settings, promises and close reasons are as with callbacks, but ``callback_timeout`` limits the time
between two messages, and ``on_message``, ``on_eof`` and ``on_idle`` are not called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from psofa_gevent.callback import PsCallback
from psofa_gevent.errors import PsCallbackError, PsClosedError
from psofa_gevent.messages import M
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["PsHandler"]

NOT_CALLED = ("on_open", "on_message", "on_eof", "on_idle")
"""The callbacks that the handler replaces."""


class PsHandler(PsCallback[M]):
    """A callback that consists of one function, which handles a session from beginning to end.

    Pass it the function, or use it as a decorator::

        @PsHandler
        def echo(session):
            for message in session:
                session.send(message)

        PsServer(echo).serve_forever()

    Or subclass it and override `handle`, and if you need them ``on_accept``, ``on_close``,
    ``on_start`` and ``on_stop``.

    The loop ends when no more messages will come: at the peer's FIN, and when the session closes
    for any other reason, which ``on_close`` gets. With ``allow_half_open`` the function may go on
    sending after the peer's FIN. An exception closes the session with FAILED, as in any callback.
    ``callback_timeout`` limits the time that the function itself takes between two messages.
    """

    def __init__(self, function: Callable[[PsSession[M]], object] | None = None) -> None:
        """Take the function that handles each session; by default the method `handle` does.

        Raises:
            PsCallbackError: `function` can't be called with a session, or is ``async`` or a
                generator; or there is neither a function nor an overridden `handle`, or both; or
                `handle` has one of these faults.
        """
        is_overridden = type(self).handle is not PsHandler.handle
        if function is None and not is_overridden:
            raise PsCallbackError("PsHandler needs a function, or a subclass that overrides handle")
        if function is not None and is_overridden:
            raise PsCallbackError(
                f"{type(self).__name__} overrides handle, so {function!r} would never be called"
            )
        self._function = function
        _check_function(self.handle if function is None else function)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in NOT_CALLED:
            for each in (name, f"{name}_async"):
                if getattr(cls, each) is not getattr(PsHandler, each):
                    raise PsCallbackError(
                        f"{cls.__name__}.{each} would never be called: a PsHandler receives the "
                        "messages itself"
                    )
        if cls.use_async_callback:
            raise PsCallbackError(
                f"{cls.__name__}: a PsHandler is not async: subclass PsCallback for "
                "use_async_callback = True"
            )

    def handle(self, session: PsSession[M]) -> None:
        """Handle a session; when this returns, the session closes."""
        assert self._function is not None
        self._function(session)

    def on_open(self, session: PsSession[M]) -> None:
        """Run the handler."""
        try:
            self.handle(session)
        except PsClosedError:
            if inside.may_receive(session):
                raise  # it came from another session
        session.close()


def _check_function(function: object) -> None:
    if not callable(function):
        raise PsCallbackError(f"the handler must be a function of a session, not {function!r}")
    kinds = (
        inspect.iscoroutinefunction,
        inspect.isasyncgenfunction,
        inspect.isgeneratorfunction,
    )
    called = getattr(function, "__call__", None)  # noqa: B004 - not a test
    if any(is_kind(each) for is_kind in kinds for each in (function, called)):
        raise PsCallbackError(
            f"the handler must be a plain function, not {function!r}, which is async or a generator"
        )
    try:
        inspect.signature(function).bind("session")
    except ValueError:
        pass  # it is not written in Python, and has no signature
    except TypeError as exc:
        raise PsCallbackError(
            f"the handler is called with (session), which {function!r} does not take: {exc}"
        ) from None
