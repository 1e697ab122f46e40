"""Binary messages of any type, and requests that are answered in any order; ends by itself.

    pip install msgpack
    python examples/msgpack_requests.py

`LengthPrefix` finds the end of a message, msgpack decodes it. A request and its reply have the
same ``id``, so any number of requests may be on their way over one connection, and quick replies
overtake slow ones. With protobuf the framing would be
``Varint().typed(MyMessage.FromString, MyMessage.SerializeToString)``.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import gevent
import msgpack  # type: ignore[import-untyped]  # it brings no types

from psofa_gevent import (
    PsCallback,
    PsClient,
    PsRequester,
    PsRequestTimeoutError,
    PsServer,
    PsServerError,
    PsSession,
)
from psofa_gevent.framing import Framing, LengthPrefix

Message = dict[str, Any]

FRAMING: Framing[Message] = LengthPrefix(max_size=65_536).typed(msgpack.unpackb, msgpack.packb)


class Squares(PsCallback[Message]):
    """Squares numbers; a larger number takes longer."""

    def on_message(self, session: PsSession[Message], message: Message) -> None:
        session.spawn(self.answer, session, message)  # so the next request need not wait

    def answer(self, session: PsSession[Message], message: Message) -> None:
        gevent.sleep(message["number"] / 100)
        session.post({"id": message["id"], "square": message["number"] ** 2})


class Replies(PsCallback[Message]):
    def __init__(self) -> None:
        self.requester: PsRequester[Message] = PsRequester(lambda message: message["id"])

    def on_message(self, session: PsSession[Message], message: Message) -> None:
        if not self.requester.resolve(session, message):
            print("too late:", message)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests and replies over one connection.")
    parser.add_argument("--port", type=int, default=0, help="0: a free one (%(default)s)")
    args = parser.parse_args()

    replies = Replies()

    def ask(session: PsSession[Message], number: int) -> None:
        request = {"id": f"request {number}", "number": number}
        try:
            reply = replies.requester.request(session, request, timeout=2)
            print(f"{number} squared is {reply['square']}", flush=True)
        except PsRequestTimeoutError as error:
            print(error, flush=True)

    try:
        server = PsServer(Squares(), host="127.0.0.1", port=args.port, framing=FRAMING)
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    with server:
        host, port = server.address[:2]
        print(f"listening on {host}:{port}", flush=True)
        with PsClient(replies, host, port, framing=FRAMING) as client:
            session = client.session
            assert session is not None
            gevent.joinall([gevent.spawn(ask, session, number) for number in (30, 20, 10, 500)])


if __name__ == "__main__":
    main()
