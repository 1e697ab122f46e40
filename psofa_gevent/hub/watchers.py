"""The event masks of gevent's io watchers: the same on libev and on libuv."""

__all__ = ["READ", "WRITE"]

READ = 1
WRITE = 2
