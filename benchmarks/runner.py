"""Takes the samples in turn: A B C, A B C, so that a drift of the machine hits all alike."""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.load import has_redis_benchmark, speaks_tls
from benchmarks.measure import Plan, Sample, measure
from benchmarks.peers import PEERS, missing_requirement
from benchmarks.processes import BenchmarkError
from benchmarks.results import Results, RowResult
from benchmarks.rows import Row

__all__ = ["choose", "run"]

OTHER_DESCRIPTORS = 1_500
"""Descriptors that a server needs beside its sessions: psofa's reserve of a sixteenth, and some."""


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


def run(rows: Sequence[Row], plan: Plan, results: Results) -> bool:
    """Measure `rows` into `results`, with a progress bar on standard error.

    Returns:
        Whether every sample could be taken. `results` gets a note of each failure.
    """
    total = sum(len(row.peers) * (_rounds(row, plan) + plan.warm_up_rounds) for row in rows)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    failures = 0
    # Drawn seldom, because drawing uses the load generator's core.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task("", total=total)

        def tell(row: Row, peer: str) -> None:
            progress.update(task, description=f"{row.name} {peer}", advance=1)

        for row in rows:
            result = results.rows[row.name] = RowResult(row)
            failures += _run_row(result, plan, tell, results.notes)
    return not failures


def _rounds(row: Row, plan: Plan) -> int:
    return max(1, round(plan.rounds * row.rounds))


def _run_row(
    result: RowResult, plan: Plan, tell: Callable[[Row, str], None], notes: list[str]
) -> int:
    row = result.row
    failed: set[str] = set()
    for count in range(-plan.warm_up_rounds, _rounds(row, plan)):
        is_warm_up = count < 0
        for name in row.peers:
            tell(row, name)
            if name in failed:
                continue
            sample = _sample(row, name, plan.for_warm_up() if is_warm_up else plan, notes)
            if sample is None:
                failed.add(name)
            elif not is_warm_up:
                result.samples.setdefault(name, []).append(sample)
    return len(failed)


def _sample(row: Row, name: str, plan: Plan, notes: list[str]) -> Sample | None:
    try:
        return measure(row, PEERS[name], plan)
    except BenchmarkError as exc:
        notes.append(f"{row.name} {name} failed: {exc}")
        return None
