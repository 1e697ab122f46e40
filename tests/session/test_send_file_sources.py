"""What `PsSession.send_file` takes: whatever can be read, from where it is, and nothing else."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import gevent
import gevent.fileobject
import pytest

from psofa_gevent import PsFramingError, PsSendError, PsServer, run_coroutine
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.session.files import LEAST_OF_A_TURN, TURN_SIZE
from psofa_gevent.testing import ClientFactory
from sent_files import (
    CONTENT,
    DIGEST,
    PIECE,
    SHORT,
    SIZE,
    Pair,
    Reader,
    ReadInThread,
    attempt,
    begin,
    hashed,
    result,
)


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
