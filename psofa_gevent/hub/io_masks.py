"""The event masks of gevent's io watchers: the same on libev and on libuv.

Only constants: `watch` and `unwatch` of `psofa_gevent.hub.forking` register and end the watchers.
"""

__all__ = ["READ", "WRITE"]

READ = 1
WRITE = 2
