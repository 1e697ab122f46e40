"""Fixtures of several files of tests here."""

from __future__ import annotations

from sent_files import by_kernel, pair, path
from slow_peers import full_line, line

__all__ = ["by_kernel", "full_line", "line", "pair", "path"]
