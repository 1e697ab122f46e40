"""The balance of session counts between processes that share one listening socket.

The kernel wakes all these processes for a connection, and the first one accepts all connections
that wait. If clients come in bursts and stay for days, one process may have ten times as many as
another. So each process publishes how many sessions it has. A process that has more than another
leaves the connections to that one for a moment (`SharedLoad.wait_for_others`).

The kernel keeps these numbers with the socket, as record locks (fcntl(2), F_SETLK), which lock
nothing here. A process with n sessions holds a shared lock on byte n, and asks whether another
process holds a lock in some range of bytes (F_GETLK). So exactly the processes that share the
socket know of each other, whatever their users and containers. There is no file, and a process that
dies, also by SIGKILL, loses its lock. Each call takes about 1 µs.

A process also loses its locks when it closes any descriptor of the same socket. So it sets its lock
anew before an accept when `TELL_PERIOD` has passed; until it does, no other process waits for it.
Two servers of one process that share a socket count as one, with the number published last.

This works on 64-bit Linux, where the layout of ``struct flock`` is known. On other systems, and
where the system refuses the locks, no process knows of another, and none waits.

All of it runs in the hub, and never blocks, switches or raises.
"""

from __future__ import annotations

import fcntl
import struct
import sys
from time import monotonic

__all__ = ["SharedLoad"]

IS_SUPPORTED = sys.platform == "linux" and struct.calcsize("P") == 8
FLOCK = struct.Struct("hhqqi4x")
"""l_type, l_whence, l_start, l_len, l_pid."""
TO_THE_END = 0
"""The length in ``struct flock`` that stands for all bytes up to the end."""
LEAST_LEAD = 10
"""Sessions that a process may have more than another before it waits: its lead. With 6 the waits
were so frequent that seldom more than one process accepted, and a third of the rate was lost."""
SESSIONS_PER_LEAD = 32
"""Sessions of a process that raise its allowed lead by one: a lead of 3 percent."""
STEPS_PER_LEAD = 2
"""How often a process publishes its number, and looks at those of others, while its number changes
by the allowed lead."""
TELL_PERIOD = 0.02
"""Seconds after which it does both in any case, and sets its lock anew."""
FIRST_WAIT = 0.001
"""Seconds for which a process first leaves connections to others. They need that long to wake up
and to accept twenty, and libev has no shorter wait. If they do not accept, a client waits at most
that much longer."""
LONGEST_WAIT = 0.008
"""Seconds of the longest such wait. The wait is doubled each time while nothing changes, as then
all are busy."""
SLOW_PATIENCE = 0.1
"""Seconds for which a process defers to another one whose number does not change: the other one is
busy, or stopped."""
FORGIVENESS = 1.0
"""Seconds after which it defers to such processes again."""


class SharedLoad:
    """The part of one process in the balance: publishes its session count, and reads the others.

    Attributes:
        has_others: whether another process accepts from the socket, as of some 20 ms ago.
    """

    __slots__ = (
        "_descriptor",
        "_has_waited",
        "_is_supported",
        "_look_at",
        "_slow",
        "_slow_until",
        "_stuck",
        "_stuck_until",
        "_told",
        "_wait",
        "_waited_until",
        "has_others",
    )

    def __init__(self, descriptor: int) -> None:
        self.has_others = False
        self._descriptor = descriptor
        self._is_supported = IS_SUPPORTED
        self._told: int | None = None
        """The number that the others see; None: this process accepts nothing."""
        self._look_at = 0.0
        """When to set the lock anew and to look for others (monotonic clock)."""
        self._wait = FIRST_WAIT
        """Seconds of the next wait."""
        self._waited_until = 0.0
        """When the last wait ended, or will end."""
        self._has_waited = False
        """Whether the last answer was a wait, so that the next connection may be accepted."""
        self._slow: int | None = None
        """The number of the process that this one waits for; None: it waits for no process."""
        self._slow_until = 0.0
        """When to stop waiting for that process."""
        self._stuck: set[int] = set()
        """The numbers of processes that this one does not wait for, as they accept nothing."""
        self._stuck_until = 0.0
        """When to forget these numbers."""

    def wait_for_others(self, count: int) -> float:
        """Seconds for which to leave the next connection to a process with fewer sessions.

        The listener asks before each accept. 0: this process may accept. When the listener asks
        right after such a wait, the answer is 0: no other process has accepted the connection.

        Args:
            count: how many sessions this process has.
        """
        if not self._is_supported:
            return 0.0
        now = monotonic()
        if self._slow is not None and now > self._waited_until + TELL_PERIOD:
            # The listener did not ask again after the wait, as no connection was left: another
            # process has accepted it.
            self._slow, self._has_waited = None, False
        lead = LEAST_LEAD + count // SESSIONS_PER_LEAD
        if now < self._look_at:
            if not self.has_others:
                return 0.0
            is_near = self._told is not None and abs(count - self._told) * STEPS_PER_LEAD < lead
            if is_near and self._slow is None:
                return 0.0
        try:
            if now >= self._look_at:
                self._look(count, now)
            else:
                self._tell(count)
            slow = self._one_below(count - lead, now)
        except OSError:  # from a kernel, or a security module, that has no locks for sockets
            self._is_supported = False
            return 0.0
        if slow is None or self._has_waited:
            self._has_waited = False
            return 0.0
        self._has_waited = True
        wait, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)
        self._waited_until = now + wait
        return wait

    def others_were_first(self) -> None:
        """Allow another wait for the next connection: no connection was left after the last one."""
        self._slow, self._has_waited = None, False
        self._look_at = 0.0  # it must look again

    def begin(self, count: int) -> None:
        """Publish that this process accepts from now on, and has `count` sessions."""
        if self._is_supported:
            try:
                self._look(count, monotonic())
            except OSError:
                self._is_supported = False

    def withdraw(self) -> None:
        """Publish that this process accepts nothing for now, so that no other waits for it."""
        if self._told is not None:
            self._told = None
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
            except OSError:
                self._is_supported = False

    def _look(self, count: int, now: float) -> None:
        """Set the lock anew, and see whether another process has one."""
        self._look_at = now + TELL_PERIOD
        self.withdraw()
        self._tell(count)
        self.has_others = self._first_within(0, TO_THE_END) is not None

    def _tell(self, count: int) -> None:
        told = self._told
        if told != count:
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, count)
            self._told = count
            if told is not None:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, told)

    def _one_below(self, limit: int, now: float) -> int | None:
        """The number of a process below `limit` for which to wait now; ``None``: for no process."""
        if now >= self._stuck_until:
            self._stuck.clear()
        slow = self._first_below(limit)
        if slow is None:
            self._slow = None
        elif slow != self._slow:
            self._slow, self._slow_until = slow, now + SLOW_PATIENCE
            self._wait = FIRST_WAIT
        elif now >= self._slow_until:
            self._stuck.add(slow)
            self._stuck_until = now + FORGIVENESS
            self._slow = self._first_below(limit)
            self._slow_until = now + SLOW_PATIENCE
        return self._slow

    def _first_below(self, limit: int) -> int | None:
        """The number of another process that is below `limit` and not stuck, or ``None``."""
        begin = 0
        for end in (*sorted(number for number in self._stuck if number < limit), limit):
            if begin < end:
                found = self._first_within(begin, end - begin)
                if found is not None:
                    return found
            begin = end + 1
        return None

    def _first_within(self, begin: int, length: int) -> int | None:
        """The number of another process among `length` numbers from `begin` on, or ``None``."""
        asked = FLOCK.pack(fcntl.F_WRLCK, 0, begin, length, 0)
        found = FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        return None if found[0] == fcntl.F_UNLCK else int(found[2])
