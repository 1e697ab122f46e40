"""The exceptions of the package.

All derive from `PsError`, so one ``except PsError`` catches all errors of the library's own. A
setting of the wrong type raises `TypeError` and one out of range `ValueError`, as everywhere in
Python: those are not wrapped.
"""

from __future__ import annotations

__all__ = [
    "PsCallbackError",
    "PsClientError",
    "PsClosedError",
    "PsError",
    "PsFramingError",
    "PsKeyTakenError",
    "PsMultiClientError",
    "PsRequestClosedError",
    "PsRequestError",
    "PsRequestTimeoutError",
    "PsSendError",
    "PsServerError",
    "PsTlsError",
]


class PsError(Exception):
    """Base of the library's own exceptions."""


class PsCallbackError(PsError, TypeError):
    """A callback is not usable: raised by the constructor that gets it."""


class PsServerError(PsError):
    """A server could not start, or its state does not allow the call."""


class PsClientError(PsError):
    """A connection could not be made, or the client's state does not allow the call."""


class PsMultiClientError(PsError):
    """The same as `PsClientError`, for a multi client."""


class PsSendError(PsError):
    """A message was not sent, or not all of it: the session is closed, broken or timed out."""


class PsClosedError(PsError):
    """No more messages will come: the peer has sent its FIN, or the session is closed."""


class PsFramingError(PsError, ValueError):
    """Bytes are not a message of the framing, or the framing can't carry a message."""


class PsKeyTakenError(PsError, ValueError):
    """The key belongs to another open session."""


class PsRequestError(PsError):
    """A request got no reply, or its caller may not wait for a reply."""


class PsRequestTimeoutError(PsRequestError, TimeoutError):
    """No reply came in time."""


class PsRequestClosedError(PsRequestError):
    """The session is closed, or was closed before the reply came."""


class PsTlsError(PsError):
    """A session could not start TLS."""


class SlowPeerError(TimeoutError):
    """``callback_timeout`` was over while the callback waited in a `send` to its peer.

    An ordinary `TimeoutError` for the callback; the log reports it as the peer's doing.
    """


def cut_traceback(cause: BaseException | None) -> None:
    """Remove the tracebacks of `cause` and of the exceptions behind it.

    Their frames hold objects that hold the cause, such as its session: a cycle that would keep all
    of them until the garbage collector runs. Call it when the failure is logged, and callbacks have
    seen it.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [cause]
    while left:
        exc = left.pop()
        if exc is None or id(exc) in seen:
            continue
        seen.add(id(exc))
        exc.__traceback__ = None
        left += [exc.__cause__, exc.__context__]
        if isinstance(exc, BaseExceptionGroup):
            left += exc.exceptions
