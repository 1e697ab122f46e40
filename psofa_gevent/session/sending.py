"""The sending half of a session: the public methods that send, and the fast path of a message.

A send tries the socket at once. Only the bytes that the kernel did not take go into the send queue,
behind other senders (`psofa_gevent.session.send_queue`). A post does the same, but no caller waits
for the rest, which goes into the session's `Outbox`. A file always goes through the queue
(`psofa_gevent.session.files`).

While a session is corked, messages are collected, and leave together: when the cork is removed,
when they reach `CORK_SIZE`, and before the session's greenlet waits for anything.

Runs in the greenlet or asyncio task that sends; calls of other OS threads are run in the hub's
thread. Only a send that has to wait switches, and the functions that a user gives for a file.

This file is longer than others because it contains the documentation of its public methods.
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
"""Bytes of a file that are read at a time, if the kernel can't send the file by itself."""
CORK_SIZE = 65_536
"""Most bytes that a cork collects. More would fill buffers, and keep the peer waiting."""
COLLECTED = 48
"""Bytes that each collected message counts in addition to its own: a bytes object in a list."""


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
        this works as long as the call need not wait; use ``await session.send_async`` there. Not
        allowed in a handler of ``signal.signal``, which may interrupt a send of the same session; a
        handler of ``gevent.signal_handler`` runs in its own greenlet, and may send.

        Args:
            message: bytes, or text, which is sent as UTF-8. A mutable buffer must not change until
                the call returns. With a framing: any message that the framing encodes.
            timeout: seconds in which the peer takes nothing, after which the session closes with
                FAILED; ``None``: no limit; by default the owner's ``send_timeout``.
            raw: send bytes (or text) without the session's framing.

        Raises:
            PsFramingError: the session's framing can't carry the message. Nothing was sent.
            PsSendError: the session is closed, was closed meanwhile, the peer took nothing for
                `timeout`, or the socket failed; or the call would have to wait where waiting is
                not allowed (in a coroutine, in the hub).
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: `message` is text with a lone surrogate, which UTF-8 can't encode.
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
            self._keep_collected()  # these messages only: the new one waits behind them
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
        """`send` for coroutines: waits without blocking the asyncio loop.

        In any asyncio loop, of the hub's thread or another thread. Arguments and errors as for
        `send`.
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
        """Send a message without ever waiting: bytes that the kernel does not take now leave later.

        At most ``high_water`` bytes wait for the peer, or a single larger message if nothing else
        waits; the setting ``overflow`` says what happens to posts beyond that. Small messages are
        joined, so in memory they take less than twice their bytes, whatever their sizes; with
        ``DROP_OLDEST`` each counts one byte more. Posts have no timeout: they wait until the peer
        reads again, or the session closes and its ``linger_timeout`` ends. Sends and posts leave in
        the order of their calls.

        The posts of other threads count as well, from the call on: a thread that posts many bytes,
        faster than the hub takes them, needs a ``high_water`` that is large enough.

        From any greenlet, including the hub, any coroutine, and any OS thread.

        Args:
            message: as for `send`; copied if it could change.
            raw: as for `send`.

        Returns:
            Whether the message was taken. False: the session is closed, or closes because of this
            post, or the message was dropped. In another OS thread: whether the hub will try.

        Raises:
            PsFramingError: the session's framing can't carry the message.
            TypeError: `message` is neither text nor bytes.
            UnicodeEncodeError: `message` is text with a lone surrogate, which UTF-8 can't encode.
        """
        encode: Any = self._encode
        data = as_bytes(message if raw or encode is None else encode(message))
        if get_ident() == self._thread_ident:
            return self._post_here(data)
        return self._post_from_thread(data)

    def _post_from_thread(self, data: bytes) -> bool:
        """Post in another thread than the hub's: call the hub, unless it was called before."""
        if not self._open:
            return False
        outbox = self._get_outbox()
        manager = self._manager
        with manager.thread.lock:
            # The hub is called under the lock: as soon as the lock is free, another thread may post
            # without calling the hub, and then ask for a close, which must come after the posts.
            comes = outbox.inbox.buffers is not None or outbox.inbox.refused > 0
            is_taken = outbox.inbox.put(data, manager.settings, outbox.weight)
            if not comes and (outbox.inbox.buffers is not None or outbox.inbox.refused):
                manager.thread.call_soon(self._take_inbox)
        return is_taken

    def _take_inbox(self) -> None:
        """Send the posts of other threads, after all waiting messages. In the hub."""
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
            with self._manager.thread.lock:  # another thread may be making one
                if self._outbox is None:
                    self._outbox = Outbox()
        return self._outbox

    def _post_here(self, data: bytes) -> bool:
        """Post an encoded message, in the hub's thread; return whether it was taken."""
        # While another thread's close request is on its way there is no reason yet: the posts of
        # that thread come before its request.
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
                return False  # the failed send has closed the session
        if sent == len(data):
            return True
        rest = memoryview(data)[sent:] if sent else data
        return self._get_outbox().post(self, rest, begun=sent > 0)

    def _refuses_posts(self) -> bool:
        """Whether the session refuses posts: the same check as in `_post_here`."""
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
        """Send a file as if it were one message; return when the kernel has taken all of it.

        The promises of `send` hold for the whole file: it leaves in the order of the calls, no
        other bytes come into its middle, and the session closes with FAILED if the transfer breaks
        off after a part has left. Only a piece of the file is in memory at a time. Without framing
        and TLS the kernel sends a regular file by itself (sendfile(2)). Reading a regular file
        blocks the thread while the disk works. In a callback, ``callback_timeout`` counts the whole
        transfer; elsewhere the idle time runs meanwhile, because the session waits for bytes.

        From any greenlet and any OS thread. For a call of another thread, the hub's thread reads
        the file and calls `progress`. In a coroutine use ``await session.send_file_async``.

        Args:
            file: the path of a regular file; or a binary file from `open`, whose position is
                neither used nor moved if it is a regular file; or any object whose ``read(n)``
                returns at most n bytes, and no bytes at its end: a `gzip.GzipFile`, an
                `io.BytesIO`, a pipe. Such a ``read`` should wait through gevent
                (`gevent.fileobject.FileObject`).
            offset: the position to begin at, in bytes. An object that can seek is moved there.
            count: bytes to send; ``None``: up to the end, which for a regular file is its end at
                the time of the call.
            timeout: as for `send`: seconds in which the peer takes nothing.
            progress: called with the number of bytes of the file that have left, and the number
                that will leave in all (``None``: unknown). Called in the greenlet that sends, after
                each piece; with sendfile(2) after each megabyte at most. An exception of `progress`
                ends the transfer. A `send` to this session in `progress` (or in ``read``) would
                wait for itself, and is refused; `post` works.
            raw: send the file's bytes without framing. Otherwise, if the session has a framing,
                each piece becomes a message of `piece_size` bytes; only the last may be shorter.
            piece_size: bytes to read at a time; with a framing, no more than the framing allows.

        Returns:
            The number of bytes of the file that were sent, without the bytes that a framing adds.

        Raises:
            OSError: the file could not be opened or read.
            PsFramingError: the session's framing can't carry a piece.
            PsSendError: as for `send`; or the file ended before `count`.
            TypeError: `file` is not one of these, can't be read, or returns text; or an argument
                has the wrong type.
            ValueError: an argument is out of range; the path is of a FIFO or a device; or `offset`
                is not 0 for an object that can't seek.
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
        """`send_file` for coroutines: waits for the peer without blocking the asyncio loop.

        In any asyncio loop, of the hub's thread or another thread. Arguments and errors as for
        `send_file`. `progress` must be a plain function. A ``read`` that waits blocks the loop.
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
        """Bytes that were posted or collected, and that the kernel has not taken yet."""
        outbox = self._outbox
        waiting = 0 if outbox is None else outbox.size + outbox.inbox.size
        return sum(map(len, self._cork or ())) + waiting

    @property
    def messages_dropped(self) -> int:
        """The number of posts that were dropped because of the setting ``overflow``."""
        return 0 if self._outbox is None else self._outbox.dropped

    # Corked

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """Send the messages of the block together, in one system call if they are not too large.

        A send in the block returns when its message is collected. The messages leave at the end of
        the block, which may wait for that as a send does. They leave earlier if they become too
        many, or if a callback of this session waits for anything in the block. Such a wait ends the
        collecting (except the wait of a plain ``greenlet`` that the callback runs). If they can't
        be sent, the session closes with FAILED.

        With a framing, a session is corked while its callbacks handle the messages of one read.

        In the hub's thread. In a coroutine, or in another greenlet than the session's own, do not
        wait in the block: messages that others send meanwhile are collected as well.

        Raises:
            PsSendError: the session is closed, or the collected messages could not be sent.
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
        """Collect `data`; return whether the collected messages have reached `CORK_SIZE`."""
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
        """Remove the cork and send the collected messages. Waits, and switches, if it may."""
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
        """Send data whose senders were told that it was sent, and wait for the peer if allowed.

        If the wait is interrupted the data is still sent, even if a close follows.
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
        """Remove the cork, and send the collected messages without waiting for the peer."""
        if self._cork is not None:
            self._keep_collected()
            self._cork = None

    def _keep_collected(self) -> None:
        timeout = None if self._cork_has_posts else DEFAULT
        self._keep(self._take_collected(), timeout)

    def _keep(self, data: bytes, timeout: float | Default | None) -> None:
        """Send data whose senders were told that it was sent. Does not wait; precedes any FIN.

        `timeout`: as for `send`; None for posts, which have no time limit.
        """
        if not data or self._released or self._eof_sent or self._is_broken:
            return
        sent = 0
        if self._send_queue is None:
            try:
                sent = self._send_now(data)
            except PsSendError:
                return  # the failed send has closed the session
            if sent == len(data):
                return
        limit = self._manager.settings.send_timeout if timeout is DEFAULT else timeout
        self._get_outbox().keep(self, memoryview(data)[sent:], limit, begun=sent > 0)

    def send_eof(self) -> None:
        """End sending: the peer gets a FIN after the sends that have begun (half-close).

        Never waits. Later sends raise `PsSendError`. Receiving goes on, and the session stays open
        until the peer's FIN. From any greenlet and any OS thread.
        """
        if get_ident() != self._thread_ident:
            if self._released:
                return  # in a child process the lock may be held for ever
            # All under the lock: the half-close must not overtake a send that another thread has
            # begun.
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
        raise PsSendError(*error.args)  # another object than the one that the session keeps

    def _send_bytes(self, data: bytes | memoryview, timeout: float | Default | None) -> None:
        self.send(data, timeout, raw=True)

    def _send_from_thread(self, data: bytes | memoryview, timeout: float | Default | None) -> None:
        """Send for a caller in another OS thread; that thread blocks natively meanwhile."""
        self._check_sending(in_callback=False)
        if not self._manager.thread.run(lambda: self._released, self._send_bytes, data, timeout):
            raise PsSendError(f"{self!r}: the session is closed")

    async def _send_from_other_loop(
        self, data: bytes | memoryview, timeout: float | Default | None
    ) -> None:
        """Send for a coroutine of another OS thread; its asyncio loop goes on meanwhile."""
        self._check_sending(in_callback=False)
        if not await self._manager.thread.run_async(
            lambda: self._released, self._send_bytes, data, timeout
        ):
            raise PsSendError(f"{self!r}: the session is closed")


class _Refusal:
    """The parking of a caller that must not wait: awaiting it raises `PsSendError`."""

    __slots__ = ("_session", "_source")

    def __init__(self, session: SendingHalf[Any], source: Source) -> None:
        self._session = session
        self._source = source

    def __await__(self) -> Generator[Any, None, None]:
        self._session._refuse_to_wait(begun=self._source.begun, instead="send_file_async")

    def wake(self) -> bool:
        """Nobody waits here."""
        return True
