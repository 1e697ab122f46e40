"""A batch: posts and collected messages that wait in the send queue, and for which no caller waits.

Belongs to the hub's thread, and nothing switches. The first step runs in the greenlet that calls
`Batch.start`, all others in the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any

from psofa_gevent.errors import PsSendError
from psofa_gevent.session.send_buffers import Buffers

__all__ = ["Batch"]


class Batch:
    """Messages that share a place in the send queue. Their own parking, resumed by the hub."""

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
        """Whether all messages have left, or no more of them will leave."""

    def start(
        self, coroutine: Coroutine[Any, None, None], stepped: Callable[[Batch], None]
    ) -> None:
        """Begin to send. In any greenlet of the hub's thread; does not switch.

        Args:
            coroutine: sends the buffers, with this batch as its parking.
            stepped: called when some of the messages may have left, and at the end.
        """
        self._coroutine = coroutine
        self._stepped = stepped
        self._waits = True
        self._go_on()

    def __await__(self) -> Generator[Any, None, None]:
        self._waits = True
        yield

    def wake(self) -> bool:
        """Have the hub resume the batch soon."""
        if self._waits:
            self._loop.run_callback(self._go_on)
        return True

    def _go_on(self) -> None:
        # Since the wake-up, the batch may have gone on, or ended.
        if self._coroutine is None or not self._waits:
            return
        self._waits = False
        try:
            self._coroutine.send(None)
        except (StopIteration, PsSendError):
            # The error has closed the session, which keeps it.
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
