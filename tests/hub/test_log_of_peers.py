"""What peers do, again and again, is one warning a minute and a count."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from helpers import Keeping, local_server, run_python, stalled_peer
from log_handlers import messages
from psofa_gevent import PsRefusal, PsSession
from psofa_gevent.framing import Line
from psofa_gevent.hub import logs
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

PEERS = 20


class Noise:
    """One kind of thing that peers do."""

    settings: Mapping[str, Any] = MappingProxyType({})
    text = ""

    def make(self, address: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def callback(self) -> RecordingCallback:
        return RecordingCallback()


class Malformed(Noise):
    settings = MappingProxyType({"framing": Line().typed(json.loads, json.dumps)})
    text = "malformed message"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client:
            client.send("no json\n")
            client.expect_eof()


class Trickling(Noise):
    settings = MappingProxyType({"framing": Line(), "frame_timeout": 0.02, "divide": 50})
    text = "message timed out"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client:
            client.send("half a line")
            client.expect_eof()


class LeavesWithin(Noise):
    settings = MappingProxyType({"framing": Line()})
    text = "closed after"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client:
            client.send("half a line")
            client.eof()
            client.expect_eof()


class BadHeader(Noise):
    settings = MappingProxyType({"proxy_protocol": True})
    text = "bad PROXY header"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client, contextlib.suppress(ConnectionError):
            client.send("no header at all\r\n")
            client.socket.recv(100)


class Refused(Noise):
    settings = MappingProxyType({"denied_networks": ["127.0.0.0/8"]})
    text = "its address is not allowed"

    def make(self, address: tuple[Any, ...]) -> None:
        with contextlib.suppress(ConnectionError), ScriptedClient(address) as client:
            client.socket.recv(100)


class Overflowing(Noise):
    settings = MappingProxyType({"high_water": 1_000})
    text = "beyond high_water"

    def callback(self) -> RecordingCallback:
        class Posting(RecordingCallback):
            def on_open(self, session: PsSession) -> None:
                super().on_open(session)
                while session.post(bytes(100_000)):
                    pass

        return Posting()

    def make(self, address: tuple[Any, ...]) -> None:
        with stalled_peer(address) as client, contextlib.suppress(ConnectionError):
            while client.socket.recv(1_000_000):
                pass


class ReadsNothing(Noise):
    settings = MappingProxyType({"callback_timeout": 0.02, "linger_timeout": 0})
    text = "it waited in a send"
    is_async = False
    _callback: RecordingCallback

    def callback(self) -> RecordingCallback:
        class Sending(RecordingCallback):
            def on_open(self, session: PsSession) -> None:
                super().on_open(session)
                session.send(bytes(32 * 1024 * 1024), timeout=None)

            async def on_open_async(self, session: PsSession) -> None:
                RecordingCallback.on_open(self, session)
                await session.send_async(bytes(32 * 1024 * 1024), timeout=None)

        self._callback = Sending(use_async_callback=self.is_async)
        return self._callback

    def make(self, address: tuple[Any, ...]) -> None:
        ended = len(self._callback.named("on_close"))
        with stalled_peer(address):
            (*_, closed) = self._callback.wait_for("on_close", ended + 1)
        assert closed.session is not None
        assert isinstance(closed.session.close_cause, TimeoutError)


class ReadsNothingOfCoroutines(ReadsNothing):
    is_async = True


class ReadsNothingOfMany(ReadsNothing):
    """What callbacks send for the messages of one read is collected, and leaves together."""

    settings = MappingProxyType({**ReadsNothing.settings, "framing": Line()})

    def callback(self) -> RecordingCallback:
        class Sending(RecordingCallback):
            def on_message(self, session: PsSession, message: Any) -> None:
                super().on_message(session, message)
                for _ in range(1_000):
                    session.send(bytes(32 * 1024), timeout=None)

            async def on_message_async(self, session: PsSession, message: Any) -> None:
                RecordingCallback.on_message(self, session, message)
                for _ in range(1_000):
                    await session.send_async(bytes(32 * 1024), timeout=None)

        self._callback = Sending(use_async_callback=self.is_async)
        return self._callback

    def make(self, address: tuple[Any, ...]) -> None:
        ended = len(self._callback.named("on_close"))
        with stalled_peer(address) as peer:
            peer.send("many\n")
            self._callback.wait_for("on_close", ended + 1)


class ReadsNothingOfManyCoroutines(ReadsNothingOfMany):
    is_async = True


class ScansTls(Noise):
    text = "TLS handshake failed"

    def __init__(self, context: object) -> None:
        self.settings = {"ssl_context": context}

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client, contextlib.suppress(ConnectionError):
            client.send("GET / HTTP/1.0\r\n\r\n")
            client.socket.recv(100)
            client.socket.recv(100)


NOISES: Mapping[str, Callable[..., Noise]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            Malformed,
            Trickling,
            LeavesWithin,
            BadHeader,
            Refused,
            Overflowing,
            ReadsNothing,
            ReadsNothingOfCoroutines,
            ReadsNothingOfMany,
            ReadsNothingOfManyCoroutines,
            ScansTls,
        )
    }
)


@pytest.fixture(params=list(NOISES))
def noise(request: pytest.FixtureRequest) -> Noise:
    if request.param == "ScansTls":
        trustme = pytest.importorskip("trustme")
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("localhost").configure_cert(context)
        return ScansTls(context)
    return NOISES[request.param]()


def test_what_many_peers_do_is_one_warning_and_a_count(
    noise: Noise, keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    def about(level: int) -> list[str]:
        return [
            each.getMessage()
            for each in keeping.records
            if each.levelno == level and noise.text in each.getMessage()
        ]

    with local_server(noise.callback(), **noise.settings) as server:
        for _ in range(PEERS):
            noise.make(server.address)
        eventually(lambda: len(about(logging.DEBUG)) == PEERS - 1)
        assert len(about(logging.WARNING)) == 1
        assert not [each for each in keeping.records if each.levelno > logging.WARNING]
        # When the minute is over it says how many others there were, and who was the first.
        monkeypatch.setattr(logs, "WARNING_PERIOD", 0.0)
        [(kind, window)] = server._peer_log._windows.items()
        window.stop_timer()
        window.start_timer(server._peer_log._end_window, kind)
        _first, count = eventually(lambda: about(logging.WARNING)[1:] and about(logging.WARNING))
        assert f"{PEERS - 1} more in the last" in count
        assert noise.text in count.partition("the first of them: ")[2]
        monkeypatch.undo()
        # And the next minute begins.
        for _ in range(2):
            noise.make(server.address)
        eventually(lambda: len(about(logging.DEBUG)) == PEERS + 1)
        assert len(about(logging.WARNING)) == 2
    (last,) = about(logging.INFO)
    assert "2 more in the last" in last
    assert len(about(logging.WARNING)) == 2


def test_the_minute_goes_on_over_a_restart(keeping: Keeping) -> None:
    server = local_server(denied_networks=["127.0.0.0/8"])
    for number in range(1, 4):
        with server:
            Refused().make(server.address)
            eventually(lambda: server.refused[PsRefusal.NETWORK] == number)  # noqa: B023 - at once
    assert len([each for each in messages(keeping, logging.WARNING) if "refused" in each]) == 1
    assert len([each for each in messages(keeping, logging.INFO) if "1 more" in each]) == 2


def test_each_kind_of_thing_has_its_own_warning(keeping: Keeping) -> None:
    with local_server(framing=Line().typed(json.loads, json.dumps)) as server:
        for _ in range(3):
            Malformed().make(server.address)
            LeavesWithin().make(server.address)
        eventually(lambda: server.get_session_count() == 0)
    assert len(messages(keeping, logging.WARNING)) == 2


def test_a_minute_without_others_ends_without_a_word(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "WARNING_PERIOD", 0.0)
    with local_server(framing=Line()) as server:
        for _ in range(3):
            LeavesWithin().make(server.address)
        eventually(lambda: server.get_session_count() == 0)
    assert len(messages(keeping, logging.WARNING)) == 3
    assert not [each for each in messages(keeping) if "more in the last" in each]


def test_the_clock_of_a_warning_keeps_neither_its_server_nor_the_hub() -> None:
    done = run_python(
        """
        import logging, sys, weakref
        import gevent
        from psofa_gevent import PsCallback, PsServer
        from psofa_gevent.hub.logs import PeerLog

        owner = PsServer(PsCallback())
        peer_log = PeerLog()
        for _ in range(3):
            peer_log.tell(owner, "kind", "text")
        gone = weakref.ref(owner)
        del owner
        assert gone() is None
        print("over", gevent.wait(timeout=5))
        """
    )
    assert (done.stdout, done.stderr) == ("over True\n", "")


def test_where_warnings_are_off_nothing_is_counted() -> None:
    logger = logging.getLogger("psofa_gevent")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        peer_log = logs.PeerLog()
        for _ in range(3):
            peer_log.tell(object(), "kind", "text")
        assert peer_log._windows == {}
    finally:
        logger.setLevel(before)
