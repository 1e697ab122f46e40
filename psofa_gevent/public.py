"""Gives public classes the ``__module__`` from which programs import them.

So reprs, tracebacks and pickles say ``psofa_gevent.PsClosedError``, and do not change when a file
moves. The lists of exports are the ``__all__`` of the public modules, not here. Runs once, when a
public module is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import get_annotations
from typing import get_type_hints

__all__ = ["publish"]


def publish(module: str, names: Iterable[str], namespace: Mapping[str, object]) -> None:
    """Set the ``__module__`` of the classes among `names` to `module`.

    Args:
        module: the public module's name.
        names: the names that it exports.
        namespace: the module's namespace, which has them.
    """
    for name in names:
        thing = namespace.get(name)
        if isinstance(thing, type) and thing.__module__.startswith(f"{module}."):
            _resolve_annotations(thing)
            thing.__module__ = module


def _resolve_annotations(cls: type) -> None:
    """Replace annotations that are text by types.

    `typing` would look up their names in the module that the class's ``__module__`` names.
    """
    own = get_annotations(cls)
    if own:
        try:
            hints = get_type_hints(cls, include_extras=True)
        except NameError:  # a name for type checkers only, which never could be resolved
            return
        cls.__annotations__ = {name: hints[name] for name in own}
