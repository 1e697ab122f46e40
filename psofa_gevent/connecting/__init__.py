"""Connecting: attempts to reach an endpoint, and staying connected."""
