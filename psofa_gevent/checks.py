"""The checks of arguments: each error names the parameter, its value, and what would be right.

A value of the wrong type raises `TypeError`, one out of range `ValueError`. Nothing here touches a
socket, and nothing switches.
"""

from __future__ import annotations

import ssl
from typing import Any, TypeVar

__all__ = [
    "LONGEST_TIME",
    "MAX_BUFFER",
    "MAX_PORT",
    "check_bool",
    "check_hostname",
    "check_instance",
    "check_int",
    "check_number",
    "check_seconds",
    "check_ssl_context",
]

T = TypeVar("T")

MAX_PORT = 65_535
LONGEST_TIME = 1e9
"""Seconds: 31 years. The event loop's timers do not take infinity."""
MAX_BUFFER = 2**31 - 1
"""The largest C int, which is what socket options and recv take."""


def check_instance(name: str, value: object, kind: type[T]) -> T:
    """Return `value`, or raise `TypeError` when it is not a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {_a(kind.__name__)}, not {value!r}")
    return value


def check_bool(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_int(name: str, value: object, least: int, most: int, *, optional: bool = False) -> None:
    """Raise unless `value` is a whole number from `least` to `most`, or ``None`` if `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value}")


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value!r}")


def check_ssl_context(name: str, value: object, *, server_side: bool) -> None:
    """Raise unless `value` is ``None`` or an `ssl.SSLContext` for that side.

    Raises:
        TypeError: `value` is something else.
        ValueError: `value` is for the other side.
    """
    if value is None:
        return
    if not isinstance(value, ssl.SSLContext):
        raise TypeError(f"{name} must be an ssl.SSLContext or None, not {value!r}")
    wrong = ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER
    if value.protocol == wrong:
        side = "PROTOCOL_TLS_SERVER" if server_side else "PROTOCOL_TLS_CLIENT"
        raise ValueError(f"{name} must be made with ssl.{side}, not {value.protocol!r}")


def check_hostname(name: str, value: object, ssl_context: ssl.SSLContext) -> None:
    """Raise for a name that no certificate can have; for ``None`` if the context needs a name."""
    if value is not None:
        check_instance(name, value, str)
    try:
        is_server = ssl_context.protocol == ssl.PROTOCOL_TLS_SERVER
        asked: Any = None if is_server else value
        ssl_context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), is_server, asked)
    except (ValueError, TypeError) as exc:  # a UnicodeError is a ValueError
        raise ValueError(
            f"{name} must be a name that a certificate can have, not {value!r}: {exc}"
        ) from exc


def check_seconds(
    name: str,
    value: object,
    *,
    optional: bool = True,
    more_than_zero: bool = False,
    most: float = LONGEST_TIME,
) -> None:
    """Raise unless `value` is a number of seconds, or ``None`` if `optional`."""
    if value is None and optional:
        return
    wanted = "a number of seconds" + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {wanted}, not {value!r}")
    if not 0 <= value <= most or (more_than_zero and value == 0):
        least = "more than 0" if more_than_zero else "0 or more"
        raise ValueError(f"{name} must be {wanted}, {least} and at most {most:.0f}, not {value!r}")


def _a(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
