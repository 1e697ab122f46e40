"""Many sessions at once: broadcasts and groups."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest

from helpers import NativeThread
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsFramingError,
    PsGroup,
    PsMultiClient,
    PsOverflow,
    PsServer,
    PsSession,
)
from psofa_gevent.framing import Framing, LengthPrefix, Line
from psofa_gevent.testing import ClientFactory, RecordingCallback, ServerFactory, eventually
from rooms import MakeRoom, Room, rooms


@pytest.fixture
def room(ps_server: ServerFactory, ps_client: ClientFactory) -> MakeRoom:
    return rooms(ps_server, ps_client)


# Broadcast


def test_a_broadcast_comes_to_every_open_session(room: MakeRoom) -> None:
    here = room(3)
    here.server.broadcast("news ")
    here.server.broadcast(b"for one", exclude=here.sessions[:2])
    here.server.broadcast(b"for two", exclude=here.sessions[2])
    for client, last in zip(here.clients, ["for two", "for two", "for one"], strict=True):
        client.expect("news " + last)


def test_a_broadcast_of_a_multi_client_comes_to_every_server(ps_server: ServerFactory) -> None:
    servers = [RecordingCallback(), RecordingCallback()]
    with PsMultiClient(PsCallback()) as bundle:
        for callback in servers:
            bundle.connect("127.0.0.1", ps_server(callback).address[1])
        bundle.broadcast("hello")
        for callback in servers:
            assert callback.wait_for("on_message")[0].value == b"hello"


def test_a_broadcast_of_what_is_not_started_reaches_nobody() -> None:
    PsServer(PsCallback()).broadcast("hello")


class Counting(Line):
    """Counts what it frames."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def encode(self, message: Any) -> bytes:
        self.count += 1
        return super().encode(message)


def test_a_message_is_framed_once_and_not_once_for_each_receiver(room: MakeRoom) -> None:
    framing = Counting()
    here = room(5, framing=framing)
    here.server.broadcast("one")
    group: PsGroup[bytes] = PsGroup()
    for session in here.sessions:
        group.join(session)
    group.post("two")
    group.post("raw|", raw=True)
    for client in here.clients:
        client.expect("one\ntwo\nraw|")
    assert framing.count == 2


def test_each_receiver_gets_a_message_in_its_own_framing(room: MakeRoom) -> None:
    class Choosing(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            framings: dict[bytes, Framing[bytes] | None] = {b"length": LengthPrefix(2), b"no": None}
            session.set_framing(framings[message])
            session.set_value("chosen", True)

    here = room(3, callback=Choosing(), framing=Line())
    here.clients[1].send("length\n")
    here.clients[2].send("no\n")
    eventually(lambda: sum(s.get_value("chosen", False) for s in here.sessions) == 2)
    here.server.broadcast("hello")
    here.clients[0].expect("hello\n")
    here.clients[1].expect(b"\0\5hello")
    here.clients[2].expect("hello")


def test_what_cannot_be_framed_comes_to_nobody(room: MakeRoom) -> None:
    here = room(2, framing=Line())
    with pytest.raises(PsFramingError):
        here.server.broadcast("two\nlines")
    with pytest.raises(TypeError):
        here.server.broadcast(3)
    here.server.broadcast("one line")
    for client in here.clients:
        client.expect("one line\n")


def test_the_order_for_each_receiver_is_that_of_the_posts(room: MakeRoom) -> None:
    here = room(3)
    group: PsGroup[bytes] = here.server.group("all")
    for session in here.sessions:
        group.join(session)
    expected = b""
    for number in range(200):
        text = b"%d " % number
        expected += text
        (here.server.broadcast if number % 2 else group.post)(text)
    for client in here.clients:
        client.expect(expected)


def test_a_thread_broadcasts_and_posts_to_groups_in_its_order(room: MakeRoom) -> None:
    here = room(3)
    group = here.server.group("all")
    for session in here.sessions:
        group.join(session)

    def speak() -> None:
        for number in range(100):
            here.server.broadcast(f"{number} ", exclude=here.sessions[0])
            group.post(f"{number}! ", exclude={here.sessions[0]})
            for session in group:
                if session is not here.sessions[0]:
                    session.post(f"{number}? ")

    NativeThread(speak).join()
    expected = "".join(f"{number} {number}! {number}? " for number in range(100))
    for client in here.clients[1:]:
        client.expect(expected)
    here.sessions[0].send("nothing else")
    here.clients[0].expect("nothing else")


def test_a_slow_receiver_holds_up_nobody(room: MakeRoom) -> None:
    here = room(3, high_water=1_000_000, overflow=PsOverflow.DROP_NEWEST)
    slow, *quick = here.clients
    chunk = "x" * 100_000
    for _ in range(100):
        here.server.broadcast(chunk)
        for client in quick:
            client.expect(chunk)
    assert here.sessions[0].messages_dropped > 0
    assert here.sessions[0].pending_bytes > 0
    assert here.sessions[0].is_open
    slow.close()


# Groups


def test_members_get_what_is_posted_and_others_do_not(room: MakeRoom) -> None:
    here = room(4)
    group = here.server.group("some")
    for session in here.sessions[:3]:
        group.join(session)
        group.join(session)  # once is enough
    group.post("to three ")
    group.leave(here.sessions[0])
    group.leave(here.sessions[0])
    group.leave(here.sessions[3])
    group.post("to two ")
    group.post("to one ", exclude=here.sessions[1])
    here.server.broadcast("end")
    expected = ["to three end", "to three to two end", "to three to two to one end", "end"]
    for client, text in zip(here.clients, expected, strict=True):
        client.expect(text)


def test_a_group_is_a_collection_of_its_members(room: MakeRoom) -> None:
    here = room(3)
    one, two, three = here.sessions
    group: PsGroup[bytes] = PsGroup("room")
    assert not list(group)
    assert group
    group.join(two)
    group.join(one)
    assert list(group) == [two, one]
    assert len(group) == 2
    assert one in group
    assert three not in group
    assert "x" not in group
    assert repr(group) == "<PsGroup 'room', 2 sessions>"
    assert group.name == "room"


def test_a_group_of_a_name_is_the_same_one_for_all(room: MakeRoom) -> None:
    here = room(1)
    group = here.server.group("a")
    assert here.server.group("a") is group
    assert here.server.group("b") is not group
    group.join(here.sessions[0])
    del group
    gc.collect()
    assert here.sessions[0] in here.server.group("a")


def test_a_group_that_nobody_needs_goes(room: MakeRoom) -> None:
    here = room(1)
    group = here.server.group("a")
    group.join(here.sessions[0])
    gone = weakref.ref(group)
    del group
    assert gone() is not None
    here.server.group("a").leave(here.sessions[0])
    eventually(lambda: gone() is None)


@pytest.mark.parametrize(
    "end",
    [
        lambda here: here.sessions[0].close(),
        lambda here: here.sessions[0].abort(),
        lambda here: here.clients[0].close(),
        lambda here: here.clients[0].reset(),
        lambda here: here.server.shutdown(),
    ],
    ids=["close", "abort", "FIN", "RST", "shutdown"],
)
def test_a_session_that_closes_leaves_its_groups_and_loses_its_keys(
    end: Callable[[Room], None], room: MakeRoom
) -> None:
    class Looking(RecordingCallback):
        def on_close(self, session: PsSession[Any], close_reason: PsCloseReason) -> None:
            seen.append((session in group, session.owner.find("key") is session))
            super().on_close(session, close_reason)

    seen: list[tuple[bool, bool]] = []
    callback = Looking()
    here = room(1, callback=callback)
    group: PsGroup[bytes] = PsGroup()
    other = here.server.group("other")
    session = here.sessions[0]
    group.join(session)
    other.join(session)
    here.server.bind(session, "key")
    end(here)
    callback.wait_for("on_close")
    assert seen == [(False, False)]
    assert len(group) == len(other) == 0


def test_a_session_that_is_closed_joins_nothing(room: MakeRoom) -> None:
    here = room(1)
    (session,) = here.sessions
    session.close()
    group: PsGroup[bytes] = PsGroup()
    group.join(session)
    here.server.bind(session, "key")
    assert len(group) == 0
    assert here.server.find("key") is None


def test_sessions_of_several_owners_share_a_group(room: MakeRoom) -> None:
    group: PsGroup[bytes] = PsGroup()
    rooms = [room(1), room(1)]
    for here in rooms:
        group.join(here.sessions[0])
    group.post("hello")
    for here in rooms:
        here.clients[0].expect("hello")


def test_sessions_join_and_leave_while_others_post(room: MakeRoom) -> None:
    here = room(4)
    group = here.server.group("busy")
    stop = gevent.event.Event()

    def wander(session: PsSession[Any]) -> None:
        while not stop.is_set():
            group.join(session)
            gevent.sleep(0)
            group.leave(session)

    group.join(here.sessions[0])
    wanderers = [NativeThread(wander, session) for session in here.sessions[1:]]
    for number in range(500):
        group.post(f"{number} ")
        gevent.sleep(0)
    stop.set()
    for thread in wanderers:
        thread.join()
    assert list(group) == [here.sessions[0]]
    here.clients[0].expect("".join(f"{number} " for number in range(500)))


def test_what_is_no_session_joins_nothing() -> None:
    group: PsGroup[bytes] = PsGroup()
    with pytest.raises(TypeError, match="session must be a PsSession"):
        group.join("x")  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="name must be a str"):
        PsGroup(5)  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="session must be a PsSession"):
        PsServer(PsCallback()).bind("x", "key")  # type: ignore[arg-type]  # the point
