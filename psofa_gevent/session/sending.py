"""The sending half of a session: what `send` promises, and its quick way.

While a session is corked, sends are collected instead, and leave together: when the cork is taken
off, when there is much of them, and before its greenlet waits for anything.

A send tries the socket at once; only what the kernel did not take goes the slow way, behind
other senders (`psofa_gevent.session.send_queue`). So does a post, but nobody waits for that: what
is left of it goes into the session's `Outbox`. A file always stands in the queue
(`psofa_gevent.session.files`).

Runs in whichever greenlet or asyncio task sends; callers in other OS threads are handed over to the
hub's thread. Only a send that has to wait switches, and what a user gave for a file.

Most of this file is the contract of its public methods, so it is longer than others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import Any, NoReturn

from psofa_gevent.checks import check_seconds
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsSendError
from psofa_gevent.hub.greenlets import may_wait, sends_to_the_end
from psofa_gevent.hub.parking import GreenletParking, Parking, TaskParking, run_in_greenlet
from psofa_gevent.hub.thread import get_ident
from psofa_gevent.messages import M, Message, as_buffer, as_bytes
from psofa_gevent.session.connection import Connection
from psofa_gevent.session.files import File, FileSource, Progress
from psofa_gevent.session.outbox import Outbox
from psofa_gevent.session.send_buffers import Buffers, Source
from psofa_gevent.session.send_queue import SendQueue, queue_up
from psofa_gevent.settings import DEFAULT, Default

__all__ = ["SendingHalf"]

PIECE_SIZE = 65_536
"""Bytes of a file that are read at a time, where the kernel can't send it by itself."""
CORK_SIZE = 65_536
"""Bytes that are collected at most. More would fill buffers, and let the peer wait."""
COLLECTED = 48
"""Bytes that each message counts then beside its own: what a bytes object in a list takes."""


class SendingHalf(Connection[M]):
    """The half of a session that sends."""

    __slots__ = ()

    _send_queue: SendQueue | None
    _outbox: Outbox | None

    def send(  # noqa: C901 - each call more would be felt
        self,
        message: M | Message,
        timeout: float | Default | None = DEFAULT,
        *,
        raw: bool = False,
    ) -> None:
        """Send a message, and return when the kernel has taken all of it.

        From any greenlet and any OS thread. Two sends never mix their bytes. In an async callback
        it works as long as it need not wait; ``await session.send_async`` waits there. Not in a
        handler of ``signal.signal``, which may hit a send of this very session half-way; one of
        ``gevent.signal_handler`` runs in a greenlet of its own.

        Args:
            message: bytes, or text, which is sent as UTF-8. A mutable buffer must not change until
                this returns. With a framing, whatever that encodes.
            timeout: seconds in which the peer takes nothing, after which the session closes with
                FAILED; ``None``: no limit; by default the owner's ``send_timeout``.
            raw: bytes (or text) that the session's framing shall leave alone.

        Raises:
            PsFramingError: the session's framing can't carry the message. Nothing was sent.
            PsSendError: the session is closed, was closed meanwhile, the peer took nothing for
                `timeout`, or the socket failed; or the call would have had to wait where it must
                not (in a coroutine, in the hub).
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: `message` is text with a lone surrogate, which is no UTF-8.
            ValueError: `timeout` is negative.
        """
        if self._encode is not None and not raw:
            data: Any = self._encode(message)
        else:
            data = message if type(message) is bytes else as_buffer(message)
        if timeout is not DEFAULT:
            check_seconds("timeout", timeout)
        if get_ident() != self._thread_ident:
            self._send_from_thread(data, timeout)
            return
        if not self._open or self._eof_requested:
            self._check_new_send()
        if self._cork is not None:
            if self._send_queue is None:
                # As in `_collect`: a read may have thousands of messages.
                self._cork.append(data if type(data) is bytes else bytes(data))
                self._corked_size += len(data) + COLLECTED
                if self._corked_size >= CORK_SIZE:
                    self._send_collected(self._take_collected(), timeout)
                return
            self._keep_collected()  # no more than that: this one waits
        sent = 0
        begun = False
        if self._send_queue is None:
            sent = self._send_now(data)
            if sent == len(data):
                return
            begun = sent > 0 or self._half_sent > 0
        if not may_wait():
            self._refuse_to_wait(begun=begun)
        rest = Buffers(memoryview(data)[sent:])
        run_in_greenlet(queue_up(self, rest, timeout, GreenletParking(), begun=begun))

    async def send_async(
        self,
        message: M | Message,
        timeout: float | Default | None = DEFAULT,
        *,
        raw: bool = False,
    ) -> None:
        """`send` for coroutines: waits without holding up the loop.

        In any asyncio loop, of the hub's thread or of another; arguments and errors as for `send`.
        """
        if self._encode is not None and not raw:
            data: Any = self._encode(message)
        else:
            data = message if type(message) is bytes else as_buffer(message)
        if timeout is not DEFAULT:
            check_seconds("timeout", timeout)
        if get_ident() != self._thread_ident:
            await self._send_from_other_loop(data, timeout)
            return
        if not self._open or self._eof_requested:
            self._check_new_send()
        if self._cork is not None:
            if self._send_queue is None:
                if self._collect(data):
                    await self._send_collected_async(self._take_collected(), timeout)
                return
            self._keep_collected()
        sent = 0
        begun = False
        if self._send_queue is None:
            sent = self._send_now(data)
            if sent == len(data):
                return
            begun = sent > 0 or self._half_sent > 0
        rest = Buffers(memoryview(data)[sent:])
        await queue_up(self, rest, timeout, TaskParking(), begun=begun)

    def post(self, message: M | Message, *, raw: bool = False) -> bool:
        """Send a message without ever waiting: what the kernel does not take now leaves later.

        At most ``high_water`` bytes wait for the peer, and a single message that is larger when
        nothing else waits; the setting ``overflow`` says what happens beyond that. Small messages
        are put together, so in memory they take less than twice their bytes, whatever their sizes;
        with ``DROP_OLDEST`` each counts one byte more. However long the peer takes nothing, what
        waits stays, until it reads again or the session closes; then ``linger_timeout`` is what it
        has. Sends and posts leave in the order of their calls.

        What other threads post counts as well, from the call on: a thread that posts much at once,
        faster than the hub comes to it, needs a ``high_water`` for it.

        From any greenlet, the hub and coroutines included, and any OS thread.

        Args:
            message: as for `send`; copied if it could change.
            raw: as for `send`.

        Returns:
            Whether the message was taken: not so when the session is closed, or closes because of
            this, or the message was dropped. In another OS thread: whether the hub will try.

        Raises:
            PsFramingError: the session's framing can't carry the message.
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: it is text with a lone surrogate, which is no UTF-8.
        """
        encode: Any = self._encode
        data = as_bytes(message if raw or encode is None else encode(message))
        if get_ident() == self._thread_ident:
            return self._post_here(data)
        return self._post_from_thread(data)

    def _post_from_thread(self, data: bytes) -> bool:
        """Post in another thread: have the hub come to it, unless it will already."""
        if not self._open:
            return False
        outbox = self._get_outbox()
        manager = self._manager
        with manager.thread.lock:
            # The hub is called in here: another thread, which need not call it for what it posts
            # now, may ask for a close next.
            comes = outbox.inbox.buffers is not None or outbox.inbox.refused > 0
            is_taken = outbox.inbox.put(data, manager.settings, outbox.weight)
            if not comes and (outbox.inbox.buffers is not None or outbox.inbox.refused):
                manager.thread.call_soon(self._take_inbox)
        return is_taken

    def _take_inbox(self) -> None:
        """Send what other threads have posted, after all that waits now. In the hub."""
        outbox = self._get_outbox()
        buffers, refused, size = outbox.empty_inbox(self._manager.thread.lock)
        if self._refuses_posts():
            return
        if refused:
            outbox.overflow(self, size, refused)
        elif buffers is not None:
            if self._cork is not None:
                self._keep_collected()
            outbox.send_on(self, buffers)

    def _get_outbox(self) -> Outbox:
        if self._outbox is None:
            with self._manager.thread.lock:  # others may just make one, too
                if self._outbox is None:
                    self._outbox = Outbox()
        return self._outbox

    def _post_here(self, data: bytes) -> bool:
        """Post in the hub's thread what the framing has made of a message."""
        # While another thread's close is on its way there is no reason yet: what that thread posted
        # before comes before it.
        has_ended = self._reason is not PsCloseReason.NONE or self._abort_asked
        if (has_ended or self._eof_requested) and self._is_refused():
            return False
        if self._cork is not None:
            if self._send_queue is None and self._corked_size + len(data) < CORK_SIZE:
                self._cork.append(data)
                self._corked_size += len(data) + COLLECTED
                self._cork_has_posts = True
                return True
            self._keep_collected()
        sent = 0
        if self._send_queue is None:
            try:
                sent = self._send_now(data)
            except PsSendError:
                return False  # it has closed the session
        if sent == len(data):
            return True
        rest = memoryview(data)[sent:] if sent else data
        return self._get_outbox().post(self, rest, begun=sent > 0)

    def _refuses_posts(self) -> bool:
        """Whether the session takes no posts any more; as `_post_here` has it."""
        has_ended = self._reason is not PsCloseReason.NONE or self._abort_asked
        return (has_ended or self._eof_requested) and self._is_refused()

    def _is_refused(self) -> bool:
        try:
            self._check_new_send()
        except PsSendError:
            return True
        return False

    # Files

    def send_file(
        self,
        file: File,
        offset: int = 0,
        count: int | None = None,
        timeout: float | Default | None = DEFAULT,
        *,
        progress: Progress | None = None,
        raw: bool = False,
        piece_size: int = PIECE_SIZE,
    ) -> int:
        """Send a file, as one message: return when the kernel has taken all of it.

        All that holds for `send` holds for the whole file: the order, that nobody's bytes come into
        its middle, and that the session closes with FAILED when it breaks off after a part has
        left. It is never in memory, only a piece of it is; without framing and TLS the kernel sends
        a regular file by itself (sendfile(2)). Reading a regular file blocks the thread while the
        disk works. In a callback ``callback_timeout`` counts all of that; elsewhere the idle time
        runs meanwhile, as the session waits for bytes.

        From any greenlet and any OS thread; for another thread the file is read, and `progress`
        called, in the hub's. In a coroutine ``await session.send_file_async``.

        Args:
            file: a path of a regular file; or a binary file of `open`, whose position, if it is a
                regular one, is neither used nor moved; or any object whose ``read(n)`` returns at
                most n bytes, and none at its end: a `gzip.GzipFile`, an `io.BytesIO`, a pipe. Such
                a ``read`` should wait in gevent's way (`gevent.fileobject.FileObject`).
            offset: bytes from the beginning of the file at which to begin. An object that can seek
                is made to.
            count: bytes to send; ``None``: up to the end, which for a regular file is where it was
                at the call.
            timeout: as for `send`: seconds in which the peer takes nothing.
            progress: called with the bytes of the file that have left, and with how many it will be
                (``None``: nobody knows), in the greenlet that sends, after each piece, or each
                megabyte at most by sendfile(2). What it raises ends the transfer. A `send` to this
                session in it (or in ``read``) would wait for itself, and is refused; `post` works.
            raw: the file's bytes as they are. Without it, where the session has a framing, each
                piece becomes a message: of `piece_size` bytes, only the last is shorter.
            piece_size: bytes that are read at a time; with a framing no more than that takes.

        Returns:
            Bytes of the file that were sent, without what a framing adds.

        Raises:
            OSError: the file could not be opened or read.
            PsFramingError: the session's framing can't carry a piece.
            PsSendError: as for `send`; or the file ended before `count`.
            TypeError: `file` is none of these, can't be read, or gives text; or an argument has the
                wrong type.
            ValueError: an argument is out of range; the path is that of a FIFO or a device; an
                `offset` in something that can't seek.
        """
        source = self._file_source(file, offset, count, timeout, progress, piece_size, raw=raw)
        with contextlib.closing(source):
            if get_ident() == self._thread_ident:
                self._send_source(source, timeout)
            else:
                self._check_sending(in_callback=False)
                thread = self._manager.thread
                if not thread.run(lambda: self._released, self._send_source, source, timeout):
                    raise PsSendError(f"{self!r}: the session is closed")
            return source.sent

    async def send_file_async(
        self,
        file: File,
        offset: int = 0,
        count: int | None = None,
        timeout: float | Default | None = DEFAULT,
        *,
        progress: Progress | None = None,
        raw: bool = False,
        piece_size: int = PIECE_SIZE,
    ) -> int:
        """`send_file` for coroutines: waits for the peer without holding up the loop.

        In any asyncio loop, of the hub's thread or of another; arguments and errors as for
        `send_file`. `progress` is a plain function here too. A ``read`` that waits holds the loop.
        """
        source = self._file_source(file, offset, count, timeout, progress, piece_size, raw=raw)
        with contextlib.closing(source):
            if get_ident() == self._thread_ident:
                self._check_new_send()
                if self._cork is not None:
                    self._keep_collected()
                await queue_up(self, source, timeout, TaskParking(), begun=False)
            else:
                self._check_sending(in_callback=False)
                if not await self._manager.thread.run_async(
                    lambda: self._released, self._send_source, source, timeout
                ):
                    raise PsSendError(f"{self!r}: the session is closed")
            return source.sent

    def _file_source(
        self,
        file: File,
        offset: int,
        count: int | None,
        timeout: float | Default | None,
        progress: Progress | None,
        piece_size: int,
        *,
        raw: bool,
    ) -> FileSource:
        if timeout is not DEFAULT:
            check_seconds("timeout", timeout)
        return FileSource(
            file,
            offset,
            count,
            encode=None if raw else self._encode,
            piece_size=piece_size,
            progress=progress,
        )

    def _send_source(self, source: FileSource, timeout: float | Default | None) -> None:
        self._check_new_send()
        parking: Parking = GreenletParking()
        if not may_wait():
            if self._send_queue is not None or not source.is_small:
                self._refuse_to_wait(begun=False, instead="send_file_async")
            parking = _Refusal(self, source)
        if self._cork is not None:
            self._keep_collected()
        run_in_greenlet(queue_up(self, source, timeout, parking, begun=False))

    @property
    def pending_bytes(self) -> int:
        """Bytes that were posted, or collected, and that the kernel has not taken yet."""
        outbox = self._outbox
        waiting = 0 if outbox is None else outbox.size + outbox.inbox.size
        return sum(map(len, self._cork or ())) + waiting

    @property
    def messages_dropped(self) -> int:
        """Posts that the setting ``overflow`` dropped."""
        return 0 if self._outbox is None else self._outbox.dropped

    # Corked

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """Let what is sent in the block leave together, in one system call if it is not too much.

        A send in the block returns when its message is collected. It leaves at the end of the
        block, which may wait for that as a send does; and before, when there is much, and when a
        callback of this session waits for anything in the block, which then ends the collecting
        (not if a plain ``greenlet`` that the callback runs waits). If it can't be sent, the session
        closes with FAILED.

        With a framing a session is corked while its callbacks handle the messages of one read.

        In the hub's thread. In other greenlets than the session's own, and in coroutines, better
        wait for nothing in the block: what others send meanwhile is collected, too.

        Raises:
            PsSendError: the session is closed, or what was collected could not be sent.
            RuntimeError: called in another thread.
        """
        if get_ident() != self._thread_ident:
            raise RuntimeError(f"{self!r}: corked belongs to the thread of the session's hub")
        if self._cork is not None:
            yield
            return
        self._check_new_send()
        self._cork = []
        try:
            yield
        finally:
            self._uncork()

    def _collect(self, data: bytes | memoryview) -> bool:
        """Keep `data` for later; whether so much is kept now that it should leave."""
        assert self._cork is not None
        self._cork.append(data if type(data) is bytes else bytes(data))
        self._corked_size += len(data) + COLLECTED
        return self._corked_size >= CORK_SIZE

    def _take_collected(self) -> bytes:
        assert self._cork is not None
        data = b"".join(self._cork)
        self._cork.clear()
        self._corked_size = 0
        self._cork_has_posts = False
        return data

    def _uncork(self) -> None:
        """Send what was collected. May wait, where that is possible."""
        if self._cork is None:
            return
        if not self._open or self._cork_has_posts:
            self._uncork_without_waiting()
            return
        data = self._take_collected()
        self._cork = None
        if data:
            self._send_collected(data, DEFAULT)

    async def _uncork_async(self) -> None:
        if self._cork is None:
            return
        if not self._open or self._cork_has_posts:
            self._uncork_without_waiting()
            return
        data = self._take_collected()
        self._cork = None
        if data:
            await self._send_collected_async(data, DEFAULT)

    def _send_collected(self, data: bytes, timeout: float | Default | None) -> None:
        """Send what others were told that it is sent, and wait for that, where it is possible.

        If the wait is broken off it goes on: it counts as sent, also for a close that comes now.
        """
        self._keep(data, timeout)
        if self._outbox is not None and self._outbox.size and may_wait():
            waiting = self._outbox.wait(self, GreenletParking(), in_callback=sends_to_the_end())
            run_in_greenlet(waiting)
        elif not self._open:
            self._check_sending(in_callback=sends_to_the_end())

    async def _send_collected_async(self, data: bytes, timeout: float | Default | None) -> None:
        self._keep(data, timeout)
        if self._outbox is not None and self._outbox.size:
            await self._outbox.wait(self, TaskParking(), in_callback=sends_to_the_end())
        elif not self._open:
            self._check_sending(in_callback=sends_to_the_end())

    def _uncork_without_waiting(self) -> None:
        """Send what was collected, now and, what the kernel does not take, later."""
        if self._cork is not None:
            self._keep_collected()
            self._cork = None

    def _keep_collected(self) -> None:
        timeout = None if self._cork_has_posts else DEFAULT
        self._keep(self._take_collected(), timeout)

    def _keep(self, data: bytes, timeout: float | Default | None) -> None:
        """Send what others were told that it is sent, without waiting, and before a FIN.

        `timeout`: as of `send`; None for posts, which wait for as long as the peer takes nothing.
        """
        if not data or self._released or self._eof_sent or self._is_broken:
            return
        sent = 0
        if self._send_queue is None:
            try:
                sent = self._send_now(data)
            except PsSendError:
                return  # it has closed the session
            if sent == len(data):
                return
        limit = self._manager.settings.send_timeout if timeout is DEFAULT else timeout
        self._get_outbox().keep(self, memoryview(data)[sent:], limit, begun=sent > 0)

    def send_eof(self) -> None:
        """Send no more: the peer gets a FIN after the sends that have begun (half-close).

        Never waits. Later sends raise `PsSendError`; receiving goes on, and the session stays open
        until the peer's FIN. From any greenlet and any OS thread.
        """
        if get_ident() != self._thread_ident:
            if self._released:
                return  # in a child process nobody may ever release the lock
            # All of it, for it must not overtake a send that another thread has begun.
            with self._manager.thread.lock:
                self._get_outbox().inbox.is_shut = True
                self._manager.thread.call_soon(self.send_eof)
        else:
            self._uncork_without_waiting()
            self._eof_requested = True
            self._shut_writing()

    def _refuse_to_wait(self, *, begun: bool, instead: str = "send_async") -> NoReturn:
        error = PsSendError(
            f"{self!r}: send() would block, which is not allowed in a coroutine or in the hub: "
            f"use 'await session.{instead}(...)'"
        )
        if begun:
            self._break_stream()
            self._request_close(PsCloseReason.FAILED, error)
            self._log(logging.ERROR, "%s; part of the message was already sent", error)
        raise PsSendError(*error.args)  # not the one that the session keeps

    def _send_bytes(self, data: bytes | memoryview, timeout: float | Default | None) -> None:
        self.send(data, timeout, raw=True)

    def _send_from_thread(self, data: bytes | memoryview, timeout: float | Default | None) -> None:
        """Send for a caller in another OS thread, which blocks natively meanwhile."""
        self._check_sending(in_callback=False)
        if not self._manager.thread.run(lambda: self._released, self._send_bytes, data, timeout):
            raise PsSendError(f"{self!r}: the session is closed")

    async def _send_from_other_loop(
        self, data: bytes | memoryview, timeout: float | Default | None
    ) -> None:
        """Send for a coroutine in an asyncio loop of another OS thread, which goes on meanwhile."""
        self._check_sending(in_callback=False)
        if not await self._manager.thread.run_async(
            lambda: self._released, self._send_bytes, data, timeout
        ):
            raise PsSendError(f"{self!r}: the session is closed")


class _Refusal:
    """The parking of one who must not wait: who comes here has to, and is refused."""

    __slots__ = ("_session", "_source")

    def __init__(self, session: SendingHalf[Any], source: Source) -> None:
        self._session = session
        self._source = source

    def __await__(self) -> Generator[Any, None, None]:
        self._session._refuse_to_wait(begun=self._source.begun, instead="send_file_async")

    def wake(self) -> bool:
        """There is nobody."""
        return True
