"""Takes the samples: short ones of all peers, in an order that is shuffled in each round.

A machine that others share changes its speed from one second to the next, and drifts. Short samples
put those that are compared close together, and the shuffling gives each peer every place among
them. The servers of a row run side by side on their core; all but one of them are idle.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.instructions import count_instructions, why_not_counted
from benchmarks.load import has_redis_benchmark, load_program, speaks_tls
from benchmarks.measure import Plan, measure
from benchmarks.peers import PEERS, missing_requirement
from benchmarks.processes import BenchmarkError, Server, start_server
from benchmarks.results import Results, RowResult
from benchmarks.rows import Row

__all__ = ["choose", "run"]

OTHER_DESCRIPTORS = 1_500
"""Descriptors that a server needs beside its sessions: psofa's reserve of a sixteenth, and some."""
ALONE = frozenset({"sessions"})
"""Kinds of rows with a new server for each sample: its memory is counted, or it shuts down."""


def choose(rows: Sequence[Row], names: Sequence[str], results: Results) -> list[Row]:
    """The rows and peers that can be measured here; `results` gets notes of the others."""
    _soft, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    chosen = []
    absent: set[str] = set()
    for row in rows:
        if missing := _missing(row):
            results.notes.append(f"{row.name} skipped: {missing}")
            continue
        if limit != resource.RLIM_INFINITY and row.connections + OTHER_DESCRIPTORS > limit:
            results.notes.append(f"{row.name} skipped: only {limit} descriptors in a process")
            continue
        wanted = [name for name in row.peers if not names or name in names]
        there = tuple(name for name in wanted if not missing_requirement(PEERS[name]))
        absent.update(set(wanted) - set(there))
        if there:
            chosen.append(replace(row, peers=there))
    results.notes.extend(
        f"{name} skipped: {PEERS[name].requires} is not installed" for name in sorted(absent)
    )
    return chosen


def _missing(row: Row) -> str | None:
    """Why no peer can be measured in `row` here; None: nothing is missing."""
    if row.kind == "redis" and not has_redis_benchmark():
        return "no redis-benchmark (Debian: redis-tools)"
    if row.is_encrypted and not speaks_tls():
        return "no headers of OpenSSL (Debian: libssl-dev)"
    if row.is_encrypted and importlib.util.find_spec("trustme") is None:
        return "trustme is not installed"
    return None


def run(rows: Sequence[Row], plan: Plan, results: Results, *, instructions: bool = False) -> bool:
    """Measure `rows` into `results`, with a progress bar on standard error.

    Args:
        rows: what to measure.
        plan: how long, how often.
        results: gets the samples, and notes about those that could not be taken.
        instructions: count instructions, too, for the rows for which that can be done.

    Returns:
        Whether every sample could be taken.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    if instructions and (missing := why_not_counted()):
        results.notes.append(f"instructions not counted: {missing}")
        instructions = False
    is_good = True
    # Drawn seldom, because drawing uses the load generator's core.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task("", total=sum(len(row.peers) * _rounds(row, plan) for row in rows))

        def tell(description: str, *, advance: int = 0) -> None:
            progress.update(task, description=description, advance=advance)

        for row in rows:
            result = results.rows[row.name] = RowResult(row)
            run = _RowRun(result, plan, results.notes, tell)
            run.take_samples()
            if instructions and row.kind == "echo":
                run.add_instructions()
            is_good &= not run.failed
    return is_good


def _rounds(row: Row, plan: Plan) -> int:
    return max(1, round(plan.rounds * row.rounds))


class _Tell(Protocol):
    def __call__(self, description: str, *, advance: int = 0) -> None:
        """Show what goes on, and that `advance` samples were taken."""


class _RowRun:
    """Measures one row."""

    def __init__(self, result: RowResult, plan: Plan, notes: list[str], tell: _Tell) -> None:
        self.failed: set[str] = set()
        """Peers that failed: they take no further part in this row."""
        self._result = result
        self._row = result.row
        self._plan = plan
        self._notes = notes
        self._tell = tell
        # The same order in each run.
        self._random = random.Random(self._row.name)
        result.samples.update({name: [] for name in self._row.peers})

    def take_samples(self) -> None:
        left = _rounds(self._row, self._plan)
        while left:
            if self._row.kind in ALONE:
                rounds = 1
                self._take_alone()
            else:
                rounds = min(left, self._plan.rounds_per_server)
                self._take_side_by_side(rounds)
            left -= rounds

    def add_instructions(self) -> None:
        """Count instructions an item. They are the same in each round, so all samples get them."""
        for name in self._row.peers:
            if name in self.failed:
                continue
            self._tell(f"{self._row.name} {name}: instructions")
            with self._note_failure(name):
                count = count_instructions(self._row, PEERS[name])
                for sample in self._result.samples[name]:
                    sample["instructions"] = count

    def _take_side_by_side(self, rounds: int) -> None:
        with contextlib.ExitStack() as servers:
            started: dict[str, Server] = {}
            for name in self._row.peers:
                with self._note_failure(name):
                    started[name] = servers.enter_context(self._start(name))
                    if self._plan.warms_up:
                        measure(self._row, started[name], self._plan.for_warm_up())
            for _ in range(rounds):
                for name in self._shuffled():
                    if name in started:
                        self._take(name, started[name])

    def _take_alone(self) -> None:
        for name in self._shuffled():
            with self._note_failure(name), self._start(name) as server:
                self._take(name, server)

    def _shuffled(self) -> Iterator[str]:
        for name in self._random.sample(self._row.peers, len(self._row.peers)):
            self._tell(f"{self._row.name} {name}", advance=1)
            if name not in self.failed:
                yield name

    def _start(self, name: str) -> Server:
        return start_server(PEERS[name], self._row.work, load_program())

    def _take(self, name: str, server: Server) -> None:
        with self._note_failure(name):
            self._result.samples[name].append(measure(self._row, server, self._plan))

    @contextlib.contextmanager
    def _note_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except BenchmarkError as exc:
            self.failed.add(name)
            self._notes.append(f"{self._row.name} {name} failed: {exc}")
