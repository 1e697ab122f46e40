"""TLS for sessions: a socket that encrypts in memory, and never waits itself."""
