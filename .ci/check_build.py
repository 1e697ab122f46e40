"""Build the sdist and the wheel, and install and use each as a stranger would.

Usage: ``python .ci/check_build.py EMPTY_DIRECTORY``, where the package ``build`` is installed.
Every build has an environment of its own, and so has every install, which gets the runtime
dependencies and nothing else. Ends at the first thing that does not work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RUNTIME_ONLY = {"gevent", "greenlet", "psofa-gevent", "zope-event", "zope-interface"}
"""All that an install may bring: the core's dependencies and theirs."""
USE = """\
import importlib.metadata, importlib.resources, sys
import psofa_gevent
assert psofa_gevent.__version__ == sys.argv[1], psofa_gevent.__version__
assert importlib.metadata.version("psofa-gevent") == sys.argv[1]
assert importlib.resources.files("psofa_gevent").joinpath("py.typed").is_file()
names = {dist.name.lower().replace("_", "-").replace(".", "-")
         for dist in importlib.metadata.distributions()}
print(*names - {"pip", "setuptools"})
"""


def run(*command: str | Path, cwd: Path) -> str:
    print("+", *(str(part).partition("\n")[0] for part in command), flush=True)
    # Out of the way: what would make Python import the checkout instead of what was installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nexit code {done.returncode}")
    return done.stdout


def build(source: Path, target: Path, *options: str) -> list[Path]:
    run(sys.executable, "-m", "build", "--outdir", target, *options, source, cwd=target.parent)
    return sorted(target.iterdir())


def version_of(built: Path) -> str:
    return built.name.removesuffix(".tar.gz").split("-")[1]


def check_install(built: Path, directory: Path) -> None:
    directory.mkdir()
    venv.create(directory / "venv", with_pip=True)
    programs = directory / "venv" / "bin"
    run(programs / "pip", "install", "--quiet", built, cwd=directory)
    run(programs / "pip", "check", cwd=directory)
    installed = set(run(programs / "python", "-c", USE, version_of(built), cwd=directory).split())
    if not installed <= RUNTIME_ONLY:
        raise SystemExit(f"{built.name} also installed {installed - RUNTIME_ONLY}")
    helps = {
        run(programs / "python", "-m", "psofa_gevent", "--help", cwd=directory),
        run(programs / "psofa", "--help", cwd=directory),
    }
    if not all("usage" in text.lower() for text in helps):
        raise SystemExit(f"{built.name}: --help says {helps}")


def main(directory: Path) -> None:
    # Of a copy: tox packs the checkout, too, maybe just now, and both would use the same folder.
    source = directory / "source"
    leftovers = shutil.ignore_patterns(".tox", ".venv", "build", "dist", "*.egg-info")
    shutil.copytree(PROJECT, source, symlinks=True, ignore=leftovers)
    # The wheel is built from the unpacked sdist, as pip would build it.
    wheel, sdist = sorted(
        build(source, directory / "dist"), key=lambda path: path.suffix, reverse=True
    )
    check_install(wheel, directory / "from-wheel")
    check_install(sdist, directory / "from-sdist")

    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # since 3.11.4; newer ones warn without it
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(directory / "unpacked")
    # Without what an sdist knows its version from, the tree is one out of `git archive`.
    (tree,) = (directory / "unpacked").iterdir()
    (tree / "PKG-INFO").unlink()
    shutil.rmtree(tree / "psofa_gevent.egg-info")
    (archived,) = build(tree, directory / "no-git", "--wheel")
    fallback = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    if version_of(archived) != fallback["fallback_version"]:
        raise SystemExit(f"{archived.name} does not have the version {fallback}")

    for built in (wheel, sdist, archived):
        print(f"{built.name}: {built.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
