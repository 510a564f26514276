"""transformers' own common tests, from the source distribution of the installed version, on our classes."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers
from conftest import ARCHITECTURES
from filelock import FileLock

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "compatibility.md"
CLASSES = {"Model", "ForTokenClassification", "ForSequenceClassification"}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtpf-tests"


def pip(*arguments) -> None:
    """Run pip without waiting long for a network that is not there; skip the test with its reason."""
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--no-deps",
        "--quiet",
        "--retries",
        "1",
        "--timeout",
        "10",
    ]
    command += ["--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        pytest.skip(f"transformers' tests cannot be fetched: {reason}")


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """The folder of the installed transformers' source distribution, kept in the user's cache."""
    name = f"transformers-{transformers.__version__}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not (CACHE / name / "packages" / "parameterized").is_dir():
            work = tmp_path_factory.mktemp("sources")
            wanted = f"transformers=={transformers.__version__}"
            pip("download", wanted, "--no-binary", "transformers", "--dest", str(work))
            with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
                members = [m for m in archive if m.name.startswith(f"{name}/tests/")]
                archive.extractall(work, members, filter="data")
            # Their tests import this one; it is installed last, so that a folder with it is complete.
            pip("install", "parameterized==0.9.0", "--target", str(work / name / "packages"))
            (work / name).rename(CACHE / name)
    return CACHE / name


def deliberate(architectures) -> set[tuple[str, str, str]]:
    """Read from the page which (architecture, class, test) we do not pass on purpose."""
    rows = re.findall(
        r"^\| `(test_\w+)` \| ([^|]+) \| ([^|]+) \|", PAGE.read_text("utf-8"), flags=re.MULTILINE
    )
    listed = set()
    for test, classes, encoders in rows:
        chosen = {name.removeprefix("Mtpf") for name in re.findall(r"`(\w+)`", classes)} or CLASSES
        known = set(architectures if encoders == "all" else encoders.split(", "))
        assert chosen <= CLASSES and known <= set(ARCHITECTURES), (test, classes, encoders)
        listed |= {(name, part, test) for name in known & set(architectures) for part in chosen}
    return listed


@pytest.mark.slow
@pytest.mark.parametrize("architectures", [ARCHITECTURES[:3], ARCHITECTURES[3:]], ids=" ".join)
def test_all_that_the_stock_class_passes_passes_or_is_documented(sources, tmp_path, architectures):
    output = tmp_path / "result.json"
    paths = [sources, sources / "packages", HERE.parents[1], HERE.parent, os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = [sys.executable, str(HERE / "transformers_suite.py"), str(output), *architectures]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    ours = {tuple(row[:3]): row[5] for row in result["rows"] if row[4] == "passed"}
    allowed = deliberate(architectures)
    assert {key: message for key, message in ours.items() if key not in allowed} == {}
    assert allowed - set(ours) == set(), "these pass; remove them from docs/compatibility.md"
    assert result["passed"] > 300 * len(architectures)
