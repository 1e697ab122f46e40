"""The command line `psofa`."""
