#!/usr/bin/env bash
# Python 3.13: in a child that a thread forked, a signal's handler waits while the child runs Python code.
#
# Guess before the run: the forking thread is the child's main thread, as `threading` says there. So a Python signal handler
# runs there soon after the signal, between two bytecodes, as in any main thread.
# Seen (plain CPython, Linux): so it is when the main thread forked, and in 3.8 to 3.12.1 also when another one did. In
# 3.13.0, 3.13.18, 3.14.10 and 3.15.2 the handler does not run in such a child for as long as it only computes, or makes
# calls such as os.getpid, os.read or a short sleep after the signal. It runs, late, with the next call that looks for
# signals itself, such as `signal.pthread_sigmask(signal.SIG_BLOCK, ())` or `print(flush=True)`. If the child is in a
# sleep when the signal comes, it runs at once.
# The cause was not looked for; 3.13 gave each thread its own word of flags for what is to interrupt its bytecode.
# What follows: a busy worker that a thread forked does not follow its SIGTERM handler. Fork workers in the main thread,
# or have them make such a call now and then.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

in_root() { "$@"; }
files=$work home=$work python=python3.13
if ! "$python" -c '' 2>/dev/null; then
    mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=python3.13 sid "$work/sid"
    in_root() { chroot "$work/sid" "$@"; }
    home=/home python=/usr/bin/python3.13
    files=$work/sid/home
fi

cat >"$files/signalled.py" <<'PY'
import os
import signal
import threading
import time

STEPS = {
    "computes": lambda: None,
    "computes, getpid and a sleep, computes": lambda: (os.getpid(), time.sleep(0.01)),
    "computes, pthread_sigmask, computes": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
}
stage = 0


def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def child(step, ready):
    global stage
    assert threading.current_thread() is threading.main_thread() and threading.active_count() == 1
    signal.signal(signal.SIGTERM, lambda *_: os._exit(stage))
    os.write(ready, b"r")
    if step == "asleep":
        time.sleep(1)
    else:
        compute(1)
        stage = 1
        STEPS[step]()
        compute(0.5)
    os._exit(2)


def fork(forker, step):
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(step, writable)
    os.read(readable, 1)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    ran = ("at once", "late", "never")[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    print(f"forked by {forker} thread, {step}: {ran}", flush=True)


fork("the main", "computes")
for step in (*STEPS, "asleep"):
    thread = threading.Thread(target=fork, args=("another", step))
    thread.start()
    thread.join()
PY

in_root "$python" -VV
in_root "$python" -W ignore::DeprecationWarning "$home/signalled.py" | tee "$files/seen"

diff "$files/seen" - <<'SEEN' || { echo "changed"; exit 1; }
forked by the main thread, computes: at once
forked by another thread, computes: never
forked by another thread, computes, getpid and a sleep, computes: never
forked by another thread, computes, pthread_sigmask, computes: late
forked by another thread, asleep: at once
SEEN
