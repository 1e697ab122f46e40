"""The documents about the structure are current: the drawing, and the files and names in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from drawing import FILE, drawn, shortened
from imports import LOOKS_UP, ROOT, package_graph, parse_modules, read_modules

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_drawing_is_what_the_imports_say() -> None:
    current = FILE.read_text(encoding="utf-8")
    assert current == drawn(read_modules()), "run: python tests/support/drawing.py"


def test_the_drawing_has_each_package() -> None:
    texts = [element.text or "" for element in ElementTree.parse(FILE).iter()]
    modules = read_modules()
    for package in {module.package for module in modules.values()} - LOOKS_UP - {"__init__"}:
        assert f"{package}/" in texts or f"{package}.py" in texts


def test_an_import_that_follows_from_others_is_not_drawn() -> None:
    modules = parse_modules(
        {
            "server": "import psofa_gevent.owner, psofa_gevent.hub",
            "owner": "import psofa_gevent.hub, psofa_gevent.typing",
            "hub": "",
            "typing": "import psofa_gevent.server",
        }
    )
    graph = shortened(package_graph(modules))
    assert graph == {"server": {"owner"}, "owner": {"hub"}, "hub": set()}
    assert drawn(modules).count("<path d=") == 2


def steps() -> Iterator[tuple[str, str]]:
    """The steps of the ways: a file, and a name that has to be defined there."""
    for file, names in re.findall(
        r"^\| `([\w/]+\.py)` \| ((?:`\w+`(?:, )?)+) \|", ARCHITECTURE, re.M
    ):
        for name in re.findall(r"`(\w+)`", names):
            yield file, name


def defined(file: str) -> set[str]:
    tree = ast.parse((ROOT / "psofa_gevent" / file).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_the_ways_have_steps() -> None:
    assert len(set(steps())) > 60


@pytest.mark.parametrize(("file", "name"), sorted(set(steps())))
def test_a_step_of_a_way_is_where_the_document_says(file: str, name: str) -> None:
    assert name in defined(file)


def test_names_that_the_architecture_tells_of_are_in_the_package() -> None:
    package = ROOT / "psofa_gevent"
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    names = set(re.findall(r"\w+", source))
    for name in re.findall(r"`(\w+)`", ARCHITECTURE):
        assert name in names, name


def test_files_and_folders_that_the_documents_name_exist() -> None:
    package = ROOT / "psofa_gevent"
    for path in re.findall(r"`([\w/]+(?:\.py|\.json|\.ini|/))`", ARCHITECTURE):
        assert (package / path).exists() or (ROOT / path).exists(), path
    for path in re.findall(r"`([\w/]+(?:\.py|\.json|\.ini|\.md))`", CONTRIBUTING):
        beside = [package / path, package / "session" / path]
        assert any(each.exists() for each in [ROOT / path, *beside]), path


def test_the_table_of_the_tree_has_each_package() -> None:
    table = ARCHITECTURE.partition("## One session")[0]
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", re.sub(r"(?m)^[^|].*$", "", table)))
    packages = {module.package for module in read_modules().values()} - {"__init__"}
    assert named >= packages


def test_links_of_the_documents_lead_somewhere() -> None:
    for text, folder in (ARCHITECTURE, ROOT / "docs"), (CONTRIBUTING, ROOT):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


def test_terms_are_in_order_and_there_once() -> None:
    terms = re.findall(r"^\| ([a-z ]+) \|", CONTRIBUTING.partition("## Terms")[2], re.M)
    terms.remove("term")
    assert len(terms) > 40
    assert terms == sorted(set(terms))
