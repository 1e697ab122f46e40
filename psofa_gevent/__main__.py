"""``python -m psofa_gevent`` and the script ``psofa``: patch first, then run the command line.

The command line is an application, so it takes a decision that the library leaves to applications:
it monkey-patches the process first of all. So a blocking library in a served callback blocks only
its own session. Importing this file patches nothing.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Patch the standard library, run the command line, and return its exit code."""
    from gevent import monkey

    monkey.patch_all()
    # Imported only now: the command line, and the callback that it serves, must see the patched
    # modules.
    from psofa_gevent.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
