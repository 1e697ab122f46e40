"""The common parts of servers and clients: sessions, timers, close queue and shutdown."""
