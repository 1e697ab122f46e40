"""wsgi_flask.py under gunicorn with its gevent worker.

    gunicorn -c examples/gunicorn.conf.py         # HTTP on 127.0.0.1:8080, devices on :8711

gunicorn imports this module in the worker, patched and on the worker's own hub. It is not imported
in gunicorn's main process, which forks: sockets and greenlets must not be made before a fork. So
gunicorn.conf.py starts the `PsServer` in the worker, and shuts it down when the worker ends.
"""

from __future__ import annotations

import os

import gevent

from psofa_gevent import PsServerError
from wsgi_flask import Devices, create_app, make_server

devices = Devices()
device_server = make_server(
    devices,
    os.environ.get("DEVICE_HOST", "127.0.0.1"),
    int(os.environ.get("DEVICE_PORT", "8711")),
)
app = create_app(device_server, devices, float(os.environ.get("ASK_TIMEOUT", "5")))


def start_device_server() -> None:
    """Start to listen for devices, as soon as the port is free; to be spawned.

    On a reload (SIGHUP) gunicorn starts the new worker while the old one still has the port.
    """
    while not device_server.started:
        try:
            device_server.start()
        except PsServerError as error:
            print(f"will try again: {error}", flush=True)
            gevent.sleep(0.5)
    host, port = device_server.address[:2]
    print(f"devices on {host}:{port}", flush=True)
