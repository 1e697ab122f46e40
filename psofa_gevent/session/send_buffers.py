"""Bytes that wait for a peer: whole messages, kept in little more memory than they have bytes.

A bytes object takes some 50 bytes beside its own, so 16 times as much as a message of three. So
`Buffers` puts small messages together, in blocks from which the kernel takes them as they are.
Larger ones stay what they are, which also lets sessions share what was broadcast to them. However
sizes mix, what waits takes less than twice its bytes, and `Buffers.weight` has what is kept besides
where single messages can be dropped.

Nothing here switches or raises, but for what the socket says.
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
"""Bytes up to which blocks are put together for one system call."""
BLOCK_SIZE = 16_384
"""Bytes up to which small messages are put together. A block grows by copies, and with 64 KiB what
these leave in the heap was as much again for some blocks; with this it was a twentieth."""
OWN_BLOCK = 160
"""Bytes from which on a message is a block of its own. With what that costs (a bytes object 56 at
most, a bytearray for a single small message between two of these 88) it is less than doubled."""
_SIZES = [bytes((size,)) for size in range(OWN_BLOCK)]
"""The size of a small message, as it is kept."""


class Step(enum.Enum):
    """How far a `Source` has come with a step."""

    ALL = enum.auto()
    """Nothing is left."""
    SOME = enum.auto()
    """More when the socket is writable again, and others had their turn."""
    MORE = enum.auto()
    """More at once, if the session lets it: others may have run."""


class Source(Protocol):
    """What a sender has to send."""

    begun: bool
    """Whether a part has left, so that the stream is broken if the rest does not follow."""
    offered_at: float
    """When it last had to wait for something else than the peer (monotonic clock); 0: never."""

    def give(self, session: Connection[Any]) -> Step:
        """Give the session's socket some of it, and nothing more after having switched.

        Whatever it raises ends the message: the session closes with FAILED if a part has left.
        """


class Buffers:
    """Messages on their way (a `Source`)."""

    __slots__ = ("_blocks", "_front", "_number", "_sizes", "begun", "left", "size")

    offered_at = 0.0

    def __init__(
        self, data: bytes | memoryview = b"", *, droppable: bool = False, must_stay: bool = False
    ) -> None:
        """`data` is the first message, or what is left of one, and the only one that has begun.

        Args:
            data: nobody changes it any more.
            droppable: keep where messages end, so that single ones can be dropped.
            must_stay: not this first one: a part of it has left, or is encrypted.
        """
        self._front: Block = b""
        """What is left of messages that must stay, where others can be dropped."""
        self._blocks: deque[Block] = deque()
        """All others: small ones together in a bytearray, and each larger one by itself."""
        self._sizes: deque[Block] | None = deque() if droppable else None
        """The size of each message in the blocks, a byte; 0: that of a block of its own."""
        self._number = 0
        """How many these are."""
        self.size = 0
        """Bytes that have not left."""
        self.left = 0
        """Bytes that have."""
        self.begun = False
        if droppable and must_stay:
            self._front = data
            self.size = len(data)
        elif data:
            self.append(data)

    @property
    def weight(self) -> int:
        """Bytes that have not left, and what is kept to tell messages apart."""
        return self.size + self._number

    @property
    def droppable_weight(self) -> int:
        """That of the messages of which nothing has left; only where they can be dropped."""
        return self.weight - len(self._front)

    def give(self, session: Connection[Any]) -> Step:
        """As much as the kernel takes now. Does not switch."""
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
        """One more message; not an empty one."""
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
        """All of `others`, of which nothing has left, and which are not used any more."""
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
        """Drop the oldest messages of which nothing has left, for so much, or all there are.

        Returns:
            How many messages that were, and their weight.
        """
        number, size = self._count_messages(weight, besides=1)
        self._forget(number)
        _cut(self._blocks, size)
        self.size -= size
        return number, size + number

    def clear(self) -> None:
        """Drop all of them."""
        self._front = b""
        self._blocks.clear()
        if self._sizes is not None:
            self._sizes.clear()
        self._number = 0
        self.size = 0

    def _first(self) -> Block:
        """What to send next: what is small together. There must be something."""
        parts: list[Block] = [self._front] if self._front else []
        room = JOIN_SIZE - len(self._front)
        for block in self._blocks:
            if room <= 0:
                break
            # A large one by itself as it is, and behind others as much as there is room for.
            fits = not parts or len(block) <= room
            parts.append(block if fits else memoryview(block)[:room])
            room -= len(block)
        return _together(parts)

    def _took(self, count: int) -> None:
        """The kernel took so many bytes."""
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
        """Let nobody drop the messages to which the first `count` bytes belong."""
        count -= len(self._front)
        if self._sizes is not None and count > 0:
            number, size = self._count_messages(count)
            self._forget(number)
            parts = self._pull(size)
            self._front = _together([self._front, *parts] if self._front else parts)

    def _count_messages(self, count: int, *, besides: int = 0) -> tuple[int, int]:
        """In how many messages of the blocks the first `count` bytes are, and the size of these.

        `besides`: what each message counts beside its bytes.
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
        """Keep no more of the sizes of so many messages."""
        if self._sizes is not None:
            self._number -= number
            _cut(self._sizes, number)

    def _pull(self, count: int) -> list[Block]:
        """Take so many bytes out of the blocks: as they are, as far as whole blocks go."""
        parts: list[Block] = []
        while count:
            block = self._blocks[0]
            part = block if len(block) <= count else block[:count]
            parts.append(part)
            count -= len(part)
            _cut(self._blocks, len(part))
        return parts


def _join(blocks: deque[Block], data: Block) -> None:
    """Add `data` to the last one, or begin another."""
    if blocks and type(last := blocks[-1]) is bytearray and len(last) + len(data) <= BLOCK_SIZE:
        last += data
    else:
        blocks.append(bytearray(data))


def _cut(blocks: deque[Block], count: int) -> None:
    """Let go of so many bytes in front."""
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
