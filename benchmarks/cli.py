"""The command line: selects the measurements, and reports, plots, keeps or compares the results."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import baseline, machine, runner
from benchmarks.growth import growth_report
from benchmarks.load import load_program
from benchmarks.measure import Plan
from benchmarks.peers import OURS, PEERS, before, peers_of
from benchmarks.processes import BenchmarkError, pin_to_load_core
from benchmarks.report import report
from benchmarks.results import Results
from benchmarks.rows import ROWS, Row, growth_rows

__all__ = ["main"]

FULL = Plan(
    rounds=12, rounds_per_server=4, warms_up=True, seconds=0.4, warm=0.1, settle=1.0, idle=4.0
)
QUICK = Plan(
    rounds=3, rounds_per_server=3, warms_up=False, seconds=0.2, warm=0.1, settle=0.3, idle=1.2
)
BASELINE = Path(__file__).with_name("baseline.json")
BUSY = 0.5
"""A load average above which other programs are likely to influence the result."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read the results of an earlier run; then report.

    Returns:
        The exit code: 1 if a sample could not be taken, or a kept ratio got worse.
    """
    options = _parser().parse_args(arguments)
    try:
        results, is_good = _results(options)
    except BenchmarkError as exc:
        print(f"benchmarks: {exc}", file=sys.stderr)
        return 1
    print("\n\n".join(part for part in (report(results), growth_report(results)) if part))
    if options.json:
        results.write(options.json)
    if options.plot:
        from benchmarks.plot import plot

        print("\nwritten:", *plot(results, options.plot))
    if options.keep:
        baseline.keep(results, options.keep)
    if options.compare:
        is_good &= _compare(results, options.compare)
    return 0 if is_good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure psofa_gevent beside its peers: the same work, in turn, in one run.",
    )
    add = parser.add_argument
    names = [row.name for row in ROWS]
    add("--quick", action="store_true", help="fewer rows and peers, shorter: under a minute")
    add("--growth", action="store_true", help="costs by number of sessions, instead of the rows")
    add("--rows", metavar="ROW,…", type=_names(names), default=[], help=", ".join(names))
    add("--peers", metavar="PEER,…", type=_names(PEERS), default=[], help=", ".join(PEERS))
    add(
        "--before",
        metavar="DIR",
        type=_checkout,
        help="measure our servers of another checkout, too, and what has become of them",
    )
    add("--rounds", metavar="N", type=int, help="rounds that count, instead of the mode's")
    add("--seconds", metavar="S", type=float, help="of each sample, instead of the mode's")
    add(
        "--instructions",
        action="store_true",
        help="count the instructions of a message, too, in the echo rows (slow; needs valgrind)",
    )
    add("--json", metavar="FILE", type=Path, help="write all samples")
    add("--from", metavar="FILE", type=Path, dest="kept", help="tell of this one; measure nothing")
    add("--plot", metavar="DIR", type=Path, help="write the plots, as PNG and SVG")
    add(
        "--compare",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=BASELINE,
        help="exit with 1 if a ratio is worse than the one that FILE keeps (baseline.json)",
    )
    add(
        "--keep",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=BASELINE,
        help="write the ratios into FILE (baseline.json)",
    )
    return parser


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "psofa_gevent" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"{text} has no psofa_gevent")
    return path


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
        return given

    return names


def _results(options: argparse.Namespace) -> tuple[Results, bool]:
    if options.kept:
        results = Results.read(options.kept)
        if "before" in results.about:
            _add_peers(Path())
        return results, True
    load_program()
    results = Results(machine.describe())
    plan = _plan(options)
    rows = runner.choose(_rows(options), options.peers, results)
    if options.before:
        _add_peers(options.before)
        rows = [_with_before(row) for row in rows]
        results.about["before"] = machine.describe_checkout(options.before)
    if os.getloadavg()[0] > BUSY:
        results.notes.append(
            f"the load average was {os.getloadavg()[0]:.1f} before: others may have disturbed this"
        )
    pin_to_load_core()
    try:
        is_good = runner.run(rows, plan, results, instructions=options.instructions)
    except KeyboardInterrupt:
        results.notes.append("interrupted")
        is_good = False
    return results, is_good


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else FULL
    if options.rounds is not None:
        plan = replace(plan, rounds=options.rounds)
    if options.seconds is not None:
        plan = replace(plan, seconds=options.seconds)
    return plan


def _rows(options: argparse.Namespace) -> list[Row]:
    if options.growth:
        return list(growth_rows())
    if options.rows:
        return [row for row in ROWS if row.name in options.rows]
    if options.quick:
        return [replace(row, peers=row.quick_peers) for row in ROWS if row.quick_peers]
    return list(ROWS)


def _add_peers(checkout: Path) -> None:
    PEERS.update({peer.name: peer for peer in peers_of(checkout)})


def _with_before(row: Row) -> Row:
    ours = [before(name) for name in row.peers if name in OURS]
    return replace(row, peers=(*row.peers, *ours))


def _compare(results: Results, path: Path) -> bool:
    try:
        text, is_good = baseline.compare(results, path)
    except (OSError, KeyError) as exc:
        print(f"benchmarks: nothing to compare with: {exc!r}", file=sys.stderr)
        return False
    print(f"\n### Compared with {path.name}\n\n{text}")
    return is_good
