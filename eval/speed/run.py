"""Speed and memory next to plain references, in the same run on the same machine.

    python eval/speed/run.py --sections labels --text texts.parquet --output speed.json
    python eval/speed/run.py --sections tc,ner,joint,cache --text texts.parquet --pairs pairs \
        --output speed.json

A section is a module ``eval/speed/sections/NAME.py`` with

* ``CONTESTANTS``: name → most rounds it takes part in,
* ``ENVIRONMENTS``, maybe: beginnings of names of contestants that run in an environment of their own, which
  ``--python NAME=PATH`` names; without it they are left out, and ``compare`` does without them,
* ``measure(contestant, options)``: does the work in a fresh process and returns its numbers,
* ``compare(medians)``: from contestant → median of each number to the ratios that are judged: what → (value,
  ``<=`` or ``>=``, limit).

Each contestant runs in its own process, in turn with the others of the same round; its peak memory
(``peak_mb``) is what the operating system counted for that process. With ``--threads 1`` seconds are those of
the CPU, so that other work on the machine decides little. What is judged is the median over rounds of the
ratio within a round, next to the least and the greatest. The record says what the machine is and what
products of matrices reach on it. This script imports nothing large: the peak of a process is never below the
size of the process that starts it.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

sys.path.insert(0, str(Path(__file__).parents[2]))  # sections share code in eval.speed.inputs

from modeling_mtpf.settings import ScriptParser
from modeling_mtpf.version import versions

SECTIONS = Path(__file__).parent / "sections"
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "scikit-learn")


def load_section(name: str) -> ModuleType:
    """Import a section by its name."""
    spec = importlib.util.spec_from_file_location(name, SECTIONS / f"{name}.py")
    if spec is None or spec.loader is None or not (SECTIONS / f"{name}.py").is_file():
        known = ", ".join(sorted(file.stem for file in SECTIONS.glob("*.py")))
        raise SystemExit(f"error: there is no section {name!r}; known: {known}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_contestant(section: str, contestant: str, options: dict) -> dict[str, float]:
    """Measure one contestant in its own process."""
    python = options.get("pythons", {}).get(contestant.partition("_")[0], sys.executable)
    command = [python, __file__, "--contestant", contestant, "--sections", section]
    with tempfile.TemporaryFile("w+") as errors:  # a full pipe would block the contestant
        child = subprocess.Popen(
            [*command, "--options", json.dumps(options)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"error: {section}/{contestant} failed:\n{errors.read()[-2000:]}")
    # Linux counts in KiB, macOS in bytes.
    peak = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return {**json.loads(output.splitlines()[-1]), "peak_mb": round(peak, 1)}


def run_section(name: str, rounds: int, options: dict) -> dict:
    """Run all contestants in turn, round after round, and compare their medians."""
    section = load_section(name)
    missing = {name for name in getattr(section, "ENVIRONMENTS", ()) if name not in options["pythons"]}
    for contestant in sorted(missing):
        print(f"{name}: {contestant} is left out; name its environment with --python {contestant}=PATH")
    contestants = {
        who: most for who, most in section.CONTESTANTS.items() if who.partition("_")[0] not in missing
    }
    results: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in contestants}
    for number in range(rounds):
        for contestant, most in contestants.items():
            if number < most:
                results[contestant].append(run_contestant(name, contestant, options))
                print(f"round {number + 1}, {name}/{contestant}: {results[contestant][-1]}", flush=True)
    medians = {
        contestant: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for contestant, runs in results.items()
    }
    compared = {}
    by_round = [
        section.compare({who: runs[min(number, len(runs) - 1)] for who, runs in results.items()})
        for number in range(rounds)
    ]
    for what, (_, sign, limit) in by_round[0].items():
        values = [of_round[what][0] for of_round in by_round]
        compared[what] = judged(statistics.median(values), sign, limit)
        compared[what]["range"] = [round(value, 4) for value in (min(values), max(values))]
    return {"rounds": results, "medians": medians, "compared": compared}


def machine(threads: int) -> dict:
    """Describe the machine, in a process of its own."""
    command = [sys.executable, __file__, "--machine", "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def judged(value: float, sign: str, limit: float) -> dict:
    """Return a number with its limit and whether it meets it."""
    meets = value <= limit if sign == "<=" else value >= limit
    return {"value": round(value, 4), "limit": f"{sign} {limit:g}", "kept": meets}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--sections", default="labels", help="names with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--text", help="raw text: a file or folder with a column 'text'")
    parser.add_argument("--pairs", help="a folder of files with columns 'anchor' and 'positive'")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--python", action="append", default=[], help="NAME=PATH of a peer's environment")
    parser.add_argument("--output", type=Path, help="raw numbers as JSON")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.machine:
        from eval.speed.machine import describe

        print(json.dumps(describe(options.threads)))
        return 0
    if options.contestant:
        numbers = load_section(options.sections).measure(options.contestant, json.loads(options.options))
        print(json.dumps(numbers))
        return 0
    inputs = {"text": options.text, "pairs": options.pairs, "threads": options.threads}
    inputs["pythons"] = dict(named.split("=", 1) for named in options.python)
    record: dict = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "threads": options.threads,
        "versions": versions(*PACKAGES),
    }
    sections = record["sections"] = {}
    for name in options.sections.split(","):
        sections[name] = run_section(name, 1 if options.quick else options.rounds, inputs)
        for what, verdict in sections[name]["compared"].items():
            low, high = verdict["range"]
            print(
                f"{name}: {what}: {verdict['value']} [{low}, {high}] ({verdict['limit']}: {verdict['kept']})"
            )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
