"""Get the tests of a library from the source distribution of its installed version."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtpf-tests"


def pip(*arguments: str) -> None:
    """Run pip without waiting long for a network that is not there; skip the test with its reason."""
    short = ("--no-deps", "--quiet", "--retries", "1", "--timeout", "10", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", *arguments, *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        pytest.skip(f"the library's tests cannot be fetched: {reason}")


def fetch(library: str, *needed: str) -> Path:
    """Return the folder of a source distribution with its tests, kept in the user's cache.

    What the tests import beyond the library's own dependencies, ``needed``, is in the subfolder ``packages``.
    """
    name = f"{library}-{version(library)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not (CACHE / name).is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                work = Path(folder)
                wanted = f"{library}=={version(library)}"
                pip("download", wanted, "--no-binary", library, "--dest", folder)
                with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
                    members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
                    archive.extractall(work, members, filter="data")
                (work / name / "tests" / "__init__.py").touch()
                for package in needed:
                    pip("install", package, "--target", str(work / name / "packages"))
                (work / name).rename(CACHE / name)
    return CACHE / name


def run_suite(script: str, sources: Path, folder: Path, architectures) -> dict:
    """Run a script of this folder with a library's tests on its path; return what it has written."""
    output = folder / "result.json"
    paths = [sources, sources / "packages", HERE.parents[1], HERE.parent, os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    command = [sys.executable, str(HERE / script), str(output), *architectures]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())
