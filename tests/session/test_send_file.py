"""`PsSession.send_file`: a file is one message, however large, and never in memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gevent
import gevent.socket
import pytest

from acting import ActingCallback
from helpers import NativeThread
from psofa_gevent import PsClient, PsCloseReason, PsSendError, PsServer, PsSession, run_coroutine
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.hub.parking import GreenletParking, run_in_greenlet
from psofa_gevent.session.files import TURN_SIZE
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)
from sent_files import (
    CONTENT,
    DIGEST,
    PIECE,
    SIZE,
    Pair,
    Reader,
    ReadInThread,
    attempt,
    begin,
    hashed,
    result,
    tls_contexts,
)

SPARSE = 256 * 1024 * 1024
IN_MEMORY = 4 * 1024 * 1024
"""Bytes: what a transfer may hold, with all that the test itself does."""


# Whole, whatever the connection


def test_a_file_arrives_whole_over_tcp_and_the_kernel_sends_it(
    path: Path, pair: Callable[..., Pair], by_kernel: list[int]
) -> None:
    session, peer, _callback = pair()
    sender = attempt(session.send_file, path)
    assert hashed(peer) == DIGEST
    assert result(sender) == session.bytes_sent == sum(by_kernel) == SIZE
    assert max(by_kernel) <= TURN_SIZE
    peer.expect_nothing(0.01)


def test_a_file_arrives_whole_over_a_unix_socket(
    path: Path, tmp_path: Path, by_kernel: list[int]
) -> None:
    callback = ActingCallback(on_open=lambda session: session.send_file(path))
    with PsServer(callback, host=f"unix:{tmp_path / 'socket'}"):
        sock = gevent.socket.socket(gevent.socket.AF_UNIX)
        sock.connect(str(tmp_path / "socket"))
        with ScriptedClient.from_socket(sock) as peer:
            assert hashed(peer) == DIGEST
    assert sum(by_kernel) == SIZE


@pytest.mark.parametrize("piece_size", [1_000, PIECE, 1_000_000])
def test_a_file_arrives_whole_over_tls(
    piece_size: int, path: Path, ps_server: ServerFactory, by_kernel: list[int]
) -> None:
    ours, theirs = tls_contexts()

    def send(session: PsSession) -> None:
        assert session.send_file(path, piece_size=piece_size) == SIZE
        session.send("and then")

    server = ps_server(ActingCallback(on_open=send), ssl_context=ours)
    received = RecordingCallback()
    with PsClient(received, *server.address, ssl_context=theirs):
        eventually(lambda: len(received.received()) == SIZE + 8, 20)
    assert hashlib.sha256(received.received()[:SIZE]).hexdigest() == DIGEST
    assert received.received()[SIZE:] == b"and then"
    assert by_kernel == []


def test_with_a_framing_each_piece_is_a_message(
    path: Path, ps_server: ServerFactory, by_kernel: list[int]
) -> None:
    def send(session: PsSession) -> None:
        assert session.send_file(path, piece_size=10_000) == SIZE
        assert session.bytes_sent > SIZE

    server = ps_server(ActingCallback(on_open=send), framing=LengthPrefix())
    received = RecordingCallback()
    with PsClient(received, *server.address, framing=LengthPrefix()):
        eventually(lambda: len(received.received()) == SIZE, 20)
    sizes = [len(cast("bytes", event.value)) for event in received.named("on_message")]
    assert sizes == [10_000] * (SIZE // 10_000) + [SIZE % 10_000]
    assert hashlib.sha256(received.received()).hexdigest() == DIGEST
    assert by_kernel == []


def test_pieces_of_a_framing_are_whole_also_from_a_source_that_gives_little(
    pair: Callable[..., Pair],
) -> None:
    session, peer, _callback = pair(framing=LengthPrefix(2))
    assert session.send_file(Reader(b"abcdefgh", most=2), piece_size=3) == 8
    peer.expect(b"\0\3abc\0\3def\0\2gh")


def test_a_raw_file_goes_past_the_framing(
    path: Path, pair: Callable[..., Pair], by_kernel: list[int]
) -> None:
    session, peer, _callback = pair(framing=Line())

    def header_and_file() -> None:
        session.send(str(SIZE))
        session.send_file(path, raw=True)
        session.send("next")

    sender = attempt(header_and_file)
    peer.expect(f"{SIZE}\n")
    assert hashed(peer) == DIGEST
    peer.expect("next\n")
    assert result(sender) is None
    assert sum(by_kernel) == SIZE


def test_a_client_sends_files_too(path: Path, ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    with PsClient(RecordingCallback(), *server.address) as client:
        assert client.session is not None
        assert client.session.send_file(path) == SIZE
    callback.wait_for("on_close")
    assert hashlib.sha256(callback.received()).hexdigest() == DIGEST


def test_50_sessions_get_a_file_each(path: Path, ps_server: ServerFactory) -> None:
    server = ps_server(ActingCallback(on_open=lambda session: session.send_file(path, 0, 2**21)))
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(ScriptedClient(server.address)) for _ in range(50)]
        readers = [gevent.spawn(hashed, peer, 2**21) for peer in peers]
        digests = {reader.get(timeout=30) for reader in readers}
    assert digests == {hashlib.sha256(CONTENT[: 2**21]).hexdigest()}


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("offset", [0, 1_234])
def test_a_refusal_of_the_kernel_loses_and_repeats_no_byte(
    calls: int,
    offset: int,
    path: Path,
    pair: Callable[..., Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sendfile = os.sendfile
    left = calls

    def refusing(*args: Any) -> int:
        nonlocal left
        if left == 0:
            raise OSError(22, "Invalid argument")
        left -= 1
        return sendfile(*args)

    monkeypatch.setattr(os, "sendfile", refusing)
    session, peer, _callback = pair()
    sender = attempt(session.send_file, path, offset)
    assert hashed(peer, SIZE - offset) == hashlib.sha256(CONTENT[offset:]).hexdigest()
    assert result(sender) == SIZE - offset == session.bytes_sent
    assert left == 0


# One message, in order


@pytest.mark.parametrize("as_pieces", [False, True], ids=["kernel", "pieces"])
def test_a_file_keeps_its_place_among_sends_and_posts(
    as_pieces: bool, path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    sender = begin(session, Reader() if as_pieces else path)
    others = [attempt(session.send, "<send>", None)]
    gevent.sleep(0)
    assert session.post("<post>")
    others.append(attempt(session.send_file, io.BytesIO(b"<file>"), timeout=None))
    gevent.sleep(0)
    assert session.post("<last>")
    assert hashed(peer) == DIGEST
    peer.expect("<send><post><file><last>")
    assert [result(outcome) for outcome in (sender, *others)] == [SIZE, None, 6]


def test_files_of_greenlets_coroutines_and_threads_never_interleave(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    files = [bytes([letter]) * 700_000 for letter in b"abcdefgh"]

    def send(number: int, content: bytes) -> Any:
        match number % 4:
            case 0:
                return attempt(session.send_file, io.BytesIO(content), timeout=None)
            case 1:
                sending = session.send_file_async(Reader(content), timeout=None)
                return attempt(run_coroutine, sending)
            case 2:
                return NativeThread(session.send_file, io.BytesIO(content), timeout=None)
            case _:
                sending = session.send_file_async(io.BytesIO(content), timeout=None)
                return NativeThread(asyncio.run, sending)

    senders = [send(number, content) for number, content in enumerate(files)]
    received = peer.receive(700_000 * len(files))
    assert {received[at : at + 700_000] for at in range(0, len(received), 700_000)} == set(files)
    for sender in senders:
        value = sender.wait() if isinstance(sender, NativeThread) else result(sender)
        assert value == 700_000


def test_what_was_collected_leaves_before_the_file(path: Path, pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair()
    with session.corked():
        session.send("before ")
        session.post("it ")
        session.send_file(path, 0, 8)
        session.send(" after")
    peer.expect(b"before it " + CONTENT[:8] + b" after")


@pytest.mark.parametrize("as_pieces", [False, True], ids=["kernel", "pieces"])
def test_other_sessions_have_their_turn_after_each_megabyte(
    as_pieces: bool, path: Path, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def send(session: PsSession, _message: bytes) -> None:
        session.send_file(Reader() if as_pieces else path)

    callback = ActingCallback(on_message=send)
    peer = ps_client(ps_server(callback))
    session = callback.opened()
    seen = [0]

    def look() -> None:
        while True:
            seen.append(session.bytes_sent)
            gevent.sleep(0)

    looking = gevent.spawn(look)
    try:
        peer.send("x")
        assert hashed(peer) == DIGEST
    finally:
        looking.kill()
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert max(steps) <= 1_048_576


def test_a_sender_that_is_woken_twice_at_once_takes_one_turn() -> None:
    parking = GreenletParking()
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await parking
            turns += 1

    sender = gevent.spawn(run_in_greenlet, turn())
    try:
        gevent.sleep(0)
        parking.wake()
        parking.wake()
        eventually(lambda: turns)
        gevent.sleep(0.01)
        assert turns == 1
        parking.wake()
        eventually(lambda: turns == 2)
    finally:
        sender.kill()


# Progress


def test_progress_is_told_in_the_callers_greenlet(path: Path, pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair()
    told: list[tuple[int, int | None]] = []
    where = set()

    def progress(sent: int, total: int | None) -> None:
        told.append((sent, total))
        where.add(gevent.getcurrent())

    sender = attempt(session.send_file, path, progress=progress)
    assert hashed(peer) == DIGEST
    assert result(sender) == SIZE
    assert [total for _sent, total in told] == [SIZE] * len(told)
    assert told == sorted(set(told))
    assert told[-1] == (SIZE, SIZE)
    assert where == {sender}

    told.clear()
    session.send_file(Reader(b"abcdefg"), piece_size=3, progress=progress)
    assert told == [(3, None), (6, None), (7, None)]


@pytest.mark.parametrize("as_pieces", [False, True], ids=["kernel", "pieces"])
def test_an_exception_of_progress_ends_the_transfer(
    as_pieces: bool, path: Path, pair: Callable[..., Pair]
) -> None:
    def stop(sent: int, total: int | None) -> None:
        raise LookupError(f"enough: {sent}")

    session, peer, callback = pair()
    with pytest.raises(LookupError, match="enough: 8"):
        session.send_file(path, 0, 8, progress=stop)
    assert session.is_open  # all of it had left
    peer.expect(CONTENT[:8])
    with pytest.raises(LookupError):
        session.send_file(Reader() if as_pieces else path, progress=stop)
    assert callback.closed(session) is PsCloseReason.FAILED
    assert isinstance(session.close_cause, LookupError)


@pytest.mark.parametrize("where", ["progress", "read"])
def test_a_send_in_the_midst_of_a_file_is_refused_and_a_post_comes_after_it(
    where: str, pair: Callable[..., Pair]
) -> None:
    refusals: list[object] = []

    def act() -> None:
        session.post("<post>")
        for send in (session.send, lambda _text: session.send_file(io.BytesIO(b"x"))):
            with pytest.raises(
                PsSendError, match=r"would deadlock|send_async|send_file_async"
            ) as caught:
                send("<send>")
            refusals.append(caught.type)

    class Acting(Reader):
        def read(self, size: int) -> bytes:
            piece = super().read(size)
            if where == "read" and piece:
                act()
            return piece

    def progress(sent: int, total: int | None) -> None:
        if where == "progress":
            act()

    session, peer, _callback = pair()
    assert session.send_file(Acting(b"content"), count=7, progress=progress) == 7

    async def send() -> int:
        return await session.send_file_async(Acting(b"content"), count=7, progress=progress)

    assert run_coroutine(send()) == 7
    peer.expect("content<post>content<post>")
    assert len(refusals) == 4


# Memory


@pytest.mark.parametrize("way", ["kernel", "pieces", "framing"])
def test_a_large_file_is_never_in_memory(
    way: str, tmp_path: Path, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, SPARSE)
    size = SPARSE if way == "kernel" else SPARSE // 4

    def send(session: PsSession) -> None:
        with path.open("rb") as file:
            source: Any = ReadInThread(file, "rb") if way == "pieces" else file
            session.send_file(source, count=size)

    framing = LengthPrefix() if way == "framing" else None
    callback = ActingCallback(on_open=send)
    peer = ps_client(ps_server(callback, framing=framing), timeout=30.0)
    on_the_wire = size + (4 * (size // PIECE) if framing else 0)
    tracemalloc.start()
    try:
        buffer = bytearray(2**20)
        while on_the_wire:
            count = peer.socket.recv_into(buffer)
            assert count
            on_the_wire -= count
        assert tracemalloc.get_traced_memory()[1] < IN_MEMORY
    finally:
        tracemalloc.stop()
