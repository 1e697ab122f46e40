"""Buffers for messages that wait for a peer; they take little more memory than the messages' bytes.

A bytes object takes some 50 bytes in addition to its content: 16 times the size of a message of
three bytes. So `Buffers` joins small messages into blocks, from which the kernel takes them without
a copy. Larger messages stay separate objects, so sessions can share a broadcast's message. In any
mix of sizes, waiting messages take less than twice their bytes. `Buffers.weight` also counts the
bytes that mark where messages end, if single messages can be dropped.

Nothing here switches, and only errors of the socket are raised.
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from psofa_gevent.session.connection import Connection

__all__ = ["Block", "Buffers", "Source", "Step"]

Block: TypeAlias = bytes | bytearray | memoryview

JOIN_SIZE = 65_536
"""Most bytes of blocks that are joined for one system call."""
BLOCK_SIZE = 16_384
"""Most bytes of a block of small messages. A block grows by copies, which leave gaps in the heap.
With 64 KiB the gaps of some blocks took as much memory as the blocks, with 16 KiB a twentieth."""
OWN_BLOCK = 160
"""Bytes from which on a message gets a block for itself: the overhead then less than doubles it. A
bytes object has at most 56 bytes of overhead; a bytearray for a single small message between two
such blocks has 88."""
_SIZES = [bytes((size,)) for size in range(OWN_BLOCK)]
"""The size of each small message, encoded in one byte."""


class Step(enum.Enum):
    """How far one step of a `Source` has come."""

    ALL = enum.auto()
    """All has left."""
    SOME = enum.auto()
    """There is more for when the socket is writable again and others had their turn."""
    MORE = enum.auto()
    """There is more to give at once. Check the session before: the source may have switched."""


class Source(Protocol):
    """The data of one sender."""

    begun: bool
    """Whether a part has left, so that the stream is broken if the rest does not follow."""
    offered_at: float
    """Monotonic time up to which the source last kept the peer waiting for data; 0: never."""

    def give(self, session: Connection[Any]) -> Step:
        """Give the session's socket some data. After a switch, give no more before returning.

        Any exception ends the message: the session closes with FAILED if a part has left.
        """


class Buffers:
    """Messages that wait to be sent (a `Source`)."""

    __slots__ = ("_blocks", "_front", "_number", "_sizes", "begun", "left", "size")

    offered_at = 0.0

    def __init__(
        self, data: bytes | memoryview = b"", *, droppable: bool = False, must_stay: bool = False
    ) -> None:
        """Begin with `data`: a message, or the rest of one. Only this first message may have begun.

        Args:
            data: the bytes; they must not change any more.
            droppable: record where messages end, so that single messages can be dropped.
            must_stay: never drop this first message: a part of it has left, or is encrypted.
        """
        self._front: Block = b""
        """The rest of messages that must stay, if other messages can be dropped."""
        self._blocks: deque[Block] = deque()
        """All other messages: small ones joined in a bytearray, each larger one by itself."""
        self._sizes: deque[Block] | None = deque() if droppable else None
        """A byte for each message in the blocks: its size; 0: it has a block for itself."""
        self._number = 0
        """The number of messages in `_sizes`."""
        self.size = 0
        """Bytes that have not left."""
        self.left = 0
        """Bytes that have left."""
        self.begun = False
        if droppable and must_stay:
            self._front = data
            self.size = len(data)
        elif data:
            self.append(data)

    @property
    def weight(self) -> int:
        """Bytes that have not left, and one more for each message whose end is recorded."""
        return self.size + self._number

    @property
    def droppable_weight(self) -> int:
        """Weight of the messages that can be dropped. Only if messages can be dropped."""
        return self.weight - len(self._front)

    def give(self, session: Connection[Any]) -> Step:
        """Give the kernel as much as it takes now. Does not switch."""
        while self.size:
            data = self._first()
            taken = session._send_now(data)
            self._took(taken)
            if taken < len(data):
                encrypted = session._half_sent
                self._keep_front(encrypted)
                self.begun = self.begun or taken + encrypted > 0
                return Step.SOME
            self.begun = True
        return Step.ALL

    def append(self, data: bytes | memoryview) -> None:
        """Add one more message, which must not be empty."""
        size = len(data)
        self.size += size
        if size < OWN_BLOCK:
            _join(self._blocks, data)
        else:
            self._blocks.append(data)
        if self._sizes is not None:
            self._number += 1
            _join(self._sizes, _SIZES[size if size < OWN_BLOCK else 0])

    def extend(self, others: Buffers) -> None:
        """Add all messages of `others`, from which no byte has left. Do not use `others` again."""
        self.size += others.size
        self._number += others._number
        for block in others._blocks:
            if type(block) is bytearray:
                _join(self._blocks, block)
            else:
                self._blocks.append(block)
        if self._sizes is not None and others._sizes is not None:
            for sizes in others._sizes:
                _join(self._sizes, sizes)

    def drop(self, weight: int) -> tuple[int, int]:
        """Drop the oldest messages that have not begun, until `weight` is dropped, or all are.

        Returns:
            The number of dropped messages, and their weight.
        """
        number, size = self._count_messages(weight, besides=1)
        self._forget(number)
        _cut(self._blocks, size)
        self.size -= size
        return number, size + number

    def clear(self) -> None:
        """Drop all messages."""
        self._front = b""
        self._blocks.clear()
        if self._sizes is not None:
            self._sizes.clear()
        self._number = 0
        self.size = 0

    def _first(self) -> Block:
        """The bytes to send next, small blocks joined. There must be some."""
        parts: list[Block] = [self._front] if self._front else []
        room = JOIN_SIZE - len(self._front)
        for block in self._blocks:
            if room <= 0:
                break
            # The first block is taken whole; a later one as far as there is room.
            fits = not parts or len(block) <= room
            parts.append(block if fits else memoryview(block)[:room])
            room -= len(block)
        return _together(parts)

    def _took(self, count: int) -> None:
        """Remove the first `count` bytes, which the kernel took."""
        self.size -= count
        self.left += count
        if self._front and count:
            in_front = min(count, len(self._front))
            count -= in_front
            self._front = memoryview(self._front)[in_front:] or b""
        if self._sizes is None:
            _cut(self._blocks, count)
        elif count:
            number, size = self._count_messages(count)
            self._forget(number)
            _cut(self._blocks, count)
            self._front = _together(self._pull(size - count))

    def _keep_front(self, count: int) -> None:
        """Protect the messages to which the first `count` bytes belong from being dropped."""
        count -= len(self._front)
        if self._sizes is not None and count > 0:
            number, size = self._count_messages(count)
            self._forget(number)
            parts = self._pull(size)
            self._front = _together([self._front, *parts] if self._front else parts)

    def _count_messages(self, count: int, *, besides: int = 0) -> tuple[int, int]:
        """The number and size of the messages in the blocks that contain the first `count` bytes.

        `besides`: bytes that each message counts in addition to its size.
        """
        if self._sizes is None:
            return 0, 0
        larger = (len(block) for block in self._blocks if type(block) is not bytearray)
        number = total = 0
        for size in chain.from_iterable(self._sizes):
            if total + number * besides >= count:
                break
            number += 1
            total += size or next(larger)
        return number, total

    def _forget(self, number: int) -> None:
        """Remove the recorded sizes of the first `number` messages."""
        if self._sizes is not None:
            self._number -= number
            _cut(self._sizes, number)

    def _pull(self, count: int) -> list[Block]:
        """Take the first `count` bytes out of the blocks, without copying whole blocks."""
        parts: list[Block] = []
        while count:
            block = self._blocks[0]
            part = block if len(block) <= count else block[:count]
            parts.append(part)
            count -= len(part)
            _cut(self._blocks, len(part))
        return parts


def _join(blocks: deque[Block], data: Block) -> None:
    """Append `data` to the last block, or begin another one."""
    if blocks and type(last := blocks[-1]) is bytearray and len(last) + len(data) <= BLOCK_SIZE:
        last += data
    else:
        blocks.append(bytearray(data))


def _cut(blocks: deque[Block], count: int) -> None:
    """Remove the first `count` bytes."""
    while count:
        block = blocks[0]
        size = len(block)
        if count < size:
            if type(block) is bytearray:
                del block[:count]
            else:
                blocks[0] = memoryview(block)[count:]
            return
        blocks.popleft()
        count -= size


def _together(parts: list[Block]) -> Block:
    return parts[0] if len(parts) == 1 else b"".join(parts)
