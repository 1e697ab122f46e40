"""The log of the library: where each of its records is made, and handed to the handlers.

`log` may be called anywhere, in the middle of anything: in the hub, in a coroutine, in the greenlet
of a session. It lets nobody else run, waits for nothing, and raises nothing of a handler's. What
holds for every record:

- It is made at the call: it has the caller's time, thread and place in the source (``funcName``,
  ``lineno``), and its message says what was so at that moment.
- It is at once handed to the handlers, in a greenlet of the log's own (`LogGreenlet`). When one of
  them waits (for a patched socket, a lock), whoever logged goes on, and what is logged meanwhile
  lines up and comes in the same order afterwards. From then on a record has its message as text,
  without what that tells of (`_settle`). So no kill, and no time limit of a callback, hits
  a handler in its middle, and no handler that waits holds up, or wakes, a session.
- Handlers and filters see context variables: those of the caller, or those that it gives.
- Its message has at most `LONGEST` characters, in one line, whatever a peer has sent and an
  exception says. So has the text of each exception in a traceback; the frames are not counted.

What waits is bounded (`MOST_WAITING`), and what is beyond is counted. A shutdown, and the end of
the process, wait a moment (`LAST_MOMENT`) for it. A thread without a hub calls the handlers itself.

What a peer does, over and over if it likes, is a warning once a minute for each kind of thing
(`PeerLog`), with the number of those like it.
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
"""Characters of a message, and of what an exception says in a traceback."""
LONGEST_TAIL = 200
"""Characters of them that are the end of what was longer."""
MOST_FRAMES = 100
"""Frames of a traceback that is shortened: the last ones."""
MOST_WAITING = 10_000
"""Records that wait for a handler that waits. Each takes about 1 kB, more with a traceback."""
LAST_MOMENT = 1.0
"""Seconds that handlers have for what waits, at the end of a shutdown and of the process."""
WARNING_PERIOD = 60.0
"""Seconds from one warning about peers to the next of the same kind."""

# Past ``Hub.switch`` and the overrides of `LogGreenlet`.
_switch = greenlet.switch


def log(
    level: int,
    message: str,
    *args: object,
    exc_info: BaseException | None = None,
    context: Context | None = None,
    stacklevel: int = 1,
) -> None:
    """Log, from any greenlet and any OS thread. Lets no other greenlet of the thread run.

    Args:
        level: the level; without effect, and as good as without cost, where that is off.
        message: the message, a %-format of `args`.
        *args: what goes into it.
        exc_info: an exception whose traceback is to be told.
        context: the context in which handlers and filters run (a copy of it, so it may be entered
            at the same time); by default the caller's.
        stacklevel: which caller the record is about: 1 for who calls this, 2 for who calls that.
    """
    if not logger.isEnabledFor(level):
        return
    # Whatever a handler, a filter or a logger class of the program's does: the library goes on.
    # logging itself keeps quiet about a handler's errors unless asked (`logging.raiseExceptions`).
    with contextlib.suppress(Exception):
        path, line, function, _stack = logger.findCaller(stacklevel=stacklevel + 1)
        text, rest = _bounded(message, args)
        info = None if exc_info is None else (type(exc_info), exc_info, exc_info.__traceback__)
        record = logger.makeRecord(logger.name, level, path, line, text, rest, info, function)
        if exc_info is not None and _says_too_much(exc_info):
            # Where formatters look first, and put what they make of it.
            record.exc_text = _bounded_traceback(exc_info)
        copied = copy_context() if context is None else context.copy()
        hub: Any = get_hub_if_exists()
        if hub is None or hub.loop is None:
            copied.run(logger.handle, record)
        else:
            _log_of(hub).add(_Entry(record, copied))


def flush(timeout: float = LAST_MOMENT) -> None:
    """Wait until what was logged in this thread has been handed over; at most so many seconds.

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
    """Let the message stay as it is: what it tells of may be otherwise when somebody looks again.

    And is not kept by it: it may well be a session.
    """
    if record.args:
        record.msg, record.args = record.getMessage(), ()


class _HubLog:
    """What was logged in the thread of one hub, and has not been handed over."""

    # A signal handler may log, or shut a server down, between any two lines. So whoever logs first
    # puts the record where any other will find it, and only then looks who hands it over.

    __slots__ = ("empty", "entries", "greenlet", "handled", "hub", "lost")

    def __init__(self, hub: Any) -> None:
        self.hub = hub
        self.entries: deque[_Entry] = deque()
        self.greenlet: LogGreenlet | None = None
        """What hands them over just now; a handler of it may wait."""
        self.handled: logging.LogRecord | None = None
        """What the handlers have just now, while none of them has waited."""
        self.empty: Event | None = None
        """Set when nothing is left, for who waits for that."""
        self.lost = 0

    def add(self, entry: _Entry) -> None:
        if len(self.entries) >= MOST_WAITING:
            self.lost += 1
            return
        if self.greenlet is not None:  # whose handler waits, or has called this
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
        """Hand over all that is there. In a `LogGreenlet`, and where the handlers may wait."""
        while self.entries:
            entry = self.entries.popleft()
            try:
                self.handled = entry.record
                entry.context.run(logger.handle, entry.record)
                self.handled = None
                if self.entries:  # in the time in which a handler has waited: let others run
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
    """Hands records over, and lets whoever logged go on as soon as a handler waits.

    It is a child of that greenlet, so that it ends there. When it has to wait it becomes a child of
    the hub, as those that wait in gevent's way should be.
    """

    __slots__ = ("_is_on_its_way", "_log")

    def __init__(self, hub_log: _HubLog) -> None:
        super().__init__()
        self._log = hub_log
        self._is_on_its_way = False
        """Whether it was going to wait, and let the caller go on before it came to the hub."""

    def run(self) -> None:
        """Hand over all that is there, and what comes meanwhile."""
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
            with contextlib.suppress(Exception):  # of a repr
                _settle(record)
        caller: Any = self.parent
        self.parent = self._log.hub
        if caller is not self._log.hub:
            self._is_on_its_way = True
            _switch(caller)

    def switch(self, *args: Any, **kwargs: Any) -> Any:
        """Called by gevent, in the hub, when what the handler waits for has come."""
        self._come_to_the_hub()
        return super().switch(*args, **kwargs)

    def throw(self, *args: Any) -> Any:
        """Called by gevent, in the hub, to interrupt a handler that waits."""
        self._come_to_the_hub()
        return super().throw(*args)

    def _come_to_the_hub(self) -> None:
        if self._is_on_its_way:
            self._is_on_its_way = False
            _switch(self)  # it switches to the hub, which is here


def _log_of(hub: Any) -> _HubLog:
    found: _HubLog | None = getattr(_of_thread, "log", None)
    if found is None or found.hub is not hub:
        found = _of_thread.log = _HubLog(hub)
    return found


@in_child
def _forget() -> None:
    """In a forked child: what waits is the parent's to hand over, and so is what is under way."""
    found: _HubLog | None = getattr(_of_thread, "log", None)
    if found is not None:
        found.entries.clear()
        _of_thread.log = None


# The original: in a patched process threading.local is about greenlets.
_of_thread: Any = monkey.get_original("threading", "local")()
atexit.register(flush)  # before logging's own, which was registered earlier, closes the handlers


# What is too long


def _bounded(message: str, args: tuple[object, ...]) -> tuple[str, tuple[object, ...]]:
    """A message and what goes into it, which together are no longer than `LONGEST`, in one line."""
    try:
        text = message % args if args else message
    except Exception:  # the repr of a user's object
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
    """The beginning of a text, and its end; control characters escaped (CWE-117)."""
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
    """Whether the traceback of an exception, and of those behind it, would be too long."""
    frames = 0
    for each in _with_causes(exc):
        notes = getattr(each, "__notes__", ())
        text = each.text if isinstance(each, SyntaxError) else ""  # the line, which is shown
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
    """The traceback with all that exceptions say shortened, and without the outermost frames."""
    told = traceback.TracebackException.from_exception(exc)
    _shorten_notes(told)
    parts = list(told.format())
    left_out = len(parts) - 2 * MOST_FRAMES
    if left_out > 0:
        parts[MOST_FRAMES:-MOST_FRAMES] = [f"  … {left_out} more\n"]
    # A frame is a part of a few lines; one that is longer is something that an exception says.
    texts = (part if len(part) <= LONGEST else _without_middle(part) for part in parts)
    return "".join(texts).rstrip("\n")


def _shorten_notes(told: traceback.TracebackException | None) -> None:
    """Let the notes of an exception, and of those behind it, be one of `LONGEST` characters."""
    while told is not None:
        notes: object = getattr(told, "__notes__", None)
        if isinstance(notes, (list, tuple)):
            text = "\n".join(str(_showable(note)) for note in notes)
            if len(text) > LONGEST:
                told.__notes__ = [_without_middle(text)]
        for each in told.exceptions or ():
            _shorten_notes(each)
        told = told.__cause__ or told.__context__


# What peers do


class _Window:
    """The time after a warning in which others of its kind are only counted."""

    __slots__ = ("_hub", "_timer", "began", "count", "first", "name")

    def __init__(self) -> None:
        self.began = monotonic()
        self.count = 0
        """Of those that were no warning."""
        self.name = self.first = ""
        """Whose peers these are, and what the first of them did: texts, which keep nothing."""
        self._hub: Any = None
        self._timer: Any = None

    def is_over(self) -> bool:
        """Whether the next one is a warning. Not while others are to be told of, by the timer."""
        return self._timer is None and monotonic() - self.began >= WARNING_PERIOD

    def start_timer(self, function: Callable[[str], None], kind: str) -> None:
        """Have `function` called with `kind` at the end of the time."""
        self._hub = get_hub()
        left = self.began + WARNING_PERIOD - monotonic()
        self._timer = watch(self._hub.loop.timer(max(left, SHORTEST_TIMER), ref=False))
        self._timer.start(function, kind)

    def stop_timer(self) -> None:
        """Without effect when there is none."""
        if self._timer is not None and self._hub.loop is not None:  # else it went with the hub
            unwatch(self._timer)
        self._timer = self._hub = None


class PeerLog:
    """What the peers of one owner do: a warning for each kind of thing, once a minute at most.

    The first of a kind is a WARNING. For a minute others are DEBUG, and counted; when it is over,
    another WARNING says how many there were, and the next minute begins. A shutdown tells
    how many there were at once, at INFO. All of it belongs to the hub's thread, and may be called
    in the hub.
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
            owner: whose peer it is.
            kind: what others have in common with it, in a few words. There are only a few kinds.
            message: as of `log`.
            *args: as of `log`.
            context: as of `log`.
            stacklevel: as of `log`.
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
        """Tell of those that were counted, and stop the timers: the owner has stopped."""
        for kind, window in self._windows.items():
            if window.count:
                self._tell_count(logging.INFO, window, kind)

    def _tell_count(self, level: int, window: _Window, kind: str) -> None:
        window.stop_timer()
        count, window.count = window.count, 0
        what = (window.name, count, monotonic() - window.began, kind, window.first)
        log(level, "%s: %d more in the last %.0f s: %s; the first of them: %s", *what)
