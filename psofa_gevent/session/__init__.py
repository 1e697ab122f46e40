"""The session: one connection, from its first byte to its close."""
