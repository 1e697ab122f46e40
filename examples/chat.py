"""A chat room: all members get what one of them says, and a slow member holds up nobody.

    python examples/chat.py                       # listens on 127.0.0.1:8710
    nc 127.0.0.1 8710                             # in as many terminals as you like

The members are a `PsGroup`, and a post to a group waits for nobody. Lines that a member has not
read are kept for it: some in the kernel, and up to ``high_water`` bytes here. A member that reads
too slowly loses its connection in the end. The alternatives are to drop lines (``overflow``), to
wait for the slowest member, or to let memory grow.
"""

from __future__ import annotations

import argparse
import sys

from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsGroup,
    PsKeyTakenError,
    PsServer,
    PsServerError,
    PsSession,
)
from psofa_gevent.framing import Line

# The memory that a member can cost: an unfinished line, the posts that wait for it here, and the
# bytes that the kernel has taken and not sent, which would be megabytes.
MAX_LINE = 1_000
HIGH_WATER = 250_000
UNSENT_LOW_WATER = 100_000
MAX_NAME = 20

NAME = "name"  # not set until a member has introduced itself


def printable(line: bytes) -> str:
    """Decode a line, without the characters that could play tricks on others' terminals."""
    text = line.decode(errors="replace")
    return "".join(character for character in text if character.isprintable())


class ChatRoom(PsCallback):
    """The room: one object, all members."""

    def __init__(self) -> None:
        self.room: PsGroup[bytes] = PsGroup("room")

    def on_open(self, session: PsSession) -> None:
        session.post("What is your name?")

    def on_message(self, session: PsSession, message: bytes) -> None:
        line = printable(message)
        name = session.get_value(NAME)
        if name is None:
            self.introduce(session, line.strip())
        else:
            self.room.post(f"{name}: {line}", exclude=session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        name = session.get_value(NAME)
        if name is not None:
            self.room.post(f"* {name} left")  # the session has left the group by itself

    def introduce(self, session: PsSession, name: str) -> None:
        if not name or len(name) > MAX_NAME:
            session.post(f"* a name has 1 to {MAX_NAME} letters. What is your name?")
            return
        try:
            session.owner.bind(session, name)
        except PsKeyTakenError:
            session.post(f"* {name} is here already. What is your name?")
            return
        session.set_value(NAME, name)
        others = ", ".join(member.get_value(NAME) for member in self.room) or "nobody else"
        session.post(f"* welcome, {name}. Here: {others}")
        self.room.post(f"* {name} joined")
        self.room.join(session)


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
            framing=Line(max_size=MAX_LINE),
            idle_milliseconds=None,  # members may stay silent
            high_water=HIGH_WATER,
            unsent_low_water=UNSENT_LOW_WATER,
        )
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    host, port = server.address[:2]
    print(f"listening on {host}:{port}", flush=True)
    server.serve_forever()  # until Ctrl-C or SIGTERM, then shuts down


if __name__ == "__main__":
    main()
