"""TLS for sessions, without a thread and without a second wait."""
