"""Fixtures of several files of tests here."""

from __future__ import annotations

from log_handlers import holding, keeping
from stopping import on_signal

__all__ = ["holding", "keeping", "on_signal"]
