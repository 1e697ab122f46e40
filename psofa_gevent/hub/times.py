"""Constants about points in time and timers that all parts share."""

__all__ = ["NEVER", "SHORTEST_TIMER", "TURN"]

NEVER = float("inf")
"""A point in time that never comes, or a number of seconds that never pass."""
SHORTEST_TIMER = 0.001
"""Seconds: gevent's libuv loop has no shorter timer, and warns about one.

There, a timer of 0 s is a check watcher, which a greenlet must not stop (`psofa_gevent.hub.ready`).
"""
TURN = 0.01
"""Seconds that the messages of one session, or one post to many, may hold the hub before others
go on."""
