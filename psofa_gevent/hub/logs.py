"""The log of the library: makes its records, and hands them to the handlers.

`log` may be called anywhere, in the middle of anything: in the hub, in a coroutine, in the greenlet
of a session. It lets no other greenlet of the library or the program run, does not wait, and raises
no `Exception` of a handler. (A handler's `SystemExit` or `KeyboardInterrupt` leaves it.) A thread
without a hub runs the handlers itself, and waits for them. For every record:

- It is made at the call: it has the caller's time, thread and place in the source (``funcName``,
  ``lineno``), and its message describes the state at that moment.
- It is handed to the handlers at once, in a greenlet of the log (`LogGreenlet`). When a handler
  waits (for a patched socket, a lock), the caller goes on, and later records wait and follow in the
  same order. Once a handler has waited, its record and the later ones have their messages as text,
  and no longer hold the objects in them (`_settle`). So no kill and no time limit of a callback
  interrupts a handler, and a handler that waits neither holds up a session nor wakes it.
- Handlers and filters see the context variables of the caller, or those that the caller gives.
- Its message has at most `LONGEST` characters, in one line, whatever a peer has sent and an
  exception says. The same holds for the text of each exception in a traceback, not counting the
  frames.

The number of waiting records is bounded (`MOST_WAITING`); further records are only counted. A
shutdown, and the end of the process, wait at most `LAST_MOMENT` for the waiting records.

A peer may repeat what it does as often as it likes. So the log warns about each kind of such events
once a minute (`PeerLog`), with their number.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from time import monotonic
from typing import Any, NamedTuple

import gevent
from gevent import get_hub, getcurrent, monkey
from gevent._hub_local import get_hub_if_exists  # there is no public way to ask without making one
from gevent.event import Event
from greenlet import greenlet

from psofa_gevent.hub.forking import in_child, unwatch, watch
from psofa_gevent.hub.times import SHORTEST_TIMER

__all__ = ["LogGreenlet", "PeerLog", "flush", "log"]

logger = logging.getLogger("psofa_gevent")

LONGEST = 1_000
"""The most characters of a message, and of the text of an exception in a traceback."""
LONGEST_TAIL = 200
"""Characters of a shortened text that come from its end."""
MOST_FRAMES = 100
"""A traceback with more frames is shortened: this many parts, which are frames and texts of
exceptions, are kept at its beginning, and as many at its end."""
MOST_WAITING = 10_000
"""The most records that wait for a slow handler. Each takes about 1 kB, more with a traceback."""
LAST_MOMENT = 1.0
"""Seconds that handlers have for waiting records, at the end of a shutdown and of the process."""
WARNING_PERIOD = 60.0
"""Seconds from one warning about peers to the next of the same kind."""

# Skips ``Hub.switch`` and the overrides of `LogGreenlet`.
_switch = greenlet.switch


def log(
    level: int,
    message: str,
    *args: object,
    exc_info: BaseException | None = None,
    context: Context | None = None,
    stacklevel: int = 1,
) -> None:
    """Log, from any greenlet and any OS thread. Lets only the log's own greenlet run.

    Args:
        level: the level; if it is off, the call has no effect and almost no cost.
        message: the message, a %-format of `args`.
        *args: the arguments of the format.
        exc_info: an exception whose traceback the record gets.
        context: the context in which handlers and filters run (in a copy, so that the context may
            be entered at the same time); by default the caller's.
        stacklevel: whose line the record has: 1 for the caller of this function, 2 for its caller.
    """
    if not logger.isEnabledFor(level):
        return
    # Whatever a handler, a filter or a logger class of the program does: the library goes on.
    # logging itself reports a handler's errors only if `logging.raiseExceptions` is set.
    with contextlib.suppress(Exception):
        path, line, function, _stack = logger.findCaller(stacklevel=stacklevel + 1)
        text, rest = _bounded(message, args)
        info = None if exc_info is None else (type(exc_info), exc_info, exc_info.__traceback__)
        record = logger.makeRecord(logger.name, level, path, line, text, rest, info, function)
        if exc_info is not None and _says_too_much(exc_info):
            # Formatters look here first, and store here the text that they make of a traceback.
            record.exc_text = _bounded_traceback(exc_info)
        copied = copy_context() if context is None else context.copy()
        hub: Any = get_hub_if_exists()
        if hub is None or hub.loop is None:
            copied.run(logger.handle, record)
        else:
            _log_of(hub).add(_Entry(record, copied))


def flush(timeout: float = LAST_MOMENT) -> None:
    """Wait until the records of this thread are handed over, for at most `timeout` seconds.

    Returns at once in the hub, and in a handler.
    """
    hub: Any = get_hub_if_exists()
    current = getcurrent()
    if hub is not None and hub.loop is not None and current is not hub:
        hub_log = _log_of(hub)
        if current is not hub_log.greenlet:
            hub_log.flush(timeout)


class _Entry(NamedTuple):
    record: logging.LogRecord
    context: Context


def _settle(record: logging.LogRecord) -> None:
    """Turn the message of a record into text now, as the objects in it may change later.

    So the record does not keep these objects alive, which may be sessions.
    """
    if record.args:
        record.msg, record.args = record.getMessage(), ()


class _HubLog:
    """The records of the thread of one hub that have not been handed over."""

    # A signal handler may log, or shut a server down, between any two lines. So a caller first puts
    # its record where every other caller finds it, and only then looks who hands it over.

    __slots__ = ("empty", "entries", "greenlet", "handled", "hub", "lost")

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self.entries: deque[_Entry] = deque()
        self.greenlet: LogGreenlet | None = None
        """The greenlet that hands them over now; one of its handlers may be waiting."""
        self.handled: logging.LogRecord | None = None
        """The record that the handlers have now, as long as none of them has waited."""
        self.empty: Event | None = None
        """Set when no records are left; None: no `flush` waits."""
        self.lost = 0
        """The number of records beyond `MOST_WAITING`."""

    def add(self, entry: _Entry) -> None:
        if len(self.entries) >= MOST_WAITING:
            self.lost += 1
            return
        if self.greenlet is not None:  # its handler waits, or has called this
            _settle(entry.record)
        self.entries.append(entry)
        if self.greenlet is None:
            _switch(LogGreenlet(self))

    def flush(self, timeout: float) -> None:
        if self.entries and self.greenlet is None:  # a signal's exception has ended it
            _switch(LogGreenlet(self))
        if self.greenlet is not None:
            self.empty = self.empty or Event()
            self.empty.wait(timeout)

    def hand_over(self) -> None:
        """Hand over all records, in a `LogGreenlet`. The handlers may wait."""
        while self.entries:
            entry = self.entries.popleft()
            try:
                self.handled = entry.record
                entry.context.run(logger.handle, entry.record)
                self.handled = None
                if self.entries:  # logged while a handler waited: let other greenlets run
                    gevent.sleep(0)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                pass
            del entry
            if self.lost and not self.entries:
                lost, self.lost = self.lost, 0
                log(logging.WARNING, "%d records are lost: the log's handlers are too slow", lost)


class LogGreenlet(greenlet):
    """Hands records over, and lets the caller of `log` go on as soon as a handler waits.

    It is a child of the caller's greenlet, so that it returns there at its end. When a handler
    waits, it becomes a child of the hub, as greenlets that wait through gevent should be.
    """

    __slots__ = ("_is_on_its_way", "_log")

    def __init__(self, hub_log: _HubLog) -> None:
        super().__init__()
        self._log = hub_log
        self._is_on_its_way = False
        """Whether it was about to wait, and let the caller go on before it switched to the hub."""

    def run(self) -> None:
        """Hand over all records, also those that come meanwhile."""
        hub_log = self._log
        while hub_log.entries and hub_log.greenlet is None:
            hub_log.greenlet = self
            try:
                hub_log.hand_over()
            finally:
                hub_log.greenlet = hub_log.handled = None
                if hub_log.empty is not None:
                    hub_log.empty.set()
                    hub_log.empty = None

    def switch_out(self) -> None:
        """Called by gevent when a handler is about to wait: the caller goes on."""
        record, self._log.handled = self._log.handled, None
        if record is not None:
            with contextlib.suppress(Exception):  # a repr may raise
                _settle(record)
        caller: Any = self.parent
        self.parent = self._log.hub
        if caller is not self._log.hub:
            self._is_on_its_way = True
            _switch(caller)

    def switch(self, *args: Any, **kwargs: Any) -> Any:
        """Called by gevent, in the hub, when the handler's wait is over."""
        self._come_to_the_hub()
        return super().switch(*args, **kwargs)

    def throw(self, *args: Any) -> Any:
        """Called by gevent, in the hub, to interrupt a handler that waits."""
        self._come_to_the_hub()
        return super().throw(*args)

    def _come_to_the_hub(self) -> None:
        if self._is_on_its_way:
            self._is_on_its_way = False
            _switch(self)  # it goes on in `switch_out`, and switches to the hub, which is here


def _log_of(hub: Any) -> _HubLog:
    found: _HubLog | None = getattr(_of_thread, "log", None)
    if found is None or found.hub is not hub:
        found = _of_thread.log = _HubLog(hub)
    return found


@in_child
def _forget() -> None:
    """Drop the records in a child process, also the one in work: the parent hands them over."""
    found: _HubLog | None = getattr(_of_thread, "log", None)
    if found is not None:
        found.entries.clear()
        _of_thread.log = None


# The original: in a patched process threading.local works on greenlets.
_of_thread: Any = monkey.get_original("threading", "local")()
atexit.register(flush)  # runs before that of logging, registered earlier, closes the handlers


# Shortening of texts that are too long


def _bounded(message: str, args: tuple[object, ...]) -> tuple[str, tuple[object, ...]]:
    """Return a message and its arguments, which make at most `LONGEST` characters in one line."""
    try:
        text = message % args if args else message
    except Exception:  # from the repr of a user's object
        args = tuple(map(_showable, args))
        text = message % args
    if len(text) <= LONGEST and text.isprintable():
        return message, args
    return _shortened(text), ()


def _showable(value: object) -> object:
    try:
        return value if repr(value) is not None and str(value) is not None else None
    except Exception as exc:
        return f"<{type(value).__name__}, whose repr raised {type(exc).__name__}>"


def _shortened(text: str) -> str:
    """Shorten a text to its beginning and its end; control characters are escaped (CWE-117)."""
    if len(text) > LONGEST:
        text = _without_middle(text)
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    text = "".join(escaped)
    return text if len(text) <= LONGEST else _without_middle(text)


def _without_middle(text: str) -> str:
    left_out = f" […{len(text) - LONGEST:,} characters and some…] "
    head = LONGEST - LONGEST_TAIL - len(left_out)
    return text[:head] + left_out + text[-LONGEST_TAIL:]


def _says_too_much(exc: BaseException) -> bool:
    """Whether the traceback of an exception and of those behind it would be too long."""
    frames = 0
    for each in _with_causes(exc):
        notes = getattr(each, "__notes__", ())
        text = each.text if isinstance(each, SyntaxError) else ""  # a traceback shows this line
        said = (_showable(each), text, *(notes if isinstance(notes, (list, tuple)) else ()))
        if sum(len(str(_showable(part))) for part in said) > LONGEST:
            return True
        frames += sum(1 for _ in traceback.walk_tb(each.__traceback__))
    return frames > MOST_FRAMES


def _with_causes(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [exc]
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        left += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions


def _bounded_traceback(exc: BaseException) -> str:
    """Make a traceback with the texts of exceptions shortened, and without its middle if long."""
    told = traceback.TracebackException.from_exception(exc)
    _shorten_notes(told)
    parts = list(told.format())
    left_out = len(parts) - 2 * MOST_FRAMES
    if left_out > 0:
        parts[MOST_FRAMES:-MOST_FRAMES] = [f"  … {left_out} more\n"]
    # A frame is a part of a few lines; a longer part is the text of an exception.
    texts = (part if len(part) <= LONGEST else _without_middle(part) for part in parts)
    return "".join(texts).rstrip("\n")


def _shorten_notes(told: traceback.TracebackException | None) -> None:
    """Shorten the notes of an exception, and of those behind it, to one of `LONGEST` characters."""
    while told is not None:
        notes: object = getattr(told, "__notes__", None)
        if isinstance(notes, (list, tuple)):
            text = "\n".join(str(_showable(note)) for note in notes)
            if len(text) > LONGEST:
                told.__notes__ = [_without_middle(text)]
        for each in told.exceptions or ():
            _shorten_notes(each)
        told = told.__cause__ or told.__context__


# Events that peers cause


class _Window:
    """The time after a warning in which further events of its kind are only counted."""

    __slots__ = ("_hub", "_timer", "began", "count", "first", "name")

    def __init__(self) -> None:
        self.began = monotonic()
        self.count = 0
        """The number of events without a warning."""
        self.name = self.first = ""
        """The owner and the first event, as texts, which keep no objects alive."""
        self._hub: Any = None
        self._timer: Any = None

    def is_over(self) -> bool:
        """Whether the next event is a warning. Not while the timer has yet to report others."""
        return self._timer is None and monotonic() - self.began >= WARNING_PERIOD

    def start_timer(self, function: Callable[[str], None], kind: str) -> None:
        """Have `function` called with `kind` at the end of the window."""
        self._hub = get_hub()
        left = self.began + WARNING_PERIOD - monotonic()
        self._timer = watch(self._hub.loop.timer(max(left, SHORTEST_TIMER), ref=False))
        self._timer.start(function, kind)

    def stop_timer(self) -> None:
        """Stop the timer. Has no effect when there is none."""
        if self._timer is not None and self._hub.loop is not None:  # else it ended with the hub
            unwatch(self._timer)
        self._timer = self._hub = None


class PeerLog:
    """Logs what the peers of one owner do: one warning a minute, at most, for each kind of event.

    The first event of a kind is a WARNING. For a minute further ones are DEBUG, and counted. When
    the minute is over, another WARNING has their number, and the next minute begins. A shutdown
    logs their number at once, at INFO. All of it belongs to the hub's thread, and may be called in
    the hub.
    """

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}

    def tell(
        self,
        owner: object,
        kind: str,
        message: str,
        *args: object,
        context: Context | None = None,
        stacklevel: int = 1,
    ) -> None:
        """Log what a peer did.

        Args:
            owner: the server or client whose peer it is.
            kind: the kind of event, in a few words. There are only a few kinds.
            message: as for `log`.
            *args: as for `log`.
            context: as for `log`.
            stacklevel: as for `log`.
        """
        if not logger.isEnabledFor(logging.WARNING):
            return
        level = logging.DEBUG
        window = self._windows.get(kind)
        if window is None or window.is_over():
            self._windows[kind] = _Window()
            level = logging.WARNING
        else:
            window.count += 1
            if window.count == 1:
                window.name = repr(owner)
                text, rest = _bounded(message, args)
                window.first = text % rest if rest else text
                window.start_timer(self._end_window, kind)
        log(level, message, *args, context=context, stacklevel=stacklevel + 1)

    def _end_window(self, kind: str) -> None:
        window = self._windows[kind]
        self._windows[kind] = _Window()
        self._tell_count(logging.WARNING, window, kind)

    def close(self) -> None:
        """Log the numbers of the counted events, and stop the timers: the owner has stopped."""
        for kind, window in self._windows.items():
            if window.count:
                self._tell_count(logging.INFO, window, kind)

    def _tell_count(self, level: int, window: _Window, kind: str) -> None:
        window.stop_timer()
        count, window.count = window.count, 0
        what = (window.name, count, monotonic() - window.began, kind, window.first)
        log(level, "%s: %d more in the last %.0f s: %s; the first of them: %s", *what)
