"""Sessions that are found: by their connection id, and by keys of the application's own."""

from __future__ import annotations

import itertools
import sys
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import NativeThread
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsKeyTakenError,
    PsMultiClient,
    PsServer,
    PsSession,
)
from psofa_gevent.owner.registry import Registry
from psofa_gevent.session.connection_id import random_bytes
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)
from rooms import MakeRoom, rooms


@pytest.fixture
def room(ps_server: ServerFactory, ps_client: ClientFactory) -> MakeRoom:
    return rooms(ps_server, ps_client)


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
