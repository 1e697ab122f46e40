"""Owners: what servers and clients share: their sessions, timers, close queue and shutdown."""
