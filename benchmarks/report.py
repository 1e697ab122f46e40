"""The tables, in Markdown: to read in a terminal, and to paste."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.measure import METRICS
from benchmarks.peers import OURS, PEERS, before
from benchmarks.results import DISTURBED, SATURATED, Results, RowResult, Spread
from benchmarks.targets import TARGETS, Target

__all__ = ["report", "table"]

CHANGES = frozenset(
    {"instructions", "per_cpu_second", "p99_ms", "kb_per_session", "open_cpu_us", "close_cpu_us"}
)
"""Metrics that are told as ratios to the build before."""
PLURALS = {"delivery": "deliveries"}


_RATIOS = "A ratio is the median of the rounds' ratios."


def report(results: Results) -> str:
    """All tables of `results`, except growth."""
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = (
        f"{about['implementation']} {about['python']}, psofa_gevent {about['psofa_gevent']},"
        f" {versions}; {about['processor']}, {about['system']}; server on core"
        f" {about['server_core']}, load on core {about['load_core']}; medians (min–max)"
    )
    parts = [machine]
    for result in results.rows.values():
        if not result.row.name.startswith("growth-") and result.measured:
            parts += [f"### {result.row.name}: {result.row.title}", _row_table(result)]
    targets = list(_target_lines(results))
    if targets:
        header = ("row", "what", "measured", "target", "")
        parts += [
            f"### Targets\n\n{_RATIOS}",
            table(header, targets),
        ]
    changes = list(_change_lines(results))
    if changes:
        title = f"### Beside the build before ({about['before']})"
        parts += [f"{title}\n\n{_RATIOS}", table(("row", "what", "now / before"), changes)]
    parts += [f"Note: {note}" for note in results.notes]
    return "\n\n".join(parts)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(cells: Sequence[str]) -> str:
        first, *others = cells
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "| " + " | ".join([first.ljust(widths[0]), *aligned]) + " |"

    return "\n".join(row(line) for line in (header, rule, *lines))


def show_number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def show_spread(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return ""
    median, low, high = (show_number(value, digits) for value in spread)
    return median if low == high else f"{median} ({low}–{high})"


def label_of(metric: str, result: RowResult) -> str:
    item = result.row.item
    return METRICS[metric].label.format(item=item, items=PLURALS.get(item, item + "s"))


def _row_table(result: RowResult) -> str:
    there = {metric for samples in result.samples.values() for s in samples for metric in s}
    metrics = [metric for metric in METRICS if metric in there]
    lines = []
    for peer in result.measured:
        cells = [show_spread(result.spread(peer, m), METRICS[m].digits) for m in metrics]
        mark = " *" if result.is_load_limited(peer) else ""
        mark += " !" if result.is_disturbed(peer) else ""
        lines.append([PEERS[peer].label + mark, *cells])
    text = table(["", *(label_of(metric, result) for metric in metrics)], lines)
    if any(result.is_load_limited(peer) for peer in result.measured):
        text += f"\n\n\\* the load generator used > {SATURATED:g} % of its core: compare CPU time"
    if any(result.is_disturbed(peer) for peer in result.measured):
        text += f"\n\n! others had the server's core for > {DISTURBED:g} % of the time"
    return text


def _target_lines(results: Results) -> Iterator[list[str]]:
    for target in TARGETS:
        spread, metric = results.spread_of(target)
        if spread is None:
            continue
        verdict = "met" if target.is_met_by(spread.median) else "NOT MET"
        digits = 2 if target.is_ratio else METRICS[metric].digits
        what = label_of(metric, results.rows[target.row])
        yield [
            target.row,
            f"{PEERS[target.ours].label}: {what}",
            show_spread(spread, digits),
            f"{target.sense} {target.bound:,g}{_against(target)}",
            verdict,
        ]


def _change_lines(results: Results) -> Iterator[list[str]]:
    for result in results.rows.values():
        for ours in OURS:
            for metric in METRICS:
                spread = result.ratio(ours, before(ours), metric) if metric in CHANGES else None
                if spread is not None:
                    what = f"{PEERS[ours].label}: {label_of(metric, result)}"
                    yield [result.row.name, what, show_spread(spread, 3)]


def _against(target: Target) -> str:
    if target.peer is not None:
        return f" × {PEERS[target.peer].label}"
    return f" × {target.other_row}" if target.other_row is not None else ""
