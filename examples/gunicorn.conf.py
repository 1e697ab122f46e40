"""gunicorn's settings for gunicorn_app.py: where the `PsServer` is started and shut down.

gunicorn reads this file in its main process; the two functions below run in the worker.

gunicorn opens both ports once, in its main process, and hands them to each worker. So no connection
is refused at a reload (SIGHUP) or an upgrade (SIGUSR2), when the old worker and the new one run
side by side. When the old worker ends, it disconnects its devices; they connect again, to the new
worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

bind = ["127.0.0.1:8080", "127.0.0.1:8711"]  # HTTP, and the devices
worker_class = "gevent"

# One: a device is connected to one process, and requests for it must come to that process.
workers = 1

wsgi_app = "gunicorn_app:app"
pythonpath = str(Path(__file__).resolve().parent)
preload_app = False  # the application must be imported after the fork, in the worker
graceful_timeout = 5  # seconds that running requests have when gunicorn ends
control_socket_disable = True  # leaves no file in the home directory; older gunicorns ignore it


def post_worker_init(worker: Any) -> None:
    """The worker is patched and has loaded the application; it serves requests right after this."""
    # After the fork and the patching: see gunicorn_app.py.
    import gunicorn_app

    http, devices = worker.sockets  # in the order of `bind`
    worker.sockets = [http]  # gunicorn serves only this one
    worker.device_server = gunicorn_app.serve_devices(devices)


def worker_exit(server: object, worker: Any) -> None:
    """The worker has finished its requests."""
    worker.device_server.shutdown()
