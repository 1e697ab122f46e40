"""The machine and the versions of a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import ssl
import subprocess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import PROJECT, load_core, server_core

__all__ = ["describe", "describe_checkout"]

PACKAGES = ("gevent", "greenlet", "uvloop", "twisted")
CPUINFO = Path("/proc/cpuinfo")


def describe() -> dict[str, Any]:
    """The entry ``about`` of the JSON file."""
    from gevent import config

    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "psofa_gevent": describe_checkout(PROJECT),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "gevent_loop": config.loop.__module__,
        "openssl": ssl.OPENSSL_VERSION,
        "redis_benchmark": _output("redis-benchmark", "--version"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "server_core": server_core,
        "load_core": load_core,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def describe_checkout(directory: Path) -> str | None:
    """The commit that is there."""
    return _output("git", "describe", "--always", "--dirty", "--tags", directory=directory)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str, directory: Path = PROJECT) -> str | None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    for line in CPUINFO.read_text().splitlines() if CPUINFO.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
