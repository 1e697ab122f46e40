"""The command line: ``demo`` shows the library, ``serve`` runs a callback on a port.

Everything here but `interrupt` runs in the main greenlet. Scripts may rely on the first line of
``serve`` on the standard output: it is ``Listening on HOST:PORT``, and comes when the port is open.
All other output is for people. Logs go to the standard error.

Exit codes: 0, success (``serve``: after Ctrl-C or SIGTERM); 1, failure, or an error in the served
module (then with its traceback); 2, an error in the command line; 130, Ctrl-C outside of serving.
Errors of the command line program itself are one line on the standard error.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import gevent

from psofa_gevent import __version__
from psofa_gevent.cli import demo, serve
from psofa_gevent.cli.errors import ModuleFailedError, UsageError
from psofa_gevent.cli.options import add_options
from psofa_gevent.errors import PsServerError

__all__ = ["main"]

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
    # Ctrl-C ends a program that waits. gevent would print a line for it, as it does for an error.
    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
    program = program_name()
    parser = build_parser(program)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Not by parse_args, whose error refers to a help that doesn't list a command's options.
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return run_demo(program) if args.command == "demo" else serve.run(args)
    except (UsageError, PsServerError) as exc:
        print(f"{program} {args.command}: error: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, UsageError) else 1
    except ModuleFailedError as exc:
        traceback.print_exception(exc.__cause__)
        return 1
    except BrokenPipeError:
        serve.discard_output()
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell reports a program that SIGINT ended


def run_demo(program: str) -> int:
    """Run the demo; Ctrl-C ends it wherever it is.

    Python would raise KeyboardInterrupt in whatever code runs at the moment: in the hub's own code
    it would end the hub. gevent's handler runs in a greenlet, and gevent passes its exception on to
    the main greenlet, which waits.
    """
    gevent.signal_handler(signal.SIGINT, interrupt)
    return demo.run(program, sys.stdout)


def interrupt() -> None:
    """Handle Ctrl-C: raise `KeyboardInterrupt`."""
    raise KeyboardInterrupt


def program_name() -> str:
    """The command by which the user called the program, for texts that users can copy."""
    name = os.path.basename(sys.argv[0])
    if name == "__main__.py":
        return "python -m psofa_gevent"
    return name if shutil.which(name) else sys.argv[0]


def version() -> str:
    """The versions of the package, of gevent and of Python."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"psofa_gevent {__version__}, gevent {gevent.__version__}, {python}"


def build_parser(program: str) -> argparse.ArgumentParser:
    """Make the parser of the whole command line; `program` is the command that users type."""
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
    """Give `parser` the argument and the options of ``serve``: one per setting of `PsServer`."""
    parser.epilog = SERVE_EXAMPLES.format(program=parser.prog)
    parser.set_defaults(parser=parser)
    parser.add_argument(
        "target",
        nargs="?",
        metavar="module:attribute",
        help="a PsCallback subclass, an instance of one, or a function that returns one; modules "
        "are looked for in the current directory first (default: an echo)",
    )
    add_options(parser)
