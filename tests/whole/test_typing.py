"""What type checkers say: mypy, which looks at this file, and pyright.

A ``type: ignore`` here is an expectation: mypy reports one that is not needed.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, assert_type

import pytest

from psofa_gevent import PsCallback, PsClient, PsHandler, PsMultiClient, PsServer, PsSession
from psofa_gevent.client import ClientKeywords
from psofa_gevent.framing import Framing, Line
from psofa_gevent.multi_client import MultiClientKeywords
from psofa_gevent.server import ServerKeywords


class Json(Framing[dict[str, Any]]):
    """Messages of another type than bytes."""


class JsonCallback(PsCallback[dict[str, Any]]):
    def on_message(self, session: PsSession[dict[str, Any]], message: dict[str, Any]) -> None:
        assert_type(message["id"], Any)


class Echo(PsCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


@PsHandler
def json_handler(session: PsSession[dict[str, Any]]) -> None:
    assert_type(session.receive(), dict[str, Any])


@PsHandler
def handler(session: PsSession) -> None:
    assert_type(session.receive(), bytes)


def test_without_a_framing_messages_are_bytes() -> None:
    assert_type(PsServer(PsCallback()), PsServer[bytes])
    assert_type(PsServer(Echo(), port=0, backlog=5, idle_milliseconds=None), PsServer[bytes])
    assert_type(PsServer(handler), PsServer[bytes])
    assert_type(PsClient(Echo(), "localhost", 1, send_timeout=None), PsClient[bytes])
    assert_type(PsMultiClient(Echo(), reconnect=True), PsMultiClient[bytes])


def test_with_a_framing_they_are_what_that_makes_of_them() -> None:
    assert_type(PsServer(Echo(), framing=Line()), PsServer[bytes])
    assert_type(PsServer(JsonCallback(), framing=Json(), port=0), PsServer[dict[str, Any]])
    assert_type(PsServer(json_handler, framing=Json()), PsServer[dict[str, Any]])
    assert_type(PsClient(JsonCallback(), "localhost", 1, framing=Json()), PsClient[dict[str, Any]])
    assert_type(PsMultiClient(JsonCallback(), framing=Json()), PsMultiClient[dict[str, Any]])


def test_a_framing_that_may_be_none_must_be_one_of_bytes() -> None:
    for line in (Line(), None):
        assert_type(PsServer(Echo(), framing=line), PsServer[bytes])
    for json in (Json(), None):
        PsServer(JsonCallback(), framing=json)  # type: ignore[arg-type]  # the point


def test_other_messages_without_a_framing_are_refused() -> None:
    PsServer(PsCallback[dict[str, Any]]())  # type: ignore[arg-type]  # the point
    PsServer(JsonCallback(), framing=None)  # type: ignore[arg-type]  # the point
    PsServer(json_handler)  # type: ignore[arg-type]  # the point
    PsClient(JsonCallback(), "localhost", 1)  # type: ignore[arg-type]  # the point
    PsClient(json_handler, "localhost", 1)  # type: ignore[arg-type]  # the point
    PsMultiClient(JsonCallback())  # type: ignore[arg-type]  # the point
    PsMultiClient(json_handler)  # type: ignore[arg-type]  # the point


def test_a_framing_of_other_messages_is_refused() -> None:
    PsServer(Echo(), framing=Json())  # type: ignore[arg-type]  # the point
    PsServer(JsonCallback(), framing=Line())  # type: ignore[arg-type]  # the point
    PsServer(handler, framing=Json())  # type: ignore[arg-type]  # the point


def test_a_setting_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError):
        PsServer(Echo(), port="x")  # type: ignore[call-overload]  # the point
    with pytest.raises(TypeError):
        PsServer(Echo(), ports=1)  # type: ignore[call-overload]  # the point


@pytest.mark.parametrize(
    ("function", "keywords", "more"),
    [
        (PsServer.__init__, ServerKeywords, set()),
        (PsClient.__init__, ClientKeywords, {"host", "port"}),
        (PsMultiClient.__init__, MultiClientKeywords, set()),
    ],
)
def test_the_overloads_have_all_parameters(
    function: Callable[..., None], keywords: type, more: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    assert {*parameters} == {*keywords.__annotations__} | more | {"self", "callback", "framing"}
    taken = typing.get_type_hints(function)
    declared = typing.get_type_hints(keywords)
    assert declared == {name: taken[name] for name in declared}
