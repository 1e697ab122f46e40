"""Names of ours and names of others: no attribute takes the place of a base class's by accident.

gevent's own tools ask any greenlet for the attributes of a `gevent.Greenlet`: those count as names
of a base class for everything that is one.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import gevent
import greenlet
import pytest

import psofa_gevent
from helpers import run_python

DELIBERATE = {
    ("LoopGreenlet", "run"): "what a greenlet runs is a method in a subclass",
    ("LogGreenlet", "run"): "what a greenlet runs is a method in a subclass",
    ("LogGreenlet", "switch"): "gevent's way to let a greenlet go on",
    ("LogGreenlet", "throw"): "gevent's way to interrupt one",
    ("LoopGreenlet", "switch"): "gevent's way to let a greenlet go on",
    ("LoopGreenlet", "throw"): "gevent's way to interrupt one",
    ("LibraryGreenlet", "switch"): "gevent's way to let a greenlet go on; not in a child",
    ("LibraryGreenlet", "throw"): "gevent's way to interrupt one; not in a child",
    ("SessionGreenlet", "_run"): "what a gevent.Greenlet runs is this method in a subclass",
    ("LibraryGreenlet", "spawning_stack_limit"): "gevent's setting",
    ("Listener", "max_accept"): "gevent's setting",
    ("Listener", "do_handle"): "takes what do_read gives, which is ours, too",
    ("HubLoop", "_ssock"): "made and closed by asyncio, but later: _make_self_pipe",
    ("HubLoop", "_csock"): "made and closed by asyncio, but later: _make_self_pipe",
}
"""What has another form than what it overrides, and why it does."""


def our_modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(psofa_gevent.__path__, "psofa_gevent.")
    # __main__ is a program: it patches its own process.
    names = [module.name for module in found if module.name != "psofa_gevent.__main__"]
    return [psofa_gevent, *map(importlib.import_module, names)]


def is_ours(cls: type) -> bool:
    return str(cls.__module__).partition(".")[0] == "psofa_gevent"


def our_classes() -> list[type]:
    our_modules()
    # By id: there are metaclasses that warn when their classes are compared.
    found: dict[int, type] = {}
    waiting: list[type] = [object]
    while waiting:
        subclasses: list[type] = type.__subclasses__(waiting.pop())
        for cls in subclasses:
            if id(cls) not in found:
                found[id(cls)] = cls
                waiting.append(cls)
    return [cls for cls in found.values() if is_ours(cls)]


def bases_of_others(cls: type) -> list[type]:
    bases = [base for base in cls.__mro__ if not is_ours(base)]
    if issubclass(cls, greenlet.greenlet):
        bases.append(gevent.Greenlet)
    return [base for base in bases if base not in (object, typing.Generic, typing.Protocol)]


@functools.cache
def our_sources() -> dict[str, list[ast.AST]]:
    """By name, as public classes do not say in which file they are written."""
    found: dict[str, list[ast.AST]] = {}
    for module in our_modules():
        for node in ast.walk(ast.parse(inspect.getsource(module) or "")):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def sources_of(cls: type) -> list[ast.AST]:
    if is_ours(cls):
        return our_sources().get(cls.__name__, [])
    try:
        return [ast.parse(textwrap.dedent(inspect.getsource(cls)))]
    except (OSError, TypeError):
        return []


def of_instances(cls: type) -> set[str]:
    """The attributes that the class's own code gives its instances, as far as there is source."""
    return {
        node.attr
        for written in sources_of(cls)
        for node in ast.walk(written)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def names_of(cls: type) -> set[str]:
    """Without those of Python's protocols (`__len__`), of enum's (`_value_`) and of abc's."""
    names = set(vars(cls)) | of_instances(cls)
    return {name for name in names if name[0] + name[-1] != "__" and name != "_abc_impl"}


def shape(function: object) -> list[tuple[str, Any]] | None:
    """The parameters of a function, for comparison; None for what is none, or does not tell."""
    if not inspect.isfunction(function):
        return None
    return [(each.name, each.kind) for each in inspect.signature(function).parameters.values()]


def is_override(cls: type, base: type, name: str) -> bool:
    """Whether it is called alike; or is a property of the base's, to which ours only assigns."""
    theirs = inspect.getattr_static(base, name, None)
    if name not in vars(cls) and inspect.isdatadescriptor(theirs):
        return True
    ours = shape(inspect.getattr_static(cls, name, None))
    return ours is not None and ours == shape(theirs)


def shadows() -> Iterator[tuple[type, str, type]]:
    for cls in our_classes():
        for base in bases_of_others(cls):
            for name in names_of(cls) & names_of(base):
                if not is_override(cls, base, name):
                    yield cls, name, base


def test_no_attribute_shadows_one_of_a_base_class_but_overrides() -> None:
    found = {
        (cls.__name__, name): f"{cls.__qualname__}.{name} shadows that of {base!r}"
        for cls, name, base in shadows()
    }
    assert [text for key, text in found.items() if key not in DELIBERATE] == []
    assert DELIBERATE.keys() - found.keys() == set()


PREPARE = """
import os, sys, io
if os.environ.get("PSOFA_TEST_PATCHED") == "1":
    from gevent import monkey
    monkey.patch_all()
import asyncio, time
import gevent, gevent.util
from psofa_gevent import PsCallback, PsClient, PsServer

class Callback(PsCallback):
    use_async_callback = True

    async def on_message_async(self, session, message):
        await asyncio.sleep(0.001)
        await session.send_async(message)

    async def on_close_async(self, session, reason):
        gevent.sleep(0.001)

server = PsServer(Callback(), host="127.0.0.1", port=0)
server.start()
client = PsClient(Callback(), *server.address)
client.connect().send("x")
while not client.session.messages_received:
    gevent.sleep(0.001)
"""


def run_with_async_callbacks(body: str, **environment: str) -> tuple[str, str]:
    """What a program prints, and what to stderr, that has an async callback at work."""
    source = [PREPARE, textwrap.dedent(body), "client.disconnect()", "server.shutdown()"]
    done = run_python("\n".join(source), environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "gevent.util.print_run_info(file=sys.stdout)",
        "print(gevent.util.GreenletTree.current_tree().format())",
        "print(*map(str, gevent.util.GreenletTree.forest()))",
    ],
)
def test_gevent_tells_of_its_greenlets_where_async_callbacks_ran(call: str) -> None:
    printed, errors = run_with_async_callbacks(call)
    assert "LoopGreenlet" in printed
    assert errors == ""


def test_gevents_monitor_thread_reports_an_async_callback_that_blocks() -> None:
    _, errors = run_with_async_callbacks(
        """
        from gevent import get_hub, monkey
        monitor = get_hub().periodic_monitoring_thread
        reported = []
        monitor.add_monitoring_function(reported.append, 0.01)

        async def block():
            monkey.get_original("time", "sleep")(0.3)

        from psofa_gevent import run_coroutine
        run_coroutine(block())
        while not reported:
            gevent.sleep(0.01)
        """,
        GEVENT_MONITOR_THREAD_ENABLE="1",
        GEVENT_MAX_BLOCKING_TIME="0.1",
    )
    assert "appears to be blocked" in errors
    assert "LoopGreenlet" in errors
    assert "Traceback" not in errors


def test_gevents_look_for_blocking_calls_finds_async_callbacks_that_wait() -> None:
    printed, errors = run_with_async_callbacks(
        """
        from psofa_gevent import run_coroutine
        with gevent.util.assert_switches(hub_only=True):
            run_coroutine(asyncio.sleep(0.01))
        try:
            with gevent.util.assert_switches():
                pass
        except gevent.util._FailedToSwitch:
            print("did not switch")
        """
    )
    assert (printed, errors) == ("did not switch\n", "")
