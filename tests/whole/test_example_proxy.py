"""The proxy example carries everything between its two sides, and nothing gets lost or stuck.

Most tests play both ends: a client, and a back end that accepts what the proxy connects.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.subprocess
import pytest

from example_process import Address, announced_address, end, example, host_and_port
from helpers import PythonProcess, ScriptedServer, free_port, stalled_peer, wait_until_accepting
from marks import needs_ipv6
from psofa_gevent.testing import ScriptedClient, eventually

pytestmark = pytest.mark.programs

psutil: Any = pytest.importorskip("psutil")

MIB = 1_048_576


@contextlib.contextmanager
def proxy(
    *backends: tuple[Any, ...], listen: str = "127.0.0.1:0"
) -> Iterator[tuple[PythonProcess, Address]]:
    """The running proxy and its address; it is ended at the end of the block, and must end well."""
    with example("proxy.py", listen, *map(host_and_port, backends)) as process:
        yield process, announced_address(process)
        end(process)


@contextlib.contextmanager
def pair_through_proxy() -> Iterator[tuple[ScriptedClient, ScriptedClient]]:
    """A client, and the back end's side of the connection that the proxy made for it."""
    with (
        ScriptedServer() as backend,
        proxy(backend.address) as (_, address),
        ScriptedClient(address) as client,
        backend.accept() as server,
    ):
        yield client, server


def send_until_stalled(client: ScriptedClient) -> int:
    """Send zeros until nobody takes any for half a second; return how many were taken."""
    chunk = bytes(65_536)
    client.socket.settimeout(0.5)
    taken = 0
    with contextlib.suppress(TimeoutError):
        while taken < 200 * MIB:
            taken += client.socket.send(chunk)
    return taken


def send_all_and(
    finish: Callable[[], None], sender: ScriptedClient, data: bytes
) -> gevent.Greenlet[[], None]:
    """Send `data` and then `finish`, in a greenlet of its own: nobody may read yet."""

    def run() -> None:
        sender.send(data)
        finish()

    return gevent.spawn(run)


def descriptors(process: PythonProcess) -> int:
    count: int = psutil.Process(process.pid).num_fds()
    return count


def memory(process: PythonProcess) -> int:
    resident: int = psutil.Process(process.pid).memory_info().rss
    return resident


# Bytes


def test_both_sides_talk_and_either_may_be_first() -> None:
    with pair_through_proxy() as (client, server):
        server.send("hello, who is there?\n")
        client.expect("hello, who is there?\n")
        client.send("me\n")
        server.expect("me\n")


def test_large_data_arrives_both_ways_while_another_session_stalls() -> None:
    to_server, to_client = os.urandom(20 * MIB), os.urandom(20 * MIB)
    with (
        ScriptedServer() as backend,
        proxy(backend.address) as (_, address),
        stalled_peer(address),
        backend.accept() as flooding,
    ):
        assert send_until_stalled(flooding) < 100 * MIB
        with ScriptedClient(address, timeout=20.0) as client, backend.accept() as server:
            server.timeout = 20.0
            senders = [gevent.spawn(client.send, to_server), gevent.spawn(server.send, to_client)]
            received_by_server = gevent.spawn(server.receive, len(to_server))
            assert client.receive(len(to_client)) == to_client
            assert received_by_server.get(timeout=20) == to_server
            gevent.joinall(senders, timeout=20, raise_error=True)


def test_bytes_from_before_the_back_is_connected_arrive() -> None:
    with (
        ScriptedServer() as backend,
        proxy(backend.address) as (_, address),
        ScriptedClient(address) as client,
    ):
        client.send("early")
        client.eof()
        with backend.accept() as server:
            assert server.receive_until_eof() == b"early"
            server.send("late")
            server.close()
            assert client.receive_until_eof() == b"late"


def test_memory_stays_flat_while_a_reader_stalls() -> None:
    with (
        ScriptedServer() as backend,
        proxy(backend.address) as (process, address),
        ScriptedClient(address, timeout=20.0) as client,
        backend.accept() as server,
    ):
        # Warmed up: what the interpreter and its allocator need for such traffic is there.
        for _ in range(20):
            server.send(bytes(65_536))
            client.receive(65_536)
        before = memory(process)
        taken = send_until_stalled(server)
        # It stalls as soon as the kernel's buffers are full: nothing piles up in the proxy.
        assert taken < 100 * MIB
        assert memory(process) - before < 4 * MIB
        server.eof()
        assert len(client.receive_until_eof()) == taken


# The ends of a connection


def test_answer_that_comes_after_the_half_close_arrives() -> None:
    question = os.urandom(MIB)
    with pair_through_proxy() as (client, server):
        sender = send_all_and(client.eof, client, question)
        assert server.receive_until_eof() == question
        sender.get(timeout=5)
        client.expect_nothing()
        server.send(question[::-1])
        server.close()
        assert client.receive_until_eof() == question[::-1]


def test_half_close_of_the_back_end_leaves_the_other_direction_open() -> None:
    with pair_through_proxy() as (client, server):
        server.send("that is all")
        server.eof()
        assert client.receive_until_eof() == b"that is all"
        client.send("but I am not done")
        server.expect("but I am not done")
        client.eof()
        server.expect_eof()


def test_both_sides_may_half_close_at_once() -> None:
    with ScriptedServer() as backend, proxy(backend.address) as (process, address):
        before = descriptors(process)
        for _ in range(20):
            with ScriptedClient(address) as client, backend.accept() as server:
                client.send("question")
                server.send("answer")
                client.eof()
                server.eof()
                assert client.receive_until_eof() == b"answer"
                assert server.receive_until_eof() == b"question"
        eventually(lambda: descriptors(process) == before, message="descriptors are left")


def test_close_of_one_side_closes_the_other_after_its_bytes() -> None:
    data = os.urandom(MIB)
    with pair_through_proxy() as (client, server):
        sender = send_all_and(server.close, server, data)
        gevent.sleep(0.2)  # the client is late: its bytes and the FIN wait for it on the way
        assert client.receive_until_eof() == data
        sender.get(timeout=5)


@pytest.mark.parametrize("who", ["client", "back end"])
def test_reset_of_one_side_resets_the_other_after_its_bytes(who: str) -> None:
    with pair_through_proxy() as (client, server):
        resetting, other = (client, server) if who == "client" else (server, client)
        # First the pair: a reset while the proxy still connects is a connect that failed.
        client.send("the first words")
        server.expect("the first words")
        resetting.send("the last words")
        resetting.reset()
        other.expect("the last words")
        other.expect_reset()


def test_client_that_is_gone_before_the_back_is_there_leaves_nothing() -> None:
    with ScriptedServer() as backend, proxy(backend.address) as (process, address):
        before = descriptors(process)
        for end_client in (ScriptedClient.close, ScriptedClient.reset) * 10:
            end_client(ScriptedClient(address))
            with backend.accept() as server, contextlib.suppress(AssertionError):
                server.expect_eof()  # or a reset
        eventually(lambda: descriptors(process) == before, message="descriptors are left")
        with ScriptedClient(address) as client, backend.accept() as server:
            client.send("still here")
            server.expect("still here")


def test_back_end_that_resets_at_once_resets_the_client() -> None:
    with ScriptedServer() as backend, proxy(backend.address) as (process, address):
        before = descriptors(process)
        for _ in range(20):
            with ScriptedClient(address) as client:
                backend.accept().reset()
                client.expect_reset()
        eventually(lambda: descriptors(process) == before, message="descriptors are left")


# Back ends


def test_back_ends_are_used_in_turn() -> None:
    with ScriptedServer() as one, ScriptedServer() as two, contextlib.ExitStack() as stack:
        _, address = stack.enter_context(proxy(one.address, two.address))
        for backend in (one, two, one, two):
            client = stack.enter_context(ScriptedClient(address))
            backend.accept().send("welcome")
            client.expect("welcome")
            client.close()


def test_dead_back_end_is_skipped_and_left_alone_for_a_while() -> None:
    dead_address = ("127.0.0.1", free_port())
    with ScriptedServer() as alive, proxy(dead_address, alive.address) as (process, address):
        for _ in range(5):
            with ScriptedClient(address) as client:
                alive.accept().send("welcome")
                client.expect("welcome")
    log = "\n".join(process.lines)
    assert log.count(f"back end {host_and_port(dead_address)} skipped for 5 s") == 1, log


def test_without_any_back_end_the_client_is_reset_until_one_comes_up() -> None:
    port = free_port()
    with proxy(("127.0.0.1", port)) as (process, address):
        with ScriptedClient(address) as client:
            client.expect_reset()
        process.expect_line("no back end can be reached")
        # Quarantine or not: it is the only one, so it is tried.
        with gevent.socket.create_server(("127.0.0.1", port)) as listener:
            listener.settimeout(5.0)
            with (
                ScriptedClient(address) as client,
                ScriptedClient.from_socket(listener.accept()[0]) as server,
            ):
                server.send("welcome")
                client.expect("welcome")


@needs_ipv6
def test_addresses_in_brackets_are_ipv6() -> None:
    with (
        ScriptedServer(host="::1") as backend,
        proxy(backend.address, listen="[::1]:0") as (_, address),
        ScriptedClient(address) as client,
        backend.accept() as server,
    ):
        assert address[0] == "::1"
        client.send("over IPv6")
        server.expect("over IPv6")


# Start and end of the program


@pytest.mark.parametrize("bad", ["::1:80", "localhost:70000"])
def test_bad_address_is_refused(bad: str) -> None:
    with example("proxy.py", "127.0.0.1:0", bad) as process:
        assert process.wait() == 2
    assert bad in process.lines[-1]


def test_address_in_use_is_named() -> None:
    with ScriptedServer() as taken:
        name = host_and_port(taken.address)
        with example("proxy.py", name, name) as process:
            assert process.wait() == 1
    assert name in process.lines[-1]
    assert "Traceback" not in "\n".join(process.lines)


def test_ends_at_once_though_both_sides_of_a_pair_stall() -> None:
    with (
        ScriptedServer() as backend,
        example("proxy.py", "127.0.0.1:0", host_and_port(backend.address)) as process,
    ):
        address = announced_address(process)
        with ScriptedClient(address) as client, backend.accept() as server:
            gevent.joinall([gevent.spawn(send_until_stalled, side) for side in (client, server)])
            start = time.monotonic()
            end(process)
            assert time.monotonic() - start < 4.0


# A real server behind it


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Address]:
    if shutil.which("redis-server") is None or shutil.which("redis-benchmark") is None:
        pytest.skip("no Redis here")
    address = ("127.0.0.1", free_port())
    process = gevent.subprocess.Popen(
        shlex.split(
            f"redis-server --bind {address[0]} --port {address[1]} --save '' --appendonly no"
        ),
        cwd=tmp_path,
        stdout=gevent.subprocess.DEVNULL,
        stderr=gevent.subprocess.DEVNULL,
    )
    try:
        wait_until_accepting(address)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=5)


@pytest.mark.parametrize("pipeline", ["1", "16"])
def test_redis_works_through_the_proxy(redis: Address, pipeline: str) -> None:
    with proxy(redis) as (_, (host, port)):
        benchmark = gevent.subprocess.run(
            shlex.split(
                f"redis-benchmark -h {host} -p {port} -n 500 -c 50 -P {pipeline} -q "
                "-t ping,set,get,incr,lpush,lrange_100,mset"
            ),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert benchmark.returncode == 0, benchmark.stderr
        assert "error" not in (benchmark.stdout + benchmark.stderr).lower()
        assert benchmark.stdout.count("requests per second") >= 8
        value = os.urandom(5 * MIB).hex()
        with ScriptedClient((host, port), timeout=10.0) as client:
            client.send(f"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${len(value)}\r\n{value}\r\n")
            client.expect("+OK\r\n")
            client.send("*2\r\n$3\r\nGET\r\n$1\r\nk\r\n")
            client.expect(f"${len(value)}\r\n{value}\r\n")
