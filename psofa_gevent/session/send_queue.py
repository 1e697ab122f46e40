"""The slow way of a message: senders in a queue for a connection that does not take it all at once.

`PsSession.send` tries the socket first; only what the kernel did not take comes here. A `SendQueue`
exists while someone waits, and goes with the last one:

- The first in line writes, whenever the socket is writable; the others wait their turn. So bytes
  of two messages never mix, and messages leave in the order in which their sends began.
- Each sender's timeout is the longest time in which the peer takes nothing. Progress is a growing
  number of acknowledged bytes (SIOCOUTQ) where the system tells, for writability comes only when a
  third of the buffer is free; elsewhere it is a successful write. It counts for all in the queue.
- A close request wakes all of them, and they raise `PsSendError`. SHUTDOWN leaves callbacks alone,
  and no close stops a `Batch`, of whose messages the senders were told that they are taken: the
  session lets it go on while it lingers.
- A sender that is thrown out (killed, cancelled, a `gevent.Timeout`) after a part of its message
  left closes the session with FAILED, as the stream is broken; before that, nothing happened.
- Nothing follows a message that broke off in its middle, whatever ended its sender: the peer would
  take it for the rest.

A sender sends a `Source` (`psofa_gevent.session.send_buffers`): `Buffers` of bytes, or a file
(`psofa_gevent.session.files`), which gives the session some of it whenever it is its turn.

Runs in whichever greenlet or asyncio task sends; the algorithm is one coroutine, and what differs
is the `Parking` that it awaits (`psofa_gevent.hub.parking`). The hub resumes that of a `Batch`
(`psofa_gevent.session.send_batch`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from gevent import getcurrent

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsSendError
from psofa_gevent.hub.forking import release, unwatch, watch
from psofa_gevent.hub.greenlets import sends_to_the_end
from psofa_gevent.hub.io_events import WRITE
from psofa_gevent.hub.parking import Parking
from psofa_gevent.net.sockopts import unacknowledged
from psofa_gevent.session.send_batch import Batch
from psofa_gevent.session.send_buffers import Buffers, Source, Step
from psofa_gevent.settings import DEFAULT, Default

if TYPE_CHECKING:
    from psofa_gevent.session.connection import Connection

__all__ = ["SendQueue", "queue_up"]

SAMPLES_PER_TIMEOUT = 8
"""How often progress is looked at in the time of one timeout: it is found late by 1/8 at most."""
LONGEST_SAMPLE = 1.0
"""Seconds between two looks at most, for a long timeout."""
SHORTEST_SAMPLE = 0.001
"""Seconds between two looks at least: a timeout of zero must not spin."""


class _Sender:
    """One who waits: where, since when, and whether a part of the message has left."""

    __slots__ = ("_begun", "began", "in_callback", "is_batch", "parking", "source", "ticks")

    def __init__(self, source: Source, parking: Parking, *, begun: bool, in_callback: bool) -> None:
        self.source = source
        self.parking = parking
        self._begun = begun
        self.in_callback = in_callback
        self.is_batch = isinstance(parking, Batch)
        self.began = monotonic()
        self.ticks: Any = None

    @property
    def begun(self) -> bool:
        """Whether the stream is broken if no more of it follows."""
        return self._begun or self.source.begun


class SendQueue:
    """The senders of one session that have to wait, in order."""

    __slots__ = (
        "_acknowledged",
        "_closed",
        "_giver",
        "_is_writable",
        "_progress_at",
        "_senders",
        "_session",
        "_watcher",
    )

    def __init__(self, session: Connection[Any]) -> None:
        self._session = session
        self._senders: deque[_Sender] = deque()
        self._progress_at = monotonic()
        self._acknowledged = self._count_acknowledged()
        self._closed = False
        self._is_writable = False
        self._giver: Any = None
        """The greenlet in which the first one's source is just giving, or who holds the queue."""
        self._watcher = session._loop.io(session._sock.fileno(), WRITE)

    async def send(
        self,
        source: Source,
        timeout: float | None,
        parking: Parking,
        *,
        begun: bool,
        in_callback: bool,
    ) -> None:
        """Send all of `source`, however long the peer takes for it.

        Args:
            source: what is still to be sent.
            timeout: seconds in which the peer takes nothing; ``None``: no limit.
            parking: where the caller waits.
            begun: whether a part of the message left before.
            in_callback: whether a callback sends: then SHUTDOWN does not interrupt it.

        Raises:
            PsSendError: the session was closed, or closes now, because of an error or the timeout.
            BaseException: what the source raised.
        """
        sender = _Sender(source, parking, begun=begun, in_callback=in_callback)
        if self._giver is getcurrent() and not sender.is_batch:
            raise PsSendError(
                f"{self._session!r}: send() while this greenlet sends a file would deadlock"
            )
        check = partial(
            self._session._check_sending, in_callback=in_callback, is_batch=sender.is_batch
        )
        self._senders.append(sender)
        self._start_ticking(sender, timeout)
        try:
            while True:
                check()
                if self._senders[0] is sender:
                    gave = self._let_give(source)
                    if gave is Step.ALL:
                        return
                    if gave is Step.MORE:
                        continue
                    check()  # others may have run
                self._check_progress(sender, timeout)
                if self._senders[0] is sender:
                    self._watcher.start(self._wake_first)
                await parking
        except BaseException as exc:
            if sender.begun:
                self._session._break_stream()
                self._session._request_close(PsCloseReason.FAILED, exc)
            raise
        finally:
            self._leave(sender)

    def _let_give(self, source: Source) -> Step:
        self._giver = getcurrent()
        try:
            return source.give(self._session)
        finally:
            self._giver = None
            self._is_writable = False
            self._progress_at = max(self._progress_at, source.offered_at)

    def interrupt(self) -> None:
        """Wake all senders, so that they see that the session closes."""
        for sender in list(self._senders):
            self._wake(sender)

    @property
    def holds_callbacks(self) -> bool:
        """Whether a callback is among the senders, and waits."""
        return any(sender.in_callback and not sender.is_batch for sender in self._senders)

    @property
    def parkings(self) -> list[Parking]:
        """Where the senders wait."""
        return [sender.parking for sender in self._senders]

    @property
    def holds_batches(self) -> bool:
        """Whether messages are among them that nobody waits for: they count as sent."""
        return any(sender.is_batch for sender in self._senders)

    def ends_with(self, parking: Parking) -> bool:
        """Whether the last sender waits there."""
        return bool(self._senders) and self._senders[-1].parking is parking

    def close(self) -> None:
        """Release the watcher, before the descriptor is closed, and wake the senders.

        They find the session closed, and touch neither watcher nor socket again.
        """
        if not self._closed:
            self._closed = True
            self._watcher.stop()
            self._watcher.close()
            self.interrupt()

    def let_go(self) -> None:
        """Release the watcher, and wake nobody: the connection is the parent process's."""
        if not self._closed:
            self._closed = True
            release(self._watcher)

    def _wake_first(self) -> None:
        if self._closed:  # a child process is about to release the watcher
            return
        # Level-triggered: it would fire until the sender ran.
        self._watcher.stop()
        self._is_writable = True
        if self._senders:
            self._wake(self._senders[0])

    def _wake(self, sender: _Sender) -> None:
        if sender.parking.wake():
            return
        # Its asyncio loop was closed under it: it must not stand in the way of the others.
        self._leave(sender)
        if sender.begun:
            self._session._break_stream()
            error = PsSendError(f"{self._session!r}: the asyncio loop of a sender was closed")
            self._session._request_close(PsCloseReason.FAILED, error)

    def _leave(self, sender: _Sender) -> None:
        if sender not in self._senders:
            return
        unwatch(sender.ticks)
        was_first = self._senders[0] is sender
        self._senders.remove(sender)
        if not self._senders:
            self.close()
            self._session._send_queue_is_empty(self)
            return
        if was_first:
            self._wake(self._senders[0])
        if not self._session._open:
            self._session._wake()  # it may linger for this one

    def _start_ticking(self, sender: _Sender, timeout: float | None) -> None:
        if timeout is not None:
            interval = min(max(timeout / SAMPLES_PER_TIMEOUT, SHORTEST_SAMPLE), LONGEST_SAMPLE)
            sender.ticks = watch(self._session._loop.timer(interval, interval))
            sender.ticks.start(self._wake, sender)

    def _check_progress(self, sender: _Sender, timeout: float | None) -> None:
        acknowledged = self._count_acknowledged()
        now = monotonic()
        # A socket that the first sender has not come to write to, a source that waits for something
        # of its own, one who holds the queue: not the peer is what is slow.
        is_idle = self._is_writable or self._giver is not None
        if acknowledged > self._acknowledged or is_idle:
            self._acknowledged = acknowledged
            self._progress_at = now
        if timeout is None or now - max(self._progress_at, sender.began) < timeout:
            return
        error = PsSendError(
            f"{self._session!r}: send timed out: the peer accepted no data for {timeout:g} s"
        )
        self._session._request_close(PsCloseReason.FAILED, error, linger=False)
        raise PsSendError(*error.args)  # not the one that the session keeps

    def _count_acknowledged(self) -> int:
        """Bytes of the session that reached the peer; where nobody knows, those that left."""
        try:
            outstanding = unacknowledged(self._session._sock)
        except OSError:
            return 0  # released: the next look at the session raises
        return self._session._wire_sent - (outstanding or 0)

    def hold(self, parking: Parking) -> Callable[[], None]:
        """Stand in front of all others, and send nothing, until what is returned is called.

        `parking` is woken when the session closes. What follows must not take this for nothing.
        """
        holder = _Sender(Buffers(), parking, begun=True, in_callback=False)
        self._senders.appendleft(holder)
        self._giver = holder

        def release() -> None:
            self._giver = None
            self._progress_at = monotonic()
            self._leave(holder)

        return release


def queue_up(
    session: Connection[Any],
    source: Source,
    timeout: float | Default | None,
    parking: Parking,
    *,
    begun: bool,
) -> Coroutine[Any, Any, None]:
    """Send `source` after all senders of `session` that wait now: the coroutine to run.

    Arguments as of `SendQueue.send`; by default `timeout` is the owner's ``send_timeout``.
    """
    queue: SendQueue | None = session._send_queue
    if queue is None:
        queue = session._send_queue = SendQueue(session)
    return queue.send(
        source,
        session._manager.settings.send_timeout if timeout is DEFAULT else timeout,
        parking,
        begun=begun,
        in_callback=sends_to_the_end(),
    )
