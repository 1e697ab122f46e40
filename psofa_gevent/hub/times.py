"""What all parts agree on about points in time and timers."""

__all__ = ["NEVER", "SHORTEST_TIMER", "TURN"]

NEVER = float("inf")
"""A point in time that does not come, a number of seconds that do not pass."""
SHORTEST_TIMER = 0.001
"""Seconds: gevent's libuv loop knows no shorter timer, and warns of one.

One of 0 s is a check watcher there, which a greenlet must not stop (`psofa_gevent.hub.ready`).
"""
TURN = 0.01
"""Seconds that one session's messages, or one post to many, may hold the hub: then others go on."""
