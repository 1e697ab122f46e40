"""The command ``serve``: loads the callback, raises the limit of open files, listens and serves.

It runs in the main greenlet of the command line program; `announce` and `reload_tls` run in other
greenlets. Errors in the command line raise `UsageError`, whose text is one line; errors inside the
user's module raise `ModuleFailedError`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import gevent

from psofa_gevent.callback import PsCallback
from psofa_gevent.cli.errors import UsageError
from psofa_gevent.cli.load import load_callback
from psofa_gevent.cli.options import DEFAULT_LOG_LEVEL, as_typed, server_settings, tls_context
from psofa_gevent.cli.reach import where_to_reach
from psofa_gevent.hub.logs import log
from psofa_gevent.server import PsServer
from psofa_gevent.session.session import PsSession

__all__ = ["discard_output", "run"]

logger = logging.getLogger("psofa_gevent")

OPEN_MAX = 10_240
"""Open files that macOS grants. Its hard limit may be "unlimited", which it refuses to set
(setrlimit(2))."""


class EchoCallback(PsCallback):
    """Sends each message back: the default callback of ``serve``."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


def make_server(callback: PsCallback, args: argparse.Namespace) -> PsServer:
    """Make the server that the command line describes.

    Raises:
        UsageError: an option or the callback is wrong.
    """
    try:
        return PsServer(callback, **server_settings(args))
    except (TypeError, ValueError) as exc:  # a PsCallbackError is a TypeError
        raise UsageError(as_typed(str(exc))) from exc


def run(args: argparse.Namespace) -> int:
    """Run the command until the server has been shut down, and return the exit code 0.

    Raises:
        UsageError: the command line is wrong.
        PsServerError: the server could not start.
        ModuleFailedError: the served module raised when it was loaded.
        Exception: what the callback's ``on_start`` raises.
    """
    with showing_records_until_set_up():
        callback = load_callback(args.target) if args.target else EchoCallback()
    set_up_logging(args.log_level)
    raise_descriptor_limit()  # before the server derives its cap from it
    server = make_server(callback, args)
    with reloading_on_sighup(server, args.certificate, args.key):
        server.start()
        text = where_to_reach(
            *server.addresses,
            serving=args.target or "an echo",
            has_tls=args.certificate is not None,
            has_header=args.proxy_protocol,
        )
        # In another greenlet, which runs when this one waits. By then the signal handlers are set:
        # a script may send a signal as soon as it has read the first line.
        gevent.spawn(announce, text)
        server.serve_forever(shutdown_timeout=args.shutdown_timeout, drain=args.drain)
    return 0


class UntilSetUp(logging.StreamHandler[TextIO]):
    """A log handler that prints records as long as there is no other handler for them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (logging.getLogger().handlers or has_handlers_of_the_program()):
            super().emit(record)


@contextlib.contextmanager
def showing_records_until_set_up() -> Iterator[None]:
    """Show warnings and errors while the application is imported, until it sets up logging.

    Python itself shows warnings and errors of loggers that have no handler; the library's logger
    has a handler, which shows nothing.
    """
    handler = UntilSetUp()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def has_handlers_of_the_program() -> bool:
    """Whether the program has given the library's logger a handler."""
    return any(not isinstance(each, (logging.NullHandler, UntilSetUp)) for each in logger.handlers)


def set_up_logging(level: str | None) -> None:
    """Log to the standard error, unless the application has set up logging.

    If it has, its handlers, levels and formats stay as they are, and `level`, unless ``None``, is
    set on the library's logger only. If the application has only set a level of the root logger,
    and `level` is ``None``, that level stays, too.
    """
    root = logging.getLogger()
    if not (root.handlers or has_handlers_of_the_program()):
        has_level = level is None and root.level != logging.WARNING  # which Python gives it
        logging.basicConfig(
            level=root.level if has_level else (level or DEFAULT_LOG_LEVEL).upper(),
            format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        )
    elif level is not None:
        logger.setLevel(level.upper())


@contextlib.contextmanager
def reloading_on_sighup(
    server: PsServer, certificate: str | None, key: str | None
) -> Iterator[None]:
    """Read the certificate again whenever SIGHUP comes, even if SIGHUP was ignored (nohup).

    If the application has set a handler for SIGHUP, that handler stays.
    """
    if signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN):
        yield
        return
    handler: Any = gevent.signal_handler(signal.SIGHUP, reload_tls, server, certificate, key)
    try:
        yield
    finally:
        handler.cancel()


def reload_tls(server: PsServer, certificate: str | None, key: str | None) -> None:
    """Serve new connections with the certificate now in the files. Errors in them are logged."""
    try:
        context = tls_context(certificate, key)
    except UsageError as exc:
        log(logging.ERROR, "%r: SIGHUP: the certificate stays as it was: %s", server, exc)
        return
    if context is None:
        log(logging.INFO, "%r: SIGHUP: ignored: there is no --certificate to read again", server)
        return
    server.reload_tls(context)
    log(logging.INFO, "%r: SIGHUP: read %s again, for new connections", server, certificate)


def announce(text: str) -> None:
    """Print `text` at once, even into a pipe. If the pipe is closed, the server goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Discard the standard output, whose reader (``| head``) has gone.

    Otherwise the rest of its buffer would raise `BrokenPipeError` again at the interpreter's end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one, as far as the system allows.

    Each session takes a descriptor, and the soft limit is often 256 or 1,024 for the sake of old
    programs that use `select.select`. A refusal is only logged.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    for limit in (hard, OPEN_MAX):
        if soft == unlimited or (limit != unlimited and limit <= soft):
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (OSError, ValueError) as exc:
            text = "The limit of open files stays at %d: %d was refused (%s)"
            log(logging.INFO, text, soft, limit, exc)
        else:
            log(logging.INFO, "The limit of open files was raised from %d to %d", soft, limit)
            return
