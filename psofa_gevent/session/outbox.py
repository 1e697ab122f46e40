"""Accepted messages that no caller waits on: posts, and messages that were collected.

It stands in the session's queue of senders (`psofa_gevent.session.send_queue`) like anyone else, in
batches: a batch ends where another sender lined up, so bytes leave in the order in which they were
sent and posted. The hub sends a batch on whenever the peer takes more. What other threads post
waits in an inbox until the hub comes to it, and counts from the call on.

What waits is limited by ``high_water``, and the session's `PsOverflow` says what happens to a post
beyond that. It counts the bytes of messages; with DROP_OLDEST also one for each, for where it ends.
In memory that is less than twice as much (`psofa_gevent.session.send_buffers`). A message of a
broadcast counts in each session that it waits in, although the sessions share it. Messages that
were collected (`PsSession.corked`) are always kept: they are few, and were sent.

All of it belongs to the hub's thread, but for the inbox, which `HubThread.lock` guards. Nothing
here switches or raises, but for `Outbox.wait`. An outbox does not hold its session: that would be a
cycle.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason, PsOverflow
from psofa_gevent.errors import PsSendError
from psofa_gevent.hub.parking import Parking
from psofa_gevent.session.send_batch import Batch
from psofa_gevent.session.send_buffers import Buffers
from psofa_gevent.session.send_queue import queue_up

if TYPE_CHECKING:
    from psofa_gevent.session.connection import Connection
    from psofa_gevent.settings import SessionSettings

__all__ = ["Inbox", "Outbox"]

SHARE_OF_INBOX = 4
"""Which part of ``high_water`` an inbox has, of which the hub has yet to drop the oldest."""


class Inbox:
    """What other threads have posted, and the hub has not come to. All of it under the lock."""

    __slots__ = ("buffers", "dropped", "is_shut", "refused")

    def __init__(self) -> None:
        self.buffers: Buffers | None = None
        """The messages; None: there are none, so the hub has to be called for the next one."""
        self.is_shut = False
        """Nothing more is taken."""
        self.refused = 0
        """Bytes of the post that was too much where that closes the session; 0: there was none."""
        self.dropped = 0

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return 0 if self.buffers is None else self.buffers.size

    @property
    def weight(self) -> int:
        """What counts for ``high_water``."""
        return 0 if self.buffers is None else self.buffers.weight

    def put(self, data: bytes, settings: SessionSettings, waiting: int) -> bool:
        """Keep `data`, if there is room for it; whether it was taken.

        `waiting`: what waits in the outbox, in weight. With DROP_OLDEST that will make room, but
        only the hub can touch it: so a part of ``high_water`` is the inbox's, whatever waits there.
        """
        if self.is_shut:
            return False
        drops_oldest = settings.overflow is PsOverflow.DROP_OLDEST
        own = self.weight + len(data) + drops_oldest
        room = settings.high_water - waiting - own
        if room < 0 and drops_oldest and self.buffers is not None:
            room = max(room, settings.high_water // SHARE_OF_INBOX - own)
            self.dropped += self.buffers.drop(max(-room, 0))[0]
        elif room < 0 and waiting + self.weight and not drops_oldest:
            if settings.overflow is PsOverflow.CLOSE:
                self.is_shut = True
                self.refused = len(data)
            else:
                self.dropped += 1
            return False
        if data:
            if self.buffers is None:
                self.buffers = Buffers(droppable=drops_oldest)
            self.buffers.append(data)
        return True


class Outbox:
    """The batches of one session, and its inbox."""

    __slots__ = ("_batches", "_dropped", "inbox", "parkings")

    def __init__(self) -> None:
        self._batches: list[Batch] = []
        self.parkings: list[Parking] = []
        """Where those wait who want to know that it has left."""
        self._dropped = 0
        self.inbox = Inbox()

    @property
    def size(self) -> int:
        """Bytes that wait in the queue."""
        return sum(batch.buffers.size for batch in self._batches)

    @property
    def weight(self) -> int:
        """What of that counts for ``high_water``. Other threads ask, too."""
        weight = 0
        for batch in self._batches:
            weight += batch.buffers.weight
        return weight

    @property
    def dropped(self) -> int:
        """Posts that were dropped."""
        return self._dropped + self.inbox.dropped

    def keep(
        self,
        session: Connection[Any],
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
        last = self._last_like(session, timeout, droppable=droppable)
        if last is not None:
            last.buffers.append(data)
            return
        drops_oldest = session._manager.settings.overflow is PsOverflow.DROP_OLDEST
        must_stay = begun or (session._send_queue is None and session._half_sent > 0)
        buffers = Buffers(data, droppable=droppable and drops_oldest, must_stay=must_stay)
        self._queue_up(session, buffers, timeout, droppable=droppable)

    def post(self, session: Connection[Any], data: bytes | memoryview, *, begun: bool) -> bool:
        """Send `data` after all that waits now, if there is room for it; whether it was taken."""
        if not data:
            return True
        settings = session._manager.settings
        drops_oldest = settings.overflow is PsOverflow.DROP_OLDEST
        wanted = self.weight + len(data) + drops_oldest - settings.high_water
        if self.inbox.buffers is not None:
            wanted += self.inbox.weight
        if wanted > 0 and not begun and self._batches:
            if settings.overflow is PsOverflow.CLOSE:
                self.overflow(session, self.size + self.inbox.size, len(data))
                return False
            if not drops_oldest or not self._make_room(wanted):
                self._dropped += 1
                return False
        self.keep(session, data, None, begun=begun, droppable=True)
        return True

    def empty_inbox(self, lock: AbstractContextManager[object]) -> tuple[Buffers | None, int, int]:
        """Take what other threads have posted out of the inbox.

        Returns:
            The messages, if there are any; bytes of the post that was too much, or 0; and bytes
            that waited then, in the inbox and the queue.
        """
        with lock:
            inbox = self.inbox
            size, refused = self.size + inbox.size, inbox.refused
            buffers, inbox.buffers, inbox.refused = inbox.buffers, None, 0
        return buffers, refused, size

    def send_on(self, session: Connection[Any], buffers: Buffers) -> None:
        """Send what came out of the inbox, after all that waits now."""
        if session._send_queue is None:
            try:
                buffers.give(session)  # most often the kernel takes all
            except PsSendError:
                return  # it has closed the session
        elif session._manager.settings.overflow is PsOverflow.DROP_OLDEST:
            wanted = self.weight + buffers.weight - session._manager.settings.high_water
            wanted -= self._drop(wanted)
            if wanted > 0 and self._batches:
                self._dropped += buffers.drop(wanted)[0]
        if not buffers.size:
            return
        last = self._last_like(session, None, droppable=True)
        if last is not None:
            last.buffers.extend(buffers)
        else:
            self._queue_up(session, buffers, None, droppable=True)

    def _last_like(
        self, session: Connection[Any], timeout: float | None, *, droppable: bool
    ) -> Batch | None:
        """The last batch, if one more message may become a part of it."""
        if not self._batches or session._send_queue is None:
            return None
        last = self._batches[-1]
        alike = last.timeout == timeout and last.droppable is droppable
        return last if alike and session._send_queue.ends_with(last) else None

    def _queue_up(
        self,
        session: Connection[Any],
        buffers: Buffers,
        timeout: float | None,
        *,
        droppable: bool,
    ) -> None:
        batch = Batch(session._loop, buffers, timeout, droppable=droppable)
        self._batches.append(batch)
        batch.start(queue_up(session, buffers, timeout, batch, begun=True), self._stepped)

    def _make_room(self, wanted: int) -> bool:
        """Drop the oldest for `wanted` bytes, or all that wait; if neither is enough, nothing."""
        most = sum(batch.buffers.droppable_weight for batch in self._batches if batch.droppable)
        if most < min(wanted, self.weight):
            return False
        self._drop(wanted)
        return True

    def _drop(self, wanted: int) -> int:
        """Drop the oldest for `wanted` bytes, or as many as can be; how many that were."""
        dropped = 0
        for batch in self._batches:
            if batch.droppable and dropped < wanted:
                number, weight = batch.buffers.drop(wanted - dropped)
                self._dropped += number
                dropped += weight
        return dropped

    def overflow(self, session: Connection[Any], waiting: int, size: int) -> None:
        """Close `session`: `size` bytes more than the `waiting` ones are beyond ``high_water``."""
        error = PsSendError(
            f"{session!r}: {waiting} bytes wait for the peer, and {size} more are beyond "
            f"high_water={session._manager.settings.high_water}"
        )
        session._break_stream()
        session._request_close(PsCloseReason.FAILED, error, linger=False)
        for batch in self._batches:
            batch.buffers.clear()
        session._log_peer("more posts than high_water wait", "%s", error)

    async def wait(self, session: Connection[Any], parking: Parking, *, in_callback: bool) -> None:
        """Wait until all that is kept now has left. It leaves also if the wait is broken off.

        There must be something, and the last of it must not be droppable.

        Raises:
            PsSendError: the session was closed meanwhile.
        """
        last = self._batches[-1]
        mark = last.buffers.left + last.buffers.size
        self.parkings.append(parking)
        try:
            while last.buffers.left < mark and not last.has_ended:
                session._check_sending(in_callback=in_callback)
                await parking
        finally:
            self.parkings.remove(parking)
        if session._is_broken or session._released:  # then it was dropped
            session._check_sending(in_callback=in_callback)

    def _stepped(self, batch: Batch) -> None:
        if batch.has_ended:
            self._batches.remove(batch)
        for parking in self.parkings:
            parking.wake()
