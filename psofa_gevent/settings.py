"""The settings that servers and clients share, checked where they are given.

Nothing here touches a socket. A value of the wrong type raises `TypeError`, one out of range
`ValueError`; both name the parameter, the value, and what would be right.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypedDict, TypeVar

from psofa_gevent.checks import (
    MAX_BUFFER,
    check_bool,
    check_instance,
    check_int,
    check_seconds,
)
from psofa_gevent.enums import PsOverflow
from psofa_gevent.framing import Framing
from psofa_gevent.messages import as_bytes
from psofa_gevent.net.sockopts import UNSENT_LOW_WATER, USER_TIMEOUT

__all__ = [
    "DEFAULT",
    "Default",
    "Heartbeat",
    "PsHeartbeat",
    "SessionKeywords",
    "SessionSettings",
    "check_framing",
    "check_heartbeat",
]

T = TypeVar("T")


class PsHeartbeat(NamedTuple):
    """What a session sends when it has sent nothing for a while: the setting ``heartbeat``.

    The tuple ``(milliseconds, message)`` is short for one that is not `raw`.

    Attributes:
        milliseconds: of sending nothing, 1 or more.
        message: what is sent then, or a function of the session (also ``async``) that returns it,
            or ``None`` for nothing.
        raw: the session's framing leaves the message alone: bytes, or text as UTF-8. For protocols
            whose sign of life is no message, such as a NUL between telegrams.
    """

    milliseconds: int
    message: Any
    raw: bool = False


Heartbeat = PsHeartbeat | tuple[int, Any]
"""What the setting may be."""

LONGEST_KEEP_ALIVE = 32_767
"""Seconds (Linux, net/tcp.h: MAX_TCP_KEEPIDLE)."""
LONGEST_IDLE = 2_000_000
"""Seconds: TCP_USER_TIMEOUT is a C int of milliseconds."""


class Default(enum.Enum):
    """The type of `DEFAULT`, so that type checkers know it from a number and from ``None``."""

    DEFAULT = enum.auto()

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final[Literal[Default.DEFAULT]] = Default.DEFAULT
"""Stands for the owner's ``send_timeout``."""


class SessionKeywords(TypedDict, total=False):
    """The parameters that all owners have, but for ``framing``: for overloads of the constructors.

    Without a framing messages are bytes, which no default can tell a type checker.
    """

    read_buffer_size: int
    divide: int
    idle_milliseconds: int | None
    send_timeout: float | None
    callback_timeout: float | None
    linger_timeout: float
    no_delay: bool
    allow_half_open: bool
    frame_timeout: float | None
    high_water: int
    overflow: PsOverflow
    send_buffer_size: int | None
    unsent_low_water: int | None
    keep_alive: float | None
    user_timeout: float | None
    heartbeat: Heartbeat | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What `PsServer`, `PsClient` and `PsMultiClient` give to each of their sessions.

    Attributes:
        read_buffer_size: bytes, the most that one ``on_message`` gets.
        divide: slices of the idle scan; each session is looked at once a second.
        idle_milliseconds: a session that waits longer for bytes closes with `TIMEOUT`; ``None``:
            never.
        send_timeout: seconds in which the peer takes nothing, after which a send fails.
        callback_timeout: seconds after which a running callback is ended; ``None``: never.
        linger_timeout: seconds for which a close waits for the peer to take the last bytes.
        no_delay: TCP_NODELAY.
        allow_half_open: the peer's FIN calls ``on_eof`` and does not close the session.
        framing: what cuts the bytes into messages; ``None``: nothing does.
        frame_timeout: seconds that a message may take from its first byte to its last; ``None``:
            any time.
        high_water: bytes of posts that wait for the peer, at most.
        overflow: what happens to a post beyond that.
        send_buffer_size: SO_SNDBUF; ``None``: the kernel's own tuning.
        unsent_low_water: bytes that the kernel may keep unsent; ``None``: it goes by
            `high_water` (`psofa_gevent.net.sockopts.unsent_low_water`).
        keep_alive: seconds of silence after which the kernel probes the peer; ``None``: never.
        user_timeout: seconds that sent data may stay unacknowledged; ``None``: the kernel's own.
        heartbeat: milliseconds of sending nothing, and what is sent then; ``None``: nothing.
    """

    read_buffer_size: int
    divide: int
    idle_milliseconds: int | None
    send_timeout: float | None
    callback_timeout: float | None
    linger_timeout: float
    no_delay: bool
    allow_half_open: bool
    framing: Framing[Any] | None
    frame_timeout: float | None
    high_water: int
    overflow: PsOverflow
    send_buffer_size: int | None
    unsent_low_water: int | None
    keep_alive: float | None
    user_timeout: float | None
    heartbeat: Heartbeat | None

    def __post_init__(self) -> None:
        check_int("read_buffer_size", self.read_buffer_size, 1, MAX_BUFFER)
        check_int("divide", self.divide, 1, 1_000)
        check_idle("idle_milliseconds", self.idle_milliseconds)
        check_seconds("send_timeout", self.send_timeout)
        check_seconds("callback_timeout", self.callback_timeout, more_than_zero=True)
        check_seconds("linger_timeout", self.linger_timeout, optional=False)
        check_bool("no_delay", self.no_delay)
        check_bool("allow_half_open", self.allow_half_open)
        check_framing("framing", self.framing)
        check_seconds("frame_timeout", self.frame_timeout, more_than_zero=True)
        check_int("high_water", self.high_water, 1, 2**53)
        check_instance("overflow", self.overflow, PsOverflow)
        if self.send_buffer_size is not None:
            check_int("send_buffer_size", self.send_buffer_size, 1, MAX_BUFFER)
        if self.unsent_low_water is not None:
            check_int("unsent_low_water", self.unsent_low_water, 1, MAX_BUFFER)
            if UNSENT_LOW_WATER is None:
                raise ValueError(
                    f"unsent_low_water must be None, not {self.unsent_low_water!r}: this system "
                    "has no TCP_NOTSENT_LOWAT"
                )
        check_seconds("keep_alive", self.keep_alive, more_than_zero=True, most=LONGEST_KEEP_ALIVE)
        check_seconds("user_timeout", self.user_timeout, more_than_zero=True, most=LONGEST_IDLE)
        check_heartbeat(self.heartbeat, self.framing)
        if self.user_timeout is not None and USER_TIMEOUT is None:
            raise ValueError(
                f"user_timeout must be None, not {self.user_timeout!r}: this system has no "
                "TCP_USER_TIMEOUT"
            )


def check_idle(name: str, value: object) -> None:
    """Raise unless `value` is ``None`` or a positive whole number of milliseconds."""
    if value is not None:
        check_int(name, value, 1, 2**53)


def check_framing(name: str, value: object) -> None:
    """Raise `TypeError` for anything but ``None`` and a `Framing`."""
    if isinstance(value, type) and issubclass(value, Framing):
        raise TypeError(f"{name} must be an instance of a Framing, not the class {value!r}")
    if value is not None and not isinstance(value, Framing):
        raise TypeError(f"{name} must be a Framing or None, not {value!r}")


def check_heartbeat(value: object, framing: Framing[Any] | None) -> None:
    """Raise unless `value` is ``None``, or milliseconds and what can be sent.

    Raises:
        TypeError: it is something else.
        ValueError: the milliseconds are less than 1, or the framing can't carry the message.
    """
    if value is None:
        return
    error = (
        "heartbeat must be None, or milliseconds (1 or more) and a message or a function of the "
        "session, such as (30_000, b'ping') or PsHeartbeat(30_000, b'\\0', raw=True), "
        f"not {value!r}"
    )
    if not isinstance(value, tuple) or len(value) not in (2, 3):
        raise TypeError(error)
    heartbeat = PsHeartbeat(*value)
    if type(heartbeat.milliseconds) is not int or type(heartbeat.raw) is not bool:
        raise TypeError(error)
    if not 1 <= heartbeat.milliseconds <= 2**53:
        raise ValueError(error)
    if callable(heartbeat.message):
        return
    try:
        if framing is not None and not heartbeat.raw:
            framing.encode(heartbeat.message)
        elif not as_bytes(heartbeat.message):
            raise ValueError(error)
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"heartbeat must have text that UTF-8 can encode, not {value!r}: {exc}"
        ) from exc
    except TypeError as exc:
        raise TypeError(f"{error}: {exc}") from exc
