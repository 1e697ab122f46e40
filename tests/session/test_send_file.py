"""`PsSession.send_file`: a file is one message, however large, and never in memory.

`CONTENT` is more than the buffers of a connection take, so each test with a peer that does not read
has a file in its middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import itertools
import logging
import os
import ssl
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import gevent
import gevent.event
import gevent.fileobject
import gevent.socket
import pytest

from acting import ActingCallback, wait_until_stalled
from helpers import TINY_BUFFER, NativeThread, stalled_peer
from psofa_gevent import (
    PsClient,
    PsCloseReason,
    PsFramingError,
    PsSendError,
    PsServer,
    PsSession,
    run_coroutine,
)
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.hub.parking import GreenletParking, run_in_greenlet
from psofa_gevent.session.files import LEAST_OF_A_TURN, TURN_SIZE
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)
from psofa_gevent.tls import socket as tls_socket

SIZE = 12 * 1024 * 1024 + 12_345
CONTENT = b"".join(b"%07d\n" % number for number in range(SIZE // 8 + 1))[:SIZE]
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PIECE = 65_536
SHORT = 0.3
"""Seconds: a timeout that is waited for."""
SPARSE = 256 * 1024 * 1024
IN_MEMORY = 4 * 1024 * 1024
"""Bytes: what a transfer may hold, with all that the test itself does."""

Outcome: TypeAlias = "gevent.Greenlet[..., BaseException | int]"
ReadInThread: Any = gevent.fileobject.FileObjectThread
Pair = tuple[PsSession[Any], ScriptedClient, ActingCallback]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(CONTENT)
    return made


@pytest.fixture
def pair(ps_server: ServerFactory) -> Iterator[Callable[..., Pair]]:
    """Makes sessions whose peers read when the test does: ``pair(callback, **settings)``."""
    with contextlib.ExitStack() as peers:

        def make(callback: ActingCallback | None = None, **settings: Any) -> Pair:
            callback = callback or ActingCallback()
            server = ps_server(callback, **{"linger_timeout": 0.0, **settings})
            peer = peers.enter_context(stalled_peer(server.address))
            return callback.opened(), peer, callback

        yield make


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What sendfile(2) has sent, call by call."""
    sent: list[int] = []
    sendfile = os.sendfile

    def counting(*args: Any) -> int:
        count = sendfile(*args)
        sent.append(count)
        return count

    monkeypatch.setattr(os, "sendfile", counting)
    return sent


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call it in a greenlet, whose value is what it returned or raised."""

    def body() -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            return error

    return gevent.spawn(body)


def result(outcome: Outcome) -> BaseException | int:
    return outcome.get(timeout=20)


def begin(session: PsSession[Any], file: Any, **kwargs: Any) -> Outcome:
    """A greenlet that sends a file, and waits in its middle."""
    sender = attempt(session.send_file, file, **{"timeout": None, **kwargs})
    wait_until_stalled(session)
    assert not sender.ready()
    return sender


def hashed(peer: ScriptedClient, count: int = SIZE) -> str:
    """Read so many bytes, without keeping them: their digest."""
    digest = hashlib.sha256()
    while count:
        data = peer.receive(min(count, PIECE))
        digest.update(data)
        count -= len(data)
    return digest.hexdigest()


class Reader:
    """An object that has nothing but ``read``."""

    def __init__(self, content: bytes = CONTENT, most: int = SIZE) -> None:
        self._file = io.BytesIO(content)
        self._most = most

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._most))


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


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


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


# What may be sent


def gzipped(path: Path) -> IO[bytes]:
    with gzip.open(path.with_suffix(".gz"), "wb", 1) as file:
        file.write(CONTENT)
    return cast("IO[bytes]", gzip.open(path.with_suffix(".gz")))


def spooled(_path: Path) -> IO[bytes]:
    file = tempfile.SpooledTemporaryFile(max_size=2**30)  # noqa: SIM115 - the test closes it
    file.write(CONTENT)
    return cast("IO[bytes]", file)


def zipped(path: Path) -> IO[bytes]:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        archive.write(path, "member")
    with zipfile.ZipFile(path.with_suffix(".zip")) as archive:
        return archive.open("member")


def temporary(_path: Path) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the test closes it
    file.write(CONTENT[:-10])
    file.write(CONTENT[-10:])  # is in the object's buffer now
    return cast("IO[bytes]", file)


def named_temporary(_path: Path) -> IO[bytes]:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - the test closes it
    file.write(CONTENT)
    return cast("IO[bytes]", file)


@pytest.mark.parametrize(
    ("opened", "regular"),
    [
        (lambda path: path.open("rb"), True),
        (lambda path: path.open("rb", buffering=0), True),
        (lambda path: path.open("rb+"), True),
        (temporary, True),
        (named_temporary, False),
        (gzipped, False),
        (spooled, False),
        (zipped, False),
        (lambda _path: io.BytesIO(CONTENT), False),
        (lambda path: ReadInThread(path.open("rb"), "rb"), False),
    ],
    ids=[
        "buffered",
        "unbuffered",
        "updating",
        "temporary",
        "named",
        "gzip",
        "spooled",
        "zip",
        "BytesIO",
        "gevent",
    ],
)
def test_whatever_can_be_read_is_sent_from_its_beginning(
    opened: Callable[[Path], IO[bytes]],
    regular: bool,
    path: Path,
    pair: Callable[..., Pair],
    by_kernel: list[int],
) -> None:
    session, peer, _callback = pair()
    with contextlib.closing(opened(path)) as file:
        sender = attempt(session.send_file, file)
        assert hashed(peer) == DIGEST
        assert result(sender) == SIZE
        assert (sum(by_kernel) == SIZE) is regular
        again = attempt(session.send_file, file, offset=5, count=SIZE - 10)
        assert hashed(peer, SIZE - 10) == hashlib.sha256(CONTENT[5:-5]).hexdigest()
        assert result(again) == SIZE - 10
        assert not file.closed


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "Path", "PathLike"])
def test_a_path_is_opened_and_closed(
    kind: Callable[[Path], Any], path: Path, pair: Callable[..., Pair]
) -> None:
    class AsBytes:
        def __fspath__(self) -> bytes:
            return os.fsencode(path)

    session, peer, _callback = pair()
    assert session.send_file(AsBytes() if kind is os.fsencode else kind(path), 8, 16) == 16
    peer.expect(CONTENT[8:24])


def test_the_position_of_a_file_is_neither_used_nor_moved(
    path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    with path.open("rb") as file:
        file.seek(100)
        session.send_file(file, 8, 8)
        peer.expect(CONTENT[8:16])
        assert file.tell() == 100
        assert file.read(8) == CONTENT[100:108]


def test_a_file_that_is_closed_meanwhile_is_sent_to_its_end(
    path: Path, tmp_path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    with path.open("rb") as file:
        sender = begin(session, file)
    (tmp_path / "other").write_bytes(b"secret" * SIZE)
    with (tmp_path / "other").open("rb"):  # has its descriptor now
        assert hashed(peer) == DIGEST
    assert result(sender) == SIZE


def test_a_pipe_is_sent_up_to_its_end_and_others_go_on(
    pair: Callable[..., Pair], ps_client: ClientFactory
) -> None:
    session, peer, callback = pair(send_timeout=SHORT)
    other = ps_client(cast("PsServer", session.owner))
    reading, writing = os.pipe()
    with (
        gevent.fileobject.FileObjectPosix(reading, "rb", 0) as source,
        gevent.fileobject.FileObjectPosix(writing, "wb", 0) as sink,
    ):
        sender = attempt(session.send_file, source)
        sink.write(b"one ")
        peer.expect("one ")
        callback.opened(1).send("hello")
        other.expect("hello")
        sink.write(b"two")
        peer.expect("two")
        sink.close()
        assert result(sender) == 7


def test_others_have_their_turn_however_small_the_pieces_are(pair: Callable[..., Pair]) -> None:
    session, _peer, _callback = pair()
    pieces: list[int] = []
    before: list[int] = []

    class Source(Reader):
        def read(self, size: int) -> bytes:
            if not pieces:
                gevent.get_hub().loop.run_callback(lambda: before.append(len(pieces)))
            pieces.append(size)
            return super().read(size)

    assert session.send_file(Source(), count=10_000, piece_size=1) == 10_000
    assert before[0] <= TURN_SIZE / LEAST_OF_A_TURN + 1


def test_what_can_not_seek_is_sent_from_where_it_is(pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair()
    assert session.send_file(Reader(b"content")) == 7
    assert session.send_file(Reader(b"content"), count=3) == 3
    peer.expect("contentcon")
    with pytest.raises(ValueError, match="offset must be 0 for a file that can't seek, not 2"):
        session.send_file(Reader(b"content"), 2)
    peer.expect_nothing(0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_file_that_says_it_is_empty_is_read_to_its_end(pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair()
    sent = session.send_file("/proc/self/limits")
    assert sent > 100
    assert peer.receive(sent).startswith(b"Limit")


def test_offsets_may_be_beyond_4_gib(tmp_path: Path, pair: Callable[..., Pair]) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(5 * 2**30)
        file.write(b"the end")
    session, peer, _callback = pair()
    assert session.send_file(tmp_path / "sparse", 5 * 2**30 - 3) == 10
    peer.expect(b"\0\0\0the end")


@pytest.mark.parametrize("framing", [None, Line()])
def test_of_an_empty_file_nothing_is_sent(
    framing: Line | None, tmp_path: Path, pair: Callable[..., Pair]
) -> None:
    (tmp_path / "empty").touch()
    session, peer, _callback = pair(framing=framing)
    assert session.send_file(tmp_path / "empty") == 0
    assert session.send_file(io.BytesIO()) == 0
    assert session.send_file(io.BytesIO(b"content"), count=0) == 0
    assert session.send_file(io.BytesIO(b"content"), 100) == 0
    peer.expect_nothing(0.01)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"offset": -1}),
        (TypeError, {"offset": 1.5}),
        (ValueError, {"count": -1}),
        (TypeError, {"count": "7"}),
        (ValueError, {"piece_size": 0}),
        (TypeError, {"piece_size": None}),
        (ValueError, {"timeout": -1}),
        (TypeError, {"progress": 7}),
        (PsSendError, {"count": SIZE + 1}),
        (PsSendError, {"offset": 1, "count": SIZE}),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_leaves(
    error: type[Exception], arguments: dict[str, Any], path: Path, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    for how in (session.send_file, lambda *a, **k: run_coroutine(session.send_file_async(*a, **k))):
        with pytest.raises(error):
            how(path, **arguments)
    assert session.is_open
    peer.expect_nothing(0.01)


def test_a_coroutine_function_as_progress_is_refused(path: Path, pair: Callable[..., Pair]) -> None:
    async def progress(sent: int, total: int | None) -> None: ...

    session, _peer, _callback = pair()
    with pytest.raises(TypeError, match="plain function"):
        session.send_file(path, progress=progress)


class Giving:
    def __init__(self, what: Any) -> None:
        self.what = what

    def read(self, size: int) -> Any:
        return self.what


@pytest.mark.parametrize(
    ("error", "file"),
    [
        (TypeError, io.StringIO("text")),
        (TypeError, b"content"),
        (TypeError, bytearray(b"content")),
        (TypeError, 7),
        (TypeError, None),
        (TypeError, io.BytesIO),
        (TypeError, Giving("text")),
        (TypeError, Giving(None)),
        (TypeError, Giving(7)),
        (TypeError, Giving([b"content"])),
        (ValueError, Giving(bytes(PIECE + 1))),
        (FileNotFoundError, "/no/such/file"),
        (IsADirectoryError, "/"),
        (ValueError, "/dev/null"),
    ],
    ids=[
        "StringIO",
        "bytes",
        "bytearray",
        "int",
        "None",
        "class",
        "gives text",
        "gives None",
        "gives a number",
        "gives a list",
        "gives too much",
        "missing",
        "directory",
        "device",
    ],
)
def test_what_is_no_binary_file_is_refused(
    error: type[Exception], file: Any, pair: Callable[..., Pair]
) -> None:
    session, peer, _callback = pair()
    with pytest.raises(error):
        session.send_file(file)
    assert session.is_open
    peer.expect_nothing(0.01)


def test_text_files_and_fifos_are_refused_at_once(path: Path, pair: Callable[..., Pair]) -> None:
    session, _peer, _callback = pair()
    with path.open() as file, pytest.raises(TypeError, match="binary mode"):
        session.send_file(cast("Any", file))
    fifo = path.with_suffix(".fifo")
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="regular file"):
        session.send_file(fifo)


@pytest.mark.parametrize("mode", ["wb", "ab", "xb"])
@pytest.mark.parametrize("buffering", [0, -1])
def test_a_file_that_is_written_is_refused_and_left_where_it_is(
    mode: str, buffering: int, tmp_path: Path, pair: Callable[..., Pair]
) -> None:
    session, _peer, _callback = pair()
    with (tmp_path / "log").open(mode, buffering) as file:
        file.write(b"first")
        with pytest.raises(TypeError, match="opened for reading"):
            session.send_file(cast("Any", file))
        file.write(b"second")
    assert (tmp_path / "log").read_bytes() == b"firstsecond"
    assert session.is_open


def test_pieces_of_which_a_framing_makes_nothing_count_as_sent(pair: Callable[..., Pair]) -> None:
    class Sparse(LengthPrefix):
        def encode(self, message: Any) -> bytes:
            return super().encode(message) if any(message) else b""

    session, peer, _callback = pair(framing=Sparse(1))
    assert (
        session.send_file(io.BytesIO(bytes(4) + b"text" + bytes(4)), count=12, piece_size=4) == 12
    )
    peer.expect(b"\4text")


def test_a_piece_that_the_framing_can_not_carry_is_refused(pair: Callable[..., Pair]) -> None:
    session, peer, _callback = pair(framing=LengthPrefix(1, max_size=100))
    with pytest.raises(PsFramingError):
        session.send_file(io.BytesIO(bytes(300)))
    assert session.is_open
    assert session.send_file(io.BytesIO(bytes(150)), piece_size=100) == 150
    peer.expect(b"\x64" + bytes(100) + b"\x32" + bytes(50))


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
