"""What a session took for sending, and nobody waits for: posts, and messages that were collected.

It stands in the session's line of senders (`psofa_gevent.send_line`) like anyone else, in batches:
a batch ends where another sender lined up, so bytes leave in the order in which they were sent and
posted. The hub sends a batch on whenever the peer takes more. What waits is limited by
``high_water``, and the session's `PsOverflow` says what happens to a post beyond that. Messages
that were collected (`PsSession.corked`) are always kept: they are few, and were sent.

All of it belongs to the hub's thread. Nothing here switches or raises, but for `Outbox.wait`. An
outbox does not hold its session: that would be a cycle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason, PsOverflow
from psofa_gevent.errors import PsSendError
from psofa_gevent.send_line import Batch, Parking

if TYPE_CHECKING:
    from psofa_gevent.sending import SendingHalf

__all__ = ["Outbox"]


class Outbox:
    """The batches of one session."""

    __slots__ = ("_batches", "_kept", "_waiting", "dropped")

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self._kept = 0
        """Bytes that were ever kept: they leave in that order."""
        self._waiting: list[Parking] = []
        self.dropped = 0
        """Posts that were dropped."""

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return sum(batch.buffers.size for batch in self._batches)

    def keep(
        self,
        session: SendingHalf[Any],
        data: bytes | memoryview,
        timeout: float | None,
        *,
        begun: bool,
        droppable: bool = False,
    ) -> None:
        """Send `data` after all that waits now.

        Args:
            session: the session.
            data: what the kernel has not taken; nobody changes it any more.
            timeout: seconds in which the peer takes nothing, after which the session fails.
            begun: whether a part of that message has left.
            droppable: whether it may be dropped to make room.
        """
        self._kept += len(data)
        line = session._line
        if self._batches and line is not None:
            last = self._batches[-1]
            alike = last.timeout == timeout and last.droppable is droppable
            if alike and line.ends_with(last):
                last.buffers.append(data)
                return
        batch = Batch(session._loop, data, timeout, begun=begun, droppable=droppable)
        if line is None:
            batch.buffers.locked = session._half_sent
        self._batches.append(batch)
        batch.start(session._line_up(batch.buffers, timeout, batch, begun=True), self._stepped)

    def post(self, session: SendingHalf[Any], data: bytes | memoryview, *, begun: bool) -> bool:
        """Send `data` after all that waits now, if there is room for it; whether it was taken."""
        settings = session._host.settings
        room = settings.high_water - self.size - len(data)
        if room < 0 and not begun and self.size:
            if settings.overflow is PsOverflow.CLOSE:
                self._overflow(session, len(data))
                return False
            if settings.overflow is PsOverflow.DROP_NEWEST or not self._make_room(-room):
                self.dropped += 1
                return False
        self.keep(session, data, None, begun=begun, droppable=True)
        return True

    def _make_room(self, wanted: int) -> bool:
        """Drop the oldest for `wanted` bytes, or all that wait; if neither is enough, nothing."""
        batches = [batch for batch in self._batches if batch.droppable]
        most = sum(batch.buffers.droppable_size for batch in batches)
        if most < min(wanted, self.size):
            return False
        for batch in batches:
            while wanted > 0 and (size := batch.buffers.drop_oldest()):
                self.dropped += 1
                wanted -= size
        return True

    def _overflow(self, session: SendingHalf[Any], size: int) -> None:
        error = PsSendError(
            f"{session!r}: {self.size} bytes wait for the peer, and {size} more are beyond "
            f"high_water={session._host.settings.high_water}"
        )
        session._break_stream()
        session._request_close(PsCloseReason.FAILED, error, linger=False)
        for batch in self._batches:
            batch.buffers.clear()
        session._log_peer("more posts than high_water wait", "%s", error)

    async def wait(self, session: SendingHalf[Any], parking: Parking, *, in_callback: bool) -> None:
        """Wait until all that is kept now has left. It leaves also if the wait is broken off.

        Raises:
            PsSendError: the session was closed meanwhile.
        """
        mark = self._kept
        self._waiting.append(parking)
        try:
            while self._kept - self.size < mark:
                session._check_sending(in_callback=in_callback)
                await parking
        finally:
            self._waiting.remove(parking)
        if session._is_broken or session._released:  # then it was dropped
            session._check_sending(in_callback=in_callback)

    def _stepped(self, batch: Batch) -> None:
        if batch.has_ended:
            self._batches.remove(batch)
        for parking in self._waiting:
            parking.wake()
