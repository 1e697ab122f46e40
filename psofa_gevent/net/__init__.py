"""The network below the sessions: addresses, socket options, Unix sockets."""
