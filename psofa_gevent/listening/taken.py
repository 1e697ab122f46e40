"""Whether another process listens at an address, read from Linux's /proc (proc_net_tcp(5)).

A server that finds its address in use asks this: another process may be about to end and release
the address, while a socket of this very process will not release it by itself. On other systems
than Linux, and where /proc can't be read, the answer is always no.

It is asked only after a bind was refused, as the answer takes a moment for each descriptor of the
process. Nothing here switches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["path_is_taken", "port_is_taken"]

LISTENS = "0A"
"""The state of a listening TCP socket (Linux, net/tcp_states.h: TCP_LISTEN)."""
SO_ACCEPTCON = 0x10000
"""The flag of a listening Unix socket (Linux, linux/net.h: __SO_ACCEPTCON)."""


def port_is_taken(port: int) -> bool:
    """Whether another process listens on TCP port `port`, at any address, and this one does not."""
    found = {
        fields[9]
        for table in ("tcp", "tcp6")
        for fields in _rows(table)
        if fields[3] == LISTENS and int(fields[1].rpartition(":")[2], 16) == port
    }
    return _are_of_others(found)


def path_is_taken(path: str) -> bool:
    """Whether another process listens on the Unix socket `path`, and this one does not."""
    found = {
        fields[6]
        for fields in _rows("unix", 8)
        if len(fields) == 8 and int(fields[3], 16) & SO_ACCEPTCON and fields[7] == path
    }
    return _are_of_others(found)


def _rows(table: str, columns: int = -1) -> Iterator[list[str]]:
    with contextlib.suppress(OSError), open(f"/proc/self/net/{table}") as lines:
        next(lines)  # the names of the columns
        for line in lines:
            yield line.rstrip("\n").split(maxsplit=columns - 1 if columns > 0 else -1)


def _are_of_others(inodes: set[str]) -> bool:
    if not inodes:
        return False
    with contextlib.suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the listing's own descriptor is closed now
                kind, _, inode = os.readlink(f"/proc/self/fd/{descriptor}").partition(":")
                if kind == "socket" and inode.strip("[]") in inodes:
                    return False
    return True
