"""A fixture of several files of tests here."""

from __future__ import annotations

from stopping import on_signal

__all__ = ["on_signal"]
