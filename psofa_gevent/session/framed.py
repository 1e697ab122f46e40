"""The receiving half of a session with a framing: chunks in, whole messages out.

Only a session that has, or had, a framing has a `FramedReceiver`; other sessions hand over each
chunk as it comes.

The messages go to ``on_message`` (`FramedReceiver.hand_over`), or to code in the session's own
greenlet that asks for the next one (`FramedReceiver.take`), even in the middle of an
``on_message``. Everything runs in that greenlet, with two exceptions: in an async callback, a new
framing and the start of TLS run in the greenlet of the asyncio loop; any thread may call
`FramedReceiver.look_soon`. ``on_message`` and the end of a turn may switch, and so may sending the
collected messages.

One read may contain 65,536 messages. After about 10 ms of handling them (`TURN`) the session gives
up its turn: the hub and all ready sessions go on, then this session with its next message. The
session waits there in a wait of its own, so a close request wakes it. The messages that its
callbacks sent leave before that wait. A session also gives up its turn when an application's own
framing has skipped bytes for as long (`Decoder.left_off`).

Error handling: malformed bytes are the peer's fault. They close the session with FAILED, without a
traceback, after the messages before them were handed over. The session handles an exception of
``on_message``.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.framing import Decoder, Framing, Raw
from psofa_gevent.hub.times import NEVER, TURN
from psofa_gevent.settings import check_framing

if TYPE_CHECKING:
    from psofa_gevent.session.sending import SendingHalf

__all__ = ["NOTHING", "FramedReceiver"]

NOTHING: Any = object()
"""Returned instead of a message if there is none."""


MOST_UNLOOKED = 64
"""Most messages between two looks at the clock: more would save less than one percent."""


class FramedReceiver:
    """Cuts what a session receives into messages."""

    __slots__ = (
        "_begun_after",
        "_decoder",
        "_left",
        "_look",
        "_messages",
        "_turn_first",
        "_turn_look",
        "_turn_round",
        "_turn_since",
        "framing",
    )

    def __init__(self, framing: Framing[Any]) -> None:
        self.framing: Framing[Any] | None = framing
        """The framing to send with; also the one to receive with, except during ``Raw(size)``."""
        self._decoder: Decoder[Any] = _decoder(framing)
        self._messages: Iterator[Any] | None = None
        """The messages of the bytes fed to the decoder; None: all of these messages were taken."""
        self._begun_after = (0, 0)
        """The number of messages, and of skips, that came before the unfinished message."""
        self._look = 0
        """The session's message count at which to look around; 0: at the next message."""
        self._turn_look = 0
        """The session's message count at which to check whether its turn is over."""
        self._turn_since = 0.0
        """When the turn began, or a message or two later; 0: not known yet."""
        self._turn_first = 0
        """The session's message count at that time."""
        self._turn_round = 0
        """The round of the hub at that time (`ReadySessions.rounds`)."""
        self._left = NEVER
        """Seconds that the unfinished message still has, while nobody waits for it."""

    @property
    def has_messages(self) -> bool:
        """Whether there may be messages that were read but not taken."""
        return self._messages is not None

    def set_framing(self, framing: Framing[Any] | None) -> None:
        """Use `framing` for all bytes that were not handed over, including those read already."""
        check_framing("framing", framing)
        decoder = _decoder(framing)
        self._messages = None  # before `unread`, which is for a decoder whose iterator was left
        self.look_soon()
        left = self._decoder.unread()
        self._decoder = decoder
        if left:
            self._messages = iter(decoder.feed(left))
        if not (isinstance(framing, Raw) and framing.size is not None):
            self.framing = framing

    def feed(self, session: SendingHalf[Any], data: bytes) -> None:
        """Take the bytes of one read. All earlier messages must have been taken."""
        self._look = self._turn_look = session._messages_received + 2  # one needs no clock
        self._turn_since = 0.0
        self._messages = iter(self._decoder.feed(data))

    def hand_over(self, session: SendingHalf[Any]) -> None:
        """Call ``on_message`` for each whole message, then send the collected messages.

        Both may switch, and so may the end of a turn.
        """
        try:
            while self._messages is not None and session._open:
                self._hand_over(session, self._messages)
        except _MalformedError as exc:
            _fail(session, exc.cause)
            return
        except BaseException:
            session._uncork_without_waiting()
            raise
        finally:
            session._uncork()
        self.set_deadline(session)

    def _hand_over(self, session: SendingHalf[Any], messages: Iterator[Any]) -> None:
        """Hand over `messages`, until they end or a callback replaces them by others.

        A read may contain thousands of messages, so a single comparison checks for all that may
        happen between two: code that closes the session, replaces the messages, or waits, lowers
        the count with which it compares (`look_soon`, `waits`).
        """
        on_message = session._manager.callbacks.on_message
        if session._cork is None:
            session._cork = []
        in_callback = False
        try:
            for message in messages:
                in_callback = True
                session._messages_received = received = session._messages_received + 1
                on_message(session, message)
                if received >= self._look:
                    self._look_around(session)
                    if not session._open or self._messages is not messages:
                        return
                    if session._cork is None:  # the callback waited, or the turn was given up
                        session._cork = []  # type: ignore[unreachable]  # by switch_out
                in_callback = False
        except Exception as exc:
            if in_callback:
                raise
            raise _MalformedError(exc) from None
        if self._messages is messages:
            self._all_taken(session)

    def look_soon(self) -> None:
        """Have `hand_over` look around before its next message. From any thread."""
        self._look = 0

    def waits(self) -> None:
        """Take note that the session's greenlet waits in the middle of its messages."""
        self._look = self._turn_look = 0

    def _look_around(self, session: SendingHalf[Any]) -> None:
        if session._messages_received >= self._turn_look:
            self._look_at_clock(session)
        # Before the caller checks whether the session is open: another thread may close it now.
        self._look = self._turn_look

    def _look_at_clock(self, session: SendingHalf[Any]) -> None:
        """Give up the turn if it is over; otherwise plan the next look at the clock.

        The next look comes after one more message, two more, four more, and so on: after as many as
        there were in this turn, but no more than its time seems to allow, and `MOST_UNLOOKED`.

        A callback's wait does not by itself give others a turn: a callback and the asyncio loop can
        wake each other, without the hub, as long as there are messages. So a wait begins a new turn
        only if the hub has begun a new round.
        """
        received = session._messages_received
        now = monotonic()
        step = 1
        hub_round = session._ready.rounds
        if not self._turn_since or hub_round != self._turn_round:
            self._turn_since, self._turn_first, self._turn_round = now, received, hub_round
        elif now - self._turn_since < TURN:
            spent = now - self._turn_since
            step = received - self._turn_first
            if spent:
                step = max(1, min(step, MOST_UNLOOKED, int(step * (TURN - spent) / spent)))
        else:
            _give_up_turn(session)
            self._turn_since, self._turn_first = monotonic(), received
            self._turn_round = session._ready.rounds
        self._turn_look = received + step

    def take(self, session: SendingHalf[Any]) -> Any:
        """The next message, or `NOTHING` if it is not whole or the session has closed."""
        self._look = 0  # perhaps called in an ``on_message``, in the middle of `hand_over`
        if self._messages is not None and session._messages_received >= self._turn_look:
            self._look_at_clock(session)
        while self._messages is not None and session._open:
            try:
                for message in self._messages:
                    if session._cork is None:
                        session._cork = []
                    session._messages_received += 1
                    return message
            except Exception as exc:
                session._uncork_without_waiting()
                _fail(session, exc)
                break
            self._all_taken(session)
        return NOTHING

    def _all_taken(self, session: SendingHalf[Any]) -> None:
        self._messages = None
        if self._decoder.left_off:
            self._messages = iter(self._decoder.feed(b""))
            _give_up_turn(session)
        elif self._decoder.spent:
            left = self._decoder.unread()
            self._decoder = _decoder(self.framing)
            if left:
                self._messages = iter(self._decoder.feed(left))

    def set_deadline(self, session: SendingHalf[Any]) -> None:
        """Set the deadline of the message that has begun; more of its bytes do not extend it.

        To be called before a wait for bytes. The time that callbacks take does not count.
        """
        timeout = session._manager.settings.frame_timeout
        if timeout is None or not session._open:
            return
        left, self._left = self._left, NEVER
        begun_after, self._begun_after = (
            self._begun_after,
            (session._messages_received, self._decoder.skips),
        )
        if not self._decoder.has_begun:
            session._frame_deadline = NEVER
        elif begun_after != self._begun_after:
            self._set_deadline(session, timeout)
        elif left != NEVER:
            self._set_deadline(session, left)
        elif session._frame_deadline == NEVER:
            self._set_deadline(session, timeout)
        elif monotonic() >= session._frame_deadline:
            self.time_out(session)

    def _set_deadline(self, session: SendingHalf[Any], seconds: float) -> None:
        session._frame_deadline = monotonic() + seconds
        if session._slice is not None:
            session._slice.due = min(session._slice.due, session._frame_deadline)

    def stop_clock(self, session: SendingHalf[Any]) -> None:
        """Stop the clock of the message that has begun, until the next `set_deadline`."""
        if session._frame_deadline != NEVER:
            self._left = max(session._frame_deadline - monotonic(), 0.0)
            session._frame_deadline = NEVER

    def time_out(self, session: SendingHalf[Any]) -> None:
        """Close with FAILED: the message that has begun was not whole in time."""
        timeout = session._manager.settings.frame_timeout
        kept = self._decoder.kept
        cause = TimeoutError(f"{kept} bytes of a message in frame_timeout={timeout:g} s")
        session._request_close(PsCloseReason.FAILED, cause)
        session._log_peer("message timed out", "%r: message timed out: %s", session, cause)

    def start_anew(self) -> bytes:
        """Forget the bytes that were read but not handed over as messages, and return them."""
        self._messages = None
        self.look_soon()
        left = self._decoder.unread()
        self._decoder = _decoder(self.framing)
        return left

    def end(self, session: SendingHalf[Any]) -> None:
        """Log if the peer's FIN came in the middle of a message."""
        if self._decoder.has_begun:
            text = "%r: the peer closed after %d bytes of a message"
            kind = "the peer closed within a message"
            session._log_peer(kind, text, session, self._decoder.kept)


def _fail(session: SendingHalf[Any], cause: Exception) -> None:
    session._request_close(PsCloseReason.FAILED, cause)
    session._log_peer("malformed message", "%r: malformed message: %s", session, cause)


def _give_up_turn(session: SendingHalf[Any]) -> None:
    if not session._open:
        return  # it may be released, and then nothing would wake it
    if session._time_limit is None:
        session._give_up_turn()
    else:
        with session._time_limit.paused():
            session._give_up_turn()


def _decoder(framing: Framing[Any] | None) -> Decoder[Any]:
    decoder = (Raw() if framing is None else framing).decoder()
    decoder.take_turns(TURN)
    return decoder


class _MalformedError(Exception):
    """Carries a decoder's exception, to tell it from one of a callback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause
