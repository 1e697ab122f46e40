"""The benchmarks run, and what they tell follows from what they measured.

Their figures are nobody's business here: other tests run on the same cores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import REPOSITORY, SUPPORT, child_environment

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(sys.platform != "linux", reason="they use epoll, processor affinity, /proc"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("psutil", "rich")),
        reason="the extra [bench] is not installed",
    ),
]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def run_benchmarks(
    *options: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    variables = child_environment(environment)
    # Last, so that an installed psofa_gevent comes before the checkout's.
    variables["PYTHONPATH"] = os.pathsep.join((variables["PYTHONPATH"], str(REPOSITORY)))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, options)],
        cwd=SUPPORT,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def kept_run(path: Path, **rounds: list[float]) -> Path:
    """A file as of ``--json``: the row echo-100, with messages per CPU second of each peer."""
    peers = {
        peer: {"rounds": [{"per_cpu_second": value} for value in values]}
        for peer, values in rounds.items()
    }
    about: dict[str, Any] = {
        "python": "3.12.0",
        "implementation": "CPython",
        "psofa_gevent": "abc",
        "versions": {"gevent": "26.9"},
        "processor": "a processor",
        "system": "Linux",
        "server_core": 0,
        "load_core": 1,
    }
    document = {"about": about, "notes": [], "rows": {"echo-100": {"title": "", "peers": peers}}}
    path.write_text(json.dumps(document))
    return path


@needs_compiler
def test_a_tiny_run_measures_every_peer_of_every_row(tmp_path: Path) -> None:
    written = tmp_path / "run.json"
    done = run_benchmarks(
        *("--quick", "--rounds=1", "--seconds=0.05", "--rows=echo-100,sessions-1000"),
        *("--peers=psofa,gevent,asyncio", "--json", written),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(written.read_text())["rows"]
    assert list(rows) == ["echo-100", "sessions-1000"]
    echo = rows["echo-100"]["peers"]
    assert set(echo) == {"psofa", "gevent", "asyncio"}
    for peer in echo.values():
        assert len(peer["rounds"]) == 1
        assert all(sample["cpu_us"] > 0 and sample["rate"] > 0 for sample in peer["rounds"])
    for sample in rows["sessions-1000"]["peers"]["psofa"]["rounds"]:
        assert sample["closes_missing"] == 0
        assert sample["kb_per_session"] > 0
    assert "### Targets" in done.stdout


@needs_compiler
def test_a_run_beside_another_checkout_tells_what_has_become_of_our_servers(
    tmp_path: Path,
) -> None:
    before = tmp_path / "before"
    for folder in ("psofa_gevent", "benchmarks"):
        shutil.copytree(REPOSITORY / folder, before / folder)
    slower = "import time\n\n\nclass Echo(PsCallback):"
    delayed = "        time.sleep(0)\n" * 50 + "        session.send(message)"
    server = before / "benchmarks/servers/psofa.py"
    text = server.read_text().replace("class Echo(PsCallback):", slower)
    server.write_text(text.replace("        session.send(message)", delayed, 1))
    written = tmp_path / "run.json"
    done = run_benchmarks(
        *("--quick", "--rounds=2", "--seconds=0.05", "--rows=echo-100", "--peers=psofa"),
        *("--before", before, "--json", written),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### Beside the build before" in done.stdout
    peers = json.loads(written.read_text())["rows"]["echo-100"]["peers"]
    assert set(peers) >= {"psofa", "psofa-before"}
    assert peers["psofa-before"]["median"]["cpu_us"] > peers["psofa"]["median"]["cpu_us"]
    told = run_benchmarks("--from", written)
    assert told.returncode == 0, told.stderr
    assert "psofa_gevent, sync, before" in told.stdout


def test_a_directory_without_the_package_is_refused(tmp_path: Path) -> None:
    done = run_benchmarks("--before", tmp_path)
    assert done.returncode == 2
    assert "has no psofa_gevent" in done.stderr


@needs_compiler
def test_instructions_are_counted_where_valgrind_is_there_and_noted_where_not(
    tmp_path: Path,
) -> None:
    written = tmp_path / "run.json"
    options = ("--rows=echo-100", "--peers=c", "--rounds=1", "--seconds=0.05", "--instructions")
    programs = tmp_path / "programs"
    programs.mkdir()
    compiler = shutil.which(os.environ.get("CC") or "cc")
    assert compiler is not None
    without = {"PATH": str(programs), "CC": compiler}
    done = run_benchmarks(*options, environment=without)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "instructions not counted: no valgrind and no callgrind_control" in done.stdout
    if shutil.which("callgrind_control") is None:
        pytest.skip("valgrind is not installed")
    done = run_benchmarks(*options, "--json", written)
    assert done.returncode == 0, done.stdout + done.stderr
    [sample] = json.loads(written.read_text())["rows"]["echo-100"]["peers"]["c"]["rounds"]
    assert 20 < sample["instructions"] < 1_000  # one in C: two system calls, and a loop


@needs_compiler
@pytest.mark.skipif(importlib.util.find_spec("trustme") is None, reason="trustme is not installed")
def test_tls_is_measured_where_openssl_is_there_and_skipped_with_a_note_where_not(
    tmp_path: Path,
) -> None:
    cc = tmp_path / "cc"
    cc.write_text('#!/bin/sh\ncase "$*" in *openssl*) exit 1;; esac\nexec cc "$@"\n')
    cc.chmod(0o755)
    written = tmp_path / "run.json"
    options = ("--quick", "--rounds=1", "--seconds=0.05", "--rows=tls,tls-64k,echo-10")
    peers = ("psofa", "gevent", "asyncio")
    without = {"CC": str(cc), "XDG_CACHE_HOME": str(tmp_path)}
    done = run_benchmarks(*options, "--peers=psofa", "--json", written, environment=without)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(written.read_text())
    assert list(run["rows"]) == ["echo-10"]
    assert "tls skipped: no headers of OpenSSL (Debian: libssl-dev)" in run["notes"]
    done = run_benchmarks(*options, "--peers", ",".join(peers), "--json", written)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(written.read_text())
    if "tls" not in run["rows"]:
        pytest.skip("there are no headers of OpenSSL")
    for row in ("tls", "tls-64k"):
        assert set(run["rows"][row]["peers"]) == set(peers)
        for peer in run["rows"][row]["peers"].values():
            assert all(sample["cpu_us"] > 0 for sample in peer["rounds"])


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    nothing = {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = run_benchmarks("--quick", environment=nothing)
    assert done.returncode == 1
    assert "no C compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds(tmp_path: Path) -> None:
    run = kept_run(tmp_path / "run.json", psofa=[100, 50, 90], uvloop=[100, 100, 100])
    done = run_benchmarks("--from", run)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("| echo-100")]
    assert "0.90 (0.50–1.00)" in line
    assert ">= 0.85 × uvloop Protocol" in line
    assert "NOT" not in line


def test_a_ratio_that_fell_by_more_than_its_tolerance_is_an_error(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    before = kept_run(tmp_path / "before.json", psofa=[90, 90, 90], uvloop=[100, 100, 100])
    assert run_benchmarks("--from", before, "--keep", baseline).returncode == 0
    a_little = kept_run(tmp_path / "little.json", psofa=[88, 88, 88], uvloop=[100, 100, 100])
    assert run_benchmarks("--from", a_little, "--compare", baseline).returncode == 0
    worse = kept_run(tmp_path / "worse.json", psofa=[70, 70, 70], uvloop=[100, 100, 100])
    done = run_benchmarks("--from", worse, "--compare", baseline)
    assert done.returncode == 1
    assert "WORSE" in done.stdout


def test_nothing_to_compare_with_is_an_error(tmp_path: Path) -> None:
    run = kept_run(tmp_path / "run.json", psofa=[1], uvloop=[1])
    done = run_benchmarks("--from", run, "--compare", tmp_path / "nothing.json")
    assert done.returncode == 1
    assert "nothing to compare with" in done.stderr
