"""The exceptions of the package.

All derive from `PsError`, so one ``except PsError`` catches whatever the library itself raises. A
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
    """Base of every exception that the library raises of its own."""


class PsCallbackError(PsError, TypeError):
    """A callback class is not usable: raised by the constructor that was given it."""


class PsServerError(PsError):
    """A server could not start, or was asked for what its state does not allow."""


class PsClientError(PsError):
    """A connection could not be made, or a client was asked for what its state does not allow."""


class PsMultiClientError(PsError):
    """The same as `PsClientError`, for a multi client."""


class PsSendError(PsError):
    """A message was not sent, or not all of it: the session is closed, broken or timed out."""


class PsClosedError(PsError):
    """No message will come any more: the peer has sent its FIN, or the session is closed."""


class PsFramingError(PsError, ValueError):
    """Bytes that are no message of a framing, or a message that a framing can't carry."""


class PsKeyTakenError(PsError, ValueError):
    """The key belongs to another session, which is open."""


class PsRequestError(PsError):
    """A request got no reply, or could not be made where it was."""


class PsRequestTimeoutError(PsRequestError, TimeoutError):
    """No reply came in time."""


class PsRequestClosedError(PsRequestError):
    """The session is closed, or was closed before the reply came."""


class PsTlsError(PsError):
    """A session could not go over to TLS."""


class SlowPeerError(TimeoutError):
    """``callback_timeout`` was over while the callback waited in a `send` to its peer.

    An ordinary `TimeoutError` for the callback; the log tells it as what a peer did.
    """


def cut_traceback(cause: BaseException | None) -> None:
    """Take the traceback from `cause` and from all that it came from.

    Their frames hold what keeps the cause, such as its session: a cycle that would keep all of it
    until the garbage collector runs. By then the failure is logged, and callbacks have seen it.
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
