"""Keeps ratios to peers in a file, and compares later runs with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import METRICS
from benchmarks.report import table
from benchmarks.results import Results
from benchmarks.targets import TARGETS

__all__ = ["compare", "keep"]

TOLERANCE = 0.08
"""The share by which a ratio may get worse: more than the spread of runs on a quiet machine."""
TOLERANCES = {"p99_ms": 0.3, "kb_per_session": 0.05, "idle_cpu_percent": 0.5}


def _ratios(results: Results) -> Iterator[tuple[str, str, float]]:
    """The ratios of the targets, by CPU time: a busy load generator limits rates."""
    for target in TARGETS:
        metric = "per_cpu_second" if target.metric == "rate" else target.metric
        result = results.rows.get(target.row)
        if target.peer is None or result is None:
            continue
        ratio = result.ratio(target.ours, target.peer, metric)
        if ratio is not None:
            yield f"{target.row} {metric} {target.ours}/{target.peer}", metric, ratio.median


def keep(results: Results, path: Path) -> None:
    """Write the ratios of `results` into the file, beside those of other Python versions.

    Ratios that `results` does not have stay as they are.
    """
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    kept = document.setdefault(results.python, {})
    for name, metric, ratio in _ratios(results):
        kept[name] = {
            "ratio": round(ratio, 3),
            "tolerance": TOLERANCES.get(metric, TOLERANCE),
        }
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def compare(results: Results, path: Path) -> tuple[str, bool]:
    """Compare the ratios of `results` with the kept ones.

    Returns:
        A table; and False if no ratio was compared, or one got worse by more than its tolerance.

    Raises:
        KeyError: the file has no ratios for this version of Python.
    """
    kept = json.loads(path.read_text())[results.python]
    lines = []
    for name, metric, ratio in _ratios(results):
        if name not in kept:
            continue
        before, tolerance = kept[name]["ratio"], kept[name]["tolerance"]
        loss = 1 - ratio / before if METRICS[metric].more_is_better else ratio / before - 1
        verdict = "WORSE" if loss > tolerance else "ok"
        lines.append([name, f"{before:.2f}", f"{ratio:.2f}", f"{tolerance:.0%}", verdict])
    is_good = bool(lines) and all(line[-1] == "ok" for line in lines)
    return table(("ratio", "kept", "now", "tolerance", ""), lines), is_good
