"""The hub: gevent's event loop and its thread, and the parts of the library that depend on them."""
