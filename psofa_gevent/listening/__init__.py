"""Listening: sockets that are bound and listen, and who is let in before a session exists."""
