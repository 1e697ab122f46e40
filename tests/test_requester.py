"""`PsRequester`: a request gets the reply that is its own, or a clear error, wherever it waits."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.pool
import pytest
from gevent import monkey

from helpers import NativeThread, close_reasons
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsError,
    PsFramingError,
    PsRequestClosedError,
    PsRequester,
    PsRequestError,
    PsRequestTimeoutError,
    PsServer,
    PsSession,
    run_coroutine,
    spawn_coroutine,
)
from psofa_gevent.framing import Framing, Line
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

JSON: Framing[dict[str, Any]] = Line().typed(json.loads, json.dumps)


def by_id(message: dict[str, Any]) -> Any:
    return message.get("id")


class Asking(RecordingCallback):
    """Keeps what is no reply."""

    def __init__(self, requester: PsRequester[Any]) -> None:
        super().__init__()
        self.requester = requester

    def on_message(self, session: PsSession[Any], message: Any) -> None:
        if not self.requester.resolve(session, message):
            super().on_message(session, message)


class Device:
    """A server that asks, and the one client that is asked."""

    def __init__(self, server: PsServer[Any], client: ScriptedClient, callback: Asking) -> None:
        self.server = server
        self.client = client
        self.callback = callback
        self.requester = callback.requester
        (self.session,) = eventually(lambda: server.sessions)

    def ask(self, message: Any, timeout: float | None = 5.0) -> Any:
        return self.requester.request(self.session, message, timeout)

    @property
    def waiting(self) -> int:
        return self.requester.get_request_count(self.session)


MakeDevice = Callable[..., Device]


@pytest.fixture
def device(ps_server: ServerFactory, ps_client: ClientFactory) -> MakeDevice:
    def make(requester: PsRequester[Any] | None = None, **settings: Any) -> Device:
        callback = Asking(requester or PsRequester())
        server = ps_server(callback, **{"framing": Line(), **settings})
        return Device(server, ps_client(server), callback)

    return make


# In order


def test_a_request_returns_the_reply(device: MakeDevice) -> None:
    here = device()
    asked = gevent.spawn(here.ask, "how are you?")
    here.client.expect("how are you?\n")
    assert here.waiting == 1
    here.client.send("fine\n")
    assert asked.get(timeout=5) == b"fine"
    assert here.waiting == 0


def test_replies_belong_to_requests_in_order(device: MakeDevice) -> None:
    here = device()
    asked = []
    for number in range(100):
        asked.append(gevent.spawn(here.ask, f"{number}"))
        gevent.sleep(0)
    here.client.expect("".join(f"{number}\n" for number in range(100)))
    here.client.send("".join(f"re {number}\n" for number in range(100)))
    assert [each.get(timeout=5) for each in asked] == [b"re %d" % n for n in range(100)]


def test_what_nobody_asked_for_is_left_to_the_callback(device: MakeDevice) -> None:
    here = device()
    here.client.send("news\n")
    here.callback.wait_for("on_message")
    asked = gevent.spawn(here.ask, "?")
    here.client.expect("?\n")
    here.client.send("reply\nmore news\n")
    assert asked.get(timeout=5) == b"reply"
    here.callback.wait_for("on_message", 2)
    assert [event.value for event in here.callback.named("on_message")] == [b"news", b"more news"]


def test_a_late_reply_is_not_taken_for_that_to_the_next_request(device: MakeDevice) -> None:
    here = device()
    with pytest.raises(PsRequestTimeoutError, match=r"no reply came within 0\.05 s"):
        here.ask("slow", timeout=0.05)
    assert here.waiting == 0
    asked = gevent.spawn(here.ask, "quick")
    here.client.expect("slow\nquick\n")
    here.client.send("to slow\nto quick\nunasked\n")
    assert asked.get(timeout=5) == b"to quick"
    here.callback.wait_for("on_message")
    assert [event.value for event in here.callback.named("on_message")] == [b"unasked"]


def test_replies_that_are_all_late_reach_nobody(device: MakeDevice) -> None:
    here = device()
    for request in ("1", "2"):
        with pytest.raises(PsRequestTimeoutError):
            here.ask(request, timeout=0.05)
    asked = gevent.spawn(here.ask, "3")
    here.client.expect("1\n2\n3\n")
    here.client.send("to 1\n")
    here.client.send("to 2\n")
    here.client.send("to 3\nunasked\n")
    assert asked.get(timeout=5) == b"to 3"
    here.callback.wait_for("on_message")
    assert [event.value for event in here.callback.named("on_message")] == [b"unasked"]


# In order, where a request is never answered


class Instrument(PsCallback):
    """Says nothing to what is wrong."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        if message != b"wrong":
            session.send(b"to " + message)


class Slow(PsCallback):
    """Answers each request, in order, so many seconds after it has come."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_message(self, session: PsSession, message: bytes) -> None:
        gevent.spawn_later(self._seconds, session.post, b"to " + message)


def ask_all(
    callback: PsCallback,
    requests: list[str],
    timeout: float,
    pause: float,
    requester: PsRequester[bytes] | None = None,
) -> list[bytes | None]:
    """The replies of a server to one request after the other; ``None``: there was none."""
    asking = Asking(requester or PsRequester())
    replies: list[bytes | None] = []
    with (
        PsServer(callback, host="127.0.0.1", port=0, framing=Line()) as server,
        PsClient(asking, *server.address[:2], framing=Line()) as client,
    ):
        assert client.session is not None
        for request in requests:
            try:
                replies.append(asking.requester.request(client.session, request, timeout))
            except PsRequestTimeoutError:
                replies.append(None)
            gevent.sleep(pause)
    return replies


def test_requests_after_one_that_is_never_answered_get_their_replies() -> None:
    requests = ["1", "wrong", "wrong", "2", "3", "4"]
    replies = ask_all(Instrument(), requests, 1.0, 0.02)
    # The one after them fails, as its reply may be a late one.
    assert replies == [b"to 1", None, None, None, b"to 3", b"to 4"]


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_a_peer_that_is_too_slow_never_gets_a_wrong_reply_through(pause: float) -> None:
    """Also where it is as slow as the requests are apart, so that replies come when they leave."""
    timeout = 0.8
    requests = [str(number) for number in range(5)]
    latenesses = [0.02, 0.1, 0.3, 0.5, 0.7, 0.82, 1.3, 1.62]
    asking = [
        gevent.spawn(ask_all, Slow(timeout + pause + late), requests, timeout, pause)
        for late in latenesses
    ]
    for each in asking:
        for request, reply in zip(requests, each.get(timeout=30), strict=True):
            assert reply in (None, f"to {request}".encode())


def lose_one(here: Device) -> None:
    """A request without a reply, and one that times out as its reply may be that of the first."""
    with pytest.raises(PsRequestTimeoutError):
        here.ask("lost", timeout=0.05)
    asking = gevent.spawn(pytest.raises, PsRequestTimeoutError, here.ask, "doubtful", 1.0)
    here.client.expect("lost\ndoubtful\n")
    here.client.send("to doubtful\n")
    asking.get(timeout=5)


def test_a_late_reply_in_the_pause_is_dropped_and_ends_it(device: MakeDevice) -> None:
    here = device()
    lose_one(here)
    asked = gevent.spawn(here.ask, "next", 60.0)
    eventually(lambda: here.waiting == 1)
    here.client.expect_nothing()
    here.client.send("late\n")
    here.client.expect("next\n")
    here.client.send("to next\n")
    assert asked.get(timeout=5) == b"to next"


def test_a_second_reply_shows_that_the_first_was_late(device: MakeDevice) -> None:
    here = device()
    lose_one(here)
    asked = gevent.spawn(here.ask, "next", 2.0)
    here.client.expect("next\n")
    here.client.send("late\n")
    gevent.sleep(0.05)
    assert not asked.ready()
    here.client.send("to next\n")
    assert asked.get(timeout=5) == b"to next"
    assert here.waiting == 0


def test_requests_wait_for_one_that_tells_whether_the_peer_is_late(device: MakeDevice) -> None:
    here = device()
    lose_one(here)
    first = gevent.spawn(here.ask, "first", 1.0)
    eventually(lambda: here.waiting == 1)
    others = [asker(kind, here, 20.0) for kind in ("greenlet", "coroutine", "thread")]
    killed = gevent.spawn(here.ask, "killed", 20.0)
    eventually(lambda: here.waiting == 5)
    killed.kill()
    with pytest.raises(PsRequestTimeoutError):
        here.ask("never sent", 0.01)
    here.client.expect("first\n")
    here.client.send("to first\n")
    assert first.get(timeout=5) == b"to first"
    here.client.expect("?\n" * 3)
    here.client.send("a\nb\nc\n")
    assert {outcome() for outcome in others} == {b"a", b"b", b"c"}
    assert here.waiting == 0


@pytest.mark.hub_errors
@pytest.mark.parametrize("kind", ["greenlet", "coroutine", "thread", "loop"])
def test_a_request_that_is_held_back_ends_with_its_session(kind: str, device: MakeDevice) -> None:
    here = device()
    lose_one(here)
    outcomes = [asker(kind, here, 60.0) for _ in range(2)]
    eventually(lambda: here.waiting == 2)
    here.session.close()
    for outcome in outcomes:
        with pytest.raises(PsRequestClosedError):
            outcome()
    assert here.waiting == 0


def test_a_session_without_a_reply_closes_after_late_timeout(device: MakeDevice) -> None:
    here = device(PsRequester(late_timeout=0.2))
    waiting = gevent.spawn(pytest.raises, PsRequestClosedError, here.ask, "waits", None)
    here.client.expect("waits\n")
    with pytest.raises(PsRequestTimeoutError):
        here.ask("?", timeout=0.05)
    assert here.session.is_open
    waiting.get(timeout=5)
    here.callback.wait_for("on_close")
    assert close_reasons(here.callback) == [PsCloseReason.FAILED]
    assert isinstance(here.session.close_cause, PsRequestTimeoutError)
    assert "late_timeout=0.2 s" in str(here.session.close_cause)


def test_a_late_reply_within_late_timeout_keeps_the_session_open(device: MakeDevice) -> None:
    here = device(PsRequester(late_timeout=0.3))
    with pytest.raises(PsRequestTimeoutError):
        here.ask("?", timeout=0.05)
    here.client.expect("?\n")
    here.client.send("late\n")
    gevent.sleep(0.5)
    assert here.session.is_open
    assert here.callback.named("on_message") == []


def test_with_skip_the_place_of_an_unanswered_request_is_given_up(device: MakeDevice) -> None:
    here = device(PsRequester(late_timeout=0.1, unanswered="skip"))
    for _ in range(2):
        with pytest.raises(PsRequestTimeoutError):
            here.ask("lost", timeout=0.05)
    asked = gevent.spawn(here.ask, "next")  # it waits for that
    here.client.expect("lost\nlost\nnext\n")
    here.client.send("to next\n")
    assert asked.get(timeout=5) == b"to next"
    assert here.session.is_open


def test_with_skip_a_late_reply_is_dropped_until_then(device: MakeDevice) -> None:
    here = device(PsRequester(late_timeout=30.0, unanswered="skip"))
    with pytest.raises(PsRequestTimeoutError):
        here.ask("slow", timeout=0.05)
    asked = gevent.spawn(here.ask, "quick", 40.0)  # less than the place has
    here.client.expect("slow\nquick\n")
    here.client.send("to slow\nto quick\n")
    assert asked.get(timeout=5) == b"to quick"


def test_a_silent_peer_lets_no_places_pile_up(device: MakeDevice) -> None:
    here = device(PsRequester(late_timeout=0.05, unanswered="skip"))
    pool = gevent.pool.Pool(100)
    for _ in range(1_000):
        pool.spawn(pytest.raises, PsRequestTimeoutError, here.ask, "?", 0.01)
    assert pool.join(timeout=20, raise_error=True)
    memberships = here.session._memberships
    assert memberships is not None
    line = memberships[here.requester]._line
    eventually(lambda: not line)


# By a key


def test_replies_in_any_order_find_their_requests(device: MakeDevice) -> None:
    here = device(PsRequester(by_id), framing=JSON)
    numbers = list(range(200))
    asked = {n: gevent.spawn(here.ask, {"id": n, "ask": n}) for n in numbers}
    lines = here.client.receive(sum(len(json.dumps({"id": n, "ask": n})) + 1 for n in numbers))
    assert {json.loads(line)["id"] for line in lines.splitlines()} == set(numbers)
    random.Random(7).shuffle(numbers)
    for number in numbers:
        here.client.send(json.dumps({"id": number, "reply": number * 2}) + "\n")
    for number, each in asked.items():
        assert each.get(timeout=5) == {"id": number, "reply": number * 2}
    assert here.waiting == 0


def test_a_late_or_unknown_reply_is_left_to_the_callback(device: MakeDevice) -> None:
    here = device(PsRequester(by_id), framing=JSON)
    with pytest.raises(PsRequestTimeoutError):
        here.ask({"id": 1}, timeout=0.05)
    here.client.send('{"id": 1}\n{"id": 2}\n{"no": "id"}\n')
    here.callback.wait_for("on_message", 3)
    assert here.waiting == 0
    asked = gevent.spawn(here.ask, {"id": 1})  # the key is free again
    eventually(lambda: here.waiting == 1)
    here.client.send('{"id": 1, "n": 2}\n')
    assert asked.get(timeout=5) == {"id": 1, "n": 2}


def test_requests_may_have_their_key_elsewhere(device: MakeDevice) -> None:
    requester: PsRequester[Any] = PsRequester(
        lambda message: message.get("reply_to"), request_key=lambda message: message["id"]
    )
    here = device(requester, framing=JSON)
    asked = gevent.spawn(here.ask, {"id": "a"})
    here.client.expect('{"id": "a"}\n')
    here.client.send('{"id": "a"}\n{"id": "b", "reply_to": "a"}\n')
    assert asked.get(timeout=5) == {"id": "b", "reply_to": "a"}
    (unasked,) = here.callback.wait_for("on_message")
    value: Any = unasked.value
    assert value == {"id": "a"}


def test_a_key_that_is_missing_or_in_use_is_refused_before_anything_is_sent(
    device: MakeDevice,
) -> None:
    here = device(PsRequester(by_id), framing=JSON)
    with pytest.raises(ValueError, match="has no key"):
        here.ask({"ask": 1})
    asked = gevent.spawn(here.ask, {"id": 1})
    here.client.expect('{"id": 1}\n')
    with pytest.raises(ValueError, match="key 1 waits for its reply already"):
        here.ask({"id": 1, "again": True})
    here.client.expect_nothing()
    here.client.send('{"id": 1}\n')
    asked.get(timeout=5)


def test_a_request_that_cannot_be_framed_leaves_no_place_in_the_line(device: MakeDevice) -> None:
    here = device()
    with pytest.raises(PsFramingError):
        here.ask("two\nlines")
    with pytest.raises(TypeError):
        here.ask(5)
    assert here.waiting == 0
    asked = gevent.spawn(here.ask, "?")
    here.client.expect("?\n")
    here.client.send("!\n")
    assert asked.get(timeout=5) == b"!"


# Who asks, and where


class Answering(PsCallback[dict[str, Any]]):
    """The other end: replies to all, in disorder."""

    def on_message(self, session: PsSession[dict[str, Any]], message: dict[str, Any]) -> None:
        def reply() -> None:
            gevent.sleep(0.001 + random.random() * 0.01)
            session.post(message)

        gevent.spawn(reply)


@pytest.fixture
def answering() -> Iterator[tuple[PsRequester[Any], PsSession[Any]]]:
    """A client's session, whose server answers."""
    requester: PsRequester[Any] = PsRequester(by_id)
    with PsServer(Answering(), host="127.0.0.1", port=0, framing=JSON) as server:
        host, port = server.address[:2]
        callback: PsCallback[Any] = Asking(requester)
        with PsClient(callback, host, port, framing=JSON) as client:
            assert client.session is not None
            yield requester, client.session


def test_greenlets_threads_and_coroutines_ask_at_the_same_time(
    answering: tuple[PsRequester[Any], PsSession[Any]],
) -> None:
    requester, session = answering
    came: list[Any] = []

    def ask(name: str) -> None:
        for number in range(20):
            key = f"{name} {number}"
            assert requester.request(session, {"id": key}) == {"id": key}
            came.append(key)

    async def ask_async(name: str) -> None:
        async def once(number: int) -> None:
            key = f"{name} {number}"
            assert await requester.request_async(session, {"id": key}) == {"id": key}
            came.append(key)

        await asyncio.gather(*(once(number) for number in range(20)))

    greenlets = [gevent.spawn(ask, f"greenlet {n}") for n in range(10)]
    greenlets += [spawn_coroutine(ask_async(f"coroutine {n}")) for n in range(10)]
    threads = [NativeThread(ask, f"thread {n}") for n in range(4)]
    threads += [NativeThread(asyncio.run, ask_async(f"loop {n}")) for n in range(4)]
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    for thread in threads:
        thread.wait()
    assert len(set(came)) == len(came) == 28 * 20
    assert requester.get_request_count(session) == 0


def test_a_callback_of_another_session_may_ask(
    answering: tuple[PsRequester[Any], PsSession[Any]],
    ps_server: ServerFactory,
    ps_client: ClientFactory,
) -> None:
    requester, session = answering

    class Front(PsCallback):
        def on_message(self, session_in_front: PsSession, message: bytes) -> None:
            reply = requester.request(session, {"id": message.decode()})
            session_in_front.send(reply["id"].upper())

    client = ps_client(ps_server(Front(), framing=Line()))
    client.send("one\ntwo\n")
    client.expect("ONE\nTWO\n")


def test_an_async_callback_of_another_session_may_ask(
    answering: tuple[PsRequester[Any], PsSession[Any]],
    ps_server: ServerFactory,
    ps_client: ClientFactory,
) -> None:
    requester, session = answering

    class Front(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session_in_front: PsSession, message: bytes) -> None:
            reply = await requester.request_async(session, {"id": message.decode()})
            await session_in_front.send_async(reply["id"].upper())

    client = ps_client(ps_server(Front(), framing=Line()))
    client.send("one\ntwo\n")
    client.expect("ONE\nTWO\n")


def test_a_request_in_a_corked_block_leaves_before_it_waits(
    answering: tuple[PsRequester[Any], PsSession[Any]],
) -> None:
    requester, session = answering
    eventually(lambda: session.waiting_since)  # its beginning would take the cork off
    with session.corked():
        session.send({"id": None})
        assert requester.request(session, {"id": 1}, timeout=2) == {"id": 1}


# Where it would wait for itself


@pytest.mark.logs_errors
@pytest.mark.parametrize("callback_name", ["on_open", "on_message"])
def test_a_callback_that_would_wait_for_itself_is_told_so(
    callback_name: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Selfish(RecordingCallback):
        def ask(self, session: PsSession[Any], name: str) -> None:
            if name == callback_name:
                PsRequester[bytes]().request(session, "?", timeout=None)

        def on_open(self, session: PsSession[Any]) -> None:
            self.ask(session, "on_open")

        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            self.ask(session, "on_message")

    callback = Selfish()
    client = ps_client(ps_server(callback))
    client.send("x")
    (closed,) = callback.wait_for("on_close")
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, PsRequestError)
    assert "would wait for itself" in str(closed.session.close_cause)


@pytest.mark.logs_errors
@pytest.mark.parametrize("suspends", [False, True])
def test_an_async_callback_that_would_wait_for_itself_is_told_so(
    suspends: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    causes: list[BaseException | None] = []

    class Selfish(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            if suspends:
                await asyncio.sleep(0)
            await PsRequester[bytes]().request_async(session, "?", timeout=None)

        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            causes.append(session.close_cause)

    client = ps_client(ps_server(Selfish()))
    client.send("x")
    eventually(lambda: causes)
    assert "would wait for itself" in str(causes[0])


def test_a_coroutine_run_by_the_callback_is_told_so_too(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    errors: list[str] = []

    class Selfish(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            with pytest.raises(PsRequestError) as caught:
                run_coroutine(PsRequester[bytes]().request_async(session, "?", timeout=None))
            errors.append(str(caught.value))
            session.send("done")

    client = ps_client(ps_server(Selfish()))
    client.send("x")
    client.expect("done")
    assert "would wait for itself" in errors[0]


def test_a_background_task_of_a_callback_may_ask_its_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    requester: PsRequester[bytes] = PsRequester()
    tasks: list[asyncio.Task[bytes]] = []

    class Background(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            if not requester.resolve(session, message):
                tasks.append(asyncio.create_task(requester.request_async(session, "?")))

    client = ps_client(ps_server(Background(), framing=Line()))
    client.send("go\n")
    client.expect("?\n")
    client.send("reply\n")
    eventually(tasks[0].done)
    assert tasks[0].result() == b"reply"


def test_a_coroutine_and_the_hub_are_sent_to_the_async_twin(device: MakeDevice) -> None:
    here = device()
    errors: list[BaseException] = []

    async def ask() -> None:
        here.ask("?")

    def ask_in_hub() -> None:
        try:
            here.ask("?")
        except PsRequestError as exc:
            errors.append(exc)

    with pytest.raises(PsRequestError, match="request_async"):
        run_coroutine(ask())
    gevent.get_hub().loop.run_callback(ask_in_hub)
    eventually(lambda: errors)
    assert "request_async" in str(errors[0])
    here.client.expect_nothing()


# The end


def asker(kind: str, here: Device, timeout: float | None = 5.0) -> Callable[[], Any]:
    """Start to ask in the background; what is returned waits for the outcome."""
    if kind == "greenlet":
        greenlet = gevent.spawn(here.ask, "?", timeout)
        return lambda: greenlet.get(timeout=5)
    request = here.requester.request_async
    if kind == "coroutine":
        spawned = spawn_coroutine(request(here.session, "?", timeout))
        return lambda: spawned.get(timeout=5)
    if kind == "thread":
        return NativeThread(here.ask, "?", timeout).wait
    return NativeThread(asyncio.run, request(here.session, "?", timeout)).wait


@pytest.mark.hub_errors
@pytest.mark.parametrize("kind", ["greenlet", "coroutine", "thread", "loop"])
@pytest.mark.parametrize("end", ["FIN", "RST", "close", "abort", "shutdown"])
def test_a_session_that_closes_ends_its_requests(kind: str, end: str, device: MakeDevice) -> None:
    here = device()
    outcome = asker(kind, here, None)
    here.client.expect("?\n")
    if end == "FIN":
        here.client.close()
    elif end == "RST":
        here.client.reset()
    elif end == "shutdown":
        here.server.shutdown()
    else:
        getattr(here.session, end)()
    with pytest.raises(PsRequestClosedError, match="no reply will come"):
        outcome()
    assert here.waiting == 0


@pytest.mark.hub_errors
@pytest.mark.parametrize("kind", ["greenlet", "coroutine", "thread", "loop"])
def test_a_request_without_a_reply_times_out(kind: str, device: MakeDevice) -> None:
    here = device()
    outcome = asker(kind, here, 0.05)
    with pytest.raises(TimeoutError) as caught:
        outcome()
    assert isinstance(caught.value, PsRequestTimeoutError)
    assert isinstance(caught.value, PsError)
    assert here.waiting == 0
    assert here.session.is_open


@pytest.mark.hub_errors
@pytest.mark.parametrize("kind", ["greenlet", "coroutine", "thread", "loop"])
def test_a_closed_session_is_not_asked(kind: str, device: MakeDevice) -> None:
    here = device()
    here.client.close()
    eventually(lambda: not here.server.get_session_count())
    with pytest.raises(PsRequestClosedError):
        asker(kind, here)()


@pytest.mark.hub_errors
def test_the_replies_that_came_before_the_fin_count(device: MakeDevice) -> None:
    here = device()
    asked = [gevent.spawn(here.ask, "?") for _ in range(3)]
    here.client.expect("?\n" * 3)
    here.client.send("1\n2\n")
    here.client.close()
    assert [each.get(timeout=5) for each in asked[:2]] == [b"1", b"2"]
    with pytest.raises(PsRequestClosedError):
        asked[2].get(timeout=5)


def test_a_kill_or_a_timeout_of_another_ends_the_wait_only(device: MakeDevice) -> None:
    here = device()
    killed = gevent.spawn(here.ask, "1")
    here.client.expect("1\n")
    killed.kill()
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        here.ask("2")
    here.client.expect("2\n")
    assert here.waiting == 0
    asked = gevent.spawn(here.ask, "3")
    here.client.expect("3\n")
    here.client.send("to 1\nto 2\nto 3\n")
    assert asked.get(timeout=5) == b"to 3"


def test_a_request_that_a_stalled_peer_never_took_wholly_fails_the_session(
    device: MakeDevice,
) -> None:
    here = device(framing=Line(max_size=2**30), send_timeout=None)
    with pytest.raises(PsRequestTimeoutError):
        here.ask(b"x" * (16 * 1024 * 1024), timeout=0.2)
    here.callback.wait_for("on_close")
    assert close_reasons(here.callback) == [PsCloseReason.FAILED]


def test_a_request_that_never_left_keeps_no_place(device: MakeDevice) -> None:
    here = device(framing=Line(max_size=2**30), send_timeout=None)
    size = 16 * 1024 * 1024
    here.session.post(b"x" * size)
    assert here.session.pending_bytes
    with pytest.raises(PsRequestTimeoutError):
        here.ask("never sent", timeout=0.05)
    here.client.receive(size + 1)
    asked = gevent.spawn(here.ask, "?")
    here.client.expect("?\n")
    here.client.send("!\n")
    assert asked.get(timeout=5) == b"!"


@pytest.mark.parametrize("in_thread", [False, True], ids=["greenlet", "thread"])
def test_a_request_that_timed_out_keeps_nothing(in_thread: bool, device: MakeDevice) -> None:
    here = device()
    session = weakref.ref(here.session)

    def ask(requester: PsRequester[Any], session: PsSession[Any]) -> None:
        with pytest.raises(PsRequestTimeoutError):
            requester.request(session, "?", 0.02)

    gc.collect()
    gc.disable()
    try:
        if in_thread:
            NativeThread(ask, here.requester, here.session).wait()
        else:
            gevent.spawn(ask, here.requester, here.session).join()
        here.client.close()
        here.callback.wait_for("on_close")
        here.callback.events.clear()
        here.__dict__.clear()
        eventually(lambda: session() is None)
    finally:
        gc.enable()


@pytest.mark.hub_errors
@pytest.mark.parametrize("has_key", [False, True], ids=["in order", "by key"])
@pytest.mark.parametrize("kind", ["greenlet", "coroutine", "thread", "loop"])
def test_a_reply_that_came_while_the_hub_stood_still_is_the_reply(
    kind: str, has_key: bool, device: MakeDevice
) -> None:
    here = device(PsRequester(lambda _message: "one at a time") if has_key else None)
    outcome = asker(kind, here, 0.2)
    here.client.expect("?\n")
    here.client.send("fine\n")  # without a switch
    monkey.get_original("time", "sleep")(0.4)
    assert outcome() == b"fine"
    assert here.waiting == 0


@pytest.mark.parametrize("kind", ["greenlet", "coroutine", "thread"])
def test_so_is_one_behind_messages_that_take_more_than_a_turn(
    kind: str, device: MakeDevice
) -> None:
    block = monkey.get_original("time", "sleep")

    def decode(message: bytes) -> bytes:
        block(0.003)
        return message

    def key(message: bytes) -> bytes | None:
        return message if message == b"fine" else None

    requester = PsRequester(key, request_key=lambda _message: b"fine")
    here = device(requester, framing=Line().typed(decode, lambda message: message))
    outcome = asker(kind, here, 0.2)
    here.client.expect("?\n")
    here.client.send("news\n" * 20 + "fine\n")  # without a switch
    block(0.4)
    assert outcome() == b"fine"
    assert len(here.callback.named("on_message")) == 20


def test_many_sessions_share_a_requester(ps_server: ServerFactory) -> None:
    requester: PsRequester[bytes] = PsRequester()
    callback = Asking(requester)
    server = ps_server(callback, framing=Line())

    class Name(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            assert session.local_endpoint is not None
            session.send(f"{message.decode()} {session.local_endpoint[1]}")

    clients = [PsClient(Name(), *server.address[:2], framing=Line()) for _ in range(50)]
    for client in clients:
        client.connect()
    eventually(lambda: len(server.sessions) == 50)
    pool = gevent.pool.Pool(200)

    def ask(session: PsSession[bytes], number: int) -> None:
        assert session.remote_endpoint is not None
        reply = requester.request(session, f"{number}")
        assert reply == b"%d %d" % (number, session.remote_endpoint[1])

    for session in server.sessions:
        for number in range(10):
            pool.spawn(ask, session, number)
    assert pool.join(timeout=20, raise_error=True)
    for client in clients:
        client.disconnect()


async def _find_key(message: bytes) -> bytes:
    return message


def test_what_makes_no_sense_is_refused(device: MakeDevice) -> None:
    with pytest.raises(TypeError, match="key must be a function"):
        PsRequester("id")  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="key must be a plain function"):
        PsRequester(_find_key)  # type: ignore[arg-type]  # the point: no two coroutines are equal
    with pytest.raises(TypeError, match="request_key must be a plain function"):
        PsRequester(len, request_key=_find_key)  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="request_key needs a key"):
        PsRequester(request_key=len)
    with pytest.raises(ValueError, match="unanswered must be 'close' or 'skip', not 'drop'"):
        PsRequester(unanswered="drop")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="late_timeout must be"):
        PsRequester(late_timeout=-1)
    with pytest.raises(TypeError, match="late_timeout must be"):
        PsRequester(late_timeout=None)  # type: ignore[arg-type]  # the point
    here = device()
    with pytest.raises(TypeError, match="session must be a PsSession"):
        here.requester.request("x", "?")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="timeout must be"):
        here.ask("?", timeout=-1)
    assert here.requester.resolve(here.session, b"unasked") is False
