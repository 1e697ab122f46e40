"""The command line: ``demo`` shows the library, ``serve`` runs a callback on a port.

Everything here runs in the main greenlet. What scripts may rely on: the first line of ``serve`` on
the standard output is ``Listening on HOST:PORT``, and comes when the port is open; everything else
is for people. Logs go to the standard error.

Exit codes: 0, it did what it should (``serve``: until Ctrl-C or SIGTERM); 1, it could not, or the
served module is at fault (then with its traceback); 2, the command line is at fault. An error of
ours is one line on the standard error.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import gevent

from psofa_gevent import __version__
from psofa_gevent.checks import LONGEST_TIME
from psofa_gevent.cli import demo, serve
from psofa_gevent.errors import PsServerError

__all__ = ["main"]

N = TypeVar("N", int, float)

DESCRIPTION = """\
TCP servers and clients on gevent: a greenlet per session, plain callbacks.
"""

EXAMPLES = """\
examples:
  {program} demo                  a server and five clients show how it works
  {program} serve                 an echo server on 127.0.0.1, port 8710
  {program} serve app:Callback    your own callback: class Callback in ./app.py
  {program} serve --help          every setting, and its trade-off

talk to a server:
  nc 127.0.0.1 8710                    type a line, press Enter; Ctrl-C ends it
  curl telnet://127.0.0.1:8710         the same, where there is no nc
"""

SERVE_DESCRIPTION = """\
Serve a callback until Ctrl-C or SIGTERM; a second one ends at once.

The first line on the standard output is "Listening on HOST:PORT", so a script can
ask for any free port with --port 0 and read which one it got. Logs go to the
standard error.
"""

SERVE_EXAMPLES = """\
examples:
  {program}                           echo, for this machine only
  {program} app:Callback              class Callback (a PsCallback) in ./app.py
  {program} app:make --port 0         what make() returns, on any free port
  {program} --host 0.0.0.0            for everyone who can reach this machine
  {program} --ipv6 --host ::          the same for IPv6 and IPv4 together
  {program} --listener 127.0.0.1:8710 --listener unix:/run/echo.sock
                                      in two places at once
  {program} --drain 30                when stopped, let sessions end by themselves first

A smallest app.py:
  from psofa_gevent import PsCallback

  class Callback(PsCallback):
      def on_message(self, session, message):
          session.send(message.upper())

SIGHUP reads --certificate and --key again, for new connections.

exit codes: 0 stopped by Ctrl-C or SIGTERM; 1 could not start (the port is taken, the
host is not this machine's), or the module raised; 2 wrong option, no such module or
attribute, not a callback
"""


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` is ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: from ``--help``, ``--version`` (0) and errors in the arguments (2).
        Exception: what the served callback's ``on_start`` raises.
    """
    # Ctrl-C ends a program that waits. gevent would print a line for it, as for an error.
    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
    program = program_name()
    parser = build_parser(program)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Not by parse_args, which would refer to the help that doesn't list a command's options.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return run_demo(program) if args.command == "demo" else serve.run(args)
    except (serve.UsageError, PsServerError) as exc:
        print(f"{program} {args.command}: error: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, serve.UsageError) else 1
    except serve.ModuleFailedError as exc:
        traceback.print_exception(exc.__cause__)
        return 1
    except BrokenPipeError:
        serve.discard_output()
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell reports a program that SIGINT ended


def run_demo(program: str) -> int:
    """Run the demo; Ctrl-C ends it wherever it is.

    Python would raise KeyboardInterrupt in whatever runs at the moment: in the hub's own code it
    would end the hub. What a greenlet raises, gevent hands on to the main one, which waits.
    """
    gevent.signal_handler(signal.SIGINT, interrupt)
    return demo.run(program, sys.stdout)


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def program_name() -> str:
    """How the user called us, for texts that they can copy."""
    name = os.path.basename(sys.argv[0])
    if name == "__main__.py":
        return "python -m psofa_gevent"
    return name if shutil.which(name) else sys.argv[0]


def version() -> str:
    """The version of the package, and of what it runs on."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"psofa_gevent {__version__}, gevent {gevent.__version__}, {python}"


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser of the whole command line; `program` is how the user calls it."""
    parser = Parser(
        prog=program,
        usage="%(prog)s {demo,serve} ...",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="{demo,serve}", prog=program
    )
    demo_parser = commands.add_parser(
        "demo",
        help="a server and five clients show how it works",
        description="Run the README's counter callback at both ends of five connections.",
    )
    demo_parser.set_defaults(parser=demo_parser)
    add_serve_parser(
        commands.add_parser(
            "serve",
            help="serve a callback of yours, or an echo",
            usage="%(prog)s [options] [module:attribute]",
            description=SERVE_DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    return parser


def add_serve_parser(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options of ``serve``: one for every setting of `PsServer`."""
    parser.epilog = SERVE_EXAMPLES.format(program=parser.prog)
    parser.set_defaults(parser=parser)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="module:attribute",
        help="a PsCallback subclass, an instance of one, or a function that returns one; modules "
        "are looked for in the current directory first (default: an echo)",
    )
    listening = parser.add_argument_group("where to listen")
    listening.add_argument(
        "--host",
        help="an address or name of this machine; 0.0.0.0 (or :: with --ipv6) for all of them; "
        "or a Unix socket: unix:PATH. "
        "(default: loopback, 127.0.0.1 or ::1, which only this machine reaches)",
    )
    listening.add_argument(
        "--port", type=int, default=8710, help="0: any free port (default: %(default)s)"
    )
    listening.add_argument(
        "--listener",
        action="append",
        metavar="ADDRESS",
        help="instead of --host and --port, and as often as you like: HOST:PORT, [IPV6]:PORT, "
        "unix:PATH, fd:N (a descriptor that listens already), or systemd (the sockets of a socket "
        "unit)",
    )
    listening.add_argument(
        "--ipv6",
        action="store_true",
        help="listen on IPv6; on :: IPv4 clients are served by the same socket",
    )
    listening.add_argument(
        "--backlog",
        type=int,
        default=1024,
        metavar="CONNECTIONS",
        help="how many connections the kernel holds until they are accepted; a burst beyond it "
        "waits and retries (default: %(default)s; the kernel has a limit of its own, somaxconn)",
    )
    listening.add_argument(
        "--max-sessions",
        type=word_or(int, "auto"),
        default="auto",
        metavar="SESSIONS",
        help="serve so many at once, further clients wait in the backlog "
        "(default: %(default)s, from the limit of file descriptors)",
    )
    listening.add_argument(
        "--refuse-when-full",
        action="store_true",
        help="close further clients at once (default: they wait)",
    )
    listening.add_argument(
        "--unix-mode",
        type=permissions,
        metavar="MODE",
        help="the permissions of a Unix socket's file: 660 (default: what the umask leaves)",
    )
    listening.add_argument(
        "--reuse-port",
        action="store_true",
        help="let further servers listen on the same port, if they have this too, and share its "
        "connections (SO_REUSEPORT)",
    )
    listening.add_argument(
        "--certificate",
        metavar="FILE",
        help="serve TLS with this certificate, and those of its authorities behind it (PEM; "
        "default: no TLS)",
    )
    listening.add_argument(
        "--key",
        metavar="FILE",
        help="the certificate's private key (PEM; default: it is in the certificate's file)",
    )

    clients = parser.add_argument_group("who is let in")
    clients.add_argument(
        "--allow-network",
        action="append",
        metavar="NETWORK",
        help="serve clients of this network only, 10.0.0.0/8 or 192.0.2.7; may be given several "
        "times (default: all of them)",
    )
    clients.add_argument(
        "--deny-network",
        action="append",
        metavar="NETWORK",
        help="do not serve clients of this one, even if it is allowed; may be given several times",
    )
    clients.add_argument(
        "--max-sessions-per-peer",
        type=word_or(int, "none"),
        default="none",
        metavar="SESSIONS",
        help="so many at once for one address; 'none': any number (default: %(default)s)",
    )
    clients.add_argument(
        "--farewell",
        metavar="TEXT",
        help="what clients get to read that are refused for their number; not with a certificate "
        "(default: nothing)",
    )
    clients.add_argument(
        "--proxy-protocol",
        action="store_true",
        help="serve clients of a load balancer that sends the header of the PROXY protocol before "
        "each connection, and nobody without it",
    )
    clients.add_argument(
        "--trusted-proxy",
        action="append",
        metavar="NETWORK",
        help="the address or network of a load balancer that may send it; may be given several "
        "times (default: this machine's, 127.0.0.0/8 and ::1)",
    )

    reading = parser.add_argument_group("reading and writing")
    reading.add_argument(
        "--read-buffer-size",
        type=int,
        default=65_536,
        metavar="BYTES",
        help="the most that one on_message gets; small ones make big transfers slow "
        "(default: %(default)s)",
    )
    reading.add_argument(
        "--receive-buffer-size",
        type=word_or(int, "auto"),
        default="auto",
        metavar="BYTES",
        help="SO_RCVBUF; a number turns off the kernel's own tuning (default: %(default)s)",
    )
    reading.add_argument(
        "--no-delay",
        choices=("on", "off"),
        default="on",
        help="TCP_NODELAY; off lets the kernel gather small messages into fewer packets, which "
        "can hold one back for 40 ms (default: %(default)s)",
    )
    reading.add_argument(
        "--allow-half-open",
        action="store_true",
        help="when a client shuts its sending side, call on_eof and let the session go on "
        "(default: the session closes)",
    )
    reading.add_argument(
        "--framing",
        choices=tuple(serve.FRAMINGS),
        default="none",
        help="what cuts the stream into messages: lines (sent with LF, or CR LF), or a length "
        "before each, of 4 bytes in network order or a varint (default: %(default)s)",
    )
    reading.add_argument(
        "--high-water",
        type=int,
        default=1_048_576,
        metavar="BYTES",
        help="what may wait for a client of what was posted to it (default: %(default)s)",
    )
    reading.add_argument(
        "--overflow",
        choices=tuple(serve.OVERFLOWS),
        default="close",
        help="what becomes of a post beyond that: close the session, or drop messages "
        "(default: %(default)s)",
    )
    reading.add_argument(
        "--send-buffer-size",
        type=word_or(int, "auto"),
        default="auto",
        metavar="BYTES",
        help="SO_SNDBUF; a number turns off the kernel's own tuning, and bounds what a slow client "
        "costs there (default: %(default)s)",
    )
    reading.add_argument(
        "--unsent-low-water",
        type=word_or(int, "auto"),
        default="auto",
        metavar="BYTES",
        help="what the kernel may keep unsent for a slow client (TCP_NOTSENT_LOWAT; default: "
        "%(default)s, on Linux four times --high-water)",
    )

    times = parser.add_argument_group("time limits")
    times.add_argument(
        "--idle-milliseconds",
        type=word_or(int, "none"),
        default=60_000,
        metavar="MILLISECONDS",
        help="close a session that has waited so long for bytes; finds peers that have gone "
        "without a word; 'none': never (default: %(default)s)",
    )
    times.add_argument(
        "--divide",
        type=int,
        default=10,
        metavar="SLICES",
        help="the idle check looks at one slice of the sessions at a time, at all of them once a "
        "second; more slices, shorter steps (default: %(default)s)",
    )
    times.add_argument(
        "--send-timeout",
        type=word_or(seconds, "none"),
        default=1.5,
        metavar="SECONDS",
        help="a send fails, and its session closes, when the peer takes nothing for so long; "
        "'none': wait for ever (default: %(default)s)",
    )
    times.add_argument(
        "--callback-timeout",
        type=word_or(seconds, "none"),
        default="none",
        metavar="SECONDS",
        help="end a callback that runs longer, and its session; 'none': never "
        "(default: %(default)s)",
    )
    times.add_argument(
        "--linger-timeout",
        type=seconds,
        default=1.0,
        metavar="SECONDS",
        help="how long a close waits for the peer to take the last bytes (default: %(default)s)",
    )
    times.add_argument(
        "--frame-timeout",
        type=word_or(seconds, "none"),
        default="none",
        metavar="SECONDS",
        help="close a session whose message is not whole so long after its first byte; 'none': "
        "never (default: %(default)s)",
    )
    times.add_argument(
        "--keep-alive",
        type=word_or(seconds, "none"),
        default="none",
        metavar="SECONDS",
        help="have the kernel probe a client that has been silent for so long; 'none': never "
        "(default: %(default)s)",
    )
    times.add_argument(
        "--user-timeout",
        type=word_or(seconds, "none"),
        default="none",
        metavar="SECONDS",
        help="give a client up that does not acknowledge what was sent for so long (not on every "
        "system); 'none': the kernel's own time (default: %(default)s)",
    )
    heartbeats = times.add_mutually_exclusive_group()
    heartbeats.add_argument(
        "--heartbeat",
        type=serve.heartbeat,
        metavar="MILLISECONDS,TEXT",
        help=r"send TEXT, in which \n and the like are escapes, to a client that was sent nothing "
        "for so long (default: nothing)",
    )
    heartbeats.add_argument(
        "--raw-heartbeat",
        type=serve.raw_heartbeat,
        metavar="MILLISECONDS,HEX",
        help="the same with bytes, in hexadecimal digits, that the framing leaves alone",
    )
    times.add_argument(
        "--handshake-timeout",
        type=word_or(seconds, "none"),
        default=10.0,
        metavar="SECONDS",
        help="how long a client may take for all that comes before on_open, the header of the "
        "PROXY protocol and the TLS handshake; 'none': any time (default: %(default)s)",
    )

    running = parser.add_argument_group("running and stopping")
    running.add_argument(
        "--drain",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="when stopped, first let sessions go on and end by themselves for so long "
        "(default: %(default)s)",
    )
    running.add_argument(
        "--shutdown-timeout",
        type=word_or(seconds, "none"),
        default=5.0,
        metavar="SECONDS",
        help="then close the rest, and kill callbacks that still run after so long; 'none' waits "
        "for them (default: %(default)s)",
    )
    running.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error", "critical"),
        help="debug tells of every session; where the application sets up logging when it is "
        "imported, this is the level of the logger psofa_gevent, and all else stays as it is "
        f"(default: {serve.DEFAULT_LOG_LEVEL})",
    )


def seconds(text: str) -> float:
    """A time on the command line."""
    value = float(text)
    if not 0 <= value <= LONGEST_TIME:
        raise ValueError(text)
    return value


def permissions(text: str) -> int:
    """A file's mode on the command line, in octal digits."""
    return int(text, 8)


def word_or(number: Callable[[str], N], word: str) -> Callable[[str], N | None]:
    """A converter for a setting that is a number, or `word`, which stands for ``None``."""

    def convert(text: str) -> N | None:
        return None if text.lower() == word else number(text)

    # argparse builds its message from the name: "invalid seconds or 'none' value: 'x'".
    convert.__name__ = f"{number.__name__} or {word!r}"
    return convert
