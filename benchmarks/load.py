"""The load generators: our own, compiled when it is needed, and redis-benchmark."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchmarkError, Child, Server, load_core
from benchmarks.rows import Row

__all__ = ["has_redis_benchmark", "load_program", "redis_benchmark", "speaks_tls", "start_load"]

SOURCE = Path(__file__).with_name("load.c")
WITH_TLS = ("-DWITH_TLS", "-lssl", "-lcrypto")
TLS_SUFFIX = "-tls"


@functools.cache
def load_program() -> Path:
    """The compiled load.c, from the cache directory if possible; with TLS if OpenSSL is there.

    Raises:
        BenchmarkError: there is no C compiler, or it can't compile the file.
    """
    source = SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "psofa-benchmarks")
    key = hashlib.sha256(source + platform.machine().encode()).hexdigest()[:16]
    plain, with_tls = cache / f"load-{key}", cache / f"load-{key}{TLS_SUFFIX}"
    if with_tls.exists():
        return with_tls
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        if plain.exists():
            return plain
        raise BenchmarkError("no C compiler: install gcc or clang, or let CC name one")
    has_openssl = _has_openssl(compiler)
    program = with_tls if has_openssl else plain
    if program.exists():
        return program
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        built = Path(directory, "load")
        done = subprocess.run(
            [compiler, "-O2", "-o", str(built), str(SOURCE), *(WITH_TLS if has_openssl else ())],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchmarkError(f"{compiler} does not compile {SOURCE.name}: {done.stderr}")
        built.replace(program)
    return program


def _has_openssl(compiler: str) -> bool:
    """Whether OpenSSL's headers are installed."""
    looked = subprocess.run(
        [compiler, "-fsyntax-only", "-include", "openssl/ssl.h", "-xc", os.devnull],
        capture_output=True,
        check=False,
    )
    return looked.returncode == 0


def speaks_tls() -> bool:
    """Whether our load generator was compiled with TLS."""
    return load_program().name.endswith(TLS_SUFFIX)


def start_load(
    mode: str, row: Row, server: Server, warm: float, seconds: float, *, items: int = 0
) -> Child:
    """Start our load generator on its core; its answers are lines of JSON.

    `items`: messages after which it ends, instead of the times.
    """
    return Child(
        [
            load_program(),
            mode,
            f"--port={server.port}",
            f"--server-pid={server.pid}",
            f"--connections={row.connections}",
            f"--size={row.size}",
            f"--depth={row.depth}",
            f"--content={row.work}",
            f"--warm={warm}",
            f"--seconds={seconds}",
            f"--items={items}",
            *(["--tls"] if row.is_encrypted else []),
        ],
        load_core,
    )


def has_redis_benchmark() -> bool:
    return shutil.which("redis-benchmark") is not None


def redis_benchmark(row: Row, server: Server, messages: int) -> dict[str, Any]:
    """Let redis-benchmark send `messages` PINGs; the result is like that of our load generator.

    redis-benchmark inherits our core, which is the load generator's.

    Raises:
        BenchmarkError: redis-benchmark failed.
    """
    command = ["redis-benchmark", "-h", "127.0.0.1", "-p", str(server.port), "--csv"]
    command += ["-c", str(row.connections), "-n", str(messages), "-t", "ping_inline"]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, began = server.cpu_seconds(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    cpu = server.cpu_seconds() - cpu
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(lines) != 2:
        raise BenchmarkError(f"redis-benchmark failed: {done.stderr or done.stdout}")
    (result,) = csv.DictReader(lines)
    return {
        "items": messages,
        "seconds": messages / float(result["rps"]),
        "server_cpu": cpu,
        # The share of the process's whole time, its start included: a little too small.
        "load_cpu": (used.ru_utime - usage.ru_utime + used.ru_stime - usage.ru_stime)
        / seconds
        * (messages / float(result["rps"])),
        "p50_ms": float(result["p50_latency_ms"]),
        "p99_ms": float(result["p99_latency_ms"]),
        "max_ms": float(result["max_latency_ms"]),
    }
