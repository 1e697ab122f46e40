"""The demo of the command line: a server and five clients in one process, and their calls.

It runs the counter, which is the callback of the README, at both ends of five real TCP connections
on the loopback interface, and prints each call in a line. It ends by itself, in less than a second.
The callbacks only put their calls into a queue, which the greenlet that called `run` prints. So an
error of the output (a closed pipe) never reaches a session.

The end does not depend on timing. An end of a connection that counts past `LIMIT` closes. By then
it has sent one message more than it has received. At most two of its messages can arrive in one
chunk, so the other end counts past `LIMIT`, too: both report SELF_CLOSE. Only the last client hangs
up early, so the server's session with it reports PEER_CLOSE.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import TextIO, cast

import gevent
from gevent.queue import Empty, Queue

from psofa_gevent.callback import PsCallback
from psofa_gevent.client import PsClient
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.multi_client import PsMultiClient
from psofa_gevent.server import PsServer
from psofa_gevent.session.session import PsSession

__all__ = ["run"]

HOST = "127.0.0.1"
KEY = "inc"
LIMIT = 3
CLIENTS = 5
PAUSE = 0.05
"""Seconds before each answer, so that the lines of the two ends alternate."""
SPACING = 0.1
"""Seconds from one client to the next: two or three are connected at any time."""
PATIENCE = 10.0
"""Seconds without a call after which the demo gives up."""

INTRODUCTION = f"""\
A server and {CLIENTS} clients in one process, talking over real TCP connections.

Both ends of a connection run the same callback, the README's counter: it greets
with "inc: 0", answers each message with its next number, and closes when that is
over {LIMIT}. Client {CLIENTS} has no patience: it hangs up at its second message.

Each end has a session of its own, with its own id and its own count. The two
that belong together tell the same port when they open.
"""

MEANINGS = {
    PsCloseReason.SELF_CLOSE: "this end closed",
    PsCloseReason.PEER_CLOSE: "the other end closed",
}
"""The close reasons that are expected here. Any other one is a failure of the demo."""

WHAT_NEXT = (
    ("{program} serve", "an echo server; talk to it with: nc 127.0.0.1 8710"),
    ("{program} serve app:Callback", "the class Callback in your app.py"),
    ("{program} serve --help", "every setting, and its trade-off"),
    ("the README", "clients, asyncio, threads, WSGI stacks"),
    ("the source of this demo", __file__),
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a callback: a line of the output."""

    seconds: float
    who: str
    session: str
    callback: str
    what: str
    close_reason: PsCloseReason | None = None


class Story:
    """The calls since the demo began: the callbacks add them, `run` reads them."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._calls: Queue[Call] = Queue()

    def tell(
        self,
        who: str,
        session: PsSession | None,
        callback: str,
        what: str,
        close_reason: PsCloseReason | None = None,
    ) -> None:
        """Add a call. Never waits, never switches."""
        seconds = time.monotonic() - self._began
        identity = str(session.connection_id)[:8] if session else "-"
        self._calls.put(Call(seconds, who, identity, callback, what, close_reason))

    def next(self, timeout: float) -> Call | None:
        """Wait up to `timeout` seconds for the next call and return it; ``None`` if none came."""
        try:
            call: Call = self._calls.get(timeout=timeout)
        except Empty:
            return None
        return call


class CounterCallback(PsCallback):
    """The README's counter, for both the server and the clients."""

    def __init__(self, who: str, story: Story) -> None:
        self.who = who
        self.story = story

    def on_start(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        if isinstance(owner, PsServer):
            host, port = owner.address[:2]
            self.story.tell(self.who, None, "on_start", f"listens on {host}:{port}")

    def on_open(self, session: PsSession) -> None:
        session.set_value(KEY, 0)
        self.story.tell(
            self.who, session, "on_open", f'port {client_port(session)}, sends "inc: 0"'
        )
        session.send("inc: 0")

    def on_message(self, session: PsSession, message: bytes) -> None:
        gevent.sleep(PAUSE)
        inc = session.get_value(KEY) + 1
        session.set_value(KEY, inc)
        closes = inc > LIMIT
        what = f'got "{message.decode()}", sends "inc: {inc}"' + (", closes" if closes else "")
        self.story.tell(self.who, session, "on_message", what)
        session.send(f"inc: {inc}")
        if closes:
            session.close()

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        what = f"{close_reason.name}, inc: {session.get_value(KEY)}"
        self.story.tell(self.who, session, "on_close", what, close_reason)

    def on_stop(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        if isinstance(owner, PsServer):
            self.story.tell(self.who, None, "on_stop", "no session is left")


class ImpatientCallback(CounterCallback):
    """A counter that hangs up at the second message."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        inc = session.get_value(KEY) + 1
        if inc == 1:
            super().on_message(session, message)
            return
        # The server answers within one PAUSE, and must not send to a client that has gone.
        gevent.sleep(2 * PAUSE)
        session.set_value(KEY, inc)
        self.story.tell(self.who, session, "on_message", f'got "{message.decode()}", hangs up')
        session.close()


def client_port(session: PsSession) -> object:
    """The port of the client's end of the connection, which shows which sessions are a pair."""
    endpoint = (
        session.remote_endpoint if isinstance(session.owner, PsServer) else session.local_endpoint
    )
    return endpoint[1] if endpoint else "?"


def run(program: str, out: TextIO) -> int:
    """Run the demo and print it to `out`. Waits cooperatively.

    Releases everything that it started, however it ends.

    Args:
        program: the command that the user types, for the hints at the end.
        out: where to print; with colours if it is a terminal and ``NO_COLOR`` is not set.

    Returns:
        The exit code: 0, or 1 if the demo did not go as expected.
    """
    printer = Printer(out)
    printer.line(INTRODUCTION)
    printer.heading()
    story = Story()
    calls: list[Call] = []
    server = PsServer(CounterCallback("server", story), host=HOST, port=0)
    with server:
        port = cast("int", server.address[1])
        clients = [PsClient(callback, HOST, port) for callback in client_callbacks(story)]
        connects = [
            gevent.spawn_later(number * SPACING, client.connect)
            for number, client in enumerate(clients)
        ]
        try:
            while sum(call.close_reason is not None for call in calls) < 2 * CLIENTS:
                call = story.next(PATIENCE)
                if call is None:
                    break
                calls.append(call)
                printer.call(call)
        finally:
            gevent.killall(connects)
            for client in clients:
                client.disconnect()
    while (call := story.next(0)) is not None:
        printer.call(call)
    printer.summary(calls)
    if sum(call.close_reason in MEANINGS for call in calls) < 2 * CLIENTS:
        printer.line("This is not how it should end: some sessions are missing, or failed.")
        return 1
    printer.what_next(program)
    return 0


def client_callbacks(story: Story) -> list[PsCallback]:
    """Make a callback for each client; the last one is impatient."""
    patient = [CounterCallback(f"client {number}", story) for number in range(1, CLIENTS)]
    return [*patient, ImpatientCallback(f"client {CLIENTS}", story)]


class Printer:
    """Prints the demo in aligned columns."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._colours = wants_colours(out)

    def line(self, text: str = "") -> None:
        """Print `text` at once, even into a pipe."""
        print(text, file=self._out, flush=True)

    def heading(self) -> None:
        """Print the names of the columns."""
        columns = f"{'seconds':7}  {'who':8}  {'session':8}  {'callback':10}  what"
        self.line(self._paint("1", columns))

    def call(self, call: Call) -> None:
        """Print one call: the server in bold, each client in a colour of its own."""
        seconds = self._paint("2", f"{call.seconds:7.3f}")
        who = self._paint(colour_of(call.who), f"{call.who:8}")
        session = self._paint("2", f"{call.session:8}")
        self.line(f"{seconds}  {who}  {session}  {call.callback:10}  {call.what}")

    def summary(self, calls: list[Call]) -> None:
        """Print the numbers of sessions, messages and close reasons."""
        named = Counter(call.callback for call in calls)
        reasons = Counter(call.close_reason for call in calls if call.close_reason)
        self.line(f"\n{named['on_open']} sessions, {named['on_message']} messages. They ended with")
        for reason, count in reasons.most_common():
            self.line(f"  {reason.name}  {count}  {MEANINGS.get(reason, '')}".rstrip())

    def what_next(self, program: str) -> None:
        """Print what a newcomer may try next."""
        rows = [(command.format(program=program), purpose) for command, purpose in WHAT_NEXT]
        width = max(len(command) for command, _ in rows)
        self.line("\nWhat next")
        for command, purpose in rows:
            self.line(f"  {command:{width}}  {purpose}")

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colours else text


def wants_colours(out: TextIO) -> bool:
    """Whether `out` is a terminal with colours, and ``NO_COLOR`` is not set (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colour_of(who: str) -> str:
    """The SGR code for a line of `who`: bold for the server, one of six colours for a client."""
    return "1" if who == "server" else str(30 + int(who.removeprefix("client ")))
