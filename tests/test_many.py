"""Many sessions: broadcast, groups, lookup by connection id, and keys of the application's own."""

from __future__ import annotations

import gc
import itertools
import sys
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import NativeThread
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsFramingError,
    PsGroup,
    PsKeyTakenError,
    PsMultiClient,
    PsOverflow,
    PsServer,
    PsSession,
)
from psofa_gevent.framing import Framing, LengthPrefix, Line
from psofa_gevent.owner.registry import Registry
from psofa_gevent.session.connection_id import random_bytes
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)


class Room:
    """A server, and clients of it, each with its session."""

    def __init__(self, server: PsServer[Any], ps_client: ClientFactory) -> None:
        self.server = server
        self._connect = ps_client
        self.clients: list[ScriptedClient] = []
        self.sessions: list[PsSession[Any]] = []

    def enter(self, count: int) -> None:
        for _ in range(count):
            self.clients.append(self._connect(self.server))
            eventually(lambda: self._session_of(self.clients[-1]))
            self.sessions += self._session_of(self.clients[-1])

    def _session_of(self, client: ScriptedClient) -> list[PsSession[Any]]:
        endpoint = client.local_endpoint
        return [each for each in self.server.sessions if each.remote_endpoint == endpoint]


MakeRoom = Callable[..., Room]


@pytest.fixture
def room(ps_server: ServerFactory, ps_client: ClientFactory) -> MakeRoom:
    def make(count: int, **settings: Any) -> Room:
        made = Room(ps_server(settings.pop("callback", PsCallback()), **settings), ps_client)
        made.enter(count)
        return made

    return make


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


# By connection id


def test_a_session_is_found_by_its_id_as_long_as_it_is_open(room: MakeRoom) -> None:
    here = room(2)
    found = [here.server.get_session(session.connection_id) for session in here.sessions]
    assert found == here.sessions
    here.enter(1)  # since the first time somebody asked
    new = here.sessions[2]
    assert here.server.get_session(new.connection_id) is new
    assert NativeThread(here.server.get_session, new.connection_id).join() is new
    new.close()
    assert here.server.get_session(new.connection_id) is None
    assert here.server.get_session(uuid.uuid4()) is None
    assert NativeThread(here.server.get_session, uuid.uuid4()).join() is None
    eventually(lambda: here.server.get_session_count() == 2)
    assert here.server.get_session(here.sessions[0].connection_id) is here.sessions[0]
    here.server.shutdown()
    assert here.server.get_session(here.sessions[0].connection_id) is None


def test_of_sessions_with_the_same_chosen_id_the_last_is_found(ps_server: ServerFactory) -> None:
    chosen = uuid.uuid4()
    port = ps_server(PsCallback()).address[1]
    with PsMultiClient(PsCallback()) as bundle:
        first = bundle.connect("127.0.0.1", port, connection_id=chosen).session
        assert bundle.get_session(chosen) is first
        second = bundle.connect("127.0.0.1", port, connection_id=chosen).session
        assert bundle.get_session(chosen) is second
        assert second is not None
        second.close()
        assert bundle.get_session(chosen) is first
        eventually(lambda: bundle.get_session_count() == 1)
        assert bundle.get_session(chosen) is first
        assert NativeThread(bundle.get_session, chosen).wait() is first


def test_to_find_a_session_no_ids_are_made(room: MakeRoom) -> None:
    here = room(3)
    for look_for in (uuid.uuid4(), here.sessions[1].connection_id):
        here.server.get_session(look_for)
        NativeThread(here.server.get_session, look_for).join()
    made = [isinstance(session._connection_id, uuid.UUID) for session in here.sessions]
    assert made == [False, True, False]


def test_random_ids_are_of_version_4() -> None:
    ids = {uuid.UUID(bytes=random_bytes()) for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(each.version == 4 and each.variant == uuid.RFC_4122 for each in ids)
    ones = [bin(each.int).count("1") for each in ids]
    assert 60 < sum(ones) / len(ones) < 66  # of 122 random bits and two that are set


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9))))
def test_the_last_of_those_with_an_id_is_found_in_whatever_order_they_come_and_go(
    steps: list[tuple[int, int]],
) -> None:
    ids = [uuid.uuid4() for _ in range(4)]
    registry, here = Registry(), list[Any]()
    for which, leaves in steps:
        if leaves < len(here):
            gone = here.pop(leaves)
            assert registry.discard(gone)
            assert not registry.discard(gone)
        session: Any = WithId(ids[which])
        registry.add(session)
        here.append(session)
        assert list(registry) == here
        assert len(registry) == len(here)
        for each in ids:
            assert list(registry.find(each)) == [
                session for session in reversed(here) if session._connection_id == each
            ]


class WithId:
    """What a registry needs of a session."""

    def __init__(self, connection_id: uuid.UUID) -> None:
        self._connection_id = connection_id


def test_an_id_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"connection_id must be a uuid\.UUID"):
        PsServer(PsCallback()).get_session("x")  # type: ignore[arg-type]  # the point


# By a key


def test_a_session_is_found_by_its_keys(room: MakeRoom) -> None:
    here = room(2)
    one, two = here.sessions
    here.server.bind(one, "one")
    here.server.bind(one, ("another", 1))
    here.server.bind(one, "one")
    here.server.bind(two, "two")
    assert here.server.find("one") is here.server.find(("another", 1)) is one
    assert here.server.find("two") is two
    assert here.server.find("three") is None
    here.server.unbind("one")
    here.server.unbind("one")
    assert here.server.find("one") is None
    assert here.server.find(("another", 1)) is one
    with pytest.raises(TypeError, match="unhashable"):
        here.server.bind(one, [])  # type: ignore[arg-type]  # the point


def test_a_key_that_an_open_session_has_is_not_taken_from_it_unasked(room: MakeRoom) -> None:
    here = room(2)
    one, two = here.sessions
    here.server.bind(one, "key")
    with pytest.raises(PsKeyTakenError, match="'key' is taken by"):
        here.server.bind(two, "key")
    assert here.server.find("key") is one
    one.close()
    here.server.bind(two, "key")  # its session may not have ended yet
    assert here.server.find("key") is two


def test_a_device_that_comes_back_replaces_its_old_session(room: MakeRoom) -> None:
    callback = RecordingCallback()
    here = room(2, callback=callback)
    old, new = here.sessions  # the peer of the old one says nothing, and never will
    here.server.bind(old, "device", replace=True)
    here.server.bind(old, "other key")
    here.server.bind(new, "device", replace=True)
    assert here.server.find("device") is new
    assert here.server.find("other key") is None
    (closed,) = callback.wait_for("on_close")
    assert closed.session is old
    assert closed.value is old.close_reason is PsCloseReason.REPLACED
    assert old.close_cause is None
    assert here.server.find("device") is new
    assert new.is_open


def test_a_thread_that_replaces_a_session_is_its_reason_at_once(room: MakeRoom) -> None:
    callback = RecordingCallback()
    here = room(2, callback=callback)
    old, new = here.sessions
    here.server.bind(old, "device")
    NativeThread(here.server.bind, new, "device", replace=True).join()
    assert not old.is_open  # the hub has yet to hear of it
    assert old.close_reason is PsCloseReason.REPLACED
    old.change_idle_milliseconds(1)
    old.close()
    NativeThread(old.close).join()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is old.close_reason is PsCloseReason.REPLACED


def test_a_session_that_closes_already_is_not_replaced(room: MakeRoom) -> None:
    callback = RecordingCallback()
    here = room(2, callback=callback)
    old, new = here.sessions
    here.server.bind(old, "device")
    old.close()
    here.server.bind(new, "device", replace=True)
    (closed,) = callback.wait_for("on_close")
    assert closed.value is old.close_reason is PsCloseReason.SELF_CLOSE


def test_a_key_leads_to_a_session_of_the_same_owner(room: MakeRoom) -> None:
    here = room(1)
    with PsMultiClient(PsCallback()) as bundle:
        foreign = bundle.connect(*here.server.address).session
        for owner, session in ((here.server, foreign), (bundle, here.sessions[0])):
            for replace in (False, True):
                with pytest.raises(ValueError, match="belongs to") as caught:
                    owner.bind(session, "key", replace=replace)
                for each in (session, session.owner, owner):
                    assert repr(each) in str(caught.value)
            assert owner.find("key") is None
        bundle.bind(foreign, "key")
        assert bundle.find("key") is foreign


def test_threads_that_bind_one_key_leave_one_session_with_it(room: MakeRoom) -> None:
    here = room(8)

    def bind(session: PsSession[Any]) -> None:
        here.server.bind(session, "key", replace=True)

    threads = [NativeThread(bind, session) for session in here.sessions]
    for thread in threads:
        thread.wait()
    eventually(lambda: len(here.server.sessions) == 1)
    assert here.server.find("key") is here.server.sessions[0]


class SlowKey(tuple[int, ...]):
    """Whose hash is Python code, in which threads take turns."""

    __slots__ = ()

    def __hash__(self) -> int:
        return sum(self)


def test_a_key_that_its_session_loses_stays_with_the_one_that_has_got_it(room: MakeRoom) -> None:
    here = room(30)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for old, new in itertools.pairwise(here.sessions):
            key = SlowKey((1, 2, 3))
            here.server.bind(old, key, replace=True)
            binding = NativeThread(here.server.bind, new, key, replace=True)
            old.close()
            binding.wait()
            assert here.server.find(key) is new
    finally:
        sys.setswitchinterval(before)


def test_threads_see_the_sessions_while_others_come_and_go(room: MakeRoom) -> None:
    def look() -> int:
        looks = 0
        while not ended:
            looks += len(here.server.sessions) > 0
        return looks

    here = room(10)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    ended: list[bool] = []
    looking = NativeThread(look)
    try:
        for _ in range(1_000):
            ScriptedClient(here.server.address).close()
    finally:
        ended.append(True)
        sys.setswitchinterval(before)
    assert looking.join(10) > 0


@pytest.mark.parametrize("turn", range(4))
def test_sessions_that_come_and_go_leave_nothing_behind(turn: int, room: MakeRoom) -> None:
    class Joining(PsCallback):
        def on_open(self, session: PsSession) -> None:
            number = next(numbers)
            session.owner.group(f"{number % 3}").join(session)
            session.owner.group("all").join(session)
            session.owner.bind(session, number)
            session.owner.bind(session, number % 5, replace=True)

        def on_message(self, session: PsSession, message: bytes) -> None:
            session.owner.broadcast(message)
            session.owner.group("all").post(message, exclude=session)

    numbers = itertools.count()
    here = room(0, callback=Joining())
    for _ in range(3):
        for _ in range(10):
            client = ScriptedClient(here.server.address)
            client.send("x")
            (client.close, client.reset)[turn % 2]()
    eventually(lambda: next(numbers) and here.server.get_session_count() == 0)
    assert len(here.server.group("all")) == 0
    assert not here.server._keys._sessions
    assert len(here.server._groups) == 0
