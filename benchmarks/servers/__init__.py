"""The servers that are measured, each written as its users would write it.

``python -m benchmarks.servers PEER WORK`` listens on a free port of 127.0.0.1, prints it as a line
of JSON, and serves until it is killed. WORK is

- ``echo``: all bytes go back as they come.
- ``hold``: the same; psofa's server counts its ``on_close`` calls, and shuts down at SIGUSR1.
- ``suspend``: the same, after ``await asyncio.sleep(0)``; coroutines only.
- ``ping``: ``PING`` lines are answered with ``+PONG`` lines, for redis-benchmark.
- ``tls``: as ``echo``, over TLS 1.3.
- ``broadcast``: a message that begins with a dot goes to all connections, any other goes back.

All servers have the same backlog, and leave all other settings at their defaults.
"""
