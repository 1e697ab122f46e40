"""Loads the callback that ``serve module:attribute`` names.

A wrong name is an error in the command line: `UsageError`, one line. An error inside the module is
the module's: `ModuleFailedError` has its exception, with the module's own traceback. All of it runs
in the main greenlet, before there is a server.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from types import TracebackType

from psofa_gevent.callback import PsCallback
from psofa_gevent.cli.errors import ModuleFailedError, UsageError

__all__ = ["load_callback"]


def load_callback(target: str) -> PsCallback:
    """Load the callback that `target`, a ``module:attribute``, names.

    The attribute may be a subclass of `PsCallback` (called without arguments), an instance of one,
    or a function that returns one. The current directory is searched first, as by ``python -m``.

    Raises:
        UsageError: there is no such module or attribute, or it is not a callback.
        ModuleFailedError: the module raised when it was imported, or the attribute when called.
    """
    try:
        return _find(target)
    except UsageError:
        raise
    except Exception as exc:
        raise ModuleFailedError from exc.with_traceback(_of_the_module(exc.__traceback__))


def _find(target: str) -> PsCallback:
    module_name, _, attribute = target.partition(":")
    names = [*module_name.split("."), *attribute.split(".")]
    if not all(name.isidentifier() for name in names) or module_name.endswith(".py"):
        raise UsageError(
            f"{target!r} is not of the form module:attribute, such as app:Callback for the "
            "class Callback in app.py"
        )
    found = _import_module(module_name)
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise UsageError(f"module {module_name!r} has no attribute {attribute!r}") from None
    return _as_callback(found, target)


def _import_module(name: str) -> object:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        # The module itself, or a package around it, is missing. Any other name is one that the
        # module wants to import: its traceback tells the user where.
        if exc.name is not None and f"{name}.".startswith(f"{exc.name}."):
            raise UsageError(
                f"no module named {exc.name!r}, neither installed nor in {os.getcwd()}"
            ) from None
        raise


def _as_callback(found: object, target: str) -> PsCallback:
    if isinstance(found, PsCallback):
        return found
    if (
        not callable(found)
        or (isinstance(found, type) and not issubclass(found, PsCallback))
        or inspect.iscoroutinefunction(found)
    ):
        raise UsageError(
            f"{target} is not a callback: it must be a subclass of PsCallback, an instance of "
            f"one, or a function that returns one, not {_describe(found)}"
        )
    try:
        inspect.signature(found).bind()
    except ValueError:
        pass  # it is written in C, and has no signature
    except TypeError as exc:
        raise UsageError(
            f"{target} cannot be called without arguments ({exc}); serve a function that gives them"
        ) from None
    made = found()
    if not isinstance(made, PsCallback):
        raise UsageError(f"{target} is not a callback: it returned {_describe(made)}")
    return made


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.iscoroutinefunction(value):
        return "an async function"
    return f"a value of the type {type(value).__name__}"


def _of_the_module(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames before the user's code.

    ``None`` if no frame is left, as for a syntax error: that error has its place itself.
    """
    before_it = (os.path.dirname(__file__), os.path.dirname(importlib.__file__), "<frozen")
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(before_it):
        trace = trace.tb_next
    return trace
