"""The command: ``python -m benchmarks``."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("psutil", "rich")
"""Packages that every run needs. The others of the extra are for one peer, or for ``--plot``."""


def check() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"benchmarks: not installed: {', '.join(missing)}; pip install '.[bench]'")


if __name__ == "__main__":
    check()
    from benchmarks.cli import main

    sys.exit(main())
