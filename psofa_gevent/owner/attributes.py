"""The check of attribute names that are assigned to a server or a client.

Python accepts any name. So a typing error, or a setting that is assigned instead of passed to the
constructor, would have no effect and raise no error. This check raises an error for an unknown
name, and suggests the nearest known one. These names may be assigned:

- Names that a class declares: its methods and properties, which tests replace on an object; in a
  user's subclass also its class attributes, slots and annotations.
- Names that begin with an underscore.
- In a user's subclass, any other name without a declaration, as in every Python class:
  ``self.database = database`` in its ``__init__`` is the usual way to declare one. Only the name of
  a setting must be declared there, because its assignment looks like a change of the setting.

Slots instead of this check would prevent tests from replacing methods of single objects
(``unittest.mock``).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from psofa_gevent.settings import SessionSettings

if sys.version_info >= (3, 14):
    from annotationlib import Format, get_annotations

    def _annotations(cls: type) -> Mapping[str, Any]:
        return get_annotations(cls, format=Format.FORWARDREF)
else:
    from inspect import get_annotations as _annotations

__all__ = ["check_attribute"]

LIBRARY = __name__.partition(".")[0]


def check_attribute(owner: object, name: str, described: type[SessionSettings]) -> None:
    """Raise `AttributeError` unless `name` may be assigned. Does not switch.

    Args:
        owner: the server or client.
        name: the name of the attribute.
        described: the class that describes the owner's settings.
    """
    kind = type(owner)
    if name.startswith("_") or any(name in vars(each) for each in kind.__mro__):
        return
    settings = [each.name for each in fields(described)]
    is_of_the_library = kind.__module__.partition(".")[0] == LIBRARY
    if name not in settings and not is_of_the_library:
        return
    if any(name in _annotations(each) for each in kind.__mro__):
        return
    raise AttributeError(
        f"a {kind.__name__} has no attribute {name!r}: {_hint(kind, name, settings)}"
    )


def _hint(kind: type, name: str, settings: Collection[str]) -> str:
    """Advice for the error text: the name that was probably meant."""
    if name in settings:
        return "it is a setting: give it to the constructor, and read it from settings"
    public = {each for each in dir(kind) if not each.startswith("_")}
    nearest = difflib.get_close_matches(name, [*settings, *public], 1)
    if not nearest:
        return "a subclass may have attributes of its own"
    if nearest[0] in settings:
        return f"did you mean the setting {nearest[0]}, which the constructor takes?"
    return f"did you mean {nearest[0]}?"
