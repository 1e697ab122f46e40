"""The command line ``psofa``."""
