"""The receiving half of a session with a framing: chunks in, whole messages out.

It exists for sessions that have, or had, a framing; the others hand their chunks over as they come.
The messages go to ``on_message`` (`FramedReceiver.hand_over`), or to whoever asks for the next one
in the session's own greenlet (`FramedReceiver.take`), also in the middle of an ``on_message``. All
of it runs in that greenlet, but for `FramedReceiver.set_framing`, which a callback of the session
calls. What may switch is ``on_message``, and the end of a turn.

One read may contain 65,536 messages. After some 10 ms of them (`TURN`) the session gives up its
turn: the hub and all sessions that are ready go on, then this one with the next message. That is a
wait of the session's own, so whoever closes it ends it there; what its callbacks sent leaves
before. So it is with a framing of the application's own that skips for as long
(`Decoder.left_off`).

Error handling: malformed bytes close the session with FAILED, after the messages before
them were handed over and without a traceback, since it is the peer's fault. An exception of
``on_message`` is left to the session.
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
"""No message."""


MOST_UNLOOKED = 64
"""Messages between two looks at the clock: more would save less than one percent."""


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
        """What messages are sent with; received, too, unless that is `Raw` for so many bytes."""
        self._decoder: Decoder[Any] = _decoder(framing)
        self._messages: Iterator[Any] | None = None
        """Those that the decoder makes of what it was fed with; None: it has seen all of that."""
        self._begun_after = (0, 0)
        """How many messages, and what else, had come before the one that is not whole."""
        self._look = 0
        """How many messages of the session there are when to look around; 0: at once."""
        self._turn_look = 0
        """How many there are when to look whether its turn is over."""
        self._turn_since = 0.0
        """When its turn began, or a message or two later; 0: not known yet."""
        self._turn_first = 0
        """Messages that there had been then."""
        self._turn_round = 0
        """Which round of the hub that was (`ReadySessions.rounds`)."""
        self._left = NEVER
        """Seconds that the one that is not whole still has, while nobody waits for it."""

    @property
    def has_messages(self) -> bool:
        """Whether there may be messages that were read, and not taken."""
        return self._messages is not None

    def set_framing(self, framing: Framing[Any] | None) -> None:
        """From the next byte on: bytes that were read already, but not handed over, included."""
        check_framing("framing", framing)
        decoder = _decoder(framing)
        self._messages = None  # before the next line, as an iterator that is left
        self.look_soon()
        left = self._decoder.unread()
        self._decoder = decoder
        if left:
            self._messages = iter(decoder.feed(left))
        if not (isinstance(framing, Raw) and framing.size is not None):
            self.framing = framing

    def feed(self, session: SendingHalf[Any], data: bytes) -> None:
        """More has come. All messages before were taken."""
        self._look = self._turn_look = session._messages_received + 2  # one needs no clock
        self._turn_since = 0.0
        self._messages = iter(self._decoder.feed(data))

    def hand_over(self, session: SendingHalf[Any]) -> None:
        """Call ``on_message`` with each message that is whole."""
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
        """As long as they are the messages to be handed over: a callback may go on to others.

        A read may have thousands of them, so one comparison tells of everything that may come in
        between: whoever closes the session, changes what is handed over, or waits sees to it.
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
                    if session._cork is None:  # the callback waited, or others had their turn
                        session._cork = []  # type: ignore[unreachable]  # by switch_out
                in_callback = False
        except Exception as exc:
            if in_callback:
                raise
            raise _MalformedError(exc) from None
        if self._messages is messages:
            self._all_taken(session)

    def look_soon(self) -> None:
        """Look around before the next message: something happened. From any thread."""
        self._look = 0

    def waits(self) -> None:
        """The session waits in the middle of its messages: others may have their turn."""
        self._look = self._turn_look = 0

    def _look_around(self, session: SendingHalf[Any]) -> None:
        if session._messages_received >= self._turn_look:
            self._look_at_clock(session)
        # Before anyone looks whether the session is open: another thread may close it just now.
        self._look = self._turn_look

    def _look_at_clock(self, session: SendingHalf[Any]) -> None:
        """Let others have their turn if this session's is over; plan the next look before it is.

        That is after one more message, two more, four more, and so on: as many as there have been,
        as many as there seems to be time for, and not too many in any case.

        A wait is no turn of others by itself: a callback and the asyncio loop can wake each other
        for as long as there are messages, without the hub.
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
        """The next message, or `NOTHING`: it is not whole, or the session has closed."""
        self._look = 0  # in the middle of an ``on_message`` maybe, which handed over others
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
        """A message that has begun must be whole in time, however its bytes trickle in.

        To be called before a wait for bytes. What callbacks take is their time, and not the peer's.
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
        """Nobody waits for the message that has begun, until the next `set_deadline`."""
        if session._frame_deadline != NEVER:
            self._left = max(session._frame_deadline - monotonic(), 0.0)
            session._frame_deadline = NEVER

    def time_out(self, session: SendingHalf[Any]) -> None:
        """The message that has begun did not come in time."""
        timeout = session._manager.settings.frame_timeout
        kept = self._decoder.kept
        cause = TimeoutError(f"{kept} bytes of a message in frame_timeout={timeout:g} s")
        session._request_close(PsCloseReason.FAILED, cause)
        session._log_peer("message timed out", "%r: message timed out: %s", session, cause)

    def start_anew(self) -> bytes:
        """Forget what was read and belongs to no message that was handed over, and return it."""
        self._messages = None
        self.look_soon()
        left = self._decoder.unread()
        self._decoder = _decoder(self.framing)
        return left

    def end(self, session: SendingHalf[Any]) -> None:
        """The peer sends no more."""
        if self._decoder.has_begun:
            text = "%r: the peer closed after %d bytes of a message"
            kind = "the peer closed within a message"
            session._log_peer(kind, text, session, self._decoder.kept)


def _fail(session: SendingHalf[Any], cause: Exception) -> None:
    session._request_close(PsCloseReason.FAILED, cause)
    session._log_peer("malformed message", "%r: malformed message: %s", session, cause)


def _give_up_turn(session: SendingHalf[Any]) -> None:
    if not session._open:
        return  # it may be released, and nobody would let it go on
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
    """Carries what a decoder raised past what callbacks raise."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause
