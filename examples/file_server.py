r"""A file server: a client sends a name in a line, and gets the size in a line, then the bytes.

    python examples/file_server.py /usr/share/doc               # serves on 127.0.0.1:8710
    echo bash/copyright | nc -q 1 127.0.0.1 8710                # OpenBSD's nc
    echo bash/copyright | socat -t 60 - TCP:127.0.0.1:8710 | tail -n +2 > copyright

If there is no such file in the directory, the reply is a line that begins with ``-``.
`PsSession.send_file` never has a file in memory: the kernel reads the file from the disk by itself,
and a slow client holds up nobody.

A name comes from the network. The server resolves ``..`` and symbolic links in it, and opens the
path only if it is still inside the directory. The size is that of the opened file, so the file is
sent in the announced length even if the name stands for another file meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import BinaryIO

from psofa_gevent import PsCallback, PsServer, PsServerError, PsSession
from psofa_gevent.framing import Line


class FileServer(PsCallback):
    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve(strict=True)

    def on_message(self, session: PsSession, message: bytes) -> None:
        try:
            file = self.open(os.fsdecode(message))
        except (OSError, ValueError):  # no such file, or a name with a zero byte
            session.send("- no such file")
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            session.send(str(size))
            session.send_file(file, count=size, raw=True)

    def open(self, name: str) -> BinaryIO:
        path = (self._folder / name).resolve(strict=True)
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise FileNotFoundError(name)
        return path.open("rb")


def main() -> None:
    parser = argparse.ArgumentParser(description="A server that sends the files of a directory.")
    parser.add_argument("folder", type=Path, help="the directory")
    parser.add_argument("--port", type=int, default=8710, help="0: a free one (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    if not args.folder.is_dir():
        sys.exit(f"{args.folder} is no directory")
    try:
        server = PsServer(
            FileServer(args.folder),
            host="127.0.0.1",
            port=args.port,
            framing=Line(max_size=4_096),
            frame_timeout=10,
            send_timeout=30,  # seconds in which a client may accept nothing
        )
        server.start()
    except (ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    print("listening on {}:{}".format(*server.address), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
