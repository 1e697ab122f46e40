"""The same work done by psofa_gevent and by others, side by side: ``python -m benchmarks --help``.

- ``rows`` says what is measured, ``targets`` what we mean to reach, ``peers`` who takes part.
- ``servers`` are the programs that are measured, ``load.c`` is what loads them.
- ``processes`` and ``load`` start them, each on its own core; ``measure`` takes one sample.
- ``runner`` takes the samples in turn, ``results`` keeps them and forms medians and ratios.
- ``report``, ``plot``, ``growth`` and ``baseline`` say what came out.
"""
