"""Our aims: ratios to peers of the same run, and a few absolute bounds."""

from __future__ import annotations

import sys
from dataclasses import dataclass

__all__ = ["TARGETS", "Target"]

AT_LEAST, AT_MOST = ">=", "<="


@dataclass(frozen=True)
class Target:
    """One bound.

    Attributes:
        row: the name of the row.
        metric: the name of the metric.
        sense: ``>=`` or ``<=``.
        bound: the bound of the ratio, or of the value if there is no `peer` and no `other_row`.
        peer: our metric is divided by that of this peer.
        other_row: our metric is divided by our own in this row.
        ours: which of our own servers is compared.
    """

    row: str
    metric: str
    sense: str
    bound: float
    peer: str | None = None
    other_row: str | None = None
    ours: str = "psofa"

    @property
    def is_ratio(self) -> bool:
        return self.peer is not None or self.other_row is not None

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.sense == AT_LEAST else value <= self.bound


def _small_echo(row: str) -> list[Target]:
    return [
        Target(row, "per_cpu_second", AT_LEAST, bound, peer)
        for peer, bound in (("uvloop", 0.85), ("gevent", 1.6), ("asyncio", 1.0), ("twisted", 1.8))
    ]


def _async_echo(row: str) -> list[Target]:
    bounds = {"uvloop-streams": 1.0}
    if sys.version_info < (3, 12):  # without eager tasks
        bounds = {"asyncio-streams": 1.0, "uvloop-streams": 0.85}
    return [
        Target(row, "per_cpu_second", AT_LEAST, bound, peer, ours="psofa-async")
        for peer, bound in bounds.items()
    ]


TARGETS = (
    *_small_echo("echo-100"),
    Target("echo-100", "p99_ms", AT_MOST, 1.2, "uvloop"),
    *_small_echo("echo-1000"),
    Target("echo-1000", "p99_ms", AT_MOST, 1.2, "uvloop"),
    *_small_echo("redis"),
    *_async_echo("async-100"),
    *_async_echo("redis"),
    Target("suspend-100", "per_cpu_second", AT_LEAST, 1.0, "asyncio-streams", ours="psofa-async"),
    Target("echo-64k", "rate", AT_LEAST, 0.95, "asyncio"),
    Target("echo-64k", "rate", AT_LEAST, 0.95, "uvloop"),
    Target("echo-1m", "rate", AT_LEAST, 0.95, "asyncio"),
    Target("echo-1m", "rate", AT_LEAST, 0.95, "uvloop"),
    *(
        Target("tls", "per_cpu_second", AT_LEAST, bound, peer)
        for peer, bound in (("uvloop", 0.85), ("gevent", 1.0), ("asyncio", 1.0))
    ),
    *(
        Target("tls-64k", "per_cpu_second", AT_LEAST, 0.95, peer)
        for peer in ("uvloop", "gevent", "asyncio")
    ),
    Target("pipelined", "per_cpu_second", AT_LEAST, 1.0, "uvloop"),
    *(
        Target(row, "per_cpu_second", AT_LEAST, bound, peer)
        for row in ("lines", "lengths")
        for peer, bound in (("psofa-alone", 5.0), ("twisted", 1.0), ("asyncio-streams", 1.0))
    ),
    Target("accept", "rate", AT_LEAST, 1.2, "gevent"),
    Target("accept", "rate", AT_LEAST, 0.8, "uvloop"),
    Target("broadcast", "rate", AT_LEAST, 1.0, "uvloop"),
    Target("sessions-15000", "kb_per_session", AT_MOST, 1.0, "gevent"),
    Target("sessions-15000", "idle_cpu_percent", AT_MOST, 1.0),
    Target("sessions-15000", "idle_cpu_percent", AT_MOST, 15.0, other_row="sessions-1000"),
    Target("sessions-15000", "closes_missing", AT_MOST, 0),
    Target("sessions-15000", "closes_per_second", AT_LEAST, 15_000),
)
