"""Takes one sample: one server under one load."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.load import redis_benchmark, start_load
from benchmarks.processes import Server
from benchmarks.rows import Row

__all__ = ["METRICS", "Metric", "Plan", "Sample", "measure"]

Sample = dict[str, float]
LARGE = 64 * 1024
"""Bytes of a message from which on the throughput is also given in MB/s."""
REDIS_MESSAGES_PER_SECOND = 100_000
"""redis-benchmark takes a number of messages, not a time: this many for each second of the plan."""
WAIT_SECONDS = 120.0
"""Seconds for steps that may take long, such as opening 15,000 sessions on a busy machine."""


@dataclass(frozen=True)
class Metric:
    """The label of a figure, and whether more is better."""

    label: str
    more_is_better: bool
    digits: int = 0


METRICS = {
    "rate": Metric("{items}/s", more_is_better=True),
    "mb_per_second": Metric("MB/s", more_is_better=True),
    "cpu_us": Metric("CPU µs/{item}", more_is_better=False, digits=2),
    "instructions": Metric("instructions/{item}", more_is_better=False),
    "per_cpu_second": Metric("{items}/CPU s", more_is_better=True),
    "p50_ms": Metric("p50 ms", more_is_better=False, digits=3),
    "p99_ms": Metric("p99 ms", more_is_better=False, digits=3),
    "kb_per_session": Metric("kB/session", more_is_better=False, digits=2),
    "open_cpu_us": Metric("CPU µs/opening", more_is_better=False, digits=1),
    "idle_cpu_percent": Metric("idle CPU %", more_is_better=False, digits=3),
    "closes_per_second": Metric("closes/s", more_is_better=True),
    "close_cpu_us": Metric("CPU µs/close", more_is_better=False, digits=1),
    "closes_missing": Metric("on_close missing", more_is_better=False),
    "server_busy": Metric("server ran %", more_is_better=True, digits=0),
    "waited": Metric("waited %", more_is_better=False, digits=1),
    "load_busy": Metric("load ran %", more_is_better=False, digits=0),
}
"""The metrics, in the order of the tables. `Row.item` goes into the braces."""


@dataclass(frozen=True)
class Plan:
    """How long a run measures, and how often.

    Attributes:
        rounds: samples of each peer that count.
        rounds_per_server: rounds after which the servers of a row are started anew. What a process
            chooses at random when it starts (where its memory lies, its hashes) is worth some
            percent, so a ratio needs several processes of each peer.
        warms_up: whether a shorter sample, which does not count, comes first with each new server.
        seconds: seconds that are counted in each sample.
        warm: seconds of load before them, on the same connections, which are not counted.
        settle: seconds of rest after the opening of idle sessions.
        idle: seconds for which the CPU time of idle sessions is measured.
    """

    rounds: int
    rounds_per_server: int
    warms_up: bool
    seconds: float
    warm: float
    settle: float
    idle: float

    def for_warm_up(self) -> Plan:
        """The plan of a sample that does not count."""
        return replace(self, seconds=self.seconds / 2, settle=self.settle / 4, idle=self.idle / 4)


def measure(row: Row, server: Server, plan: Plan) -> Sample:
    """Take one sample.

    Raises:
        BenchmarkError: the server or the load generator failed.
    """
    waited, began = server.waited_seconds(), time.monotonic()
    sample = MEASURES[row.kind](row, server, plan)
    waited = server.waited_seconds() - waited
    sample["waited"] = waited / (time.monotonic() - began) * 100
    return sample


def _throughput(row: Row, result: dict[str, Any]) -> Sample:
    items, seconds = result["items"], result["seconds"]
    sample = {
        "rate": items / seconds,
        "cpu_us": result["server_cpu"] / items * 1e6,
        "per_cpu_second": items / result["server_cpu"],
        "p50_ms": result["p50_ms"],
        "p99_ms": result["p99_ms"],
        "server_busy": result["server_cpu"] / seconds * 100,
        "load_busy": result["load_cpu"] / seconds * 100,
    }
    if row.size >= LARGE:
        sample["mb_per_second"] = items * row.size / seconds / 1e6
    return sample


def _under_load(row: Row, server: Server, plan: Plan) -> Sample:
    with start_load(row.kind, row, server, plan.warm, plan.seconds) as load:
        return _throughput(row, load.answer(WAIT_SECONDS + plan.warm + plan.seconds))


def _redis(row: Row, server: Server, plan: Plan) -> Sample:
    redis_benchmark(row, server, max(1_000, int(plan.warm * REDIS_MESSAGES_PER_SECOND)))
    messages = max(1_000, int(plan.seconds * REDIS_MESSAGES_PER_SECOND))
    return _throughput(row, redis_benchmark(row, server, messages))


def _sessions(row: Row, server: Server, plan: Plan) -> Sample:
    first = replace(row, connections=10)
    with start_load("hold", first, server, 0, 0) as load:  # first uses are not the sessions' cost
        load.answer()
    memory = server.resident_bytes()
    with start_load("hold", row, server, 0, 0) as load:
        opening = load.answer(WAIT_SECONDS)
        time.sleep(plan.settle)
        sample = {
            "kb_per_session": (server.resident_bytes() - memory) / row.connections / 1e3,
            "open_cpu_us": opening["server_cpu"] / row.connections * 1e6,
        }
        cpu, began = server.cpu_seconds(), time.monotonic()
        time.sleep(plan.idle)
        used = server.cpu_seconds() - cpu
        sample["idle_cpu_percent"] = used / (time.monotonic() - began) * 100
        if server.peer.delivers_closes:
            sample |= _shutdown(row, server)
    return sample


def _shutdown(row: Row, server: Server) -> Sample:
    server.send_signal(signal.SIGUSR1)
    closing = server.answer(WAIT_SECONDS)
    return {
        "closes_per_second": row.connections / closing["seconds"],
        "close_cpu_us": closing["cpu"] / row.connections * 1e6,
        "closes_missing": row.connections - closing["closes"],
    }


MEASURES: dict[str, Callable[[Row, Server, Plan], Sample]] = {
    "echo": _under_load,
    "accept": _under_load,
    "broadcast": _under_load,
    "redis": _redis,
    "sessions": _sessions,
}
