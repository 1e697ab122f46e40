"""How processes that share one listening socket even out their session counts.

The kernel wakes all of them for a connection, and whoever is first takes as many as are there. Of
clients that come in bursts and stay for days, one process may have ten times as many as another. So
each process tells the others how many sessions it has, and one that has more than another leaves
the connections to that one for a moment (`SharedLoad.wait_for_others`).

The kernel keeps what they know of each other, with the socket: as record locks (fcntl(2), F_SETLK),
which lock nothing here. A process with n sessions holds a shared lock on byte n, and asks whether
another process holds one on a byte of some range (F_GETLK). So exactly the processes that share the
socket know of each other, whatever their users and containers; there is no file, and the lock of a
process that dies, also by SIGKILL, goes with it. Each call takes about 1 µs.

The locks of a process go when it closes any descriptor of the same socket. So it sets its lock anew
now and then; until it does, nobody waits for it. Two servers of one process that share a socket
count as one, with the number of whichever told it last.

Works on Linux with 64 bits, where the layout of ``struct flock`` is known. Elsewhere, and where the
system refuses, nobody knows anything, and nobody waits.

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
"""As a length in ``struct flock``."""
LEAST_LEAD = 10
"""Sessions that a process may have more than another before it waits. With 6 there were so many
waits that seldom more than one process accepted, and a third of the rate was lost."""
SESSIONS_PER_LEAD = 32
"""Sessions of its own that allow it one more: 3 percent."""
STEPS_PER_LEAD = 2
"""How often it tells its number, and asks for those of others, while that changes by so much."""
TELL_PERIOD = 0.02
"""Seconds after which it does so in any case, and sets its lock anew."""
FIRST_WAIT = 0.001
"""Seconds for which it leaves connections to others: long enough for them to wake up, and to accept
twenty; and the least that libev waits. So much longer a client waits, at most, if they do not."""
LONGEST_WAIT = 0.008
"""Seconds that such a wait may become, doubled each time, while nothing changes: all are busy."""
SLOW_PATIENCE = 0.1
"""Seconds for which it waits for a process whose number does not change: it is busy, or stopped."""
FORGIVENESS = 1.0
"""Seconds after which it waits for such processes again."""


class SharedLoad:
    """What a process tells the others that share a listening socket, and learns from them.

    Attributes:
        has_others: whether another process accepts from the socket, as it was some 20 ms ago.
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
        """The number that the others see."""
        self._look_at = 0.0
        """When to tell it anew (monotonic clock)."""
        self._wait = FIRST_WAIT
        """Seconds of the next wait."""
        self._waited_until = 0.0
        """When the last one ended, or will end."""
        self._has_waited = False
        """The next connection may be accepted, as nobody else did in that time."""
        self._slow: int | None = None
        """The number of the process that this one waits for; None: it waits for none."""
        self._slow_until = 0.0
        """When that is given up."""
        self._stuck: set[int] = set()
        """The numbers of processes that are not waited for, as they accept nothing."""
        self._stuck_until = 0.0

    def wait_for_others(self, count: int) -> float:
        """Seconds to wait, as the next connection is for another process, which has fewer sessions.

        To be asked before each accept; 0: it is for this one. Asked again after such a wait it says
        0 in any case, once: nobody else has accepted the connection.

        Args:
            count: how many sessions this process has.
        """
        if not self._is_supported:
            return 0.0
        now = monotonic()
        if self._slow is not None and now > self._waited_until + TELL_PERIOD:
            # No connection was left after the wait, so others have accepted it.
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
        except OSError:  # of a kernel, or a security module, that has no locks for sockets
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
        """When such a wait ended no connection was left: the next one is worth another."""
        self._slow, self._has_waited = None, False
        self._look_at = 0.0  # it has to ask again

    def begin(self, count: int) -> None:
        """This process accepts from now on, and has so many sessions."""
        if self._is_supported:
            try:
                self._look(count, monotonic())
            except OSError:
                self._is_supported = False

    def withdraw(self) -> None:
        """This process accepts nothing for now: nobody is to wait for it."""
        if self._told is not None:
            self._told = None
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
            except OSError:
                self._is_supported = False

    def _look(self, count: int, now: float) -> None:
        """Set the lock anew, and see who else has one."""
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
        """The number of a process that has so few sessions that this one should wait for it."""
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
        """The number of another process, if one is below `limit` that is not stuck."""
        begin = 0
        for end in (*sorted(number for number in self._stuck if number < limit), limit):
            if begin < end:
                found = self._first_within(begin, end - begin)
                if found is not None:
                    return found
            begin = end + 1
        return None

    def _first_within(self, begin: int, length: int) -> int | None:
        """The number of another process, if one is among `length` numbers from `begin` on."""
        asked = FLOCK.pack(fcntl.F_WRLCK, 0, begin, length, 0)
        found = FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        return None if found[0] == fcntl.F_UNLCK else int(found[2])
