"""Logging from where a handler that raises, or waits, must not disturb what is going on."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import gevent

__all__ = ["log_from_hub", "log_safely"]

logger = logging.getLogger("psofa_gevent")


def log_safely(level: int, message: str, *args: object, **kwargs: Any) -> None:
    """Log where a handler that raises must not undo what is going on."""
    # logging itself keeps quiet about a handler's errors unless asked (`logging.raiseExceptions`).
    if logger.isEnabledFor(level):
        with contextlib.suppress(Exception):
            logger.log(level, message, *args, **kwargs)


def log_from_hub(level: int, message: str, *args: object, **kwargs: Any) -> None:
    """Log in a greenlet of its own: a handler may block, which the hub must not."""
    gevent.spawn(logger.log, level, message, *args, **kwargs)
