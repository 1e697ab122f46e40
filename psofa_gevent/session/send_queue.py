"""The send queue: the senders of one session that wait for the peer to take their bytes.

`PsSession.send` tries the socket first; only the bytes that the kernel did not take come here. A
`SendQueue` exists while there are senders in it:

- The first sender writes whenever the socket is writable; the others wait for their turns. So bytes
  of two messages never mix, and messages leave in the order in which their sends began.
- Each sender's timeout is the longest time in which the peer takes nothing. Progress is a growing
  number of acknowledged bytes (SIOCOUTQ) where the system reports it, because a socket is writable
  only when a third of its buffer is free; elsewhere progress is a successful write. Progress counts
  for all senders in the queue.
- A close request wakes all senders, and they raise `PsSendError`. SHUTDOWN does not interrupt
  callbacks. No close stops a `Batch`, whose senders were told that their messages are taken: the
  session lets the batch go on while it lingers.
- A sender that is interrupted (killed, cancelled, a `gevent.Timeout`) after a part of its message
  has left closes the session with FAILED, because the stream is broken. A sender that is
  interrupted before that leaves no trace.
- After a message that broke off in its middle nothing is sent, whatever ended its sender: the peer
  would take further bytes for the rest of that message.

A sender sends a `Source` (`psofa_gevent.session.send_buffers`): `Buffers` of bytes, or a file
(`psofa_gevent.session.files`). A source gives the session a part of its data at each turn.

Runs in the greenlet or asyncio task that sends. The algorithm is one coroutine, for any `Parking`
that it awaits (`psofa_gevent.hub.parking`). The hub runs the coroutine of a `Batch`
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
from psofa_gevent.hub.io_masks import WRITE
from psofa_gevent.hub.parking import Parking
from psofa_gevent.net.sockopts import unacknowledged
from psofa_gevent.session.send_batch import Batch
from psofa_gevent.session.send_buffers import Buffers, Source, Step
from psofa_gevent.settings import DEFAULT, Default

if TYPE_CHECKING:
    from psofa_gevent.session.connection import Connection

__all__ = ["SendQueue", "queue_up"]

SAMPLES_PER_TIMEOUT = 8
"""Checks for progress per timeout: a timeout is found at most 1/8 of its time too late."""
LONGEST_SAMPLE = 1.0
"""Most seconds between two checks, for a long timeout."""
SHORTEST_SAMPLE = 0.001
"""Least seconds between two checks: a timeout of zero must not spin."""


class _Sender:
    """One sender: its parking, when it began, and whether a part of its message has left."""

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
        """Whether the stream is broken if the rest of the message does not follow."""
        return self._begun or self.source.begun


class SendQueue:
    """The waiting senders of one session, in order."""

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
        """The greenlet that runs the first sender's `Source.give`, or the holder of the queue."""
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
            source: the data to send.
            timeout: seconds in which the peer takes nothing; ``None``: no limit.
            parking: where the caller waits.
            begun: whether a part of the message has left already.
            in_callback: whether a callback sends: then SHUTDOWN does not interrupt the send.

        Raises:
            PsSendError: the session was closed, or closes now for an error or the timeout.
            BaseException: an exception of the source, or one thrown into the wait.
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
        """Wake all senders, to let them see that the session closes."""
        for sender in list(self._senders):
            self._wake(sender)

    @property
    def holds_callbacks(self) -> bool:
        """Whether a callback is among the senders."""
        return any(sender.in_callback and not sender.is_batch for sender in self._senders)

    @property
    def parkings(self) -> list[Parking]:
        """The parkings of the senders."""
        return [sender.parking for sender in self._senders]

    @property
    def holds_batches(self) -> bool:
        """Whether a batch is among the senders: its messages count as sent."""
        return any(sender.is_batch for sender in self._senders)

    def ends_with(self, parking: Parking) -> bool:
        """Whether the last sender waits at `parking`."""
        return bool(self._senders) and self._senders[-1].parking is parking

    def close(self) -> None:
        """Release the watcher, and wake the senders. Call it before the descriptor is closed.

        The senders find the session closed, and do not use the watcher or the socket again.
        """
        if not self._closed:
            self._closed = True
            self._watcher.stop()
            self._watcher.close()
            self.interrupt()

    def let_go(self) -> None:
        """Release the watcher in a child process, and wake nobody: the parent sends."""
        if not self._closed:
            self._closed = True
            release(self._watcher)

    def _wake_first(self) -> None:
        if self._closed:  # a child process is about to release the watcher
            return
        # Level-triggered: the watcher would fire until the sender has run.
        self._watcher.stop()
        self._is_writable = True
        if self._senders:
            self._wake(self._senders[0])

    def _wake(self, sender: _Sender) -> None:
        if sender.parking.wake():
            return
        # The sender's asyncio loop was closed, so it will never run: remove it from the queue.
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
            self._session._wake()  # it may linger for this sender

    def _start_ticking(self, sender: _Sender, timeout: float | None) -> None:
        if timeout is not None:
            interval = min(max(timeout / SAMPLES_PER_TIMEOUT, SHORTEST_SAMPLE), LONGEST_SAMPLE)
            sender.ticks = watch(self._session._loop.timer(interval, interval))
            sender.ticks.start(self._wake, sender)

    def _check_progress(self, sender: _Sender, timeout: float | None) -> None:
        acknowledged = self._count_acknowledged()
        now = monotonic()
        # The peer is not the slow one if the first sender has yet to write to a writable socket, if
        # a source waits for its data, or if the queue is held.
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
        raise PsSendError(*error.args)  # another object than the one that the session keeps

    def _count_acknowledged(self) -> int:
        """Bytes that the peer acknowledged; those that the kernel took if the system can't tell."""
        try:
            outstanding = unacknowledged(self._session._sock)
        except OSError:
            return 0  # the socket is released: the next check of the session raises
        return self._session._wire_sent - (outstanding or 0)

    def hold(self, parking: Parking) -> Callable[[], None]:
        """Take the first place in the queue, and send nothing; return a function that ends this.

        `parking` is woken when the session closes: the code that waits there must check for that.
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
    """Return the coroutine that sends `source` after all waiting senders of `session`.

    Arguments as for `SendQueue.send`. With `DEFAULT`, `timeout` is the owner's ``send_timeout``.
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
