"""A Flask application that talks to TCP devices: HTTP and a `PsServer` in one process.

    python examples/wsgi_flask.py                 # HTTP on 127.0.0.1:8080, devices on :8711
    nc 127.0.0.1 8711                             # play a device: type "HELLO lamp", then answers
    curl 127.0.0.1:8080/devices
    curl 127.0.0.1:8080/devices/lamp/ask -d 'how are you?'

A device connects, introduces itself with a first line ``HELLO name``, and from then on answers
every line with a line. ``gevent.pywsgi`` runs every HTTP request in a greenlet and the `PsServer`
every device, all in one thread: a request waits for its device, and all others go on.

Neither Flask nor the library needs monkey-patching. An application that also uses blocking
libraries (``requests``, a database driver) must be patched before anything else runs:
``python -m gevent.monkey examples/wsgi_flask.py``. For gunicorn see gunicorn_app.py.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

import flask
import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIServer

from psofa_gevent import (
    PsCallback,
    PsRequestClosedError,
    PsRequester,
    PsRequestTimeoutError,
    PsServer,
    PsServerError,
    PsSession,
)
from psofa_gevent.framing import Line

NAME = "name"


class Devices(PsCallback):
    """The callback of the devices' server; `server` is set when that server starts."""

    server: PsServer

    def __init__(self) -> None:
        self.requester: PsRequester[bytes] = PsRequester()  # a device answers in order

    def on_start(self, owner: object) -> None:
        assert isinstance(owner, PsServer)
        self.server = owner

    def on_message(self, session: PsSession, message: bytes) -> None:
        if session.get_value(NAME) is None:
            self.register(session, message)
        else:
            self.requester.resolve(session, message)

    def register(self, session: PsSession, line: bytes) -> None:
        command, _, name = line.decode(errors="replace").partition(" ")
        if command != "HELLO" or not name:
            session.close()
            return
        session.set_value(NAME, name)
        # The device may have come back before we noticed that it was gone.
        session.owner.bind(session, name, replace=True)


def make_server(devices: Devices, **where: Any) -> PsServer:
    """The server for devices; `where` is a host and a port, or a listener, as in `PsServer`."""
    return PsServer(
        devices,
        framing=Line(max_size=65_536),
        idle_milliseconds=None,  # a device speaks only when it is asked, which may be never
        **where,
    )


def create_app(devices: Devices, ask_timeout: float = 5.0) -> flask.Flask:
    """The HTTP side: ``GET /devices`` and ``POST /devices/<name>/ask``; the timeout in seconds."""
    app = flask.Flask(__name__)

    @app.get("/devices")
    def list_devices() -> flask.Response:
        names = [session.get_value(NAME) for session in devices.server.sessions]
        return flask.jsonify(sorted(name for name in names if name is not None))

    @app.post("/devices/<name>/ask")
    def ask_device(name: str) -> flask.Response:
        question = flask.request.get_data()
        if b"\n" in question:
            return plain_text("a question is one line", 400)
        device = devices.server.find(name)
        if device is None:
            return plain_text(f"no device {name} is connected", 404)
        try:
            return plain_text(devices.requester.request(device, question, ask_timeout), 200)
        except PsRequestTimeoutError:
            device.close()  # the device is stuck: let it connect again
            return plain_text(f"{name} did not answer", 504)
        except PsRequestClosedError:
            return plain_text(f"{name} has left", 502)

    return app


def plain_text(text: str | bytes, status: int) -> flask.Response:
    return flask.Response(text, status=status, mimetype="text/plain")


def main() -> None:
    parser = argparse.ArgumentParser(description="HTTP in front of TCP devices.")
    parser.add_argument("--host", default="127.0.0.1", help="address of both (%(default)s)")
    parser.add_argument("--http-port", type=int, default=8080, help="0: a free one (%(default)s)")
    parser.add_argument("--device-port", type=int, default=8711, help="0: a free one (%(default)s)")
    parser.add_argument("--ask-timeout", type=float, default=5.0, help="seconds (%(default)s)")
    args = parser.parse_args()

    stopping = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopping.set)
    devices = Devices()
    try:
        device_server = make_server(devices, host=args.host, port=args.device_port)
        app = create_app(devices, args.ask_timeout)
        # A greenlet per request, at most 1,000 at a time: further ones wait in the backlog.
        http_server = WSGIServer((args.host, args.http_port), app, spawn=1_000)
        device_server.start()
        http_server.start()
    except (OSError, OverflowError, ValueError, PsServerError) as error:
        sys.exit(str(error))  # invalid port number, or port in use
    print(f"devices on {args.host}:{device_server.address[1]}", flush=True)
    print(f"http on {args.host}:{http_server.server_port}", flush=True)

    stopping.wait()
    http_server.stop(timeout=1)  # running requests may finish: they need their devices
    device_server.shutdown()


if __name__ == "__main__":
    main()
