#!/usr/bin/env bash
# Linux: POSIX record locks work on sockets, so processes that share one can tell each other a number through it.
#
# Guess before the run: fcntl(2) with F_SETLK is for files; on a socket it fails with EINVAL or EBADF.
# Seen (Linux 6.18, CPython's fcntl module; nothing else is needed): a process may set a shared lock on any byte of a TCP
# socket, far beyond any size that it could have. Another process with the same socket sees it (F_GETLK tells which byte and
# whose), one with another socket does not. /proc/locks lists it by the socket's inode. It goes with the process, also by
# SIGKILL, and, as fcntl(2) says of files, as soon as the process closes any descriptor of the same socket, even a duplicate.
# What follows: workers that accept from one listening socket can publish how loaded they are without shared memory, a file
# or a helper process: "byte n is locked" means "one of us has n". A lock must be set anew now and then.
set -euo pipefail

command -v python3 >/dev/null
uname -sr
python3 - <<'PY'
import fcntl
import os
import signal
import socket
import struct

FLOCK = struct.Struct("hhqqi4x")


def holder(sock, first, count):
    """The byte in that range that another process has locked, and that process; None: none."""
    asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
    kind, _, start, _, pid = FLOCK.unpack(fcntl.fcntl(sock, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else (start, pid)


def child(lock):
    commands, answers = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        fcntl.lockf(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 1_000_000)
        os.write(answers[1], b"locked")
        os.read(commands[0], 10)
        os.close(os.dup(lock.fileno()))
        os.write(answers[1], b"closed")
        os.read(commands[0], 10)
        os._exit(0)
    assert os.read(answers[0], 10) == b"locked"
    return pid, commands[1], answers[0]


with socket.create_server(("127.0.0.1", 0)) as shared, socket.create_server(("127.0.0.1", 0)) as other:
    pid, command, answer = child(shared)
    assert holder(shared, 999_990, 100) == (1_000_000, pid), "the lock is not seen"
    assert holder(shared, 0, 1_000_000) is None
    assert holder(other, 999_990, 100) is None, "another socket's lock is seen"
    inode = os.fstat(shared.fileno()).st_ino
    listed = [line for line in open("/proc/locks") if line.split()[5].endswith(f":{inode}")]
    assert listed and "POSIX" in listed[0] and "READ" in listed[0], listed
    print("seen by who shares the socket, and in /proc/locks:", " ".join(listed[0].split()[1:5]))
    os.write(command, b"close")
    assert os.read(answer, 10) == b"closed"
    assert holder(shared, 999_990, 100) is None, "the lock outlives a closed duplicate"
    print("gone when a duplicate was closed")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    pid, command, answer = child(shared)
    assert holder(shared, 999_990, 100) == (1_000_000, pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert holder(shared, 999_990, 100) is None, "the lock outlives its process"
    print("gone with a process that was killed")
PY
