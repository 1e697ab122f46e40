"""A callback that records what is called and then does what a test says, and sends that stall."""

from __future__ import annotations

from collections.abc import Callable

import gevent

from psofa_gevent import PsCloseReason, PsSendError, PsSession
from psofa_gevent.testing import RecordingCallback, eventually

__all__ = [
    "LONGER_THAN_A_WINDOW_PROBE",
    "STALLING",
    "ActingCallback",
    "sending",
    "wait_until_stalled",
]

STALLING = bytes(8_000_000)
"""More than the kernel's buffers take for a `stalled_peer`: sending it waits."""
LONGER_THAN_A_WINDOW_PROBE = 0.3
"""Seconds. Linux sends the first one after 200 ms; its answer may make room for some bytes more."""


class ActingCallback(RecordingCallback):
    """Records each call, then calls what the test gave for it, in the same greenlet."""

    def __init__(
        self,
        *,
        on_open: Callable[[PsSession], object] | None = None,
        on_message: Callable[[PsSession, bytes], object] | None = None,
        on_eof: Callable[[PsSession], object] | None = None,
        on_close: Callable[[PsSession, PsCloseReason], object] | None = None,
    ) -> None:
        super().__init__()
        self._on_open = on_open
        self._on_message = on_message
        self._on_eof = on_eof
        self._on_close = on_close

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        if self._on_open is not None:
            self._on_open(session)

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        if self._on_message is not None:
            self._on_message(session, message)

    def on_eof(self, session: PsSession) -> None:
        super().on_eof(session)
        if self._on_eof is not None:
            self._on_eof(session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        if self._on_close is not None:
            self._on_close(session, close_reason)

    def opened(self, number: int = 0) -> PsSession:
        """Wait for the session that was opened after `number` others, and return it."""
        session = self.wait_for("on_open", number + 1)[number].session
        assert session is not None
        return session

    def closed(self, session: PsSession) -> PsCloseReason:
        """Wait for the session's ``on_close``, and return its reason."""
        [event] = self.wait_for("on_close", session=session)
        assert isinstance(event.value, PsCloseReason)
        return event.value

    def names(self, session: PsSession) -> list[str]:
        """What was called for the session so far."""
        return [event.name for event in self.events if event.session is session]


def sending(
    session: PsSession, message: bytes = STALLING, timeout: float | None = None
) -> gevent.Greenlet[..., PsSendError | None]:
    """Send in a greenlet of its own, whose value is the `PsSendError` that came of it, or `None`.

    By default with a message and a timeout that make it wait for a `stalled_peer` for ever.
    """

    def send() -> PsSendError | None:
        try:
            session.send(message, timeout)
        except PsSendError as error:
            return error
        return None

    return gevent.spawn(send)


def wait_until_stalled(session: PsSession, for_seconds: float = 0.03) -> None:
    """Wait until the kernel takes no more of what is sent to the session's peer."""

    def takes_nothing_more() -> bool:
        before = session.bytes_sent
        gevent.sleep(for_seconds)
        return 0 < session.bytes_sent == before

    eventually(takes_nothing_more, timeout=20)
