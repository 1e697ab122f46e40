"""A file that stops half-way, for its peer, its source or its sender; and who must not wait."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest

from acting import ActingCallback, wait_until_stalled
from helpers import TINY_BUFFER, NativeThread, stalled_peer
from psofa_gevent import PsClient, PsCloseReason, PsSendError, PsSession, run_coroutine
from psofa_gevent.framing import LengthPrefix
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ServerFactory,
    connected_session,
    eventually,
)
from psofa_gevent.tls import socket as tls_socket
from sent_files import (
    CONTENT,
    DIGEST,
    PIECE,
    SHORT,
    SIZE,
    Pair,
    Reader,
    attempt,
    begin,
    hashed,
    result,
    tls_contexts,
)

# The peer takes nothing


@pytest.mark.parametrize("as_pieces", [False, True], ids=["kernel", "pieces"])
def test_a_peer_that_takes_nothing_fails_the_session(
    as_pieces: bool, path: Path, pair: Callable[..., Pair]
) -> None:
    session, _peer, callback = pair()
    sender = attempt(session.send_file, Reader() if as_pieces else path, timeout=SHORT)
    error = result(sender)
    assert isinstance(error, PsSendError)
    assert "accepted no data for 0.3 s" in str(error)
    assert callback.closed(session) is PsCloseReason.FAILED


def test_a_peer_that_reads_slowly_gets_all_of_it(path: Path, pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair(send_timeout=SHORT)
    sender = attempt(session.send_file, path)
    digest = hashlib.sha256()
    for _ in range(20):
        digest.update(peer.receive(100_000))
        gevent.sleep(SHORT / 6)
    left = SIZE - 20 * 100_000
    while left:
        data = peer.receive(min(left, PIECE))
        digest.update(data)
        left -= len(data)
    assert result(sender) == SIZE
    assert digest.hexdigest() == DIGEST


def test_a_source_that_waits_is_not_taken_for_a_peer_that_takes_nothing(
    pair: Callable[..., Pair],
) -> None:
    session, peer, _callback = pair(send_timeout=SHORT)

    class Slow(Reader):
        def read(self, size: int) -> bytes:
            gevent.sleep(2 * SHORT)
            return super().read(3)

    sender = attempt(session.send_file, Slow(b"abcdef"), progress=lambda *_: gevent.sleep(SHORT))
    gevent.sleep(0)
    behind = attempt(session.send, "behind")
    peer.expect("abcdefbehind")
    assert result(sender) == 6
    assert result(behind) is None


@pytest.mark.parametrize("waits", ["read", "progress"])
def test_a_peer_has_its_whole_time_after_the_source_has_waited(waits: str, path: Path) -> None:
    class Slow(Reader):
        def read(self, size: int) -> bytes:
            gevent.sleep(2 * SHORT)
            return super().read(size)

    told: list[int] = []

    def progress(sent: int, total: int | None) -> None:
        told.append(sent)
        if len(told) == 1:
            gevent.sleep(2 * SHORT)

    # Of a Unix socket pair: what its peer has not read is not acknowledged.
    with connected_session(RecordingCallback(), linger_timeout=0.0) as connected:
        session = connected.session
        if waits == "read":
            sender = attempt(session.send_file, Slow(), 0, 2**20, SHORT, piece_size=2**20)
        else:
            sender = attempt(session.send_file, path, 0, 2**20, SHORT, progress=progress)
        eventually(lambda: session.bytes_sent)
        if waits == "progress":
            gevent.sleep(2 * SHORT)
        assert hashed(connected.peer, 2**20) == hashlib.sha256(CONTENT[: 2**20]).hexdigest()
        assert result(sender) == 2**20


# It breaks off


def test_a_kill_in_the_middle_fails_the_session(path: Path, pair: Callable[..., Pair]) -> None:
    session, _peer, callback = pair()
    sender = begin(session, path)
    sender.kill()
    assert not session.is_open
    assert callback.closed(session) is PsCloseReason.FAILED
    with pytest.raises(PsSendError):
        session.send("nothing may follow")


def test_a_kill_fails_the_session_also_when_all_that_has_left_is_a_part_of_a_tls_record(
    path: Path, ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tls_socket, "ENCRYPTED_AT_A_TIME", 2**20
    )  # more than the buffers take at once
    ours, theirs = tls_contexts()
    never = gevent.event.Event()
    callback = ActingCallback()
    server = ps_server(callback, ssl_context=ours, linger_timeout=0.0)
    deaf = ActingCallback(on_open=lambda _session: never.wait())
    with PsClient(deaf, *server.address, ssl_context=theirs):
        session = callback.opened()
        session._sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_SNDBUF, 4_096)
        sender = attempt(session.send_file, path, timeout=None, piece_size=2**20)
        eventually(lambda: session._half_sent)
        assert session.bytes_sent == 0
        sender.kill()
        assert callback.closed(session) is PsCloseReason.FAILED
        never.set()


def test_a_kill_before_its_turn_does_nothing(path: Path, pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair()
    first = begin(session, path)
    second = attempt(session.send_file, path, timeout=None)
    gevent.sleep(0)
    second.kill()
    assert hashed(peer) == DIGEST
    assert result(first) == SIZE
    session.send("next")
    peer.expect("next")


def test_a_timeout_of_gevent_in_the_middle_fails_the_session(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, _peer, callback = pair()

    def send() -> None:
        with gevent.Timeout(SHORT):
            session.send_file(path, timeout=None)

    assert isinstance(result(attempt(send)), gevent.Timeout)
    assert callback.closed(session) is PsCloseReason.FAILED


def test_a_cancelled_coroutine_fails_the_session(path: Path, pair: Callable[..., Pair]) -> None:
    session, _peer, callback = pair()

    async def send() -> None:
        async with asyncio.timeout(SHORT):
            await session.send_file_async(path, timeout=None)

    with pytest.raises(TimeoutError):
        run_coroutine(send())
    assert callback.closed(session) is PsCloseReason.FAILED


@pytest.mark.parametrize("how", [PsSession.close, PsSession.abort])
def test_a_close_in_the_middle_interrupts_it(
    how: Callable[[PsSession[Any]], None], path: Path, pair: Callable[..., Pair]
) -> None:
    session, _peer, callback = pair()
    sender = begin(session, path)
    how(session)
    assert isinstance(result(sender), PsSendError)
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE


def test_shutdown_lets_a_callback_send_its_file_to_the_end(
    path: Path, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def send(session: PsSession, _message: bytes) -> None:
        session.send_file(path, timeout=None)

    callback = ActingCallback(on_message=send)
    server = ps_server(callback)
    peer = ps_client(server, receive_buffer_size=TINY_BUFFER, timeout=30.0)
    peer.send("x")
    session = callback.opened()
    wait_until_stalled(session)
    stopping = gevent.spawn(server.shutdown, 20.0)
    eventually(lambda: not session.is_open)
    assert hashed(peer) == DIGEST
    peer.expect_eof()
    stopping.get(timeout=10)
    assert callback.closed(session) is PsCloseReason.SHUTDOWN


def test_a_peer_that_resets_in_the_middle_fails_the_session(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, callback = pair()
    sender = begin(session, path)
    peer.reset()
    assert isinstance(result(sender), PsSendError)
    assert callback.closed(session) is PsCloseReason.FAILED


@pytest.mark.parametrize("as_pieces", [False, True], ids=["kernel", "pieces"])
def test_a_file_that_is_truncated_meanwhile_fails_the_session(
    as_pieces: bool,
    path: Path,
    pair: Callable[..., Pair],
    caplog: pytest.LogCaptureFixture,
) -> None:
    framing = LengthPrefix() if as_pieces else None
    session, peer, callback = pair(framing=framing, linger_timeout=5.0)
    sender = begin(session, path)
    os.truncate(path, SIZE - 1_000_000)
    received = peer.receive_until_eof()
    error = result(sender)
    assert isinstance(error, PsSendError)
    assert f"ended after {SIZE - 1_000_000} of {SIZE} bytes" in str(error)
    assert callback.closed(session) is PsCloseReason.FAILED
    if not as_pieces:
        assert hashlib.sha256(received).digest() == hashlib.sha256(CONTENT[:-1_000_000]).digest()
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the file ended after" in record.getMessage()


def test_a_source_that_ends_before_count_fails_the_session_if_a_part_has_left(
    pair: Callable[..., Pair],
) -> None:
    session, peer, callback = pair()
    with pytest.raises(PsSendError, match="ended after 0 of 5 bytes"):
        session.send_file(io.BytesIO(), count=5)
    assert session.is_open
    with pytest.raises(PsSendError, match="ended after 3 of 5 bytes"):
        session.send_file(io.BytesIO(b"abc"), count=5)
    assert callback.closed(session) is PsCloseReason.FAILED
    assert peer.receive_until_eof() == b"abc"


@pytest.mark.parametrize("error", [OSError("disk"), PsSendError("another session's")])
def test_a_source_that_fails_in_the_middle_fails_the_session(
    error: Exception, pair: Callable[..., Pair]
) -> None:
    class Failing(Reader):
        calls = 0

        def read(self, size: int) -> bytes:
            self.calls += 1
            if self.calls == 2:
                raise error
            return super().read(size)

    session, _peer, callback = pair()
    with pytest.raises(type(error), match=str(error)):
        session.send_file(Failing())
    assert callback.closed(session) is PsCloseReason.FAILED
    assert session.close_cause is error


def test_a_session_that_is_released_while_the_source_waits_is_left_alone(
    pair: Callable[..., Pair],
) -> None:
    session, peer, callback = pair()
    go_on = gevent.event.Event()

    class Slow(Reader):
        def read(self, size: int) -> bytes:
            go_on.wait()
            return super().read(size)

    sender = attempt(session.send_file, Slow(b"late"))
    gevent.sleep(0)
    session.close()
    callback.closed(session)
    with gevent.socket.socket() as other:  # has its descriptor now
        go_on.set()
        assert isinstance(result(sender), PsSendError)
        assert other.fileno() >= 0
    peer.expect_eof()


def test_nothing_leaves_when_the_session_closes_while_the_source_is_read(
    pair: Callable[..., Pair],
) -> None:
    class Closing(Reader):
        def read(self, size: int) -> bytes:
            session.close()
            return b"late"

    session, peer, _callback = pair()
    with pytest.raises(PsSendError, match="closed"):
        session.send_file(Closing())
    peer.expect_eof()


def test_a_close_that_is_asked_for_in_progress_ends_the_transfer_at_once(
    path: Path, ps_server: ServerFactory
) -> None:
    """Also where the session can't end yet, and the peer takes nothing any more."""

    def progress(sent: int, total: int | None) -> None:
        wait_until_stalled(session)
        session.close()

    never = gevent.event.Event()
    callback = ActingCallback(on_message=lambda *_: never.wait())
    server = ps_server(callback, linger_timeout=0.0)
    with stalled_peer(server.address) as peer:
        peer.send("x")
        callback.wait_for("on_message")
        session = callback.opened()
        session._sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_SNDBUF, 4_096)
        sender = attempt(session.send_file, path, timeout=None, progress=progress)
        assert isinstance(result(sender), PsSendError)
        assert not callback.named("on_close")
        never.set()


@pytest.mark.parametrize("as_pieces", [False, True], ids=["kernel", "pieces"])
@pytest.mark.parametrize("how", [PsSession.close, PsSession.abort])
def test_a_session_that_closes_in_progress_ends_the_transfer(
    how: Callable[[PsSession[Any]], None],
    as_pieces: bool,
    path: Path,
    pair: Callable[..., Pair],
) -> None:
    def progress(sent: int, total: int | None) -> None:
        how(session)
        callback.closed(session)

    session, _peer, callback = pair()
    sender = attempt(session.send_file, Reader() if as_pieces else path, progress=progress)
    assert isinstance(result(sender), PsSendError)
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE


def test_a_closed_session_refuses_files(path: Path, pair: Callable[..., Pair]) -> None:
    session, _peer, callback = pair()
    session.close()
    callback.closed(session)
    for attempted in (
        attempt(session.send_file, path),
        attempt(run_coroutine, session.send_file_async(path)),
    ):
        assert isinstance(result(attempted), PsSendError)
    with pytest.raises(PsSendError):
        NativeThread(session.send_file, path).wait()


def test_a_file_after_send_eof_is_refused_and_one_before_it_arrives(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    sender = begin(session, path)
    session.send_eof()
    with pytest.raises(PsSendError, match="after send_eof"):
        session.send_file(path)
    assert hashed(peer) == DIGEST
    peer.expect_eof()
    assert result(sender) == SIZE


# Where it must not wait


def test_sync_send_file_in_a_coroutine_is_refused_before_anything_leaves(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()

    async def send(file: Any) -> int:
        return session.send_file(file)

    for file in (path, Reader(b"of unknown size")):
        with pytest.raises(PsSendError, match="send_file_async"):
            run_coroutine(send(file))
    assert session.is_open
    peer.expect_nothing(0.01)


def test_sync_send_file_of_a_small_file_works_in_a_coroutine_and_in_the_hub(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    values: list[int] = []

    async def send() -> int:
        return session.send_file(path, 0, 8)

    assert run_coroutine(send()) == 8
    gevent.get_hub().loop.run_callback(lambda: values.append(session.send_file(path, 8, 8)))
    peer.expect(CONTENT[:16])
    assert values == [8]


def test_sync_send_file_in_a_coroutine_never_waits_behind_others(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    sender = begin(session, path)

    async def send() -> None:
        session.send_file(path, 0, 8)

    with pytest.raises(PsSendError, match="send_file_async"):
        run_coroutine(send())
    assert hashed(peer) == DIGEST
    assert result(sender) == SIZE
    peer.expect_nothing(0.01)


@pytest.mark.logs_errors
def test_sync_send_file_in_a_coroutine_that_can_not_go_on_fails_the_session() -> None:
    with connected_session(RecordingCallback(), linger_timeout=0.0) as connected:

        async def send() -> None:
            while True:
                connected.session.send_file(io.BytesIO(bytes(50_000)), count=50_000)

        with pytest.raises(PsSendError, match="send_file_async"):
            run_coroutine(send())
        assert not connected.session.is_open
        assert isinstance(connected.session.close_cause, PsSendError)
