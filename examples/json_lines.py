r"""Messages instead of chunks: one JSON object per line, typed from end to end.

    python examples/json_lines.py                 # serves on 127.0.0.1:8710
    echo '{"name": "pi", "value": 3.14}' | nc -q 1 127.0.0.1 8710
    printf 'UPLOAD 5\n12345' | nc -q 1 127.0.0.1 8710

TCP is a stream of bytes: the data of two sends may arrive glued together or cut anywhere. A framing
cuts the stream into messages. `Line` gives lines, and ``typed(decode, encode)`` makes a `Reading`
or an `Upload` of each line, so ``on_message`` gets these dataclasses, and type checkers know them.
Any other line closes its session with FAILED and a line in the log.

Binary protocols do the same with `LengthPrefix` and msgpack, or with `Varint` and protobuf:
``LengthPrefix().typed(msgpack.unpackb, msgpack.packb)``,
``Varint().typed(MyMessage.FromString, MyMessage.SerializeToString)``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass

from psofa_gevent import PsCallback, PsServer, PsServerError, PsSession
from psofa_gevent.framing import Line, Raw


@dataclass
class Reading:
    name: str
    value: float


@dataclass
class Upload:
    """The announcement of an upload: `size` bytes follow as they are."""

    size: int


Message = Reading | Upload | bytes


def decode(line: bytes) -> Message:
    """A line as a message. Any exception raised here means that the message is malformed."""
    if line.startswith(b"UPLOAD "):
        size = int(line[7:])
        if size < 0:
            raise ValueError(f"an upload of {size} bytes")
        return Upload(size)
    fields = json.loads(line)
    return Reading(str(fields["name"]), float(fields["value"]))


def encode(message: Message) -> bytes:
    if not isinstance(message, Reading):
        raise TypeError(f"only readings are sent, not {message!r}")
    return json.dumps(asdict(message)).encode()


class Summing(PsCallback[Message]):
    """Answers each reading with the sum of all readings of its name, each upload with its size."""

    def on_message(self, session: PsSession[Message], message: Message) -> None:
        if isinstance(message, Reading):
            total = session.get_value(message.name, 0.0) + message.value
            session.set_value(message.name, total)
            session.send(Reading(message.name, total))
        elif isinstance(message, Upload):
            session.set_value("received", 0)
            session.set_value("size", message.size)
            if message.size:
                session.set_framing(Raw(message.size))  # afterwards lines again
        else:
            # Chunks of the upload, as they come: even of a large upload only one is in memory.
            received = session.get_value("received") + len(message)
            session.set_value("received", received)
            if received == session.get_value("size"):
                session.send(Reading("uploaded", received))


def main() -> None:
    parser = argparse.ArgumentParser(description="A server of JSON lines.")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        server = PsServer(
            Summing(),
            host="127.0.0.1",
            port=args.port,
            framing=Line(max_size=4_096).typed(decode, encode),
            frame_timeout=10,  # seconds that a line may take
        )
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
