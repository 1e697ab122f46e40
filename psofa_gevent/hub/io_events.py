"""The event masks of gevent's io watchers: the same on libev and on libuv.

`psofa_gevent.hub.forking` starts and ends the watchers themselves (`watch`, `unwatch`).
"""

__all__ = ["READ", "WRITE"]

READ = 1
WRITE = 2
