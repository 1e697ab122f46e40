#!/usr/bin/env bash
# gevent: the first child that a patched process forks, and that ends at once, is never reported by waitpid.
#
# Guess before the run: in a monkey-patched process `os.waitpid(pid, os.WNOHANG)` in a loop with `gevent.sleep` reports a
# child that has ended, at the latest at the hub's next turn. So it is with the unpatched functions.
# Seen (gevent 26.9.0 on libev, CPython 3.11.7, Linux): for the first child of the process, if that ends at once, it is
# not reported (in none of 8 programs within 3 s). A first child that lives for a fifth of a second is reported, and so
# is one that ends at once when another one was forked and reaped before. The cause was not looked for.
# What follows: a program that forks short jobs under gevent (daemons, health checks) should wait for the first child once, or
# fork it through gevent.subprocess.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gevent==26.9.0 greenlet==3.5.6

cat >"$work/forks.py" <<'PY'
import sys

from gevent import monkey

monkey.patch_all()

import os
import time

import gevent

original_sleep = monkey.get_original("time", "sleep")


def child(seconds):
    pid = os.fork()
    if pid == 0:
        original_sleep(seconds)
        os._exit(0)
    return pid


def is_reported(pid):
    with gevent.Timeout(3, False):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            gevent.sleep(0.01)
        return True
    return False


if "after_another" in sys.argv:
    assert is_reported(child(0.2))
print(is_reported(child(0.2 if "lives_on" in sys.argv else 0)))
PY

count() { # how many of 8 programs saw the end of their child
    local seen=0
    for _ in 1 2 3 4 5 6 7 8; do
        [ "$("$work/venv/bin/python" "$work/forks.py" "$@")" = True ] && seen=$((seen + 1))
    done
    echo "$seen"
}

"$work/venv/bin/python" -VV
at_once=$(count) lives_on=$(count lives_on) after_another=$(count after_another)
echo "reported, of 8: first child that ends at once: $at_once; that lives on: $lives_on; a second one: $after_another"
[ "$at_once" -le 4 ] && [ "$lives_on" -eq 8 ] && [ "$after_another" -eq 8 ] || { echo "changed"; exit 1; }
