"""Listening: bound sockets, admission, and the preamble of accepted connections."""
