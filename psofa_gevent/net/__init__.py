"""The network, without a session: addresses, socket options, Unix sockets."""
