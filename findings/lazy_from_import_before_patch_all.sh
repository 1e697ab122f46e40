#!/usr/bin/env bash
# Python 3.15: a lazy `from` import of a module that is loaded already is not lazy, so gevent's patching misses it.
#
# Guess before the run: names that `lazy from module import name` (PEP 810) binds are looked up at their first use. So a
# program that writes them above `monkey.patch_all()` and uses them below gets gevent's versions, whatever the module.
# Seen (CPython 3.15.2, gevent 26.9.0): so it is with a module that nobody has imported yet (socket, select, queue). If
# the module is in sys.modules when the statement runs, as time and os always are, the name is bound at once, to the
# blocking original. So it changes with an import elsewhere: one `import socket` in another file, and
# `lazy from socket import create_connection` is the blocking one. `lazy import socket` stays lazy in both cases (and
# an attribute of a module is patched anyway). `-X lazy_imports=all` with the patching first works as ever.
# PEP 810 has an example in which such a name stays lazy though its module is loaded.
# What follows: lazy imports are no reason to move `patch_all()` down. First thing, as before.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

in_root() { "$@"; }
home=$work
if ! python=$(command -v python3.15); then
    mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=python3.15,python3.15-venv,ca-certificates sid "$work/sid"
    cp /etc/ssl/certs/ca-certificates.crt "$work/sid/etc/ssl/certs/"
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$work/sid/etc/"
    in_root() { chroot "$work/sid" "$@"; }
    home=/home python=/usr/bin/python3.15
    files=$work/sid/home
fi
files=${files:-$work}

in_root "$python" -m venv "$home/venv"
in_root "$home/venv/bin/pip" install -q gevent==26.9.0

cat >"$files/above.py" <<'PY'
import sys

if "import_socket" in sys.argv:
    import socket

lazy import socket as lazy_module
lazy from socket import create_connection
lazy from select import select
lazy from queue import Queue
lazy from time import sleep
lazy from os import fork

kinds = {
    name: type(globals()[name]).__name__ == "lazy_import"
    for name in ("lazy_module", "create_connection", "select", "Queue", "sleep", "fork")
}

from gevent import monkey

monkey.patch_all()

import os
import queue
import select as select_module
import socket
import time

patched = {
    "lazy_module": lazy_module.socket is socket.socket,
    "create_connection": create_connection is socket.create_connection,
    "select": select is select_module.select,
    "Queue": Queue is queue.Queue,
    "sleep": sleep is time.sleep,
    "fork": fork is os.fork,
}
for name, is_lazy in kinds.items():
    print(name, "lazy" if is_lazy else "bound", "patched" if patched[name] else "original")
PY

in_root "$python" -VV
echo "nobody has imported socket:"
in_root "$home/venv/bin/python" "$home/above.py" | tee "$files/fresh"
echo "somebody has imported socket:"
in_root "$home/venv/bin/python" "$home/above.py" import_socket | tee "$files/loaded"

status=0
expect() {
    grep -qx "$2" "$files/$1" || { echo "changed: '$2' was seen when socket was $1"; status=1; }
}
for name in lazy_module create_connection select Queue; do
    expect fresh "$name lazy patched"
done
expect fresh "sleep bound original"
expect fresh "fork bound original"
expect loaded "lazy_module lazy patched"
expect loaded "create_connection bound original"
exit "$status"
