#!/usr/bin/env bash
# gevent: the patched os.close of a pipe's or a socket's descriptor returns with the descriptor still open.
#
# Guess before the run: os.close closes at once, patched or not.
# Seen (gevent 26.9.0 on libev, CPython 3.11.7, 3.12.1 and 3.13.0, Linux): as soon as the process has a hub, each os.close of a pipe or a
# socket leaves the closing to the event loop, waited on or not. Until that has polled once more the descriptor is open,
# its number is not free, and the other end sees no end of file. `gevent.sleep(0)` often isn't enough for that (50 in a
# row were not), `gevent.sleep(0.001)` is. A regular file is closed at once, and so is a socket by its own close(), if no
# greenlet waits on it. gevent's documentation says that its os.close cooperates with the loop, not that it is late.
# What follows: code that closes by descriptor (`sock.detach()`, `os.pipe()`) and then blocks natively, or computes for long,
# keeps its peer waiting; close the socket object, or call `monkey.get_original("os", "close")` where nothing waits.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gevent==26.9.0 greenlet==3.5.6

cat >"$work/closes.py" <<'PY'
from gevent import monkey

monkey.patch_all()

import os
import socket
import tempfile

import gevent

original_close = monkey.get_original("os", "close")
original_select = monkey.get_original("select", "select")


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def state(closed, other=None):
    words = ["open" if is_open(closed) else "closed"]
    if other is not None:
        words.append("end of file" if original_select([other], [], [], 0)[0] else "no end of file")
    return ", ".join(words)


def closed_with(close, kind):
    if kind == "file":
        file, name = tempfile.mkstemp()
        os.unlink(name)
        close(file)
        return state(file)
    if kind == "pipe":
        other, closed = os.pipe()
    else:
        one, two = socket.socketpair()
        other, closed = one.detach(), two.detach()
    close(closed)
    at_once = state(closed, other)
    if not is_open(closed):
        original_close(other)
        return at_once
    with open(os.devnull) as file:
        assert file.fileno() != closed
    gevent.sleep(0.01)
    later = state(closed, other)
    original_close(other)
    return f"{at_once}; a hundredth of a second later: {later}"


def closed_socket():
    one, two = socket.socketpair()
    descriptor = two.fileno()
    two.close()
    return state(descriptor, one.fileno())


print("os.close of a pipe, no hub yet:", closed_with(os.close, "pipe"))
gevent.sleep(0.01)
for kind in ("pipe", "socket", "file"):
    print(f"os.close of a {kind}:", closed_with(os.close, kind))
print("original os.close of a socket:", closed_with(original_close, "socket"))
print("socket.close:", closed_socket())
PY

"$work/venv/bin/python" -VV
"$work/venv/bin/python" "$work/closes.py" | tee "$work/seen"

diff "$work/seen" - <<'SEEN' || { echo "changed"; exit 1; }
os.close of a pipe, no hub yet: closed, end of file
os.close of a pipe: open, no end of file; a hundredth of a second later: closed, end of file
os.close of a socket: open, no end of file; a hundredth of a second later: closed, end of file
os.close of a file: closed
original os.close of a socket: closed, end of file
socket.close: closed, end of file
SEEN
