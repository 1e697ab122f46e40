"""The command ``serve``: find the callback, make room, listen, and say where to reach it.

All of it runs in the main greenlet of the command line program, before the server accepts its first
connection. What a user can get wrong raises `UsageError`, whose text is one line; what goes wrong
inside the user's module is the user's: `ModuleFailedError` has it, and the module's own traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import ipaddress
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TextIO

import gevent

from psofa_gevent import systemd
from psofa_gevent.callback import PsCallback
from psofa_gevent.enums import PsOverflow, PsSocketAddressFamily
from psofa_gevent.framing import Framing, LengthPrefix, Line, Varint
from psofa_gevent.hub.logs import log
from psofa_gevent.listening.binds import DEFAULT_HOST, DEFAULT_PORT, Given
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.interfaces import local_addresses
from psofa_gevent.net.unix import unix_path
from psofa_gevent.server import PsServer
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import PsHeartbeat

__all__ = ["DEFAULT_LOG_LEVEL", "ModuleFailedError", "UsageError", "run"]

logger = logging.getLogger("psofa_gevent")

DEFAULT_LOG_LEVEL = "info"
OPEN_MAX = 10_240
"""What macOS grants where its hard limit says "unlimited", which it refuses (setrlimit(2))."""


class UsageError(Exception):
    """The command line asks for what is not there; its text is the one line that the user sees."""


class ModuleFailedError(Exception):
    """The served module raised, imported or called; ``__cause__`` is what it raised."""


FRAMINGS: dict[str, Framing[bytes] | None] = {
    "none": None,
    "line": Line(),
    "crlf": Line(newline=b"\r\n"),
    "length": LengthPrefix(),
    "varint": Varint(),
}
"""What ``--framing`` may be. Others, and their settings, are for programs."""
OVERFLOWS = {each.name.lower().replace("_", "-"): each for each in PsOverflow}
"""What ``--overflow`` may be."""
THIS_MACHINE = ("127.0.0.0/8", "::1/128")
"""Who is trusted to be a load balancer, unless others are named."""
HEADER_BY_HAND = r"(printf 'PROXY UNKNOWN\r\n'; cat) | "
"""What a load balancer would send before all else."""
REPEATED = {
    "allowed_networks": "allow_network",
    "denied_networks": "deny_network",
    "trusted_proxies": "trusted_proxy",
}
"""Settings whose options are given once for each of their values."""


class EchoCallback(PsCallback):
    """Sends back what it gets: what ``serve`` serves when it is told nothing else."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        session.send(message)


def make_server(callback: PsCallback, args: argparse.Namespace) -> PsServer:
    """The server that the command line describes; raises as `PsServer` does."""
    if args.listener is not None and args.host is not None:
        raise UsageError(f"--listener must not be given besides a --host ({args.host})")
    if args.listener is not None and args.port != DEFAULT_PORT:
        raise UsageError(f"--listener must not be given besides a --port ({args.port})")
    if args.trusted_proxy is not None and not args.proxy_protocol:
        raise UsageError("--trusted-proxy needs --proxy-protocol")
    host = args.host or ""
    ipv6 = args.ipv6 or (":" in host and not host.startswith("unix:"))
    loopback = "::1" if ipv6 else "127.0.0.1"
    listener = None if args.listener is None else listeners(args.listener)
    return PsServer(
        callback,
        host=args.host or (loopback if listener is None else DEFAULT_HOST),
        port=args.port,
        listener=listener,
        socket_address_family=PsSocketAddressFamily.IPV6 if ipv6 else PsSocketAddressFamily.IPV4,
        backlog=args.backlog,
        receive_buffer_size=args.receive_buffer_size,
        unix_mode=args.unix_mode,
        reuse_port=args.reuse_port,
        max_sessions=args.max_sessions,
        ssl_context=tls_context(args.certificate, args.key),
        handshake_timeout=args.handshake_timeout,
        proxy_protocol=args.proxy_protocol,
        trusted_proxies=args.trusted_proxy or THIS_MACHINE,
        allowed_networks=args.allow_network,
        denied_networks=args.deny_network or (),
        max_sessions_per_peer=args.max_sessions_per_peer,
        refuse_when_full=args.refuse_when_full,
        farewell=args.farewell,
        read_buffer_size=args.read_buffer_size,
        divide=args.divide,
        idle_milliseconds=args.idle_milliseconds,
        send_timeout=args.send_timeout,
        callback_timeout=args.callback_timeout,
        linger_timeout=args.linger_timeout,
        no_delay=args.no_delay == "on",
        allow_half_open=args.allow_half_open,
        framing=FRAMINGS[args.framing],
        frame_timeout=args.frame_timeout,
        high_water=args.high_water,
        overflow=OVERFLOWS[args.overflow],
        send_buffer_size=args.send_buffer_size,
        unsent_low_water=args.unsent_low_water,
        keep_alive=args.keep_alive,
        user_timeout=args.user_timeout,
        heartbeat=args.heartbeat or args.raw_heartbeat,
    )


def heartbeat(text: str) -> tuple[int, bytes]:
    """A heartbeat on the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    milliseconds, comma, message = text.partition(",")
    if not comma or not milliseconds.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be MILLISECONDS,TEXT, such as 30000,ping, not {text!r}"
        )
    # Escapes only: "unicode_escape" takes anything else for Latin-1.
    escaped = message.encode("ascii", "backslashreplace").decode("unicode_escape")
    return int(milliseconds), escaped.encode()


def raw_heartbeat(text: str) -> PsHeartbeat:
    """One that no framing touches, on the command line.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    milliseconds, _, digits = text.partition(",")
    try:
        message = bytes.fromhex(digits)
    except ValueError:
        message = b""
    if not message or not milliseconds.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be MILLISECONDS,HEX, such as 30000,fff1, not {text!r}"
        )
    return PsHeartbeat(int(milliseconds), message, raw=True)


def listeners(texts: Sequence[str]) -> list[Given]:
    """What the command line's addresses stand for.

    Raises:
        UsageError: one of them is none, or systemd gave no socket.
    """
    found: list[Given] = []
    for text in texts:
        if text == "systemd":
            found += from_systemd()
        elif text.startswith("unix:"):
            found.append(text)
        elif text.startswith("fd:") and text[3:].isdecimal():
            found.append(int(text[3:]))
        else:
            host, colon, port = text.rpartition(":")
            if not colon or not port.isdecimal():
                raise UsageError(
                    "--listener must be HOST:PORT, [IPV6]:PORT, unix:PATH, fd:N or systemd, "
                    f"not {text!r}"
                )
            found.append((_host(host, text), int(port)))
    return found


def from_systemd() -> list[Given]:
    """The sockets of the socket unit.

    Raises:
        UsageError: there are none.
    """
    try:
        sockets = systemd.listen_sockets()
    except (OSError, ValueError) as exc:
        raise UsageError(f"--listener systemd: {exc}") from exc
    if not sockets:
        raise UsageError(
            "--listener systemd: there are no sockets of systemd's (LISTEN_FDS) for this process"
        )
    return [*sockets]


def _host(text: str, address: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        return text[1:-1]
    if ":" in text:
        raise UsageError(f"--listener must have brackets round an IPv6 address, not {address!r}")
    return text


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """The context that serves TLS with these files; ``None`` without them."""
    if certificate is None:
        if key is not None:
            raise UsageError("--key needs a --certificate")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as exc:  # an ssl.SSLError is an OSError
        files = certificate if key is None else f"{certificate} and {key}"
        hint = ""
        if isinstance(exc, ssl.SSLError) and key is None:  # OpenSSL says "PEM lib", and no more
            hint = "; it must have a certificate and its private key, or --key must name the key"
        raise UsageError(f"cannot serve TLS with {files}: {exc}{hint}") from exc
    return context


def run(args: argparse.Namespace) -> int:
    """Run the command; waits until the server has been shut down. The exit code is 0.

    Raises:
        UsageError: the command line asks for what is not there, or cannot be.
        PsServerError: the server could not start.
        ModuleFailedError: the served module raised when it was loaded.
        Exception: what the callback's ``on_start`` raises.
    """
    try:
        with showing_records_until_set_up():
            callback = load_callback(args.target) if args.target else EchoCallback()
    except UsageError:
        raise
    except Exception as exc:
        raise ModuleFailedError from exc.with_traceback(_of_the_module(exc.__traceback__))
    set_up_logging(args.log_level)
    raise_descriptor_limit()  # before the server derives its cap from it
    try:
        server = make_server(callback, args)
    except (TypeError, ValueError) as exc:  # a PsCallbackError is a TypeError
        raise UsageError(_as_typed(str(exc), args)) from exc
    with reloading_on_sighup(server, args.certificate, args.key):
        server.start()
        text = where_to_reach(
            *server.addresses,
            serving=args.target or "an echo",
            has_tls=args.certificate is not None,
            has_header=args.proxy_protocol,
        )
        # A greenlet of its own runs when this one waits, and by then the signal handlers are set: a
        # script may send a signal as soon as it has read the first line.
        gevent.spawn(announce, text)
        server.serve_forever(shutdown_timeout=args.shutdown_timeout, drain=args.drain)
    return 0


class UntilSetUp(logging.StreamHandler[TextIO]):
    """Prints records as long as there is no other handler for them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (logging.getLogger().handlers or has_handlers_of_the_program()):
            super().emit(record)


@contextlib.contextmanager
def showing_records_until_set_up() -> Iterator[None]:
    """The time in which the application is imported, and may set up logging, or not yet.

    Python itself shows warnings and errors of loggers that have no handler; ours has one, which
    shows nothing.
    """
    handler = UntilSetUp()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def has_handlers_of_the_program() -> bool:
    """Whether somebody else has given our logger a handler."""
    return any(not isinstance(each, (logging.NullHandler, UntilSetUp)) for each in logger.handlers)


def set_up_logging(level: str | None) -> None:
    """Log to the standard error, unless the application has set up logging.

    Then its handlers, levels and formats stay as they are: `level`, if it was asked for, is that of
    our own logger. So does a level that it has given to the root logger, and no handler.
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
    """Read the certificate again whenever SIGHUP comes, also where that was ignored (nohup).

    Where the application has set a handler for SIGHUP, that stays.
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
    """Serve new connections with what the files have now. What is wrong with them is logged."""
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


def _of_the_module(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames through which we came to the user's code.

    ``None`` where nothing is left, for a syntax error: that tells its place itself.
    """
    before_it = (os.path.dirname(__file__), os.path.dirname(importlib.__file__), "<frozen")
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(before_it):
        trace = trace.tb_next
    return trace


def _as_typed(message: str, args: argparse.Namespace) -> str:
    """The message of a setting's error, which begins with its name, with the option's instead."""
    setting, _, rest = message.partition(" ")
    setting = REPEATED.get(setting, setting)
    return f"--{setting.replace('_', '-')} {rest}" if setting in args else message


def announce(text: str) -> None:
    """Print `text` at once, also into a pipe. Who doesn't read it shall be served all the same."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Let the standard output go nowhere: whoever read it (``| head``) has gone.

    What is still in its buffer would raise `BrokenPipeError` once more when the interpreter ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_callback(target: str) -> PsCallback:
    """The callback that `target`, a ``module:attribute``, names.

    The attribute may be a subclass of `PsCallback` (made without arguments), an instance of one, or
    a function that returns one. The current directory is looked in first, as by ``python -m``.

    Raises:
        UsageError: there is no such module or attribute, or it is not a callback.
        Exception: whatever the module raises when it is imported, or the attribute when called.
    """
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
        # The module itself, or a package around it. Anything else is what the module wants to
        # import: its traceback tells the user where.
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
        pass  # written in C, and does not tell
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


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one, as far as the system allows.

    Each session takes a descriptor, and the soft limit is often 256 or 1,024 for the sake of old
    programs that use `select.select`. A refusal is logged, and no error.
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


def where_to_reach(
    *addresses: tuple[object, ...], serving: str, has_tls: bool = False, has_header: bool = False
) -> str:
    """What ``serve`` prints when it listens there; its first line is for scripts too."""
    header = HEADER_BY_HAND if has_header else ""
    address, *others = addresses
    lines = [f"Listening on {_where(address)}"]
    lines += [_row("" if row else "and on", _where(other)) for row, other in enumerate(others)]
    lines.append(_row("serving", serving))
    path = unix_path(str(address[0]))
    if path is not None:
        attempt = f"{header}nc -U {path}"
        if has_tls:
            attempt = f"openssl s_client -quiet -unix {path}"
    else:
        host, port = _host_with_zone(address), address[1]
        nearest = host
        if ipaddress.ip_address(host).is_unspecified:
            nearest = "::1" if ":" in host else "127.0.0.1"
            lines += _reached_at(host, port)
        attempt = f"{header}nc {nearest} {port}"
        if has_tls:
            attempt = f"openssl s_client -quiet -connect {format_address(nearest, port)}"
    if has_tls and has_header:
        attempt = "through the load balancer: openssl s_client sends no PROXY header"
    lines += [_row("try", attempt), _row("stop", "Ctrl-C")]
    return "\n".join(lines)


def _where(address: tuple[object, ...]) -> str:
    return format_address(_host_with_zone(address), address[1])


def _reached_at(wildcard: str, port: object) -> list[str]:
    """The machine's addresses, if the extra that tells them is installed."""
    try:
        addresses = local_addresses(PsSocketAddressFamily.IPV4)
        if ":" in wildcard:  # dual-stack: both
            addresses = local_addresses(PsSocketAddressFamily.IPV6) + addresses
    except ImportError:
        hint = 'all addresses of this machine; to see them: pip install "psofa_gevent[network]"'
        return [_row("reached at", hint)]
    except OSError as exc:
        return [_row("reached at", f"all addresses of this machine ({exc})")]
    endpoints = [format_address(address, port) for address in addresses]
    return [_row("" if row else "reached at", text) for row, text in enumerate(endpoints)]


def _row(label: str, text: str) -> str:
    return f"  {label:10}  {text}"


def _host_with_zone(address: tuple[object, ...]) -> str:
    """The host of a socket's name; a link-local one with its zone, which the tuple has apart."""
    host = str(address[0])
    scope_id = address[3] if len(address) > 3 else 0
    if not isinstance(scope_id, int) or scope_id == 0:
        return host
    return f"{host.partition('%')[0]}%{socket.if_indextoname(scope_id)}"
