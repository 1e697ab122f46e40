"""Who imports whom in the package, and who touches whose private names: read from the source.

``python tests/support/imports.py`` prints the graph of the packages, with the imports that are
there for type checkers only; circles; arrows up, against the order in `LAYERS`; and how often a
file touches a private name of another one. `tests/whole/test_architecture.py` holds the package to
it.

A top-level module of ``psofa_gevent/`` counts as a package of one file. Nothing is imported or run:
the source is parsed (`ast`), so this works without dependencies and on any Python.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "psofa_gevent"
PUBLIC = "__init__"
"""The package of ``psofa_gevent/__init__.py``."""

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("testing",),
    (PUBLIC,),
    ("server", "client", "multi_client"),
    ("listening", "connecting"),
    ("owner",),
    ("group", "requester", "handler"),
    ("callback",),
    ("session",),
    ("aio", "tls", "settings"),
    ("framing", "proxy_protocol", "systemd"),
    ("net",),
    ("hub",),
    ("checks", "errors", "messages"),
    ("enums", "public"),
    ("typing",),
)
"""From top to bottom: a package imports from layers below its own, and no neighbour in its own."""

LOOKS_UP = frozenset({"typing"})
"""Packages whose arrows count as none: aliases for type checkers, which nothing runs."""

FOREIGN = frozenset({("aio.loop", "_wait"), ("hub.calls", "_callbacks")})
"""Where a name is one of asyncio's or gevent's, though some file of ours has the same one."""

Arrow = tuple[str, str]
"""Who imports, and whom."""


@dataclass
class Module:
    """One file of the package."""

    name: str
    """Its dotted name without ``psofa_gevent.``."""
    lines: int
    tree: ast.Module
    runs: set[str] = field(default_factory=set)
    """The modules that it imports when it runs."""
    checks: set[str] = field(default_factory=set)
    """Those that it imports for type checkers only."""

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    """All modules of the package, by name."""
    sources = {}
    for path in sorted((root / NAME).rglob("*.py")):
        parts = path.relative_to(root / NAME).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return parse_modules(sources)


def parse_modules(sources: Mapping[str, str]) -> dict[str, Module]:
    """The same of a package that has these modules."""
    modules = {
        name: Module(name, source.count("\n"), ast.parse(source, name))
        for name, source in sources.items()
    }
    for module in modules.values():
        _find_imports(module.tree, module, modules, is_checked=False)
    return modules


def _find_imports(
    node: ast.AST, module: Module, modules: Mapping[str, Module], *, is_checked: bool
) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            found = set(_imported(child, modules)) - {module.name}
            (module.checks if is_checked else module.runs).update(found)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for each in child.body:
                wrapped = ast.Module([each], [])
                _find_imports(wrapped, module, modules, is_checked=True)
            for each in child.orelse:
                wrapped = ast.Module([each], [])
                _find_imports(wrapped, module, modules, is_checked=is_checked)
        else:
            _find_imports(child, module, modules, is_checked=is_checked)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imported(node: ast.Import | ast.ImportFrom, modules: Mapping[str, Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    else:
        dotted = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in dotted:
        first, _, rest = name.partition(".")
        if first != NAME:
            continue
        if rest in modules:
            yield rest
        elif rest.rpartition(".")[0] in modules:
            yield rest.rpartition(".")[0]
        else:
            yield PUBLIC


# Packages


def package_graph(modules: Mapping[str, Module], *, types: bool = True) -> dict[str, set[str]]:
    """Each package, and those that it imports from; `types`: also for type checkers only."""
    graph: dict[str, set[str]] = {module.package: set() for module in modules.values()}
    for module in modules.values():
        for name in module.runs | (module.checks if types else set()):
            other = modules[name].package
            if other != module.package:
                graph[module.package].add(other)
    return graph


def arrows_up(graph: Mapping[str, Iterable[str]]) -> set[Arrow]:
    """The imports that do not go to a lower layer.

    Raises:
        KeyError: a package stands in no layer.
    """
    rank = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    return {
        (package, other)
        for package, others in graph.items()
        for other in others
        if package not in LOOKS_UP and rank[other] <= rank[package]
    }


def without(graph: Mapping[str, set[str]], arrows: Iterable[Arrow]) -> dict[str, set[str]]:
    """The graph less some arrows, and less those of `LOOKS_UP`."""
    left = {name: set() if name in LOOKS_UP else set(others) for name, others in graph.items()}
    for package, other in arrows:
        left.get(package, set()).discard(other)
    return left


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups in which each imports each, directly or by way of others; the largest first."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups, key=lambda group: (-len(group), group))]


def _reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for other in graph[ahead.pop()]:
            if other not in found:
                found.add(other)
                ahead.append(other)
    return found


# Private names


@dataclass(frozen=True)
class Access:
    """A private name of another file, touched in one line."""

    module: str
    line: int
    name: str
    kind: str
    """``session``: of a session, from outside ``session/``; ``file``: of another file outside it;
    ``foreign``: of another distribution (gevent, asyncio)."""


def private_accesses(modules: Mapping[str, Module]) -> list[Access]:
    """Where a file touches a private name that is not its own.

    Not counted: ``self._name``, ``super()._name``, what a file of `session` touches of another one
    there, and a name that the same file defines, unless it is touched of a session.
    """
    defined = {name: set(_defined(module.tree)) for name, module in modules.items()}
    where: dict[str, set[str]] = defaultdict(set)
    for name, names in defined.items():
        for each in names:
            where[each].add(modules[name].package)
    accesses = []
    for module in modules.values():
        for receiver, line, name in _touched(module.tree):
            kind = _kind(module, receiver, name, defined[module.name], where)
            if kind is not None:
                accesses.append(Access(module.name, line, name, kind))
    return accesses


def _kind(
    module: Module, receiver: str, name: str, own: set[str], where: Mapping[str, set[str]]
) -> str | None:
    packages = set() if (module.name, name) in FOREIGN else where.get(name, set())
    if module.package == "session" and (not packages or "session" in packages):
        return None if packages or receiver.rpartition(".")[2] == "session" else "foreign"
    is_of_session = receiver.rpartition(".")[2].lstrip("_") == "session"
    if "session" in packages and (is_of_session or name not in own):
        return "session"
    if name in own or (receiver, name) == ("os", "_exit"):  # documented, and public
        return None
    return "file" if packages else "foreign"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def _defined(tree: ast.Module) -> Iterator[str]:
    """The private names that a file defines, for itself or for its objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [node.attr] if _is_own(node.value) else []
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            names = [str(ast.literal_eval(each)) for each in _elements(node.value)]
        else:
            continue
        yield from filter(_is_private, names)


def _elements(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]


def _is_own(receiver: ast.expr) -> bool:
    return isinstance(receiver, ast.Name) and receiver.id in ("self", "cls")


def _touched(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """What is touched of something else: that thing, as it is written, the line, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if _is_private(alias.name) and alias.asname is None:
                    yield str(node.module), node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            receiver = ast.unparse(node.value)
            if not _is_own(node.value) and receiver != "super()":
                yield receiver, node.lineno, node.attr


# Constants


def constants(modules: Mapping[str, Module]) -> dict[str, dict[str, str]]:
    """The constants of the modules, by name: which module gives it which value, as it is written.

    Type variables are none, nor are names of one letter.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for module in modules.values():
        for node in module.tree.body:
            if not isinstance(node, (ast.AnnAssign, ast.Assign)) or node.value is None:
                continue
            for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
                name = ast.unparse(target)
                if name.isupper() and len(name) > 2:
                    found[name][module.name] = ast.unparse(node.value)
    return found


# The report


def report(modules: Mapping[str, Module]) -> Iterator[str]:
    """What `main` prints, line by line."""
    with_types, at_run_time = package_graph(modules), package_graph(modules, types=False)
    yield "Packages, each with what it imports from (in brackets: for type checkers only)"
    for package in LAYER_ORDER:
        if package in with_types:
            only_types = with_types[package] - at_run_time[package]
            others = [name for name in LAYER_ORDER if name in with_types[package]]
            shown = [f"[{name}]" if name in only_types else name for name in others]
            yield f"  {package}: {', '.join(shown)}"
    up = arrows_up(with_types)
    yield f"Arrows up: {len(up)}"
    for package, other in sorted(up):
        yield f"  {package} -> {other}"
        for module in modules.values():
            for name in sorted(module.runs | module.checks):
                if (module.package, modules[name].package) == (package, other):
                    yield f"    {module.name} -> {name}"
    for title, graph in (
        ("packages, types included", without(with_types, ())),
        ("packages, at run time", without(at_run_time, ())),
        ("files, types included", file_graph(modules)),
    ):
        found = circles(graph)
        yield f"Circles of {title}: {len(found)}"
        yield from (f"  {len(group)}: {', '.join(group)}" for group in found)
    yield from _report_accesses(modules)


def _report_accesses(modules: Mapping[str, Module]) -> Iterator[str]:
    accesses = private_accesses(modules)
    yield "Private names of another file"
    for kind, text in KINDS.items():
        of_kind = [access for access in accesses if access.kind == kind]
        yield f"  {text}: {len(of_kind)}, {per_thousand(len(of_kind), modules):.1f} per 1,000 lines"
        for module_name, count in Counter(access.module for access in of_kind).most_common():
            names = sorted({access.name for access in of_kind if access.module == module_name})
            yield f"    {module_name}: {count} ({', '.join(names)})"


LAYER_ORDER = [package for layer in LAYERS for package in layer]
KINDS = {
    "session": "of a session, from outside session/",
    "file": "of others, outside session/",
    "foreign": "of other distributions",
}


def per_thousand(count: int, modules: Mapping[str, Module]) -> float:
    """For 1,000 lines of the package."""
    return 1_000 * count / sum(module.lines for module in modules.values())


def file_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Each file, and those that it imports from, types included; less those of `LOOKS_UP`."""
    return {
        module.name: set() if module.package in LOOKS_UP else module.runs | module.checks
        for module in modules.values()
    }


def main() -> None:
    for line in report(read_modules()):
        print(line)


if __name__ == "__main__":
    main()
