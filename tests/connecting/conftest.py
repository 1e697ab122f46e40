"""A fixture of several files of tests here."""

from __future__ import annotations

from reconnecting import address

__all__ = ["address"]
