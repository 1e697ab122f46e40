"""What can be wrong with a command line, or with the application that it names."""

from __future__ import annotations

__all__ = ["ModuleFailedError", "UsageError"]


class UsageError(Exception):
    """The command line asks for what is not there; its text is the one line that the user sees."""


class ModuleFailedError(Exception):
    """The served module raised, imported or called; ``__cause__`` is what it raised."""
