"""A chat room: what one member says, all others hear, and a slow one holds up nobody.

    python examples/chat.py                       # listens on 127.0.0.1:8710
    nc 127.0.0.1 8710                             # in as many terminals as you like

The lines meant for a member wait in that member's own bounded outbox, which a greenlet of its own
empties. So saying something never waits for a listener. A member who reads too slowly finds the
outbox full in the end, and is dropped: the alternatives are to wait for the slowest member, or to
let memory grow.
"""

from __future__ import annotations

import argparse
import sys

import gevent
from gevent.queue import Full, Queue

from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsSendError,
    PsServer,
    PsServerError,
    PsSession,
)

# Together they bound what a member can cost: at most about 1,000 lines of 1,000 bytes wait.
MAX_LINE = 1_000
OUTBOX_LINES = 1_000
MAX_NAME = 20

MEMBER = "member"


class Member:
    """A session in the room: what it is called, what it has half said, what it has yet to hear."""

    def __init__(self, session: PsSession) -> None:
        self.session = session
        self.name: str | None = None  # None until it has introduced itself
        self._unfinished = b""
        self._outbox: Queue[str] = Queue(maxsize=OUTBOX_LINES)
        self._writer = gevent.spawn(self._write)

    def hear(self, line: str) -> None:
        """Put a line into the outbox. Never switches greenlets, so a broadcast is one step."""
        try:
            self._outbox.put_nowait(f"{line}\n")
        except Full:
            # Not close(): that would linger for bytes which nobody reads.
            self.session.abort()

    def split_lines(self, message: bytes) -> list[str]:
        """Add what arrived; return the lines that are complete now.

        TCP keeps no boundaries: a message may hold half a line, or many. Splitting them is up to
        the callback.

        Raises:
            ValueError: the line is too long, so that an endless one does not fill the memory.
        """
        *lines, self._unfinished = (self._unfinished + message).split(b"\n")
        if max(map(len, [*lines, self._unfinished])) > MAX_LINE:
            raise ValueError(f"a line is longer than {MAX_LINE} bytes")
        return [printable(line) for line in lines]

    def leave(self) -> None:
        """End the writer; what is still in the outbox can't be sent any more."""
        self._writer.kill(block=False)

    def _write(self) -> None:
        try:
            while True:
                self.session.send(self._outbox.get())
        except PsSendError:
            pass  # the session is over: on_close does the rest


def printable(line: bytes) -> str:
    """Decode a line, without the characters that could play tricks on others' terminals."""
    text = line.decode(errors="replace")
    return "".join(character for character in text if character.isprintable())


class ChatRoom(PsCallback):
    """The room: one object, all members.

    The callbacks of different sessions run in different greenlets, but a greenlet gives way only
    where it waits, and nothing here does: ``members`` needs no lock.
    """

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}

    def on_open(self, session: PsSession) -> None:
        member = Member(session)
        session.set_value(MEMBER, member)
        member.hear("What is your name?")

    def on_message(self, session: PsSession, message: bytes) -> None:
        member: Member = session.get_value(MEMBER)
        try:
            lines = member.split_lines(message)
        except ValueError:
            session.abort()  # not a raise: that would put a traceback into the log
            return
        for line in lines:
            if member.name is None:
                self.join(member, line.strip())
            else:
                self.say(f"{member.name}: {line}", but_not_to=member)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        member: Member | None = session.get_value(MEMBER)
        if member is None:
            return  # closed before on_open had come to it
        member.leave()
        if member.name is not None:
            del self.members[member.name]
            self.say(f"* {member.name} left")

    def join(self, member: Member, name: str) -> None:
        if not name or len(name) > MAX_NAME:
            member.hear(f"* a name has 1 to {MAX_NAME} letters. What is your name?")
        elif name in self.members:
            member.hear(f"* {name} is here already. What is your name?")
        else:
            member.name = name
            others = ", ".join(self.members) or "nobody else"
            member.hear(f"* welcome, {name}. Here: {others}")
            self.say(f"* {name} joined")
            self.members[name] = member

    def say(self, line: str, *, but_not_to: Member | None = None) -> None:
        for member in self.members.values():
            if member is not but_not_to:
                member.hear(line)


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat room; join it with nc or telnet.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()

    try:
        server = PsServer(
            ChatRoom(),
            host=args.host,
            port=args.port,
            idle_milliseconds=None,  # listening in silence is allowed
            send_timeout=None,  # how slow is too slow is decided by the outbox
        )
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # no port has that number; or it is in use
    host, port = server.address[:2]
    print(f"listening on {host}:{port}", flush=True)
    server.serve_forever()  # until Ctrl-C or SIGTERM, then shuts down


if __name__ == "__main__":
    main()
