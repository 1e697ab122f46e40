"""wsgi_flask.py under gunicorn with its gevent worker.

    gunicorn -c examples/gunicorn.conf.py         # HTTP on 127.0.0.1:8080, devices on :8711

gunicorn imports this module in the worker, which is patched and has its own hub. gunicorn's main
process does not import it, because it forks: greenlets and servers must not be made before a fork.
The main process has only the sockets of both ports. gunicorn.conf.py starts the `PsServer` in the
worker, and shuts it down when the worker ends.
"""

from __future__ import annotations

import os
import socket

from psofa_gevent import PsServer
from wsgi_flask import Devices, create_app, make_server

devices = Devices()
app = create_app(devices, float(os.environ.get("ASK_TIMEOUT", "5")))


def serve_devices(listener: socket.socket) -> PsServer:
    """Accept devices from a socket that listens already."""
    server = make_server(devices, listener=listener)
    server.start()
    host, port = server.address[:2]
    print(f"devices on {host}:{port}", flush=True)
    return server
