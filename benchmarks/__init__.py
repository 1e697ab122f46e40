"""The same work done by psofa_gevent and by others, side by side: ``python -m benchmarks --help``.

- ``rows`` has the measurements, ``targets`` our aims, ``peers`` the servers that take part.
- ``servers`` has the programs that are measured; ``load.c`` is the load generator.
- ``processes`` and ``load`` start both, each on its own core; ``measure`` takes one sample.
- ``runner`` takes the samples in turn; ``results`` keeps them and forms medians and ratios.
- ``report``, ``plot``, ``growth`` and ``baseline`` present the results.
"""
