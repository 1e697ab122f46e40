"""The policy by which a client connects again, and gives up. A `Link` carries it out."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass

from psofa_gevent.checks import check_instance, check_int, check_number, check_seconds
from psofa_gevent.errors import PsError

__all__ = ["PsReconnect", "check_reconnect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PsReconnect:
    """When a client connects again, with exponential backoff and jitter, and when it gives up.

    Two things count as a failure: an attempt that failed at all endpoints, and a session that
    received nothing and did not last for `steady_after`. Any other session is a success, even a
    short one, as some servers answer and close. A success sets the count of failures to 0.

    Attributes:
        first_delay: seconds before the first attempt after a session, or after the first failure.
        factor: how many times as long each delay is as the one before.
        longest_delay: seconds of the longest delay.
        jitter: the part of each delay, from 0 to 1, that is random, so that a thousand clients
            whose server restarts do not all connect at once.
        attempts: failures in a row after which the client gives up; ``None``: any number.
        give_up_after: seconds without a success after which the client gives up; ``None``: never.
        attempt_timeout: seconds for each attempt at each endpoint; ``None``: as long as the system
            takes.
        steady_after: seconds after which a session is a success even if it received nothing.
        should_retry: a function that is called after each failure and after each session, with the
            number of failures in a row and the last error (``None`` after a session). If it returns
            ``False``, the client gives up. It is not called when `attempts` or `give_up_after` has
            decided that already, so not after the last failure. It runs in a greenlet of the
            client, and may wait.
    """

    first_delay: float = 0.5
    factor: float = 2.0
    longest_delay: float = 30.0
    jitter: float = 0.5
    attempts: int | None = None
    give_up_after: float | None = None
    attempt_timeout: float | None = 10.0
    steady_after: float = 10.0
    should_retry: Callable[[int, PsError | None], bool | None] | None = None

    def __post_init__(self) -> None:
        check_seconds("first_delay", self.first_delay, optional=False, more_than_zero=True)
        check_number("factor", self.factor, 1, 1_000)
        check_seconds("longest_delay", self.longest_delay, optional=False)
        check_number("jitter", self.jitter, 0, 1)
        if self.attempts is not None:
            check_int("attempts", self.attempts, 1, 2**53)
        check_seconds("give_up_after", self.give_up_after, more_than_zero=True)
        check_seconds("attempt_timeout", self.attempt_timeout, more_than_zero=True)
        check_seconds("steady_after", self.steady_after, optional=False)
        if self.should_retry is not None and not callable(self.should_retry):
            raise TypeError(f"should_retry must be a function or None, not {self.should_retry!r}")
        if inspect.iscoroutinefunction(self.should_retry):
            raise TypeError(f"should_retry must be a plain function, not {self.should_retry!r}")

    def delay(self, failures: int) -> float:
        """Seconds to wait after `failures` in a row, with a new random `jitter` in each call."""
        try:
            longest = self.first_delay * float(self.factor) ** max(failures - 1, 0)
        except OverflowError:
            longest = self.longest_delay
        return min(longest, self.longest_delay) * (1 - self.jitter * random.random())


def check_reconnect(value: object) -> PsReconnect | None:
    """The policy of a client: for True the default one, for ``None`` and False no policy.

    Raises:
        TypeError: `value` is something else and not a `PsReconnect`.
    """
    if value is None or value is False:
        return None
    return PsReconnect() if value is True else check_instance("reconnect", value, PsReconnect)
