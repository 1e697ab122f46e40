"""`PsCallback`: what is refused at construction, and which method is called when."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock

import gevent
import pytest

from psofa_gevent import (
    PsCallback,
    PsCallbackError,
    PsClient,
    PsCloseReason,
    PsError,
    PsHandler,
    PsMultiClient,
    PsServer,
    PsSession,
)
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, serving

SYNC_METHODS = ["on_open", "on_message", "on_eof", "on_idle", "on_close", "on_start", "on_stop"]
ASYNC_METHODS = [f"{name}_async" for name in SYNC_METHODS]

Make = Callable[[Any], object]


def make_server(callback: Any) -> object:
    return PsServer(callback)


def make_client(callback: Any) -> object:
    return PsClient(callback, "127.0.0.1", 1)


def make_multi_client(callback: Any) -> object:
    return PsMultiClient(callback)


OWNERS: list[Make] = [make_server, make_client, make_multi_client]
for_all_owners = pytest.mark.parametrize("make", OWNERS)


async def coroutine_function(*_args: object) -> None:
    pass


async def async_generator(*_args: object) -> AsyncIterator[None]:
    yield


def plain_function(*_args: object) -> None:
    pass


class AsyncCallable:
    async def __call__(self, *_args: object) -> None:
        pass


def overriding(name: str, value: object, *, use_async: bool = False) -> PsCallback:
    """A callback of a class that has `value` under `name`."""
    kind = type("MyCallback", (PsCallback,), {"use_async_callback": use_async, name: value})
    callback: PsCallback = kind()
    return callback


# Refused


@for_all_owners
@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("name", SYNC_METHODS)
def test_sync_method_written_async_is_refused_naming_method_and_fix(
    make: Make, name: str, use_async: bool
) -> None:
    with pytest.raises(PsCallbackError) as refused:
        make(overriding(name, coroutine_function, use_async=use_async))
    message = str(refused.value)
    assert f"MyCallback.{name} " in message
    assert f"{name}_async" in message
    assert "use_async_callback" in message


@for_all_owners
@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("name", ASYNC_METHODS)
def test_async_method_written_sync_is_refused_naming_method_and_fix(
    make: Make, name: str, use_async: bool
) -> None:
    with pytest.raises(PsCallbackError) as refused:
        make(overriding(name, plain_function, use_async=use_async))
    message = str(refused.value)
    assert f"MyCallback.{name} " in message
    assert "async def" in message
    assert name.removesuffix("_async") in message


@pytest.mark.parametrize(
    "disguised",
    [
        staticmethod(functools.partial(coroutine_function)),
        staticmethod(coroutine_function),
        classmethod(coroutine_function),
        functools.partialmethod(coroutine_function),
        async_generator,
        mock.AsyncMock(),
        AsyncCallable(),
    ],
    ids=[
        "partial",
        "staticmethod",
        "classmethod",
        "partialmethod",
        "generator",
        "mock",
        "callable",
    ],
)
def test_async_in_disguise_is_refused_as_a_sync_method(disguised: object) -> None:
    """Each of them would make coroutines that nobody awaits."""
    with pytest.raises(PsCallbackError, match="on_message"):
        PsServer(overriding("on_message", disguised))


@pytest.mark.parametrize(
    "disguised",
    [
        staticmethod(functools.partial(coroutine_function)),
        staticmethod(coroutine_function),
        classmethod(coroutine_function),
        functools.partialmethod(coroutine_function),
    ],
    ids=["partial", "staticmethod", "classmethod", "partialmethod"],
)
def test_async_in_disguise_is_taken_as_an_async_method(disguised: object) -> None:
    PsServer(overriding("on_message_async", disguised, use_async=True))


def test_async_generator_is_refused_as_an_async_method() -> None:
    with pytest.raises(PsCallbackError, match="on_message_async"):
        PsServer(overriding("on_message_async", async_generator, use_async=True))


def test_method_set_on_the_instance_is_looked_at_too() -> None:
    callback: Any = PsCallback()
    callback.on_message = coroutine_function
    with pytest.raises(PsCallbackError, match=r"on_message .*async def"):
        PsServer(callback)


def test_inherited_method_is_looked_at_too() -> None:
    class Child(type(overriding("on_close", coroutine_function))):  # type: ignore[misc]  # dynamic
        pass

    with pytest.raises(PsCallbackError, match=r"Child\.on_close"):
        PsServer(Child())


@for_all_owners
@pytest.mark.parametrize("name", SYNC_METHODS + ASYNC_METHODS)
@pytest.mark.parametrize("value", [None, 7, "on_open"])
def test_name_overridden_by_something_that_cannot_be_called_is_refused(
    make: Make, name: str, value: object
) -> None:
    with pytest.raises(PsCallbackError, match=rf"MyCallback\.{name} "):
        make(overriding(name, value))


@for_all_owners
def test_class_instead_of_an_instance_is_refused_with_the_fix(make: Make) -> None:
    class Chat(PsCallback):
        pass

    with pytest.raises(PsCallbackError, match=r"Chat\(\)"):
        make(Chat)


@for_all_owners
@pytest.mark.parametrize("value", [None, object(), plain_function, "callback", int])
def test_anything_else_than_a_callback_is_refused(make: Make, value: object) -> None:
    with pytest.raises(PsCallbackError, match="callback"):
        make(value)


@pytest.mark.parametrize("value", [None, 1, 0, "yes", lambda: True])
def test_use_async_callback_that_is_no_bool_is_refused(value: object) -> None:
    with pytest.raises(PsCallbackError, match="use_async_callback"):
        PsServer(overriding("use_async_callback", value))


@for_all_owners
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("on_mesage", "on_message"),
        ("on_messages", "on_message"),
        ("on_opened", "on_open"),
        ("on_clos", "on_close"),
        ("on_message_asynk", "on_message_async"),
        ("on_connect", "on_open"),
        ("on_disconnect_async", "on_close_async"),
        ("on_recieve", "on_message"),
        ("on_data_received", "on_message"),
        ("on_connection", "on_open"),
        ("on_disconect_async", "on_close_async"),
        ("on_", "on_"),
        ("on_whatever", "on_"),
    ],
)
def test_a_method_with_the_name_of_no_callback_is_refused_with_the_nearest(
    make: Make, name: str, nearest: str
) -> None:
    any_function: Any = plain_function
    values: list[Any] = [plain_function, coroutine_function]
    values += [staticmethod(any_function), classmethod(any_function)]
    values += [functools.partialmethod(any_function), functools.singledispatchmethod(any_function)]
    for value in values:
        with pytest.raises(PsCallbackError) as caught:
            make(overriding(name, value))
        assert f"MyCallback.{name} is not a callback" in str(caught.value)
        assert f"did you mean {nearest}" in str(caught.value)


def test_such_a_method_of_a_base_class_a_mixin_or_a_handler_is_refused_too() -> None:
    class Mixin:
        def on_mesage(self, session: PsSession, message: bytes) -> None:
            raise AssertionError

    class Mixed(Mixin, PsCallback):
        pass

    class Derived(Mixed):
        def on_message(self, session: PsSession, message: bytes) -> None:
            raise AssertionError

    class Handler(Mixin, PsHandler[bytes]):
        def handle(self, session: PsSession[bytes]) -> None:
            raise AssertionError

    for callback in (Mixed(), Derived(), Handler()):
        with pytest.raises(PsCallbackError, match=r"on_mesage .* did you mean on_message\?"):
            PsServer(callback)


def test_what_is_no_method_may_have_any_name() -> None:
    class Free(PsCallback):
        on_duty = True

        def __init__(self, on_result: Callable[..., None]) -> None:
            self.on_result = on_result

        @property
        def on_call(self) -> object:
            raise AssertionError("nobody asks")

        def _on_reply(self) -> None:
            raise AssertionError

        def once(self) -> None:
            raise AssertionError

    PsServer(Free(plain_function))
    PsServer(PsCallback())


def test_callback_error_is_a_type_error_and_one_of_ours() -> None:
    assert issubclass(PsCallbackError, TypeError)
    assert issubclass(PsCallbackError, PsError)


@pytest.mark.parametrize("use_async", [False, True])
def test_callback_may_have_both_kinds_whichever_is_used(use_async: bool) -> None:
    PsServer(RecordingCallback(use_async_callback=use_async))


# The base class


def test_base_class_has_every_method_and_its_async_twin() -> None:
    for name in SYNC_METHODS:
        assert not inspect.iscoroutinefunction(getattr(PsCallback, name))
        assert inspect.iscoroutinefunction(getattr(PsCallback, f"{name}_async"))
        ours = list(inspect.signature(getattr(PsCallback, name)).parameters)
        assert list(inspect.signature(getattr(PsCallback, f"{name}_async")).parameters) == ours
    assert PsCallback.use_async_callback is False


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("allow_half_open", [False, True])
def test_base_class_serves_and_does_nothing(use_async: bool, allow_half_open: bool) -> None:
    class Nothing(PsCallback):
        use_async_callback = use_async

    with (
        serving(Nothing(), allow_half_open=allow_half_open) as server,
        ScriptedClient(server.address) as client,
    ):
        client.send("anybody there?")
        client.expect_nothing(0.05)
        server.shutdown()
        client.expect_eof()


# Called


def talk(server: PsServer) -> None:
    with ScriptedClient(server.address) as client:
        client.send("hello")
        client.expect("hello")
        client.eof()
        client.expect_eof()


class OnlySync(RecordingCallback):
    """An echo whose async twins note that they were called."""

    wrong = False

    async def on_open_async(self, session: PsSession) -> None:
        self.wrong = True

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.wrong = True

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.wrong = True

    async def on_start_async(self, owner: Any) -> None:
        self.wrong = True

    async def on_stop_async(self, owner: Any) -> None:
        self.wrong = True


class OnlyAsync(PsCallback):
    """The other way round."""

    use_async_callback = True

    def __init__(self) -> None:
        self.names: list[str] = []
        self.wrong = False

    def on_open(self, session: PsSession) -> None:
        self.wrong = True

    def on_message(self, session: PsSession, message: bytes) -> None:
        self.wrong = True

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.wrong = True

    def on_start(self, owner: Any) -> None:
        self.wrong = True

    def on_stop(self, owner: Any) -> None:
        self.wrong = True

    async def on_open_async(self, session: PsSession) -> None:
        self.names.append("on_open")

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.names.append("on_message")
        await asyncio.sleep(0)
        await session.send_async(message)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.names.append("on_close")

    async def on_start_async(self, owner: Any) -> None:
        self.names.append("on_start")

    async def on_stop_async(self, owner: Any) -> None:
        self.names.append("on_stop")


LIFE = ["on_start", "on_open", "on_message", "on_close", "on_stop"]


def test_sync_methods_are_called_and_no_async_one() -> None:
    callback = OnlySync(lambda message: message)
    with serving(callback) as server:
        talk(server)
    assert [event.name for event in callback.events] == LIFE
    assert not callback.wrong


def test_async_methods_are_called_and_no_sync_one() -> None:
    callback = OnlyAsync()
    with serving(callback) as server:
        talk(server)
    assert callback.names == LIFE
    assert not callback.wrong


@pytest.mark.parametrize("use_async", [False, True])
def test_client_callbacks_come_in_the_same_order(ps_server: ServerFactory, use_async: bool) -> None:
    server = ps_server(RecordingCallback(lambda message: message))
    callback = RecordingCallback(use_async_callback=use_async)
    with PsClient(callback, *server.address) as client:
        assert client.session is not None
        client.session.send("hello")
        callback.wait_for("on_message")
    assert [event.name for event in callback.events] == LIFE
    assert callback.events[0].value is callback.events[-1].value is client


@pytest.mark.parametrize("use_async", [False, True])
def test_multi_client_callbacks_come_in_the_same_order(
    ps_server: ServerFactory, use_async: bool
) -> None:
    server = ps_server(RecordingCallback(lambda message: message))
    callback = RecordingCallback(use_async_callback=use_async)
    with PsMultiClient(callback) as bundle:
        assert [event.name for event in callback.events] == ["on_start"]
        bundle.connect(*server.address).session.send("hello")
        callback.wait_for("on_message")
    assert [event.name for event in callback.events] == LIFE
    assert callback.events[0].value is callback.events[-1].value is bundle


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("allow_half_open", [False, True])
def test_on_eof_is_called_only_with_allow_half_open(use_async: bool, allow_half_open: bool) -> None:
    class Callback(RecordingCallback):
        def on_eof(self, session: PsSession) -> None:
            super().on_eof(session)
            session.close()

    callback = Callback(lambda message: message, use_async_callback=use_async)
    with serving(callback, allow_half_open=allow_half_open) as server:
        talk(server)
        callback.wait_for("on_close")
    assert len(callback.named("on_eof")) == int(allow_half_open)


@pytest.mark.parametrize("use_async", [False, True])
def test_messages_are_bytes_that_may_be_kept(use_async: bool) -> None:
    callback = RecordingCallback(lambda message: message, use_async_callback=use_async)
    with serving(callback) as server, ScriptedClient(server.address) as client:
        for text in ("first", "second"):
            client.send(text)
            client.expect(text)
    messages = [event.value for event in callback.named("on_message")]
    assert messages == [b"first", b"second"]
    assert {type(message) for message in messages} == {bytes}


@pytest.mark.parametrize("use_async", [False, True])
def test_one_slow_session_holds_up_no_other(use_async: bool) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            if message == b"slow":
                gevent.sleep(30)
            super().on_message(session, message)

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            if message == b"slow":
                await asyncio.sleep(30)
            await super().on_message_async(session, message)

    callback = Callback(lambda message: message, use_async_callback=use_async)
    with (
        serving(callback) as server,
        ScriptedClient(server.address) as slow,
        ScriptedClient(server.address) as quick,
    ):
        slow.send("slow")
        for _ in range(10):
            quick.send("quick")
            quick.expect("quick")
        server.shutdown(timeout=0)


def test_callback_may_have_slots_and_properties() -> None:
    class Slotted(PsCallback):
        __slots__ = ("seen",)

        def __init__(self) -> None:
            self.seen: list[bytes] = []

        @property
        def first(self) -> bytes:
            return self.seen[0]

        def on_message(self, session: PsSession, message: bytes) -> None:
            self.seen.append(message)
            session.send(message)

    callback = Slotted()
    with serving(callback) as server:
        talk(server)
    assert callback.first == b"hello"


@pytest.mark.parametrize("name", ["on_open", "on_message", "on_close_async"])
def test_method_that_does_not_take_its_arguments_is_refused(name: str) -> None:
    async def takes_too_little(self: object) -> None: ...

    method = takes_too_little if name.endswith("_async") else lambda self: None
    wrong = type("Wrong", (PsCallback,), {name: method, "use_async_callback": "async" in name})
    with pytest.raises(PsCallbackError, match=rf"Wrong\.{name} is called with \(session"):
        PsServer(wrong())


@pytest.mark.parametrize("is_async", [True, False])
def test_method_of_the_kind_that_is_not_called_is_refused(is_async: bool) -> None:
    class OnlyAsync(PsCallback):
        async def on_message_async(self, session: PsSession, message: bytes) -> None: ...

    class OnlySync(PsCallback):
        use_async_callback = True

        def on_message(self, session: PsSession, message: bytes) -> None: ...

    callback = OnlyAsync() if is_async else OnlySync()
    with pytest.raises(PsCallbackError, match="would never be called: with use_async_callback"):
        PsServer(callback)
