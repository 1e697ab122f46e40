"""Connecting: attempts to connect to an endpoint, and links, which stay connected."""
