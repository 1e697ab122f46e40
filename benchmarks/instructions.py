"""Counts the instructions that a server executes in user space for one message.

By callgrind: it counts in a simulated processor, so neither other programs nor the machine's speed
change the figure. What the kernel does is not in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.load import load_program, start_load
from benchmarks.peers import Peer
from benchmarks.processes import BenchmarkError, Server, start_server
from benchmarks.rows import Row

__all__ = ["count_instructions", "why_not_counted"]

START_SECONDS = 300.0
"""Callgrind makes a program some 50 times slower, its start and its imports included."""
LOAD_SECONDS = 600.0
LEAST = 4_000
"""Messages in the shorter load, at least. The longer one has twice as many."""
LEAST_EACH = 20
"""Messages on each connection in the shorter load, at least."""
LEAST_FULL = 4
"""How often all connections have all that may be under way, at least."""


def why_not_counted() -> str | None:
    """What is missing here; None: nothing."""
    needed = ("valgrind", "callgrind_control")
    missing = [name for name in needed if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} (Debian: valgrind)" if missing else None


def count_instructions(row: Row, peer: Peer) -> float:
    """Count those of a load with N messages and of one with 2N: the difference has N messages.

    What a load needs besides its messages, to open and close the connections, drops out. A load
    comes before both, so that the server has made what it makes once.

    Raises:
        BenchmarkError: the server or the load generator failed under callgrind.
    """
    each = max(LEAST_EACH, LEAST_FULL * row.depth)
    messages = max(LEAST, each * row.connections)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "counts")
        under = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        with start_server(
            peer, row.work, load_program(), under=under, seconds=START_SECONDS
        ) as server:
            _load(row, server, messages // 2)
            _dump(server, out, 1)
            _load(row, server, messages)
            shorter = _dump(server, out, 2)
            _load(row, server, 2 * messages)
            longer = _dump(server, out, 3)
    return (longer - shorter) / messages


def _load(row: Row, server: Server, messages: int) -> None:
    with start_load(row.kind, row, server, 0, 0, items=messages) as load:
        load.answer(LOAD_SECONDS)


def _dump(server: Server, out: Path, number: int) -> int:
    """Let callgrind write what it has counted since the last dump, and begin again."""
    done = subprocess.run(
        ["callgrind_control", "--dump", str(server.pid)],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    written = out.with_name(f"{out.name}.{number}")
    if done.returncode or not written.exists():
        raise BenchmarkError(f"callgrind_control failed: {done.stderr or done.stdout}")
    found = re.search(r"^(?:totals|summary): (\d+)", written.read_text(), re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"callgrind wrote no total into {written.name}")
    return int(found[1])
