"""The event masks of gevent's io watchers: the same on libev and on libuv.

`watch` and `unwatch` of `psofa_gevent.hub.forking` register and end the watchers themselves.
"""

__all__ = ["READ", "WRITE"]

READ = 1
WRITE = 2
