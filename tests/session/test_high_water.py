"""`high_water` is what a slow peer costs: in memory, and message by message."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import NativeThread, close_reasons, run_python
from psofa_gevent import PsCallback, PsCloseReason, PsGroup, PsOverflow, PsServer, PsSession
from psofa_gevent.framing import LengthPrefix
from psofa_gevent.session.send_buffers import JOIN_SIZE, OWN_BLOCK, Buffers, Step
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ServerFactory,
    connected_session,
    eventually,
)

PIECE = 65_536

# In memory, seen from outside

MEMORY = """
    import contextlib, ctypes, os, socket, ssl, sys

    import gevent
    import gevent.ssl
    from helpers import NativeThread
    from psofa_gevent import PsCallback, PsOverflow, PsServer
    from psofa_gevent.framing import Line

    HIGH_WATER = 1_048_576
    PAGE = os.sysconf("SC_PAGE_SIZE")
    M_TOP_PAD, M_ARENA_MAX = -2, -8  # of malloc.h
    way, overflow, path, *files = sys.argv[1:]
    noise = os.urandom(HIGH_WATER).replace(b"\\n", b"x").replace(b"\\r", b"x")


    def memory():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * PAGE


    def post_all(session, size):
        for number in range(HIGH_WATER // size + 20_000):
            if overflow == "CLOSE" and session.pending_bytes + size > HIGH_WATER:
                return
            at = number * size % (HIGH_WATER - size)
            session.post(noise[at : at + size])


    def measure(size):
        settings = {"high_water": HIGH_WATER, "overflow": PsOverflow[overflow]}
        if way == "tls":
            settings["ssl_context"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            settings["ssl_context"].load_cert_chain(files[0])
        if way == "framing":
            settings["framing"] = Line()
        host = "unix:" + path if way == "unix" else "127.0.0.1"
        with PsServer(PsCallback(), host=host, port=0, linger_timeout=0, **settings) as server:
            peer = gevent.socket.socket(socket.AF_UNIX if way == "unix" else socket.AF_INET)
            peer.connect(path if way == "unix" else server.address)
            if way == "tls":
                trust = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                trust.load_verify_locations(files[1])
                peer = trust.wrap_socket(peer, server_hostname="localhost")
            while not server.sessions or server.sessions[0]._is_opening:
                gevent.sleep(0.001)
            (session,) = server.sessions
            while not session.pending_bytes:  # the kernel's own part
                session.post(bytes(size * (65_536 // size)))
                gevent.sleep(0)
            if way == "thread":
                NativeThread(session.post, b"x").join()
            # glibc: what was freed before is not to be used; the heap grows page by page, and not
            # in steps of 128 KiB; threads have no heaps of their own.
            with contextlib.suppress(AttributeError):
                libc = ctypes.CDLL(None)
                libc.mallopt(M_TOP_PAD, 0)
                libc.mallopt(M_ARENA_MAX, 1)
                libc.malloc_trim(0)
            before = memory()
            if way != "thread":
                post_all(session, size)
            elif overflow == "DROP_OLDEST":  # behind an outbox that is full
                post_all(session, size)
                NativeThread(post_all, session, size).join(100)
            else:  # the hub stands still
                NativeThread(post_all, session, size).join(100)
            return memory() - before, session.pending_bytes


    for size in (1, 2, 100, 200, 1_024, 65_536):
        child = os.fork()
        if not child:
            print(size, *measure(size), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.deadline(240.0)
@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@pytest.mark.parametrize(
    ("way", "overflow"),
    [
        *(("hub", each) for each in PsOverflow),
        *(("thread", each) for each in PsOverflow),
        ("framing", PsOverflow.DROP_OLDEST),
        ("unix", PsOverflow.DROP_NEWEST),
        ("tls", PsOverflow.DROP_OLDEST),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_waits_takes_at_most_twice_high_water_in_memory(
    way: str, overflow: PsOverflow, tmp_path: Path
) -> None:
    files: list[str] = []
    if way == "tls":
        trustme = pytest.importorskip("trustme")
        authority = trustme.CA()
        files = [str(tmp_path / "cert.pem"), str(tmp_path / "ca.pem")]
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(files[0])
        authority.cert_pem.write_to_path(files[1])
    path = str(tmp_path / "app.sock")
    result = run_python(MEMORY, way, overflow.name, path, *files, timeout=220)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [[int(word) for word in line.split()] for line in result.stdout.splitlines()]
    assert [size for size, _growth, _waits in lines] == [1, 2, 100, 200, 1_024, 65_536]
    for size, growth, waits in lines:
        assert growth <= 2 * 1_048_576, (size, growth, waits)
        assert waits >= 0.45 * 1_048_576, (size, growth, waits)  # else nothing was measured


# Message by message


class Taker:
    """What `Buffers` need of a session: one whose kernel takes as many bytes as it is told."""

    def __init__(self) -> None:
        self.received = b""
        self.room = 0
        self._half_sent = 0
        """Bytes that TLS has encrypted, and the kernel has not taken."""

    def _send_now(self, data: Any) -> int:
        taken = min(self.room, len(data))
        assert len(data) >= self._half_sent
        self.received += bytes(data[:taken])
        self.room -= taken
        return taken


def messages_of(sizes: list[int]) -> Iterator[bytes]:
    """Different ones, of these sizes."""
    for number, size in enumerate(sizes):
        yield (b"%d," % number * size)[:size]


sizes_of_messages = st.lists(
    st.one_of(st.integers(1, 9), st.integers(1, 2 * OWN_BLOCK), st.sampled_from([JOIN_SIZE])),
    max_size=30,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("give"), st.integers(0, 3_000)),
        st.tuples(st.just("drop"), st.integers(1, 1_000)),
        st.tuples(st.just("append"), st.integers(1, 2 * OWN_BLOCK)),
        st.tuples(st.just("extend"), st.integers(1, 2 * OWN_BLOCK)),
    ),
    max_size=20,
)


@given(sizes_of_messages, steps, st.integers(0, 500))
def test_whole_messages_are_dropped_and_the_others_arrive_in_order(
    sizes: list[int], steps: list[tuple[str, int]], encrypted: int
) -> None:
    buffers = Buffers(droppable=True)
    taker = Taker()
    waiting = list(messages_of(sizes))
    for message in waiting:
        buffers.append(message)
    expected = b""  # of messages that have begun, or must stay
    for step, number in steps:
        if step == "give":
            taker.room = number
            taker._half_sent = min(encrypted, max(buffers.size - number, 0))
            is_all = number >= buffers.size
            assert buffers.give(taker) is (Step.ALL if is_all else Step.SOME)  # type: ignore[arg-type]  # a double
            stays = len(taker.received) + (0 if is_all else taker._half_sent)
            while waiting and len(expected) < stays:
                expected += waiting.pop(0)
        elif step == "drop":
            oldest, weight = 0, 0
            while oldest < len(waiting) and weight < number:
                weight += len(waiting[oldest]) + 1
                oldest += 1
            assert buffers.drop(number) == (oldest, weight)
            del waiting[:oldest]
        else:
            message = bytes([number % 256]) * number
            waiting.append(message)
            if step == "append":
                buffers.append(message)
            else:
                others = Buffers(droppable=True)
                others.append(message)
                buffers.extend(others)
        left = len(expected) - len(taker.received)
        assert buffers.size == left + sum(map(len, waiting))
        assert buffers.weight == buffers.size + len(waiting)
        assert buffers.droppable_weight == buffers.weight - left
    taker.room = buffers.size
    taker._half_sent = 0
    buffers.give(taker)  # type: ignore[arg-type]  # a double
    assert taker.received == expected + b"".join(waiting)
    assert buffers.size == buffers.weight == 0
    assert buffers.left == len(taker.received)


def the_session(server: PsServer[Any]) -> PsSession[Any]:
    (session,) = eventually(lambda: server.sessions)
    return session


def fill(session: PsSession[Any]) -> None:
    """Until the kernel takes nothing more, and a little waits. Of a pair of Unix sockets."""
    while not session.pending_bytes:
        session.post(LengthPrefix().encode(bytes(PIECE)), raw=True)


@pytest.mark.parametrize("size", [1, 2, 100, 159, 160, 1_024, PIECE])
def test_bytes_are_counted_and_nothing_else(size: int) -> None:
    callback = RecordingCallback()
    high_water = PIECE * 3
    with connected_session(callback, high_water=high_water) as both:
        session = both.session
        fill(session)
        for _ in range((high_water - session.pending_bytes) // size):
            assert session.post(bytes(size))
        assert session.pending_bytes > high_water - size
        assert session.post(bytes(size)) is False
        callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]


def numbered(number: int) -> bytes:
    """A message that has its number, of 3 to 300 bytes."""
    return b"%d;" % number + bytes(number * 7 % 300)


def numbers_in(data: bytes) -> list[int]:
    """Those of the messages, which must be whole; the one of `fill` is none."""
    decoder = LengthPrefix().decoder()
    messages = [bytes(message) for message in decoder.feed(data)]
    assert decoder.kept == 0
    numbers = [int(each.partition(b";")[0]) for each in messages if len(each) < PIECE]
    assert [each for each in messages if len(each) < PIECE] == list(map(numbered, numbers))
    return numbers


@pytest.mark.parametrize("overflow", [PsOverflow.DROP_OLDEST, PsOverflow.DROP_NEWEST])
def test_each_small_message_is_dropped_whole_and_counted(overflow: PsOverflow) -> None:
    settings: dict[str, Any] = {"high_water": 3 * PIECE, "overflow": overflow}
    with connected_session(PsCallback(), framing=LengthPrefix(), **settings) as both:
        session, peer = both.session, both.peer
        fill(session)
        posted = 3_000
        taken = [session.post(numbered(number)) for number in range(posted)]
        eventually(lambda: session.pending_bytes <= 3 * PIECE)  # when the hub has come to all of it
        dropped = session.messages_dropped
        numbers = numbers_in(peer.receive(session.bytes_sent + session.pending_bytes))
        assert len(numbers) == posted - dropped < posted
        if overflow is PsOverflow.DROP_OLDEST:
            assert all(taken)
            assert numbers == list(range(dropped, posted))
        else:
            assert numbers == [number for number in range(posted) if taken[number]]
        session.post(numbered(7))
        peer.expect(LengthPrefix().encode(numbered(7)))


@pytest.mark.parametrize("use_group", [False, True])
@pytest.mark.parametrize("overflow", PsOverflow)
def test_what_threads_post_counts_at_once(overflow: PsOverflow, use_group: bool) -> None:
    """While the hub stands still, and behind what it has posted itself."""
    callback = RecordingCallback()
    settings: dict[str, Any] = {"high_water": 3 * PIECE, "overflow": overflow}
    posted = 3_000

    def post_all() -> list[bool]:
        if use_group:
            for number in range(posted):
                group.post(numbered(number))
            return []
        return [session.post(numbered(number)) for number in range(posted)]

    with connected_session(callback, framing=LengthPrefix(), **settings) as both:
        session, peer = both.session, both.peer
        group: PsGroup[bytes] = PsGroup()
        group.join(session)
        fill(session)
        before = session.pending_bytes
        taken = NativeThread(post_all).join()
        waits = session.pending_bytes
        assert before < waits <= 3 * PIECE
        if overflow is PsOverflow.CLOSE:
            if not use_group:
                number = taken.index(False)
                assert not any(taken[number:])
            callback.wait_for("on_close")
            assert close_reasons(callback) == [PsCloseReason.FAILED]
            assert f"high_water={3 * PIECE}" in str(session.close_cause)
            assert f"{waits} bytes wait" in str(session.close_cause)
            return
        numbers = numbers_in(peer.receive(session.bytes_sent + waits))
        dropped = session.messages_dropped
        assert len(numbers) == posted - dropped < posted
        if overflow is PsOverflow.DROP_OLDEST:
            assert all(taken)
            assert numbers == list(range(dropped, posted))
        elif not use_group:
            assert numbers == [number for number in range(posted) if taken[number]]
        assert NativeThread(session.post, numbered(7)).wait() is True
        peer.expect(LengthPrefix().encode(numbered(7)))


def test_what_threads_post_makes_the_outbox_drop_its_oldest() -> None:
    settings: dict[str, Any] = {"high_water": 3 * PIECE, "overflow": PsOverflow.DROP_OLDEST}
    with connected_session(PsCallback(), framing=LengthPrefix(), **settings) as both:
        session, peer = both.session, both.peer
        fill(session)
        ours = 3_000
        for number in range(ours):
            session.post(numbered(number))
        for _ in range(3):  # in turns with the hub
            for number in range(ours, ours + 100):
                NativeThread(session.post, numbered(number)).join()
            ours += 100
            gevent.sleep(0)
        eventually(lambda: session.pending_bytes <= 3 * PIECE)  # when the hub has come to all of it
        numbers = numbers_in(peer.receive(session.bytes_sent + session.pending_bytes))
        assert numbers == list(range(session.messages_dropped, ours))


@pytest.mark.parametrize("overflow", PsOverflow)
def test_a_thread_s_message_larger_than_the_mark_is_taken_when_nothing_waits(
    overflow: PsOverflow, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), high_water=1, overflow=overflow)
    client = ps_client(server)
    session = the_session(server)
    assert NativeThread(session.post, bytes(16 * PIECE)).join() is True
    assert client.receive(16 * PIECE) == bytes(16 * PIECE)
    assert session.messages_dropped == 0
    assert NativeThread(session.post, b"").join() is True


def test_threads_and_the_hub_share_the_mark() -> None:
    settings: dict[str, Any] = {"high_water": 3 * PIECE, "overflow": PsOverflow.DROP_NEWEST}
    with connected_session(PsCallback(), **settings) as both:
        session = both.session
        fill(session)
        room = 3 * PIECE - session.pending_bytes
        assert NativeThread(session.post, bytes(room - 10)).join() is True
        assert session.post(bytes(11)) is False
        assert session.post(bytes(10)) is True
        assert NativeThread(session.post, b"x").join() is False
        assert session.pending_bytes == 3 * PIECE
        assert session.messages_dropped == 2


def test_posts_of_threads_keep_their_place_among_what_these_ask_for() -> None:
    class Blocking(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            results.append(NativeThread(ask, session).join())  # the hub does not run meanwhile

    def ask(session: PsSession[Any]) -> list[bool]:
        taken = [session.post(b"a"), session.post(b"b")]
        session.send_eof()
        return [*taken, session.post(b"late")]

    results: list[list[bool]] = []
    with connected_session(Blocking()) as both:
        both.peer.send("go")
        both.peer.expect("ab")
        both.peer.expect_eof()
    assert results == [[True, True, False]]


def test_many_threads_lose_and_mix_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), framing=LengthPrefix(), high_water=2**30)
    clients = [ps_client(server, timeout=30.0) for _ in range(3)]
    eventually(lambda: len(server.sessions) == 3)
    each = 2_000

    def post_some(letter: int) -> None:
        for number in range(each):
            server.broadcast(b"%d:%d" % (letter, number) + bytes(number % 200))

    threads = [NativeThread(post_some, letter) for letter in range(4)]
    sizes = [len(b"%d:%d" % (0, number)) + number % 200 + 4 for number in range(each)]
    for client in clients:
        received = client.receive(4 * sum(sizes))
        by_letter: dict[bytes, list[int]] = {}
        for message in LengthPrefix().decoder().feed(received):
            letter, _, number = message.rstrip(b"\0").partition(b":")
            by_letter.setdefault(letter, []).append(int(number))
            assert message == b"%s:%s" % (letter, number) + bytes(int(number) % 200)
        assert by_letter == {b"%d" % letter: list(range(each)) for letter in range(4)}
    for thread in threads:
        thread.wait()


def test_a_collected_send_waits_for_its_bytes_whatever_is_dropped_behind_it() -> None:
    settings: dict[str, Any] = {"high_water": 2 * PIECE, "overflow": PsOverflow.DROP_OLDEST}
    with connected_session(PsCallback(), send_timeout=None, **settings) as both:
        session, peer = both.session, both.peer
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += session._sock.send(bytes(PIECE))
        returned: list[int] = []

        def send_corked() -> None:
            with session.corked():
                session.send(b"s" * PIECE)
            returned.append(session.bytes_sent)

        sender = gevent.spawn(send_corked)
        eventually(lambda: session.pending_bytes)
        for _ in range(20):
            session.post(b"p" * (PIECE // 2))
        assert session.messages_dropped > 0
        while not returned:
            peer.receive(1_000)
            gevent.sleep(0)
        sender.get(timeout=5)
        assert returned[0] >= PIECE


@pytest.mark.parametrize("size", [1, 2, 100])
def test_what_is_collected_takes_little_memory(size: int) -> None:
    with connected_session(PsCallback(), high_water=2**30) as both:
        session = both.session
        with session.corked():
            while not session.bytes_sent:
                session.post(bytes(size))
                cork = session._cork or []
                assert sum(map(sys.getsizeof, cork)) + sys.getsizeof(cork) <= 2 * JOIN_SIZE


@pytest.mark.parametrize("framing", [None, LengthPrefix()])
@pytest.mark.parametrize("overflow", PsOverflow)
def test_small_posts_files_and_sends_leave_in_order(
    framing: LengthPrefix | None, overflow: PsOverflow, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"high_water": 2**24, "overflow": overflow, "send_timeout": None}
    file = tmp_path / "file"
    file.write_bytes(b"f" * 3 * PIECE)
    with connected_session(PsCallback(), framing=framing, **settings) as both:
        session, peer = both.session, both.peer
        while not session.pending_bytes:
            session.post(b"a" * PIECE, raw=True)
        expected = b"a" * (session.bytes_sent + session.pending_bytes)
        outbox = session._get_outbox()
        senders: list[gevent.Greenlet[..., Any]] = []
        for number in range(20):
            for letter in b"pqr":
                session.post(bytes([letter]) * number, raw=True)
                NativeThread(session.post, bytes([letter]) * number, raw=True).wait()
                eventually(lambda: outbox.inbox.buffers is None)  # the hub has come to it
                expected += bytes([letter]) * number * 2
            if number % 4 == 0:
                senders.append(gevent.spawn(session.send_file, file, raw=True))
                expected += b"f" * 3 * PIECE
            elif number % 4 == 2:
                senders.append(gevent.spawn(session.send, b"s" * number, raw=True))
                expected += b"s" * number
            gevent.sleep(0)
        assert peer.receive(len(expected)) == expected
        gevent.joinall(senders, timeout=5, raise_error=True)
        assert session.bytes_sent == len(expected)
        assert session.pending_bytes == session.messages_dropped == 0
