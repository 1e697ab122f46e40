"""Start one server: ``python -m benchmarks.servers PEER WORK``."""

from __future__ import annotations

import ctypes
import importlib
import resource
import signal
import sys

from benchmarks.peers import PEERS

PR_SET_PDEATHSIG = 1
FREED_ONCE = 4 * 1024 * 1024
"""Bytes. glibc maps a separate block, and unmaps it, for an allocation larger than any block that
the program has freed so far. A program that has run for a while has freed large blocks. A fresh one
would map a block for each recv of asyncio's Protocol, which asks for 256 KiB: 48 µs of CPU time a
message, not 17."""


def announce(port: int) -> None:
    print(f'{{"port": {port}}}', flush=True)


def main(name: str, work: str) -> None:
    # So that no server is left running when the benchmark is killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bytes(FREED_ONCE)
    peer = PEERS[name]
    importlib.import_module(f"benchmarks.servers.{peer.module}").serve(peer.variant, work, announce)


if __name__ == "__main__":
    main(*sys.argv[1:])
