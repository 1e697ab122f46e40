"""A Flask application that talks to TCP devices: HTTP and a `PsServer` in one process.

    python examples/wsgi_flask.py                 # HTTP on 127.0.0.1:8080, devices on :8711
    nc 127.0.0.1 8711                             # play a device: type "HELLO lamp", then answers
    curl 127.0.0.1:8080/devices
    curl 127.0.0.1:8080/devices/lamp/ask -d 'how are you?'

A device connects, introduces itself with a first line ``HELLO name``, and from then on answers
every line with a line. ``gevent.pywsgi`` runs every HTTP request in a greenlet and the `PsServer`
every device, all in one thread: a request waits for its device, and everybody else goes on.

Neither Flask nor the library needs monkey-patching. An application that also uses blocking
libraries (``requests``, a database driver) is started patched, first thing:
``python -m gevent.monkey examples/wsgi_flask.py``. For gunicorn see gunicorn_app.py.
"""

from __future__ import annotations

import argparse
import signal
import sys

import flask
import gevent
from gevent.event import AsyncResult, Event
from gevent.lock import BoundedSemaphore
from gevent.pywsgi import WSGIServer

from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsSendError,
    PsServer,
    PsServerError,
    PsSession,
)

MAX_LINE = 65_536
DEVICE = "device"


class DeviceTimeoutError(Exception):
    """The device did not answer in time."""


class DeviceLostError(Exception):
    """The device's connection ended before it had answered."""


class Device:
    """A connected device: one question at a time, since an answer does not say what it answers."""

    def __init__(self, session: PsSession) -> None:
        self.session = session
        self.name: str | None = None  # None until it has said HELLO
        self._unfinished = b""
        self._turn = BoundedSemaphore()
        self._answer: AsyncResult[bytes | None] | None = None  # to the current question

    def ask(self, question: bytes, timeout: float) -> bytes:
        """Send a line and wait for the device's next one. For any greenlet of this thread.

        Raises:
            DeviceTimeoutError: there was no answer within `timeout` seconds.
            DeviceLostError: the device is gone.
        """
        with gevent.Timeout(timeout, DeviceTimeoutError), self._turn:
            self._answer = AsyncResult()
            try:
                self.session.send(question + b"\n")
                answer = self._answer.get()
            except PsSendError as error:
                raise DeviceLostError from error
            except DeviceTimeoutError:
                # Its late answer would be taken for that to the next question: start afresh.
                self.session.close()
                raise
            finally:
                self._answer = None
        if answer is None:
            raise DeviceLostError
        return answer

    def split_lines(self, message: bytes) -> list[bytes]:
        """Add what arrived; return the lines that are complete now.

        Raises:
            ValueError: the line is too long, so that an endless one does not fill the memory.
        """
        *lines, self._unfinished = (self._unfinished + message).split(b"\n")
        if len(self._unfinished) > MAX_LINE:
            raise ValueError(f"a line is longer than {MAX_LINE} bytes")
        return [line.rstrip(b"\r") for line in lines]

    def answered(self, line: bytes) -> None:
        if self._answer is not None:  # otherwise nobody has asked
            self._answer.set(line)

    def lost(self) -> None:
        if self._answer is not None:
            self._answer.set(None)


class Devices(PsCallback):
    """The callback of the devices' server, and the registry that the HTTP side looks into."""

    def __init__(self) -> None:
        self.by_name: dict[str, Device] = {}

    def on_open(self, session: PsSession) -> None:
        session.set_value(DEVICE, Device(session))

    def on_message(self, session: PsSession, message: bytes) -> None:
        device: Device = session.get_value(DEVICE)
        try:
            lines = device.split_lines(message)
        except ValueError:
            session.abort()  # not a raise: that would put a traceback into the log
            return
        for line in lines:
            if device.name is None:
                self.register(device, line)
            else:
                device.answered(line)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        device: Device | None = session.get_value(DEVICE)
        if device is None:
            return  # closed before on_open had come to it
        device.lost()
        if device.name is not None and self.by_name.get(device.name) is device:
            del self.by_name[device.name]

    def register(self, device: Device, line: bytes) -> None:
        command, _, name = line.decode(errors="replace").partition(" ")
        if command != "HELLO" or not name:
            device.session.close()
            return
        previous = self.by_name.get(name)
        if previous is not None:
            previous.session.close()  # it has come back before we noticed that it was gone
        device.name = name
        self.by_name[name] = device


def create_app(devices: Devices, ask_timeout: float = 5.0) -> flask.Flask:
    """The HTTP side: ``GET /devices`` and ``POST /devices/<name>/ask``.

    `ask_timeout` is in seconds, for the whole question: waiting for one's turn included.
    """
    app = flask.Flask(__name__)

    @app.get("/devices")
    def list_devices() -> flask.Response:
        return flask.jsonify(sorted(devices.by_name))

    @app.post("/devices/<name>/ask")
    def ask_device(name: str) -> flask.Response:
        question = flask.request.get_data()
        if b"\n" in question:
            return plain_text("a question is one line", 400)
        device = devices.by_name.get(name)
        if device is None:
            return plain_text(f"no device {name} is connected", 404)
        try:
            return plain_text(device.ask(question, ask_timeout), 200)
        except DeviceTimeoutError:
            return plain_text(f"{name} did not answer", 504)
        except DeviceLostError:
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

    devices = Devices()
    # A greenlet per request, at most so many at a time: the others wait in the backlog.
    app = create_app(devices, args.ask_timeout)
    http_server = WSGIServer((args.host, args.http_port), app, spawn=1_000)

    stopping = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, stopping.set)
    try:
        device_server = PsServer(
            devices,
            host=args.host,
            port=args.device_port,
            idle_milliseconds=None,  # a device speaks when it is asked, which may be never
        )
        device_server.start()
        http_server.start()
    except (OSError, OverflowError, ValueError, PsServerError) as error:
        sys.exit(str(error))  # no port has that number; or it is in use
    print(f"devices on {args.host}:{device_server.address[1]}", flush=True)
    print(f"http on {args.host}:{http_server.server_port}", flush=True)

    stopping.wait()
    http_server.stop(timeout=1)  # requests that run may finish: they need their devices
    device_server.shutdown()


if __name__ == "__main__":
    main()
