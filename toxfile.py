"""What tox.ini can't say: which run of the suite is measured, and how far each run is.

tox loads this file as a plugin. With ``tox -p`` an environment's output is shown when it has ended,
minutes later: until then the lines from here tell what runs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tox.plugin import impl
from tox.tox_env.errors import Skip
from tox.tox_env.runner import RunToxEnv

if TYPE_CHECKING:
    from tox.config.sets import ConfigSet
    from tox.session.state import State
    from tox.tox_env.api import ToxEnv
    from tox.tox_env.installer import InstallArguments

REPORT_PERIOD = 30.0
"""Seconds between two lines on all that runs."""
MEASURED = f"py{sys.version_info.major}{sys.version_info.minor}"
"""The environment of the interpreter that runs tox: the only one that is certain to be there."""


class Progress:
    """Tells what each environment does: when that changes, and every `REPORT_PERIOD`.

    Each environment calls it in a thread of its own.
    """

    def __init__(self) -> None:
        self.is_shown = False
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._stages: dict[str, str | Path] = {}

    def enter(self, name: str, stage: str | Path) -> None:
        """Tell that an environment begins with `stage`.

        Args:
            name: the environment's.
            stage: words, or the file in which tests/support/progress.py keeps how far the tests
                are.
        """
        with self._lock:
            if self._stages.get(name) == stage:
                return
            if not self._stages:
                threading.Thread(target=self._tell_from_time_to_time, daemon=True).start()
            self._stages[name] = stage
            self._tell([name])

    def leave(self, name: str) -> None:
        with self._lock:
            self._stages.pop(name, None)

    def _tell_from_time_to_time(self) -> None:
        while True:
            time.sleep(REPORT_PERIOD)
            with self._lock:
                if not self._stages:
                    return
                self._tell(list(self._stages))

    def _tell(self, names: list[str]) -> None:
        if not self.is_shown:
            return
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        what = "; ".join(f"{name}: {described(self._stages[name])}" for name in names)
        # Not sys.stdout, which may be the environment's. A terminal has a spinner in this line.
        out = sys.__stdout__
        clear = "\r\033[K" if out.isatty() else ""
        print(f"{clear}[{minutes}:{seconds:02}] {what}", file=out, flush=True)


def described(stage: str | Path) -> str:
    if isinstance(stage, str):
        return stage
    try:
        done, total = map(int, stage.read_text().split())
    except (OSError, ValueError):  # no test has ended yet, or the file is just being written
        return "runs"
    return f"{done:,} of {total:,} tests ({done / total:.0%})"


progress = Progress()


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    options = state.conf.options
    progress.is_shown = bool(getattr(options, "parallel", 0)) and not options.parallel_live
    if options.env.is_default_list or "coverage" in options.env:
        # What tox.ini runs pytest with, in this one environment.
        os.environ[f"RUN_{MEASURED}"] = "coverage run"


@impl
def tox_on_install(
    tox_env: ToxEnv, arguments: InstallArguments, section: str, of_type: str
) -> None:
    if isinstance(tox_env, RunToxEnv):
        progress.enter(tox_env.conf.name, "installs what it needs")


@impl
def tox_before_run_commands(tox_env: ToxEnv) -> None:
    name = tox_env.conf.name
    if name == "coverage" and not list(tox_env.core["tox_root"].glob(".coverage.*")):
        raise Skip(f"nothing was measured: {MEASURED} did not run")
    progress.enter(name, tox_env.conf["env_tmp_dir"] / "progress")


@impl
def tox_env_teardown(tox_env: ToxEnv) -> None:
    progress.leave(tox_env.conf.name)
