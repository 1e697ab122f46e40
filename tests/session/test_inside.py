"""A session has one state, in one file, and one door through which the rest of the package asks it.

That nobody goes past the door: `tests/whole/test_architecture.py`.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import psofa_gevent
from psofa_gevent import PsSession
from psofa_gevent.session import inside
from psofa_gevent.session.connection import Connection
from psofa_gevent.session.life import SessionLife
from psofa_gevent.session.receiving import ReceivingHalf
from psofa_gevent.session.sending import SendingHalf

PACKAGE = Path(inspect.getfile(psofa_gevent)).parent

CHAIN = (Connection, SendingHalf, ReceivingHalf, SessionLife, PsSession)


def test_all_state_of_a_session_is_declared_in_one_class() -> None:
    assert PsSession.__mro__[: len(CHAIN)] == CHAIN[::-1]
    assert [cls.__name__ for cls in CHAIN if vars(cls)["__slots__"]] == ["Connection"]


def test_all_questions_to_a_session_are_asked() -> None:
    own = {
        name
        for node in ast.parse(inspect.getsource(inside)).body
        for name in names_bound_by(node)
        if name[0].islower()  # not a type
    }
    used = {
        name
        for file in PACKAGE.rglob("*.py")
        if file.name != "inside.py"
        for node in ast.walk(ast.parse(file.read_text()))
        for name in names_used_by(node)
    }
    assert own - used == set()


def names_bound_by(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def names_used_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return [node.attr] if node.value.id == "inside" else []
    if isinstance(node, ast.ImportFrom) and node.module == "psofa_gevent.session.inside":
        return [alias.name for alias in node.names]
    return []
