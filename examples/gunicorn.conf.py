"""gunicorn's settings for gunicorn_app.py: where the `PsServer` is started and shut down.

gunicorn reads this file in its main process; the two functions below run in the worker.
"""

from __future__ import annotations

from pathlib import Path

bind = "127.0.0.1:8080"
worker_class = "gevent"

# One: a device is connected to one process, and a request must come to that one. (Several workers
# could not all listen on the devices' port either.)
workers = 1

wsgi_app = "gunicorn_app:app"
pythonpath = str(Path(__file__).resolve().parent)
preload_app = False  # the application must be imported after the fork, in the worker
graceful_timeout = 5  # seconds for requests that run when gunicorn is told to end
control_socket_disable = True  # leaves nothing in the home directory; older gunicorns ignore it


def post_worker_init(worker: object) -> None:
    """The worker is patched and has loaded the application; it serves requests right after this."""
    # After the fork and the patching: see gunicorn_app.py.
    import gevent

    import gunicorn_app

    gevent.spawn(gunicorn_app.start_device_server)


def worker_exit(server: object, worker: object) -> None:
    """The worker has finished its requests."""
    import gunicorn_app

    gunicorn_app.device_server.shutdown()
