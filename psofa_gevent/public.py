"""Gives public classes the ``__module__`` by which programs import them.

It holds no list of exports: those are the ``__all__`` of the public modules.

So reprs, tracebacks and pickles have ``psofa_gevent.PsClosedError``, and a file that moves changes
none of them. Runs once, when a public module is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import get_annotations
from typing import get_type_hints

__all__ = ["publish"]


def publish(module: str, names: Iterable[str], namespace: Mapping[str, object]) -> None:
    """Have the classes among those names say that they are `module`'s.

    Args:
        module: the public module's name.
        names: what it exports.
        namespace: where it has that.
    """
    for name in names:
        thing = namespace.get(name)
        if isinstance(thing, type) and thing.__module__.startswith(f"{module}."):
            _resolve_annotations(thing)
            thing.__module__ = module


def _resolve_annotations(cls: type) -> None:
    """Put types where annotations are text: `typing` looks their names up where the class says."""
    own = get_annotations(cls)
    if own:
        try:
            hints = get_type_hints(cls, include_extras=True)
        except NameError:  # for type checkers only: nobody else has known them before
            return
        cls.__annotations__ = {name: hints[name] for name in own}
