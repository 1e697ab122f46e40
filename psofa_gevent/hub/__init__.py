"""The hub: gevent's event loop and its thread, and everything of the library that is tied to it."""
