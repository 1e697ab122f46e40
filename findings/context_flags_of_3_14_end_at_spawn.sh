#!/usr/bin/env bash
# Python 3.14's two context flags reach a patched thread, and end at gevent.spawn.
#
# Guess before the run: gevent copies the spawner's context variables into a greenlet, as asyncio does into a task. So a
# monkey-patched thread, which is a greenlet, sees its starter's variables with or without `-X thread_inherit_context=1`;
# and with `-X context_aware_warnings=1` a greenlet spawned in `with warnings.catch_warnings(record=True)` records into
# that block's list, while a sibling's warnings stay out of it.
# Seen (CPython 3.14.x of Debian sid, gevent 26.9.0, greenlet 3.5.6): a greenlet starts with an empty context, whoever spawns it (spawn, Pool, spawn_later,
# loop callbacks). A patched `threading.Thread` follows the flag as a native one does: it starts empty without, and inherits with it, as Thread.start
# itself runs the target in the copied context. So one program has both: `Thread(target=f)` sees the variable, `gevent.spawn(f)` does not.
# With `context_aware_warnings` (the default of free-threaded builds) the sibling stays out, as guessed, and so does the
# greenlet that was spawned in the block: `with pytest.warns(...)` around `gevent.spawn(f).join()` sees none of its warnings, which it
# does without the flag.
# What follows: hand over the context by hand, `gevent.spawn(contextvars.copy_context().run, f)`: with that both arrive.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

in_root() { "$@"; }
home=$work
if ! python=$(command -v python3.14); then
    mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=python3.14,python3.14-venv,ca-certificates sid "$work/sid"
    cp /etc/ssl/certs/ca-certificates.crt "$work/sid/etc/ssl/certs/"
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$work/sid/etc/"
    in_root() { chroot "$work/sid" "$@"; }
    home=/home python=/usr/bin/python3.14
    files=$work/sid/home
fi
files=${files:-$work}

in_root "$python" -m venv "$home/venv"
in_root "$home/venv/bin/pip" install -q gevent==26.9.0 greenlet==3.5.6

cat >"$files/variables.py" <<'PY'
from gevent import monkey

monkey.patch_all()

import contextvars
import sys
import threading

import gevent

variable = contextvars.ContextVar("variable", default="empty")
variable.set("inherited")
seen = []
thread = threading.Thread(target=lambda: seen.append(variable.get()))
thread.start()
thread.join()
spawned = gevent.spawn(variable.get).get()
by_hand = gevent.spawn(contextvars.copy_context().run, variable.get).get()
print(f"thread_inherit_context={sys.flags.thread_inherit_context}:", f"Thread {seen[0]},", f"spawn {spawned},", f"by hand {by_hand}")
PY
cat >"$files/warned.py" <<'PY'
import contextvars
import sys
import warnings

import gevent


def warn(text):
    gevent.sleep(0.01)
    warnings.warn(text)


def recorded(warn_in_greenlet):
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        warn_in_greenlet()
    return len(records)


warnings.simplefilter("ignore")
inside = recorded(lambda: gevent.spawn(warn, "inside").join())
by_hand = recorded(lambda: gevent.spawn(contextvars.copy_context().run, warn, "by hand").join())
sibling = gevent.spawn(warn, "sibling")
beside = recorded(sibling.join)
print(
    f"context_aware_warnings={sys.flags.context_aware_warnings}:",
    f"spawned inside {inside}, by hand {by_hand}, sibling {beside}",
)
PY

in_root "$python" -VV
for flag in 0 1; do
    in_root "$home/venv/bin/python" -X thread_inherit_context=$flag "$home/variables.py"
    in_root "$home/venv/bin/python" -X context_aware_warnings=$flag "$home/warned.py"
done | tee "$files/seen"

diff "$files/seen" - <<'SEEN' || { echo "changed"; exit 1; }
thread_inherit_context=0: Thread empty, spawn empty, by hand inherited
context_aware_warnings=0: spawned inside 1, by hand 1, sibling 1
thread_inherit_context=1: Thread inherited, spawn empty, by hand inherited
context_aware_warnings=1: spawned inside 0, by hand 1, sibling 0
SEEN
