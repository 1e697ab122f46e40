"""A session has one state, in one file, and the rest of the package asks it through one door."""

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

OF_FORKING = {"_let_go"}
"""Others have it, too: what `psofa_gevent.hub.forking` calls."""


def private_names() -> set[str]:
    names = set(dir(PsSession)) | set(Connection.__slots__)
    return {name for name in names if name.startswith("_") and not name.endswith("__")} - OF_FORKING


def private_looks(file: Path, names: set[str]) -> list[str]:
    """The places where a file uses one of `names` of something else than ``self``."""
    tree = ast.parse(file.read_text())
    looks = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        f"{file.relative_to(PACKAGE)}:{look.lineno} {ast.unparse(look)}"
        for look in looks
        if look.attr in names and ast.unparse(look.value) not in {"self", "cls"}
    ]


def test_nobody_outside_of_its_folder_touches_a_private_name_of_a_session() -> None:
    names = private_names()
    files = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE / "session"]
    assert len(files) > 40
    assert [look for file in files for look in private_looks(file, names)] == []


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
