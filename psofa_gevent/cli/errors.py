"""The errors in a command line, or in the application that it names."""

from __future__ import annotations

__all__ = ["ModuleFailedError", "UsageError"]


class UsageError(Exception):
    """The command line is wrong. The text of this error is the one line that the user sees."""


class ModuleFailedError(Exception):
    """The served module raised when it was imported or called; ``__cause__`` is its exception."""
