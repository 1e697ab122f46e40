"""The outbox: accepted messages that no caller waits for, both posts and collected messages.

The messages stand in the session's send queue (`psofa_gevent.session.send_queue`) in batches. A
batch ends where another sender joins the queue, so bytes leave in the order in which they were sent
and posted. The hub goes on with a batch whenever the peer takes more. Posts of other threads wait
in an inbox until the hub takes them out, and count from the call on.

``high_water`` limits the waiting posts, and the session's `PsOverflow` decides about a post beyond
it. The limit counts the bytes of messages, and with DROP_OLDEST one byte more for each message, for
the place where it ends. In memory the messages take less than twice that
(`psofa_gevent.session.send_buffers`). A broadcast's message counts in each session in which it
waits, although the sessions share it. Collected messages (`PsSession.corked`) are always kept: they
are few, and their senders were told that they are sent.

Everything belongs to the hub's thread, except the inbox, which `HubThread.lock` guards. Only
`Outbox.wait` switches or raises. An outbox does not hold its session, which would be a cycle.
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
"""With DROP_OLDEST an inbox may hold this fraction (1/4) of ``high_water`` beside a full outbox."""


class Inbox:
    """Posts of other threads that the hub has not taken yet. Every use needs the lock."""

    __slots__ = ("buffers", "dropped", "is_shut", "refused")

    def __init__(self) -> None:
        self.buffers: Buffers | None = None
        """The messages; None: there are none, so the hub must be called for the next one."""
        self.is_shut = False
        """Whether the inbox refuses all further posts."""
        self.refused = 0
        """Bytes of the post beyond ``high_water`` that will close the session; 0: there is none."""
        self.dropped = 0

    @property
    def size(self) -> int:
        """Bytes of the waiting messages."""
        return 0 if self.buffers is None else self.buffers.size

    @property
    def weight(self) -> int:
        """Bytes that count for ``high_water``."""
        return 0 if self.buffers is None else self.buffers.weight

    def put(self, data: bytes, settings: SessionSettings, waiting: int) -> bool:
        """Keep `data`, if there is room for it; return whether it was taken.

        `waiting` is the weight of the outbox. With DROP_OLDEST the outbox will make room, but only
        the hub may change it. So a part of ``high_water`` is reserved for the inbox, however much
        waits in the outbox.
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
        """The parkings of callers that wait until messages have left (`wait`)."""
        self._dropped = 0
        self.inbox = Inbox()

    @property
    def size(self) -> int:
        """Bytes that wait in the send queue."""
        return sum(batch.buffers.size for batch in self._batches)

    @property
    def weight(self) -> int:
        """Bytes of the send queue that count for ``high_water``. From any thread."""
        weight = 0
        for batch in self._batches:
            weight += batch.buffers.weight
        return weight

    @property
    def dropped(self) -> int:
        """The number of dropped posts."""
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
        """Send `data` after all messages that wait now.

        Args:
            session: the session.
            data: the bytes that the kernel has not taken; they must not change any more.
            timeout: seconds without progress after which the session closes with FAILED.
            begun: whether a part of that message has left.
            droppable: whether the message may be dropped to make room.
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
        """Send `data` after all waiting messages, if there is room; return whether it was taken."""
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
        """Take the posts of other threads out of the inbox.

        Returns:
            The messages, if there are any; the bytes of the refused post, or 0; and the bytes that
            waited until now, in the inbox and in the send queue.
        """
        with lock:
            inbox = self.inbox
            size, refused = self.size + inbox.size, inbox.refused
            buffers, inbox.buffers, inbox.refused = inbox.buffers, None, 0
        return buffers, refused, size

    def send_on(self, session: Connection[Any], buffers: Buffers) -> None:
        """Send messages from the inbox, after all messages that wait now."""
        if session._send_queue is None:
            try:
                buffers.give(session)  # usually the kernel takes all
            except PsSendError:
                return  # the failed send has closed the session
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
        """The last batch, if another message may be added to it."""
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
        """Drop the oldest messages, for `wanted` bytes of weight or all that wait.

        Drops nothing, and returns false, if neither is possible.
        """
        most = sum(batch.buffers.droppable_weight for batch in self._batches if batch.droppable)
        if most < min(wanted, self.weight):
            return False
        self._drop(wanted)
        return True

    def _drop(self, wanted: int) -> int:
        """Drop the oldest messages, for `wanted` bytes if possible; return the dropped weight."""
        dropped = 0
        for batch in self._batches:
            if batch.droppable and dropped < wanted:
                number, weight = batch.buffers.drop(wanted - dropped)
                self._dropped += number
                dropped += weight
        return dropped

    def overflow(self, session: Connection[Any], waiting: int, size: int) -> None:
        """Close `session`: `size` bytes in addition to the `waiting` ones exceed ``high_water``."""
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
        """Wait until all messages kept now have left; they also leave if the wait is interrupted.

        There must be a message, and the last one must not be droppable.

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
        if session._is_broken or session._released:  # then the messages were dropped
            session._check_sending(in_callback=in_callback)

    def _stepped(self, batch: Batch) -> None:
        if batch.has_ended:
            self._batches.remove(batch)
        for parking in self.parkings:
            parking.wake()
