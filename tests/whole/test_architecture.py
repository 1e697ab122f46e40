"""The structure of the package: imports run one way, and private names stay where they belong.

What is still open stands in `OPEN_ARROWS` and `MOST_OF_A_SESSION`. Both can only shrink: what is
done is to be taken out. `python tests/support/imports.py` prints all of it.
"""

from __future__ import annotations

import ast
import pickle
import traceback
import typing
from pathlib import Path

import pytest

import psofa_gevent
import psofa_gevent.framing
from imports import (
    LAYERS,
    Module,
    arrows_up,
    circles,
    constants,
    file_graph,
    package_graph,
    parse_modules,
    per_thousand,
    private_accesses,
    read_modules,
    without,
)
from psofa_gevent import PsClosedError, PsCloseReason, PsProxyInfo, PsReconnect

OPEN_ARROWS: dict[tuple[str, str], str] = {}
"""Imports that go up, and why they still do."""
OPEN_CIRCLES: list[set[str]] = []
"""Files that import each other, types included."""
MOST_OF_A_SESSION = 0
"""Private names of a session that are touched outside of ``session/``."""
LONG = 500
"""Lines."""
MOST_PER_THOUSAND = 2.0
"""The same of anything else that another file has, per 1,000 lines of code."""


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_modules()


def test_each_package_has_its_layer(modules: dict[str, Module]) -> None:
    known = [package for layer in LAYERS for package in layer]
    assert sorted(known) == sorted({module.package for module in modules.values()})


def test_imports_go_down_types_included(modules: dict[str, Module]) -> None:
    found = arrows_up(package_graph(modules))
    assert found - OPEN_ARROWS.keys() == set()
    assert OPEN_ARROWS.keys() - found == set(), "done: take it out of OPEN_ARROWS"


def test_no_import_at_run_time_goes_up(modules: dict[str, Module]) -> None:
    assert arrows_up(package_graph(modules, types=False)) == set()


def test_packages_import_each_other_in_no_circle(modules: dict[str, Module]) -> None:
    assert circles(without(package_graph(modules), OPEN_ARROWS)) == []


def test_files_import_each_other_in_no_circle(modules: dict[str, Module]) -> None:
    assert circles({module.name: module.runs for module in modules.values()}) == []
    graph = file_graph(modules)
    for name, others in graph.items():
        package = modules[name].package
        graph[name] = {
            other for other in others if (package, modules[other].package) not in OPEN_ARROWS
        }
    assert [set(circle) for circle in circles(graph)] == OPEN_CIRCLES


def test_what_lets_go_after_a_fork_is_below_all_that_does(modules: dict[str, Module]) -> None:
    forking = modules["hub.forking"]
    assert forking.runs | forking.checks == set()


def test_private_names_are_touched_in_their_own_file(modules: dict[str, Module]) -> None:
    accesses = private_accesses(modules)
    of_session = [access for access in accesses if access.kind == "session"]
    assert len(of_session) <= MOST_OF_A_SESSION, of_session
    assert len(of_session) == MOST_OF_A_SESSION, "fewer: lower MOST_OF_A_SESSION"
    others = [access for access in accesses if access.kind == "file"]
    assert per_thousand(len(others), modules) <= MOST_PER_THOUSAND, others


def test_a_constant_is_given_its_value_in_one_file(modules: dict[str, Module]) -> None:
    several = {
        (name, frozenset(where)) for name, where in constants(modules).items() if len(where) > 1
    }
    assert not several, several


def test_a_long_file_says_why_it_is() -> None:
    for path in Path(psofa_gevent.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if text.count("\n") > LONG:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            assert "This file is longer than others because" in docstring, path


# What the script finds, and what it leaves out


def modules_of(**sources: str) -> dict[str, Module]:
    """A package of these files, by name; ``__`` stands for the dot."""
    return parse_modules({name.replace("__", "."): text for name, text in sources.items()})


def test_an_import_for_type_checkers_is_an_import() -> None:
    found = modules_of(
        server="from psofa_gevent.hub.times import NEVER",
        hub__times="""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from psofa_gevent.server import PsServer
""",
    )
    graph = package_graph(found)
    assert arrows_up(graph) == {("hub", "server")}
    assert circles(graph) == [["hub", "server"]]
    assert arrows_up(package_graph(found, types=False)) == set()
    assert circles(package_graph(found, types=False)) == []


def test_an_import_within_a_function_is_an_import() -> None:
    found = modules_of(
        net__unix="def f() -> None:\n    from psofa_gevent import server\n", server=""
    )
    assert arrows_up(package_graph(found)) == {("net", "server")}


def test_packages_of_one_layer_do_not_import_each_other() -> None:
    found = modules_of(listening__binds="import psofa_gevent.connecting.link", connecting__link="")
    assert arrows_up(package_graph(found)) == {("listening", "connecting")}


def test_private_names_of_others_are_found() -> None:
    found = modules_of(
        session__session="class PsSession:\n    __slots__ = ('_open',)\n",
        owner__keys="""
class Keys:
    def __init__(self):
        self._mine = 0
    def f(self, session, other, pool):
        self._open = other._mine
        return session._open, other._not_mine, pool._semaphore, super()._f()
""",
        owner__base="class Base:\n    def _not_mine(self): ...\n",
    )
    accesses = {(each.name, each.kind) for each in private_accesses(found)}
    assert accesses == {("_open", "session"), ("_not_mine", "file"), ("_semaphore", "foreign")}


# Where public classes say that they are


def public_classes() -> list[type]:
    things = [getattr(psofa_gevent, name) for name in psofa_gevent.__all__]
    return [thing for thing in things if isinstance(thing, type)]


def test_public_classes_say_where_programs_find_them() -> None:
    assert len(public_classes()) > 25
    for cls in public_classes():
        assert cls.__module__ == "psofa_gevent"
    for name in psofa_gevent.framing.__all__:
        cls = getattr(psofa_gevent.framing, name)
        if isinstance(cls, type) and cls is not psofa_gevent.PsFramingError:
            assert cls.__module__ == "psofa_gevent.framing"
    assert repr(psofa_gevent.PsServer) == "<class 'psofa_gevent.PsServer'>"
    last_line = traceback.format_exception_only(PsClosedError("gone"))[-1]
    assert last_line == "psofa_gevent.PsClosedError: gone\n"


def test_a_pickle_names_what_is_public_only() -> None:
    error = PsClosedError("gone")
    for thing in (PsCloseReason.TIMEOUT, PsReconnect(factor=3), error, psofa_gevent.PsSession):
        pickled = pickle.dumps(thing, protocol=0)
        assert b"cpsofa_gevent\n" in pickled
        assert b"psofa_gevent." not in pickled
        loaded = pickle.loads(pickled)
        assert type(loaded) is type(thing)
        if thing is not error:
            assert loaded == thing


def test_a_pickle_of_before_can_be_read() -> None:
    assert pickle.loads(b"cpsofa_gevent.enums\nPsCloseReason\n(I4\ntR.") is PsCloseReason(4)


@pytest.mark.parametrize("cls", [PsReconnect, PsProxyInfo, psofa_gevent.PsHeartbeat])
def test_the_types_of_their_attributes_are_known(cls: type) -> None:
    assert not any(isinstance(hint, str) for hint in typing.get_type_hints(cls).values())
