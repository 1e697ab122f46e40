"""The receiving half of a session with a framing: chunks in, whole messages out to ``on_message``.

It exists for sessions that have, or had, a framing; the others hand their chunks over as they come.
All of it runs in the session's own greenlet, but for `FramedReceiver.set_framing`, which a callback
of the session calls. What may switch is ``on_message``, and the log handler of a malformed message.

Error handling: bytes that are no message close the session with FAILED, after the messages before
them were handed over and without a traceback, since it is the peer's fault. An exception of
``on_message`` is left to the session.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.framing import Decoder, Framing, Raw
from psofa_gevent.settings import check_framing

if TYPE_CHECKING:
    from psofa_gevent.session import PsSession

__all__ = ["NEVER", "FramedReceiver"]

logger = logging.getLogger("psofa_gevent")

NEVER = float("inf")


class FramedReceiver:
    """Cuts what a session receives into messages."""

    __slots__ = ("_decoder", "_session", "framing")

    def __init__(self, session: PsSession[Any], framing: Framing[Any]) -> None:
        self._session = session
        self.framing: Framing[Any] | None = framing
        """What messages are sent with; received, too, unless that is `Raw` for so many bytes."""
        self._decoder: Decoder[Any] = framing.decoder()

    def set_framing(self, framing: Framing[Any] | None) -> None:
        """From the next byte on: bytes that were read already, but not handed over, included."""
        check_framing("framing", framing)
        self._decoder = _decoder(framing)
        if not (isinstance(framing, Raw) and framing.size is not None):
            self.framing = framing

    def receive(self, data: bytes) -> None:
        """Hand over the messages that are whole with `data`."""
        session = self._session
        given_out = session._messages_received
        try:
            while data and session._open:
                decoder = self._decoder
                if self._hand_over(decoder, data):
                    break
                data = decoder.unread()
                if self._decoder is decoder:  # spent
                    self._decoder = _decoder(self.framing)
        except _MalformedError as exc:
            self._fail(exc.cause)
            return
        except BaseException:
            session._uncork_without_waiting()
            raise
        finally:
            session._uncork()
        if session._host.settings.frame_timeout is not None:
            self._set_deadline(session._host.settings.frame_timeout, given_out)

    def _hand_over(self, decoder: Decoder[Any], data: bytes) -> bool:
        """Whether all of `data` was taken: not so if the framing changed in between."""
        session = self._session
        on_message = session._host.dispatch.on_message
        in_callback = False
        try:
            for message in decoder.feed(data):
                in_callback = True
                if session._cork is None:  # it has just begun, or a callback waited
                    session._cork = []
                session._messages_received += 1
                on_message(session, message)
                in_callback = False
                if not session._open:
                    return True
                if self._decoder is not decoder:
                    return False
        except Exception as exc:
            if in_callback:
                raise
            raise _MalformedError(exc) from None
        return not decoder.spent

    def _fail(self, cause: Exception) -> None:
        session = self._session
        session._request_close(PsCloseReason.FAILED, cause)
        logger.warning("%r: not a message: %s", session, cause)

    def _set_deadline(self, timeout: float, given_out: int) -> None:
        """A message that has begun must be whole in time, however its bytes trickle in."""
        session = self._session
        if not self._decoder.kept:
            session._frame_deadline = NEVER
        elif session._frame_deadline == NEVER or session._messages_received != given_out:
            # Only now, after the callbacks: they took their own time, and not the peer's.
            session._frame_deadline = monotonic() + timeout
            if session._slice is not None:
                session._slice.due = min(session._slice.due, session._frame_deadline)
        elif monotonic() >= session._frame_deadline:
            self.time_out()

    def time_out(self) -> None:
        """The message that has begun did not come in time."""
        timeout = self._session._host.settings.frame_timeout
        self._fail(
            TimeoutError(f"{self._decoder.kept} bytes of a message in frame_timeout={timeout:g} s")
        )

    def end(self) -> None:
        """The peer sends no more."""
        if kept := self._decoder.kept:
            session = self._session
            logger.info("%r: the peer closed after %d bytes of a message", session, kept)


def _decoder(framing: Framing[Any] | None) -> Decoder[Any]:
    return (Raw() if framing is None else framing).decoder()


class _MalformedError(Exception):
    """Carries what a decoder raised past what callbacks raise."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause
