"""asyncio on gevent: the event loop that runs coroutines on the hub."""
