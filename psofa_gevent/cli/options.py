"""The options of ``serve``: one table, the source of the parser, its help and the settings.

An option for a setting of `PsServer` takes its default and its help from the setting's description
(`psofa_gevent.settings`), unless the table has its own. The table says how the option is written.

Nothing here opens anything but the files of a certificate and the sockets of systemd, and nothing
switches.
"""

from __future__ import annotations

import argparse
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from psofa_gevent import systemd
from psofa_gevent.checks import LONGEST_TIME
from psofa_gevent.cli.errors import UsageError
from psofa_gevent.enums import PsOverflow, PsSocketAddressFamily
from psofa_gevent.framing import Framing, LengthPrefix, Line, Varint
from psofa_gevent.listening.binds import DEFAULT_HOST, DEFAULT_PORT, Given
from psofa_gevent.listening.settings import ServerSettings
from psofa_gevent.server import SHUTDOWN_TIMEOUT
from psofa_gevent.settings import PsHeartbeat, described

__all__ = [
    "DEFAULT_LOG_LEVEL",
    "FLAGS",
    "add_options",
    "as_typed",
    "server_settings",
    "tls_context",
]

N = TypeVar("N", int, float)

DEFAULT_LOG_LEVEL = "info"
SETTINGS = described(ServerSettings)

# -- how values are written


def seconds(text: str) -> float:
    """Convert a time on the command line."""
    value = float(text)
    if not 0 <= value <= LONGEST_TIME:
        raise ValueError(text)
    return value


def permissions(text: str) -> int:
    """Convert a file's mode on the command line, in octal digits."""
    return int(text, 8)


def word_or(number: Callable[[str], N], word: str) -> Callable[[str], N | None]:
    """Make a converter for a setting that is a number, or `word`, which stands for ``None``."""

    def convert(text: str) -> N | None:
        return None if text.lower() == word else number(text)

    # argparse builds its message from the name: "invalid seconds or 'none' value: 'x'".
    convert.__name__ = f"{number.__name__} or {word!r}"
    return convert


def heartbeat(text: str) -> tuple[int, bytes]:
    """Convert a heartbeat on the command line.

    Raises:
        argparse.ArgumentTypeError: `text` is not a heartbeat.
    """
    milliseconds, comma, message = text.partition(",")
    if not comma or not milliseconds.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be MILLISECONDS,TEXT, such as 30000,ping, not {text!r}"
        )
    # First to ASCII with escapes: "unicode_escape" would take other bytes for Latin-1.
    escaped = message.encode("ascii", "backslashreplace").decode("unicode_escape")
    return int(milliseconds), escaped.encode()


def raw_heartbeat(text: str) -> PsHeartbeat:
    """Convert a heartbeat that goes past the framing, on the command line.

    Raises:
        argparse.ArgumentTypeError: `text` is not a heartbeat.
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


FRAMINGS: dict[str, Framing[bytes] | None] = {
    "none": None,
    "line": Line(),
    "crlf": Line(newline=b"\r\n"),
    "length": LengthPrefix(),
    "varint": Varint(),
}
"""The values of ``--framing``. Other framings, and settings of framings, are for programs."""
OVERFLOWS = {each.name.lower().replace("_", "-"): each for each in PsOverflow}
"""The values of ``--overflow``."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How an option is written.

    Attributes:
        arguments: the arguments of `argparse.ArgumentParser.add_argument` for it.
        word: the word that stands for ``None``.
        values: the settings that its words stand for, if the option only takes words.
        is_list: whether it may be given several times.
        is_switch: whether it has no value.
    """

    arguments: Mapping[str, Any]
    word: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    is_list: bool = False
    is_switch: bool = False


def number(convert: Callable[[str], Any], unit: str, word: str = "") -> Kind:
    """The kind of a number, or a word that stands for ``None``."""
    kind = word_or(convert, word) if word else convert
    return Kind({"type": kind, "metavar": unit} if unit else {"type": kind}, word)


def text(name: str, convert: Callable[[str], Any] = str) -> Kind:
    """The kind of a text, for which the help has `name`."""
    return Kind({"type": convert, "metavar": name})


def several(name: str) -> Kind:
    """The kind of several texts, each with the option before it."""
    return Kind({"action": "append", "metavar": name}, is_list=True)


def words(values: Mapping[str, Any]) -> Kind:
    """The kind of one of a few words."""
    return Kind({"choices": tuple(values)}, values=values)


SWITCH = Kind({"action": "store_true"}, is_switch=True)
IPV6 = Kind({"action": "store_const", "const": PsSocketAddressFamily.IPV6}, is_switch=True)

# -- the table


@dataclass(frozen=True, slots=True)
class Option:
    """One option. Two options of the same name in a group exclude each other.

    Attributes:
        name: the name of its setting of `PsServer`, or else its name in ``serve``.
        kind: how it is written.
        flag: its flag; by default ``--`` and the name.
        says: its help; by default that of the setting.
        default: its default; by default that of the setting. If it is given, `says` must name it.
    """

    name: str
    kind: Kind = Kind({})
    flag: str = ""
    says: str = ""
    default: Any = ...

    @property
    def option(self) -> str:
        """The option as users type it."""
        return self.flag or f"--{self.name.replace('_', '-')}"


LEVELS = ("debug", "info", "warning", "error", "critical")
GROUPS: dict[str, tuple[Option, ...]] = {
    "where to listen": (
        Option(
            "host",
            says="an address or name of this machine; 0.0.0.0 (or :: with --ipv6) for all of "
            "them; or a Unix domain socket: unix:PATH (default: loopback, 127.0.0.1 or ::1, which "
            "only this machine reaches)",
            default=None,
        ),
        Option("port", number(int, "")),
        Option(
            "listener",
            several("ADDRESS"),
            says="instead of --host and --port, and as often as you like: HOST:PORT, [IPV6]:PORT, "
            "unix:PATH, fd:N (a descriptor that listens already), or systemd (the sockets of a "
            "socket unit)",
            default=None,
        ),
        Option(
            "socket_address_family",
            IPV6,
            flag="--ipv6",
            says="listen on IPv6; on :: IPv4 clients are served by the same socket",
        ),
        Option("backlog", number(int, "CONNECTIONS")),
        Option("max_sessions", number(int, "SESSIONS", "auto")),
        Option("refuse_when_full", SWITCH),
        Option(
            "unix_mode",
            text("MODE", permissions),
            says="the permissions of a Unix socket's file, in octal digits such as 660",
        ),
        Option("reuse_port", SWITCH),
        Option(
            "certificate",
            text("FILE"),
            says="serve TLS with this certificate, and those of its authorities behind it (PEM; "
            "default: no TLS); read again on SIGHUP",
            default=None,
        ),
        Option(
            "key",
            text("FILE"),
            says="the certificate's private key (PEM; default: it is in the certificate's file)",
            default=None,
        ),
    ),
    "access control": (
        Option("allowed_networks", several("NETWORK"), flag="--allow-network"),
        Option("denied_networks", several("NETWORK"), flag="--deny-network"),
        Option("max_sessions_per_peer", number(int, "SESSIONS", "none")),
        Option("farewell", text("TEXT")),
        Option("proxy_protocol", SWITCH),
        Option("trusted_proxies", several("NETWORK"), flag="--trusted-proxy"),
    ),
    "reading and writing": (
        Option("read_buffer_size", number(int, "BYTES")),
        Option("receive_buffer_size", number(int, "BYTES", "auto")),
        Option("no_delay", words({"on": True, "off": False})),
        Option("allow_half_open", SWITCH),
        Option(
            "framing",
            words(FRAMINGS),
            says="how the stream is split into messages: lines (sent with LF, or CR LF), or a "
            "length before each, of 4 bytes in network order or a varint",
        ),
        Option("high_water", number(int, "BYTES")),
        Option("overflow", words(OVERFLOWS)),
        Option("send_buffer_size", number(int, "BYTES", "auto")),
        Option("unsent_low_water", number(int, "BYTES", "auto")),
    ),
    "time limits": (
        Option("idle_milliseconds", number(int, "MILLISECONDS", "none")),
        Option("divide", number(int, "SLICES")),
        Option("send_timeout", number(seconds, "SECONDS", "none")),
        Option("callback_timeout", number(seconds, "SECONDS", "none")),
        Option("linger_timeout", number(seconds, "SECONDS")),
        Option("frame_timeout", number(seconds, "SECONDS", "none")),
        Option("keep_alive", number(seconds, "SECONDS", "none")),
        Option("user_timeout", number(seconds, "SECONDS", "none")),
        Option(
            "heartbeat",
            text("MILLISECONDS,TEXT", heartbeat),
            says=r"send TEXT, in which \n and the like are escapes, to a client that was sent "
            "nothing for this time (default: nothing)",
            default=None,
        ),
        Option(
            "heartbeat",
            text("MILLISECONDS,HEX", raw_heartbeat),
            flag="--raw-heartbeat",
            says="the same with bytes, in hexadecimal digits, sent without the framing",
            default=None,
        ),
        Option("handshake_timeout", number(seconds, "SECONDS", "none")),
    ),
    "running and stopping": (
        Option(
            "drain",
            number(seconds, "SECONDS"),
            says="when stopped, first let sessions go on and end by themselves for this "
            "time (default: 0.0)",
            default=0.0,
        ),
        Option(
            "shutdown_timeout",
            number(seconds, "SECONDS", "none"),
            says="then close the rest, and kill callbacks that still run after this time; "
            f"'none' waits for them (default: {SHUTDOWN_TIMEOUT})",
            default=SHUTDOWN_TIMEOUT,
        ),
        Option(
            "log_level",
            Kind({"choices": LEVELS}),
            says="debug logs every session; if the application sets up logging when it is "
            "imported, this sets the level of the logger psofa_gevent and nothing else "
            f"(default: {DEFAULT_LOG_LEVEL})",
            default=None,
        ),
    ),
}
OPTIONS = [option for group in GROUPS.values() for option in group]
FLAGS = {option.name: option.option for option in reversed(OPTIONS)}
"""The options by the names of settings; of two that exclude each other, the first one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of ``serve``."""
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        names = [option.name for option in options]
        either: dict[str, Any] = {}
        for option in options:
            where: Any = group
            if names.count(option.name) > 1:
                if option.name not in either:
                    either[option.name] = group.add_mutually_exclusive_group()
                where = either[option.name]
            where.add_argument(
                option.option,
                dest=option.name,
                default=_default(option),
                help=_help(option).replace("%", "%%"),
                **option.kind.arguments,
            )


def _default(option: Option) -> Any:
    """The parser's default for an option: a word if the kind has a word for it."""
    default = SETTINGS[option.name].default if option.default is ... else option.default
    if option.kind.is_list:
        return None  # argparse would append to a default
    if option.kind.values:
        return next(word for word, value in option.kind.values.items() if value == default)
    return option.kind.word or None if default is None else default


def _help(option: Option) -> str:
    """The help of an option, with its default, unless the option has its own default in `says`."""
    if option.default is not ...:
        return option.says
    setting, kind = SETTINGS[option.name], option.kind
    texts = [option.says] if option.says else [setting.what, setting.trades]
    if kind.word:
        texts.append(f"'{kind.word}': {setting.none}")
    if kind.is_list:
        texts.append("may be given several times")
    said = re.sub(r"`([^`]+)`", _with_options, "; ".join(filter(None, texts)))
    if kind.is_switch:
        return said
    default = ", ".join(setting.default or ()) if kind.is_list else _default(option)
    told = setting.none if default in (None, "") else default
    return f"{said} (default: {told})" if told else said


def _with_options(match: re.Match[str]) -> str:
    """Replace a setting's name in a description by its option, if there is one."""
    return FLAGS.get(match[1], match[1])


def as_typed(message: str) -> str:
    """A setting's error message with the option in place of the setting's name, its first word."""
    name, _, rest = message.partition(" ")
    return f"{FLAGS[name]} {rest}" if name in FLAGS else message


# -- the settings that they stand for


def server_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `PsServer` on the command line.

    Raises:
        UsageError: options contradict each other, or their files or sockets can't be used.
    """
    if args.trusted_proxies is not None and not args.proxy_protocol:
        raise UsageError("--trusted-proxy needs --proxy-protocol")
    given = {each.name: _value(each, args) for each in OPTIONS if each.name in SETTINGS}
    return {**given, **_place(args), "ssl_context": tls_context(args.certificate, args.key)}


def _value(option: Option, args: argparse.Namespace) -> Any:
    """The setting for the value that the parser has read."""
    value = getattr(args, option.name)
    if option.kind.values:
        return option.kind.values[value]
    if option.kind.is_list and value is None:
        return SETTINGS[option.name].default
    return value


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of where to listen, from --host, --port, --listener and --ipv6 together."""
    if args.listener is not None:
        if args.host is not None:
            raise UsageError(f"--listener must not be given besides a --host ({args.host})")
        if args.port != DEFAULT_PORT:
            raise UsageError(f"--listener must not be given besides a --port ({args.port})")
        return {"host": DEFAULT_HOST, "listener": listeners(args.listener)}
    host, family = args.host, args.socket_address_family
    if host and ":" in host and not host.startswith("unix:"):
        family = PsSocketAddressFamily.IPV6
    loopback = "::1" if family is PsSocketAddressFamily.IPV6 else "127.0.0.1"
    return {"host": host or loopback, "socket_address_family": family}


def listeners(texts: Sequence[str]) -> list[Given]:
    """Convert the addresses of --listener.

    Raises:
        UsageError: one of them is not an address, or systemd gave no socket.
    """
    found: list[Given] = []
    for each in texts:
        if each == "systemd":
            found += from_systemd()
        elif each.startswith("unix:"):
            found.append(each)
        elif each.startswith("fd:") and each[3:].isdecimal():
            found.append(int(each[3:]))
        else:
            host, colon, port = each.rpartition(":")
            if not colon or not port.isdecimal():
                raise UsageError(
                    "--listener must be HOST:PORT, [IPV6]:PORT, unix:PATH, fd:N or systemd, "
                    f"not {each!r}"
                )
            found.append((_host(host, each), int(port)))
    return found


def from_systemd() -> list[Given]:
    """The sockets of the systemd socket unit.

    Raises:
        UsageError: there are no sockets, or they can't be used.
    """
    try:
        sockets = systemd.listen_sockets()
    except (OSError, ValueError) as exc:
        raise UsageError(f"--listener systemd: {exc}") from exc
    if not sockets:
        raise UsageError(
            "--listener systemd: systemd passed no sockets to this process (LISTEN_FDS)"
        )
    return [*sockets]


def _host(host: str, address: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1]
    if ":" in host:
        raise UsageError(f"--listener must have brackets round an IPv6 address, not {address!r}")
    return host


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Make the context that serves TLS with these files; ``None`` without them.

    Raises:
        UsageError: the files cannot be used.
    """
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
