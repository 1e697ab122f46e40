"""The slow way of a message: senders in line for a connection that does not take it all at once.

`PsSession.send` tries the socket first; only what the kernel did not take comes here. A `SendQueue`
exists while someone waits, and goes with the last one:

- The first in line writes, whenever the socket is writable; the others wait their turn. So bytes
  of two messages never mix, and messages leave in the order in which their sends began.
- Each sender's timeout is the longest time in which the peer takes nothing. Progress is a growing
  number of acknowledged bytes (SIOCOUTQ) where the system tells, for writability comes only when a
  third of the buffer is free; elsewhere it is a successful write. It counts for all in line.
- A close request wakes all of them, and they raise `PsSendError`. SHUTDOWN leaves callbacks alone,
  and no close stops a `Batch`, of whose messages the senders were told that they are taken: the
  session lets it go on while it lingers.
- A sender that is thrown out (killed, cancelled, a `gevent.Timeout`) after a part of its message
  left closes the session with FAILED, as the stream is broken; before that, nothing happened.
- Nothing follows a message that broke off in its middle, whatever ended its sender: the peer would
  take it for the rest.

What a sender sends is a `Source` (`psofa_gevent.session.buffers`): `Buffers` of bytes, or a file
(`psofa_gevent.session.files`), which gives the session some of it whenever it is its turn.

Runs in whichever greenlet or asyncio task sends; the algorithm is one coroutine, and what differs
is the `Parking` that it awaits: `GreenletParking` switches to the hub and never suspends the
coroutine, `TaskParking` awaits a future, and a `Batch` is resumed by the hub.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from gevent import get_hub, getcurrent

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsSendError
from psofa_gevent.hub.forking import release, unwatch, watch
from psofa_gevent.net.sockopts import unacknowledged
from psofa_gevent.session.buffers import Buffers, Source, Step

if TYPE_CHECKING:
    from psofa_gevent.session.sending import SendingHalf

__all__ = [
    "Batch",
    "GreenletParking",
    "Parking",
    "SendQueue",
    "TaskParking",
    "run_in_greenlet",
]

WRITE = 2
"""The event mask of gevent's io watchers (libev's EV_WRITE)."""
SAMPLES_PER_TIMEOUT = 8
"""How often progress is looked at in the time of one timeout: it is found late by 1/8 at most."""
LONGEST_SAMPLE = 1.0
"""Seconds between two looks at most, for a long timeout."""
SHORTEST_SAMPLE = 0.001
"""Seconds between two looks at least: a timeout of zero must not spin."""


class Parking(Protocol):
    """A place to wait: awaited by one sender, woken by anyone in the hub's thread.

    A wake-up when nobody waits is lost, and one may come without a cause: look, then wait again.
    """

    def __await__(self) -> Generator[Any, None, None]: ...

    def wake(self) -> bool:
        """Let the sender go on, soon; false when it never can any more. Does not switch."""


class GreenletParking:
    """Waits by switching to the hub."""

    __slots__ = ("_greenlet", "_hub", "_is_woken")

    def __init__(self) -> None:
        self._hub = get_hub()
        self._greenlet: Any = None
        self._is_woken = False
        """Whether a switch is on its way: another one would end the next wait."""

    def __await__(self) -> Generator[Any, None, None]:
        self._greenlet = getcurrent()
        try:
            self._hub.switch()
        finally:
            self._greenlet = None
        yield from ()

    def wake(self) -> bool:
        """Switch back, soon."""
        if self._greenlet is not None and not self._is_woken:
            self._is_woken = True
            self._hub.loop.run_callback(self._switch)
        return True

    def _switch(self) -> None:
        self._is_woken = False
        # Since the wake-up the greenlet may have gone on, and wait for something else now.
        if self._greenlet is not None:
            self._greenlet.switch()


class TaskParking:
    """Waits by awaiting a future of the running asyncio loop, in the hub's thread."""

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None

    def __await__(self) -> Generator[Any, None, None]:
        self._future = self._loop.create_future()
        try:
            yield from self._future
        finally:
            self._future = None

    def wake(self) -> bool:
        """Resolve the future, soon; false when its loop was closed."""
        if self._future is not None:
            try:
                # The loop may be another one than the hub's: then only this call wakes it.
                self._loop.call_soon_threadsafe(_resolve, self._future)
            except RuntimeError:
                return False
        return True


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Batch:
    """Messages that nobody waits for, in line together: their own parking, resumed by the hub."""

    __slots__ = (
        "_coroutine",
        "_loop",
        "_stepped",
        "_waits",
        "buffers",
        "droppable",
        "has_ended",
        "timeout",
    )

    def __init__(
        self, loop: Any, buffers: Buffers, timeout: float | None, *, droppable: bool
    ) -> None:
        self._loop = loop
        self.buffers = buffers
        self.timeout = timeout
        self.droppable = droppable
        self._coroutine: Coroutine[Any, None, None] | None = None
        self._stepped: Callable[[Batch], None] | None = None
        self._waits = False
        self.has_ended = False
        """All of it has left, or never will."""

    def start(
        self, coroutine: Coroutine[Any, None, None], stepped: Callable[[Batch], None]
    ) -> None:
        """Begin to send, in any greenlet of the hub's thread. Does not switch.

        Args:
            coroutine: what sends the buffers, with this as its parking.
            stepped: called when some of them may have left, and at the end.
        """
        self._coroutine = coroutine
        self._stepped = stepped
        self._waits = True
        self._go_on()

    def __await__(self) -> Generator[Any, None, None]:
        self._waits = True
        yield

    def wake(self) -> bool:
        """Go on, soon."""
        if self._waits:
            self._loop.run_callback(self._go_on)
        return True

    def _go_on(self) -> None:
        # Since the wake-up it may have gone on, or ended.
        if self._coroutine is None or not self._waits:
            return
        self._waits = False
        try:
            self._coroutine.send(None)
        except (StopIteration, PsSendError):
            # Whatever was wrong has closed the session, which has the reason.
            self._end()
        except BaseException:
            self._end()
            raise
        finally:
            if self._stepped is not None:
                self._stepped(self)

    def _end(self) -> None:
        self._coroutine = None
        self.buffers.clear()
        self.has_ended = True


def run_in_greenlet(coroutine: Coroutine[Any, None, None]) -> None:
    """Run a coroutine that waits in a `GreenletParking` only, in the calling greenlet."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    finally:
        coroutine.close()
    raise RuntimeError("the coroutine suspended outside its parking")


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

    def __init__(self, session: SendingHalf[Any]) -> None:
        self._session = session
        self._senders: deque[_Sender] = deque()
        self._progress_at = monotonic()
        self._acknowledged = self._count_acknowledged()
        self._closed = False
        self._is_writable = False
        self._giver: Any = None
        """The greenlet in which the first one's source is just giving, or who holds the line."""
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
            raise PsSendError(f"{self._session!r}: a send in the midst of a file waits for itself")
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
        # of its own, one who holds the line: not the peer is what is slow.
        is_idle = self._is_writable or self._giver is not None
        if acknowledged > self._acknowledged or is_idle:
            self._acknowledged = acknowledged
            self._progress_at = now
        if timeout is None or now - max(self._progress_at, sender.began) < timeout:
            return
        error = PsSendError(f"{self._session!r}: the peer took nothing for {timeout:g} s")
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
