"""Runs the programs in ``examples/`` as a user would: in their own processes, ended by a signal."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator, Sequence

from helpers import REPOSITORY, PythonProcess, python_process

EXAMPLES = REPOSITORY / "examples"

Address = tuple[str, int]


@contextlib.contextmanager
def example(name: str, *arguments: str) -> Iterator[PythonProcess]:
    """A running ``python examples/name``, with its arguments."""
    with python_process(str(EXAMPLES / name), *arguments) as process:
        yield process


def announced_address(process: PythonProcess, before: str = "listening on ") -> Address:
    """Wait for the line in which the program says where it listens."""
    line = process.expect_line(before)
    found = re.search(re.escape(before) + r"(?:\w+://)?(\[.+\]|[\d.]+):(\d+)", line)
    assert found is not None, line
    return found[1].strip("[]"), int(found[2])


def end(process: PythonProcess, number: signal.Signals = signal.SIGTERM) -> None:
    """Signal the program, and check that it ends well."""
    process.send_signal(number)
    ended_well(process)


def ended_well(process: PythonProcess) -> None:
    """Wait for the program's end: exit code 0, and nothing that looks like a traceback."""
    code = process.wait()
    output = "\n".join(process.lines)
    assert code == 0, output
    assert "Traceback" not in output, output


@contextlib.contextmanager
def serving_example(
    name: str, *arguments: str, number: signal.Signals = signal.SIGTERM
) -> Iterator[tuple[PythonProcess, Address]]:
    """A server among the examples; at the end of the block it is signalled, and must end well."""
    with example(name, *arguments) as process:
        yield process, announced_address(process)
        end(process, number)


def host_and_port(address: Sequence[object]) -> str:
    """An address as the examples' command lines take it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
