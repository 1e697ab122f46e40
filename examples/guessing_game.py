"""Straight-line code: a game that is one function, from the first line to the last.

    python examples/guessing_game.py              # serves on 127.0.0.1:8710
    nc 127.0.0.1 8710                             # guess the number

A `PsHandler` has a session to itself: it asks for the next message and waits for it, instead of
being called with each message. So the state of the game is the place in the code, and the local
variables. The clock is work that runs beside it, belongs to the session, and ends with the session.
"""

from __future__ import annotations

import argparse
import random
import sys

import gevent

from psofa_gevent import PsHandler, PsServer, PsServerError, PsSession
from psofa_gevent.framing import Line

LARGEST = 100
MAX_LINE = 100


class Game(PsHandler[bytes]):
    def __init__(self, seconds: int, number: int | None) -> None:
        super().__init__()
        self.seconds = seconds
        self.number = number

    def handle(self, session: PsSession) -> None:
        session.send("What is your name?")
        try:
            name = session.receive(timeout=self.seconds).decode(errors="replace").strip()
        except TimeoutError:
            session.send("No name? Bye!")
            return  # then the session closes
        session.spawn(self.tick, session)
        number = self.number or random.randint(1, LARGEST)
        session.send(f"Hello, {name}. Guess a number from 1 to {LARGEST}.")
        for guesses, message in enumerate(session, 1):
            if not message.strip().isdigit():
                session.send("A number, please.")
            elif (guess := int(message)) != number:
                session.send("larger" if guess < number else "smaller")
            else:
                session.send(f"Yes, {name}! {guesses} guesses.")
                return

    def tick(self, session: PsSession) -> None:
        """Post the seconds left, every tenth second, and end the game when its time is over."""
        for left in range(self.seconds, 0, -1):
            if left % 10 == 0:
                session.post(f"{left} seconds left")
            gevent.sleep(1)
        session.post("Your time is over.")
        session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Guess a number; play with nc or telnet.")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="of a game (%(default)s)")
    parser.add_argument("--number", type=int, help="not a random one")
    args = parser.parse_args()
    try:
        server = PsServer(
            Game(args.seconds, args.number),
            host="127.0.0.1",
            port=args.port,
            framing=Line(max_size=MAX_LINE),
        )
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
