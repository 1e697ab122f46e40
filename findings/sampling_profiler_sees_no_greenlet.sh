#!/usr/bin/env bash
# Python 3.15's own sampling profiler takes no sample inside a greenlet; py-spy takes all of them.
#
# Guess before the run: `python -m profiling.sampling` reads the frames of whatever runs in the thread, so a greenlet
# that computes shows up like any function, and only greenlets that are switched out are missing.
# Seen (CPython 3.15.2, greenlet 3.5.6, gevent 26.9.0, Linux x86_64): of the samples taken while a greenlet runs, more than
# 99 of 100 are errors, which the summary calls "Error rate"; what is left are the imports before the first switch. The same function without
# a greenlet: about 1 error in 100, and its line is there. It needs no gevent: one raw greenlet does it. `--blocking`,
# which stops the process for each sample, changes nothing. py-spy 0.4.3 on the same program: no error, and the functions of
# all three greenlets in it.
# What follows: profile a gevent process on 3.15 with py-spy, and read "Error rate" before you believe an empty profile.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

in_root() { "$@"; }
home=$work
if ! python=$(command -v python3.15); then
    mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
        --include=python3.15,python3.15-venv,ca-certificates sid "$work/sid"
    trap 'umount "$work/sid/proc" && rm -rf --one-file-system "$work"' EXIT
    mount -t proc proc "$work/sid/proc"
    cp /etc/ssl/certs/ca-certificates.crt "$work/sid/etc/ssl/certs/"
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$work/sid/etc/"
    in_root() { chroot "$work/sid" "$@"; }
    home=/home python=/usr/bin/python3.15
    files=$work/sid/home
fi
files=${files:-$work}

in_root "$python" -m venv "$home/venv"
in_root "$home/venv/bin/pip" install -q gevent==26.9.0 greenlet==3.5.6 py-spy==0.4.3

cat >"$files/one.py" <<'PY'
import sys
import time

from greenlet import greenlet


def compute(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


if sys.argv[1] == "in_greenlet":
    greenlet(compute).switch(1)
else:
    compute(1)
PY
cat >"$files/three.py" <<'PY'
import time

import gevent


def compute(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def turns():
    for _ in range(40):
        compute(0.02)
        gevent.sleep(0.001)


def first():
    turns()


def second():
    turns()


def third():
    turns()


gevent.joinall([gevent.spawn(each) for each in (first, second, third)])
PY

sample() { # the profile's file, the program and its arguments; prints the error rate
    local profile=$1
    shift
    in_root "$home/venv/bin/python" -m profiling.sampling run --collapsed -o "$home/$profile" "$@" |
        sed -n 's/^Error rate: *//p'
}

in_root "$python" -VV
plain=$(sample plain "$home/one.py" in_main)
inside=$(sample inside "$home/one.py" in_greenlet)
gevents=$(sample gevents "$home/three.py")
in_root "$home/venv/bin/py-spy" record --rate 200 --format raw -o "$home/spied" -- "$home/venv/bin/python" \
    "$home/three.py" 2>&1 | sed -n 's/.*\(Samples: .*\)/py-spy 0.4.3: \1/p' | tee "$files/spy.log"

echo "error rate without a greenlet: $plain %; in a greenlet: $inside %; three greenlets of gevent: $gevents %"
status=0
expect() {
    "${@:2}" || { echo "changed: $1"; status=1; }
}
expect "many errors without a greenlet" awk -v rate="$plain" 'BEGIN { exit !(rate < 20) }'
expect "the function shows up without a greenlet, no more" grep -q ':compute:' "$files/plain"
expect "few errors in a greenlet" awk -v rate="$inside" 'BEGIN { exit !(rate > 90) }'
expect "the greenlet's function shows up" bash -c "! grep -q ':compute:' '$files/inside'"
expect "few errors with gevent" awk -v rate="$gevents" 'BEGIN { exit !(rate > 90) }'
expect "py-spy has errors" grep -q 'Errors: 0' "$files/spy.log"
for name in first second third; do
    expect "py-spy misses $name" grep -q "$name (" "$files/spied"
done
exit "$status"
