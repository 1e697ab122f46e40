"""The rows, which are the measurements: one for each line of the targets, and a few others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import C_SERVER
from benchmarks.servers.works import TLS

__all__ = ["GROWTH_SIZES", "ROWS", "Row", "growth_rows"]

LOOPS = ("psofa", "gevent", "asyncio", "uvloop", "twisted")
TLS_LOOPS = ("psofa", "gevent", "asyncio", "uvloop")
STREAMS = ("asyncio-streams", "uvloop-streams")
COROUTINES = ("psofa-async", *STREAMS)
MANY = 15_000
"""Sessions. On many machines a process may open 20,000 descriptors."""
GROWTH_SIZES = (10, 100, 1_000, 5_000, MANY)
GROWTH_PEERS = ("psofa", "gevent", "uvloop")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: its name in ``--rows`` and in the JSON file.
        title: its description.
        kind: the way to measure: echo, accept, sessions, broadcast or redis.
        work: the servers' work: see `benchmarks.servers`.
        connections: connections at a time.
        peers: the peers that are measured, in turn.
        size: bytes of a message.
        depth: messages under way on each connection.
        item: the name of the thing that is counted.
        shown: the metric that plots show.
        rounds: factor for the number of the plan's rounds.
        quick_peers: the peers with ``--quick``; if empty, the row is left out.
    """

    name: str
    title: str
    kind: str
    work: str
    connections: int
    peers: tuple[str, ...]
    size: int = 64
    depth: int = 1
    item: str = "message"
    shown: str = "per_cpu_second"
    rounds: float = 1
    quick_peers: tuple[str, ...] = ()

    @property
    def is_encrypted(self) -> bool:
        """Whether the connections use TLS."""
        return self.work == TLS


ROWS = (
    Row(
        "echo-10",
        "echo, 64 B, 10 connections",
        kind="echo",
        work="echo",
        connections=10,
        peers=(*LOOPS, *STREAMS),
    ),
    Row(
        "echo-100",
        "echo, 64 B, 100 connections",
        kind="echo",
        work="echo",
        connections=100,
        peers=(*LOOPS, *STREAMS, C_SERVER),
        quick_peers=LOOPS,
    ),
    Row(
        "echo-1000",
        "echo, 64 B, 1,000 connections",
        kind="echo",
        work="echo",
        connections=1_000,
        peers=(*LOOPS, *STREAMS),
    ),
    Row(
        "async-100",
        "echo, 64 B, 100 connections, coroutines",
        kind="echo",
        work="echo",
        connections=100,
        peers=COROUTINES,
        quick_peers=COROUTINES,
    ),
    Row(
        "suspend-100",
        "echo, 64 B, 100 connections, coroutines that suspend",
        kind="echo",
        work="suspend",
        connections=100,
        peers=COROUTINES,
    ),
    Row(
        "echo-64k",
        "echo, 64 KiB, 10 connections",
        kind="echo",
        work="echo",
        connections=10,
        peers=LOOPS,
        size=64 * 1024,
        shown="mb_per_second",
        rounds=1.4,
    ),
    Row(
        "echo-1m",
        "echo, 1 MiB, 10 connections",
        kind="echo",
        work="echo",
        connections=10,
        peers=(*LOOPS, C_SERVER),
        size=1024 * 1024,
        shown="mb_per_second",
        rounds=1.4,
    ),
    Row(
        "pipelined",
        "echo, 64 B, 100 connections, depth 64",
        kind="echo",
        work="echo",
        connections=100,
        peers=(*LOOPS, *STREAMS, C_SERVER),
        depth=64,
        quick_peers=("psofa", "uvloop"),
    ),
    *(
        Row(
            work,
            f"{title} of 64 B, 100 connections, depth 64",
            kind="echo",
            work=work,
            connections=100,
            peers=("psofa", "psofa-async", "psofa-alone", "asyncio", "uvloop", "twisted", *STREAMS),
            depth=64,
        )
        for work, title in (("lines", "lines"), ("lengths", "length-prefixed messages"))
    ),
    Row(
        "tls",
        "echo over TLS 1.3, 64 B, 100 connections",
        kind="echo",
        work=TLS,
        connections=100,
        peers=TLS_LOOPS,
    ),
    Row(
        "tls-64k",
        "echo over TLS 1.3, 64 KiB, 10 connections",
        kind="echo",
        work=TLS,
        connections=10,
        peers=TLS_LOOPS,
        size=64 * 1024,
        shown="mb_per_second",
        rounds=1.4,
    ),
    Row(
        "accept",
        "accept, echo 64 B once, close; 50 at a time",
        kind="accept",
        work="echo",
        connections=50,
        peers=(*LOOPS, *STREAMS, C_SERVER),
        item="connection",
        quick_peers=("psofa", "gevent", "uvloop"),
    ),
    Row(
        "broadcast",
        "broadcast of 64 B to 1,000 sessions",
        kind="broadcast",
        work="broadcast",
        connections=1_000,
        peers=LOOPS,
        item="delivery",
        quick_peers=("psofa", "uvloop"),
    ),
    Row(
        "redis",
        "redis-benchmark, ping_inline, 100 conn.",
        kind="redis",
        work="ping",
        connections=100,
        peers=(*LOOPS, "psofa-async", *STREAMS),
        quick_peers=("psofa", "uvloop"),
    ),
    Row(
        "sessions-1000",
        "1,000 idle sessions, then shutdown",
        kind="sessions",
        work="hold",
        connections=1_000,
        peers=("psofa", "gevent"),
        item="session",
        shown="kb_per_session",
        rounds=0.4,
        quick_peers=("psofa", "gevent"),
    ),
    Row(
        "sessions-15000",
        "15,000 idle sessions, then shutdown",
        kind="sessions",
        work="hold",
        connections=MANY,
        peers=("psofa", "gevent", "uvloop"),
        item="session",
        shown="kb_per_session",
        rounds=0.4,
    ),
)


def growth_rows() -> Iterator[Row]:
    """The rows of ``--growth``: the same costs with more and more sessions."""
    for count in GROWTH_SIZES:
        for kind, work, item in (
            ("echo", "echo", "message"),
            ("sessions", "hold", "session"),
            ("broadcast", "broadcast", "delivery"),
        ):
            yield Row(
                f"growth-{kind}-{count}",
                f"growth: {kind}, {count:,} sessions",
                kind=kind,
                work=work,
                connections=count,
                peers=GROWTH_PEERS,
                item=item,
                rounds=0.25,
            )
