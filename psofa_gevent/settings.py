"""The settings of sessions: one description of each, the source of checks and documents.

A setting is a field of `SessionSettings`, which has its name, type, default, check, what it is and
what it trades in one place. These fields are the source of the checks, of the options of ``psofa
serve`` with their help, and of docs/settings.md. The constructors of the owners and
`SessionKeywords` repeat the settings, for editors and type checkers; a test compares them.

Nothing here touches a socket. A value of the wrong type raises `TypeError`, one out of range
`ValueError`; both name the parameter, the value, and what would be right.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
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
from psofa_gevent.net.sockopts import UNSENT_LOW_WATER, USER_TIMEOUT, unsent_low_water

__all__ = [
    "DEFAULT",
    "Default",
    "Heartbeat",
    "PsHeartbeat",
    "SessionKeywords",
    "SessionSettings",
    "Setting",
    "about",
    "check_framing",
    "check_idle",
    "described",
    "in_effect",
    "seconds",
    "whole",
]


class PsHeartbeat(NamedTuple):
    """What a session sends when it has sent nothing for a while: the setting ``heartbeat``.

    The tuple ``(milliseconds, message)`` is short for a heartbeat that is not `raw`.

    Attributes:
        milliseconds: the time without a send after which the heartbeat is sent, 1 or more.
        message: the message, or a function of the session (also ``async``) that returns it, or
            ``None`` to send nothing.
        raw: the message goes past the session's framing: bytes, or text as UTF-8. For protocols
            whose sign of life is not a message, such as a NUL between telegrams.
    """

    milliseconds: int
    message: Any
    raw: bool = False


Heartbeat = PsHeartbeat | tuple[int, Any]
"""The type of the setting ``heartbeat``."""

LONGEST_KEEP_ALIVE = 32_767
"""Seconds (Linux, net/tcp.h: MAX_TCP_KEEPIDLE)."""
LONGEST_IDLE = 2_000_000
"""Seconds: TCP_USER_TIMEOUT is a C int of milliseconds."""


class Default(enum.Enum):
    """The type of `DEFAULT`: type checkers can tell it from a number and from ``None``."""

    DEFAULT = enum.auto()

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final[Literal[Default.DEFAULT]] = Default.DEFAULT
"""Stands for the owner's ``send_timeout``."""


class SessionKeywords(TypedDict, total=False):
    """The parameters that all owners have, except ``framing``: for overloads of the constructors.

    Each overload has its own ``framing``: without one, messages are bytes, which a default cannot
    express to a type checker.
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


Check = Callable[[str, Any], object]
"""Takes the name and the value; raises `TypeError` or `ValueError`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The description of one setting, the source of its documentation and of its option.

    The texts are for the documentation and for ``psofa serve --help``: names of settings, callbacks
    and values stand in backticks.

    Attributes:
        name: the parameter of the constructors.
        annotation: its type, as in the signatures of the constructors.
        default: its default; `dataclasses.MISSING`: it must be given.
        check: the function that raises for a wrong value. ``None``: the part that uses the value
            checks it, since the check depends on other settings or converts the value (addresses,
            networks).
        what: what it is, in one line.
        trades: what a larger or smaller value costs and gains.
        none: what ``None`` means.
    """

    name: str
    annotation: str
    default: Any
    check: Check | None
    what: str
    trades: str
    none: str


def about(*, check: Check | None, what: str, trades: str = "", none: str = "") -> dict[str, Any]:
    """Return the metadata of a field that is a setting; the field itself has the rest."""
    return {"check": check, "what": what, "trades": trades, "none": none}


def described(settings: type[SessionSettings]) -> dict[str, Setting]:
    """Return the descriptions of a class of settings, by name; those of its base come first."""
    return {
        each.name: Setting(each.name, str(each.type), each.default, **each.metadata)
        for each in fields(settings)
    }


def whole(least: int, most: int, *, optional: bool = False) -> Check:
    """Return the check of a whole number."""
    return partial(check_int, least=least, most=most, optional=optional)


def seconds(**limits: Any) -> Check:
    """Return the check of a time: `limits` are the keyword arguments of `check_seconds`."""
    return partial(check_seconds, **limits)


def check_idle(name: str, value: object) -> None:
    """Raise unless `value` is ``None`` or a positive whole number of milliseconds."""
    check_int(name, value, 1, 2**53, optional=True)


def check_framing(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is ``None`` or a `Framing`."""
    if isinstance(value, type) and issubclass(value, Framing):
        raise TypeError(f"{name} must be an instance of a Framing, not the class {value!r}")
    if value is not None and not isinstance(value, Framing):
        raise TypeError(f"{name} must be a Framing or None, not {value!r}")


def check_unsent_low_water(name: str, value: object) -> None:
    """Raise unless `value` is ``None``, or a number of bytes and the system has the option."""
    check_int(name, value, 1, MAX_BUFFER, optional=True)
    if value is not None and UNSENT_LOW_WATER is None:
        raise ValueError(
            f"{name} must be None, not {value!r}: this system has no TCP_NOTSENT_LOWAT"
        )


def check_user_timeout(name: str, value: object) -> None:
    """Raise unless `value` is ``None``, or a number of seconds and the system has the option."""
    check_seconds(name, value, more_than_zero=True, most=LONGEST_IDLE)
    if value is not None and USER_TIMEOUT is None:
        raise ValueError(f"{name} must be None, not {value!r}: this system has no TCP_USER_TIMEOUT")


def check_heartbeat(name: str, value: object) -> None:
    """Raise unless `value` is ``None``, or a tuple of milliseconds and anything.

    Raises:
        TypeError: `value` is something else.
        ValueError: the milliseconds are less than 1, or more than 2**53.
    """
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) not in (2, 3):
        raise TypeError(_heartbeat_error(name, value))
    heartbeat = PsHeartbeat(*value)
    if type(heartbeat.milliseconds) is not int or type(heartbeat.raw) is not bool:
        raise TypeError(_heartbeat_error(name, value))
    if not 1 <= heartbeat.milliseconds <= 2**53:
        raise ValueError(_heartbeat_error(name, value))


def check_heartbeat_fits(value: Heartbeat | None, framing: Framing[Any] | None) -> None:
    """Raise `TypeError` or `ValueError` for a heartbeat that `framing` can't encode."""
    if value is None:
        return
    heartbeat = PsHeartbeat(*value)
    if callable(heartbeat.message):
        return
    try:
        if framing is not None and not heartbeat.raw:
            framing.encode(heartbeat.message)
        elif not as_bytes(heartbeat.message):
            raise ValueError(_heartbeat_error("heartbeat", value))
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"heartbeat must have text that UTF-8 can encode, not {value!r}: {exc}"
        ) from exc
    except TypeError as exc:
        raise TypeError(f"{_heartbeat_error('heartbeat', value)}: {exc}") from exc


def _heartbeat_error(name: str, value: object) -> str:
    return (
        f"{name} must be None, or milliseconds (1 or more) and a message or a function of the "
        "session, such as (30_000, b'ping') or PsHeartbeat(30_000, b'\\0', raw=True), "
        f"not {value!r}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """The settings that `PsServer`, `PsClient` and `PsMultiClient` give to each of their sessions.

    Each field is the one description of its setting. `psofa_gevent.listening.settings` and
    `psofa_gevent.connecting.settings` add the settings that only one kind of owner has.
    """

    read_buffer_size: int = field(
        default=65536,
        metadata=about(
            check=whole(1, MAX_BUFFER),
            what="the most bytes that one `on_message` gets without a framing",
            trades="a small one costs more calls in large transfers, a large one costs idle "
            "sessions nothing",
        ),
    )
    divide: int = field(
        default=10,
        metadata=about(
            check=whole(1, 1_000),
            what="slices of the idle check, which looks at each session once a second, one slice "
            "at a time",
            trades="more slices make shorter steps",
        ),
    )
    idle_milliseconds: int | None = field(
        default=60_000,
        metadata=about(
            check=check_idle,
            what="milliseconds that a session waits for bytes before it closes with `TIMEOUT`",
            trades="finds peers that vanished. Only what the peer sends counts, not what this end "
            "sends; the time in a callback does not count",
            none="never, for peers that only listen; one that vanished is not found",
        ),
    )
    send_timeout: float | None = field(
        default=1.5,
        metadata=about(
            check=seconds(),
            what="seconds without progress (the peer accepts no data) after which a send "
            "fails and the session closes",
            trades="the longer it is, the longer a stalled peer holds its sender",
            none="wait for ever",
        ),
    )
    callback_timeout: float | None = field(
        default=None,
        metadata=about(
            check=seconds(more_than_zero=True),
            what="seconds after which a running callback is ended, and its session with `FAILED`",
            trades="it cannot end a callback that never waits",
            none="never",
        ),
    )
    linger_timeout: float = field(
        default=1.0,
        metadata=about(
            check=seconds(optional=False),
            what="seconds that a close waits, at most, for the peer to take the last bytes",
            trades="a short one may lose them, a long one keeps closed sessions for slow peers",
        ),
    )
    no_delay: bool = field(
        default=True,
        metadata=about(
            check=check_bool,
            what="TCP_NODELAY: small messages leave at once",
            trades="without it the kernel gathers small messages into fewer packets, which can "
            "hold one back for 40 ms",
        ),
    )
    allow_half_open: bool = field(
        default=False,
        metadata=about(
            check=check_bool,
            what="when the peer shuts its sending side, call `on_eof` and let the session go on "
            "until it is closed",
            trades="without it the session closes",
        ),
    )
    framing: Framing[Any] | None = field(
        default=None,
        metadata=about(
            check=check_framing,
            what="how the stream is split into messages",
            none="the bytes as they come",
        ),
    )
    frame_timeout: float | None = field(
        default=None,
        metadata=about(
            check=seconds(more_than_zero=True),
            what="seconds that a message may take from its first byte to its last before the "
            "session closes with `FAILED`",
            trades="without it a peer may trickle one message for as long as it sends a byte "
            "within the idle time",
            none="any time",
        ),
    )
    high_water: int = field(
        default=1_048_576,
        metadata=about(
            check=whole(1, 2**53),
            what="bytes of posts that wait for a slow peer, at most, with those that threads have "
            "posted and the hub has not come to",
            trades="in memory they take less than twice as many, whatever their sizes; with "
            "`DROP_OLDEST` each message counts one byte more",
        ),
    )
    overflow: PsOverflow = field(
        default=PsOverflow.CLOSE,
        metadata=about(
            check=partial(check_instance, kind=PsOverflow),
            what="what happens to a post beyond `high_water`: close the session with `FAILED`, or "
            "drop the newest message, or the oldest ones",
            trades="closing costs the peer its session, dropping costs it messages",
        ),
    )
    send_buffer_size: int | None = field(
        default=None,
        metadata=about(
            check=whole(1, MAX_BUFFER, optional=True),
            what="SO_SNDBUF in bytes: a hard bound for what the kernel keeps for a peer, unsent "
            "and unacknowledged",
            trades="a number turns the kernel's own tuning off: throughput is this much per round "
            "trip, at most. Linux makes twice as much of it, up to net.core.wmem_max",
            none="the kernel's own tuning, up to megabytes",
        ),
    )
    unsent_low_water: int | None = field(
        default=None,
        metadata=about(
            check=check_unsent_low_water,
            what="TCP_NOTSENT_LOWAT: bytes that the kernel may keep unsent for a slow peer before "
            "posts and sends wait",
            trades="less takes less memory, and news is fresher when it leaves; but large "
            "transfers wake up more often (16 KiB cost some 50 % more CPU time)",
            none="on Linux four times `high_water`, from 64 KiB to the kernel's own bound; "
            "elsewhere any number",
        ),
    )
    keep_alive: float | None = field(
        default=None,
        metadata=about(
            check=seconds(more_than_zero=True, most=LONGEST_KEEP_ALIVE),
            what="seconds of silence after which the kernel probes whether the peer is there; "
            "three probes without an answer close the session with `FAILED`",
            trades="finds a peer that vanished where `idle_milliseconds` cannot, as it may be "
            "silent for long; costs packets on quiet connections",
            none="never",
        ),
    )
    user_timeout: float | None = field(
        default=None,
        metadata=about(
            check=check_user_timeout,
            what="TCP_USER_TIMEOUT in seconds: the session closes with `FAILED` when sent "
            "data stays unacknowledged for this time, or a full peer accepts no data",
            trades="a short one gives up a peer whose network is down for a while; Linux only",
            none="the kernel's own time",
        ),
    )
    heartbeat: Heartbeat | None = field(
        default=None,
        metadata=about(
            check=check_heartbeat,
            what="milliseconds, and what a session sends when it has sent nothing for this time, "
            "such as `(30_000, b'ping')`: a message, or a function of the session (also async) "
            "that returns one. `PsHeartbeat(30_000, b'\\xff', raw=True)` goes past the framing",
            trades="keeps NAT routers and the peer's idle check content; costs a packet each time",
            none="nothing",
        ),
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            check: Check | None = each.metadata["check"]
            if check is not None:
                check(each.name, value)
            if isinstance(value, (list, set, dict)):  # copied, as the caller may change it later
                object.__setattr__(self, each.name, tuple(value))
        check_heartbeat_fits(self.heartbeat, self.framing)


S = TypeVar("S", bound=SessionSettings)


def in_effect(settings: S, **chosen: object) -> S:
    """Return a copy in which the library's choices replace the settings that left it a choice.

    Args:
        settings: as they were given.
        **chosen: the owner's choices. This function adds the choice for the sessions
            (``unsent_low_water``).
    """
    copied = copy(settings)
    chosen["unsent_low_water"] = unsent_low_water(settings) or None
    for name, value in chosen.items():
        object.__setattr__(copied, name, value)
    return copied
