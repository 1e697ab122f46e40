"""Real asyncio libraries on the hub's loop, used by many greenlets at once."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gevent
import gevent.event
import gevent.pool
import gevent.subprocess
import pytest
from gevent.pywsgi import WSGIServer

from helpers import free_port, wait_until_accepting
from psofa_gevent import PsCallback, PsServer, PsSession, run_coroutine, spawn_coroutine
from psofa_gevent.testing import ScriptedClient

T = TypeVar("T")

GREENLETS = 200


@pytest.fixture
def http_port() -> Iterator[int]:
    """The port of a WSGI server on our own hub: it says what it was asked for."""

    def application(environment: dict[str, Any], start_response: Any) -> Sequence[bytes]:
        gevent.sleep(0.001)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environment["PATH_INFO"].encode() + environment["wsgi.input"].read()]

    server = WSGIServer(("127.0.0.1", 0), application, log=None)
    server.start()
    try:
        yield int(server.address[1])
    finally:
        server.stop()


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    """The port of a Redis server of our own."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    process = gevent.subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=gevent.subprocess.DEVNULL,
    )
    try:
        wait_until_accepting(("127.0.0.1", port))
        yield port
    finally:
        process.kill()
        process.wait()


async def open_session(aiohttp: Any) -> Any:
    return aiohttp.ClientSession()  # which wants a running loop


def in_greenlets(function: Callable[[int], T], count: int = GREENLETS) -> list[T]:
    return gevent.pool.Pool(count).map(function, range(count))


def test_an_httpx_client_is_shared_by_all_greenlets(http_port: int) -> None:
    httpx = pytest.importorskip("httpx")
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", trust_env=False)

    async def ask(number: int) -> str:
        answer = await client.post(f"/{number}", content=b"!" * 10_000)
        return str(answer.text[:-10_000])

    try:
        # Fewer: the work of httpx's connection pool grows with their square.
        answers = in_greenlets(lambda number: run_coroutine(ask(number), timeout=30), 50)
        assert answers == [f"/{number}" for number in range(50)]
    finally:
        run_coroutine(client.aclose())


def test_an_aiohttp_client_and_server_talk_to_each_other(http_port: int) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    web = pytest.importorskip("aiohttp.web")

    async def start_proxy(session: Any) -> tuple[Any, int]:
        """An aiohttp server that asks the WSGI server."""

        async def handle(request: Any) -> Any:
            async with session.get(f"http://127.0.0.1:{http_port}{request.path}") as answer:
                return web.Response(text="proxied " + await answer.text())

        runner = web.ServerRunner(web.Server(handle))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    async def ask(number: int) -> str:
        async with session.get(f"http://127.0.0.1:{port}/{number}") as answer:
            return str(await answer.text())

    # Two of them: one would wait for connections of its own to end.
    session, proxys_session = (run_coroutine(open_session(aiohttp)) for _ in range(2))
    runner, port = run_coroutine(start_proxy(proxys_session))
    try:
        answers = in_greenlets(lambda number: run_coroutine(ask(number), timeout=30))
        assert answers == [f"proxied /{number}" for number in range(GREENLETS)]
    finally:
        run_coroutine(session.close())
        run_coroutine(runner.cleanup())
        run_coroutine(proxys_session.close())


def test_a_redis_client_is_shared_by_all_greenlets(redis_port: int) -> None:
    redis = pytest.importorskip("redis.asyncio")
    client = redis.Redis(
        host="127.0.0.1", port=redis_port, max_connections=2 * GREENLETS, decode_responses=True
    )

    async def use(number: int) -> tuple[str, int]:
        async with client.pipeline() as pipeline:
            pipeline.set(f"key {number}", f"value {number}")
            pipeline.incr("uses")
            await pipeline.execute()
        async with asyncio.timeout(30):
            return await client.get(f"key {number}"), int(await client.get("uses"))

    try:
        answers = in_greenlets(lambda number: run_coroutine(use(number)))
        assert [value for value, _ in answers] == [f"value {n}" for n in range(GREENLETS)]
        assert max(uses for _, uses in answers) == GREENLETS
    finally:
        run_coroutine(client.aclose())


def test_a_redis_subscriber_hears_what_greenlets_publish(redis_port: int) -> None:
    redis = pytest.importorskip("redis.asyncio")
    client = redis.Redis(
        host="127.0.0.1", port=redis_port, max_connections=2 * GREENLETS, decode_responses=True
    )

    async def listen(count: int) -> set[str]:
        heard: set[str] = set()
        async with client.pubsub() as channel:
            await channel.subscribe("news")
            async for message in channel.listen():
                if message["type"] == "subscribe":
                    subscribed.set()
                else:
                    heard.add(message["data"])
                if len(heard) == count:
                    return heard
        return heard

    subscribed = gevent.event.Event()
    listening = spawn_coroutine(listen(20))
    try:
        assert subscribed.wait(10)
        in_greenlets(lambda number: run_coroutine(client.publish("news", f"{number}")), 20)
        assert listening.get(timeout=10) == {str(number) for number in range(20)}
    finally:
        listening.kill()
        run_coroutine(client.aclose())


def test_libraries_work_in_the_async_callbacks_of_200_sessions(
    http_port: int, redis_port: int
) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    redis = pytest.importorskip("redis.asyncio")

    async def ask(key: str) -> str:
        async with web_session.get(f"http://127.0.0.1:{http_port}/{key}") as answer:
            return str(await answer.text())

    web_session = run_coroutine(open_session(aiohttp))
    store = redis.Redis(host="127.0.0.1", port=redis_port, max_connections=2 * GREENLETS)

    class Callback(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            key = message.decode()
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                answer = group.create_task(ask(key))
                stored = group.create_task(store.incr(key))
            await session.send_async(f"{answer.result()} {stored.result()}\n")

    def talk(number: int) -> None:
        with ScriptedClient(server.address, timeout=30) as client:
            for count in (1, 2, 3):
                client.send(f"{number}")
                client.expect(f"/{number} {count}\n")

    try:
        with PsServer(Callback(), host="127.0.0.1", port=0) as server:
            in_greenlets(talk)
    finally:
        run_coroutine(web_session.close())
        run_coroutine(store.aclose())
