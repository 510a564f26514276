"""Mutate valid adapters, backbones and exports, and load each in a child process with bounded time and memory.

    python tests/folder_fuzzer.py FOLDER --cases 2000 --seed 0

FOLDER holds ``backbone``, ``entities`` (an app), ``bundle``, ``prefix`` (an app with one), ``delta`` (a standalone
app) and ``phone`` (an export), as `tests/test_fuzz.py` makes them.
Every outcome is ``loaded`` (with the right results), ``clear`` (refused in one sentence, and `inspect` finds
something), or a fault: ``wrong``, ``traceback``, ``slow`` (5 s of CPU), ``large`` (1 GB), ``died``.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

KINDS = {
    "adapter": "entities",
    "backbone": "backbone",
    "export": "phone",
    "bundle": "bundle",
    "prefix": "prefix",
    "delta": "delta",
}
SECONDS, BYTES = 5, 1_000_000_000
NEEDS_BACKBONE = re.compile(
    "trained on|trained with|the backbone reads|the backbone has no|rows of new tokens"
)
"""Refusals of what `inspect` of one folder cannot know."""
GOOD = ("loaded", "clear")
TEXTS = ["Ada Lovelace met Charles Babbage in London on Monday.", "Hi"]
EVIL = "(([a-z0-9]+)+[._]?)+!"
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "[" * 50 + "]" * 50,
    "[" * 5000 + "]" * 5000,
    '"\\ud800"',
    "1" * 5000,
)
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 4 * 10**9, 10**18, 10**40, 0.5, -0.0, 1e308),
    *("", "x", "\x1b[31m", "a\nb", "../../etc/passwd", "/etc/passwd", "evil/kernel", EVIL, "(a+)+b", "[" * 9),
    *(
        "float16",
        "int8",
        "load",
        "\u202e",
        "x" * 1_000_000,
        [],
        {},
        [[]],
        {"a": {}},
        ["a"],
        [1, 2],
        ["x"] * 50_000,
    ),
    *({"Regex": "(a+)+b"}, {"Regex": "["}, {"String": ""}, {str(number): number for number in range(20_000)}),
)
KEYS = (
    *(
        "attn_implementation",
        "_attn_implementation",
        "quantization_config",
        "auto_map",
        "to_dict",
        "__class__",
    ),
    *("torch_dtype", "num_labels", "id2label", "is_decoder", "layer_norm_eps", "per_layer_config", "dropout"),
    *(
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "rank_pattern",
        "exclude_modules",
        "layers_pattern",
        "bias",
    ),
    *("format_version", "kind", "precompiled_charsmap", "type", "normalizer", "pre_tokenizer", "truncation"),
)
FREE = {
    *(
        "lora_alpha",
        "use_rslora",
        "alpha_pattern",
        "rank_pattern",
        "max_length",
        "window_overlap",
        "special_tokens",
    ),
    *("pad_token_id", "lora_dropout", "labels", "kind", "before", "after", "tail", "trunk"),
}
"""Keys that change results rightly, because nothing else in the folder tells what they were."""


# ------------------------------------------------------------------------------------------------- mutation


def mutate(folder: Path, chance: random.Random) -> str:
    """Change one to three things in a folder; return what, with a ``*`` where results may change."""
    return "; ".join(_mutate_once(folder, chance) for _ in range(chance.choice((1, 1, 1, 2, 3))))


def _mutate_once(folder: Path, chance: random.Random) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".md"))
    if not files:
        return "nothing left"
    weights = [4 if path.suffix == ".json" else 2 if path.suffix == ".safetensors" else 1 for path in files]
    file = chance.choices(files, weights)[0]
    name = file.relative_to(folder).as_posix()
    if chance.random() < 0.1:
        done = _mutate_file(file, files, chance)
    elif file.suffix == ".json" and chance.random() < 0.85:
        done = _mutate_json(file, chance)
    elif file.suffix == ".safetensors" and chance.random() < 0.7:
        done = _mutate_header(file, chance)
    else:
        done = _mutate_bytes(file, chance)
    _hash_again(folder, file)
    return f"{name}: {done}"


def _mutate_file(file: Path, files: list[Path], chance: random.Random) -> str:
    how = chance.choice(("delete", "empty", "folder", "other", "noise", "link"))
    data = file.read_bytes()
    file.unlink()
    if how == "empty":
        file.touch()
    elif how == "folder":
        file.mkdir()
    elif how == "other":
        other = chance.choice(files)
        file.write_bytes(data if other == file else other.read_bytes())
    elif how == "noise":
        file.write_bytes(chance.randbytes(len(data) // 2))
    elif how == "link":
        file.symlink_to("/etc/hostname")
    return how


def _mutate_json(file: Path, chance: random.Random) -> str:
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return _mutate_bytes(file, chance)
    parent, path = value, []
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            return "empty already"
        key = chance.choice(keys)
        path.append(str(key))
        if not isinstance(parent[key], (dict, list)) or not parent[key] or chance.random() < 0.3:
            break
        parent = parent[key]
    how, raw = (
        chance.choice(("value", "value", "value", "raw", "delete", "add", "swap", "twice", "nudge")),
        None,
    )
    new = chance.choice(VALUES)
    if how == "delete":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        path[-1] = chance.choice(KEYS)
        parent[path[-1]] = new
    elif how == "swap":
        other = chance.choice(keys)
        parent[key], parent[other] = parent[other], parent[key]
        path.append(str(other))
    elif how == "nudge" and type(parent[key]) in (int, float):
        parent[key] += chance.choice((-1, 1, 100, -0.5))
    elif how in ("raw", "twice"):
        raw, parent[key] = chance.choice(RAW) if how == "raw" else "1, " + json.dumps(str(key)) + ": 2", "RAW"
    else:
        parent[key] = new
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    file.write_text(
        text if raw is None else text.replace('"RAW"', raw), encoding="utf-8", errors="surrogatepass"
    )
    return f"{how} at {'.'.join(path)[:60]} {str(new)[:20] if how in ('value', 'add') else ''}" + "*" * bool(
        FREE & {*path}
    )


def _mutate_header(file: Path, chance: random.Random) -> str:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        key = chance.choice(sorted(header))
        how = chance.choice(("dtype", "shape", "offsets", "name", "drop", "entry", "metadata"))
        entry = header[key]
        if how == "dtype":
            entry["dtype"] = chance.choice(
                ("I8", "BOOL", "F64", "F16", "BF16", "I64", "F8_E4M3", "X", None, 5)
            )
        elif how == "shape":
            entry["shape"] = chance.choice(
                ([], [2**40, 2**40], [-1], entry["shape"][::-1], "x", [1.5], [2**63])
            )
        elif how == "offsets":
            entry["data_offsets"] = chance.choice(([0, 0], [0, 2**60], [-4, 4], [8, 4], [0], entry["shape"]))
        elif how == "name":
            header[chance.choice((key + "x", "a" * 99, "\x1b", "__proto__"))] = header.pop(key)
        elif how == "drop":
            del header[key]
        elif how == "entry":
            header[key] = chance.choice(VALUES)
        else:
            header["__metadata__"] = chance.choice(
                (*VALUES, {"labels": "["}, {"labels": "[" * 9999}, {"app": "{}"})
            )
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return _mutate_bytes(file, chance)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return f"header {how} of {key}*"


def _mutate_bytes(file: Path, chance: random.Random) -> str:
    data = bytearray(file.read_bytes() or b"x")
    how = chance.choice(("flip", "flips", "cut", "insert", "append", "length"))
    at = chance.randrange(len(data))
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else 50):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = chance.randbytes(chance.choice((1, 8, 1000)))
    elif how == "append":
        data += chance.choice((b"\0", b"}", chance.randbytes(100)))
    else:
        data[:8] = struct.pack("<Q", chance.choice((0, 1, 2**20, 2**40, 2**63)))
    file.write_bytes(data)
    return f"{how} at {at}*"


def _hash_again(folder: Path, file: Path) -> None:
    """Let an export list the hash of the changed file, as an attacker would."""
    try:
        manifest = json.loads((folder / "export.json").read_text())
        name = file.relative_to(folder).as_posix()
        entries = [*manifest["files"].items(), *((app["file"], app) for app in manifest["apps"].values())]
        for listed, entry in entries:
            if listed == name and file.is_file():
                entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "export.json").write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass


# ---------------------------------------------------------------------------------------------------- child


class Child:
    """Loads folders, one after the other."""

    def __init__(self, originals: Path):
        spec = importlib.util.spec_from_file_location("fuzzed_runner", originals / "phone" / "runner.py")
        self.runner = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.runner)
        from modeling_mtpf.data.backbones import load_backbone
        from modeling_mtpf.errors import MtpfError
        from modeling_mtpf.hub import inspect

        self.originals, self.load_backbone, self.inspect = originals, load_backbone, inspect
        self.refusals = (MtpfError, self.runner.RunnerError)
        self.model = load_backbone(str(originals / "backbone")).eval()
        self.expected = {kind: self.results(kind, originals / name) for kind, name in KINDS.items()}
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def results(self, kind: str, folder: Path):
        if kind == "export":
            return self.runner.Runner(folder, threads=1).predict(TEXTS, ["entities"])["entities"]
        adapter = kind not in ("backbone", "export")
        model = self.model if adapter else self.load_backbone(str(folder)).eval()
        try:
            source = folder if adapter else self.originals / "entities"
            model.load_adapter(source, adapter_name="fuzzed", standalone=kind == "delta")
            results = model.predict(TEXTS, adapters=["fuzzed"])["fuzzed"]
            parts = ("words", "goal")
            return results if kind != "bundle" else [[*row[parts[0]], row[parts[1]]] for row in results]
        finally:
            if "fuzzed" in (*model.adapters, *model.standalone):
                model.delete_adapter("fuzzed")

    def outcome(self, kind: str, folder: Path, may_differ: bool) -> tuple[str, str]:
        try:
            results, refusal = self.results(kind, folder), None
        except self.refusals as error:
            results, refusal = None, str(error)
        except BaseException as error:  # also a panic of Rust
            return "traceback", f"load: {type(error).__name__}: {error}"[:300]
        findings: list[str] = []
        if kind != "export":
            try:
                inspection = self.inspect(folder)
                findings = inspection.findings
                if "\x1b" in str(inspection):
                    return "wrong", "inspect prints an escape"
            except self.refusals as error:
                findings = [str(error)]
            except BaseException as error:
                return "traceback", f"inspect: {type(error).__name__}: {error}"[:300]
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory > BYTES / 1024:
            return "large", refusal or ""
        if refusal is not None:
            if not refusal.strip() or "\n" in refusal or len(refusal) > 1500 or "\x1b" in refusal:
                return "wrong", f"no sentence: {refusal[:300]}"
            if kind != "export" and not findings and not NEEDS_BACKBONE.search(refusal):
                return "wrong", f"inspect finds nothing: {refusal[:300]}"
            return "clear", refusal[:300]
        try:
            json.dumps(results, allow_nan=False)
        except ValueError:
            return "wrong", "results are no JSON"
        same = _rounded(results) == _rounded(self.expected[kind])
        return ("loaded", "") if same or may_differ else ("wrong", f"other results: {str(results)[:200]}")


def _rounded(results):
    if results and isinstance(results[0], dict):  # of a text classifier
        return [{**row, "score": round(row["score"], 3)} for row in results]
    return [[{**entity, "score": round(entity["score"], 3)} for entity in row] for row in results]


def serve(originals: Path) -> None:
    """Answer each line of standard input (kind, folder, whether results may differ) with its outcome."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)  # panics print a trace before they are raised
    child = Child(originals)
    print("ready", file=answers, flush=True)  # noqa: T201
    for line in sys.stdin:
        kind, folder, may_differ = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU; SIGPROF ends the process
        answer = child.outcome(kind, Path(folder), may_differ)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)  # noqa: T201


# --------------------------------------------------------------------------------------------------- driver


class Driver:
    """Runs cases in a child that is started again when it dies."""

    def __init__(self, originals: Path):
        self.originals, self.child = originals, None

    def start(self):
        limit = 16 * 10**9  # of addresses, so that no case takes the machine down
        self.child = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.originals)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        if self.child.stdout.readline().strip() != "ready":
            raise RuntimeError("The child cannot load the original folders.")

    def stop(self):
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None

    def run(self, kind: str, folder: Path, may_differ: bool) -> tuple[str, str]:
        if self.child is None:
            self.start()
        self.child.stdin.write(json.dumps([kind, str(folder), may_differ]) + "\n")
        self.child.stdin.flush()
        ready, _, _ = select.select([self.child.stdout], [], [], 60)
        line = self.child.stdout.readline() if ready else ""
        if line:
            answer = tuple(json.loads(line))
            if answer[0] == "large":
                self.stop()
            return answer
        self.stop() if not ready else self.child.wait()
        code = self.child.returncode if self.child is not None else None
        self.child = None
        return ("slow" if code in (None, -signal.SIGPROF) else "died"), f"exit status {code}"


def fuzz(originals: Path, cases: int, seed: int, kinds=tuple(KINDS), progress=None):
    """Return the count of each outcome by kind, and the faults: seed, kind, mutation, outcome, reason."""
    counts, faults, driver = {kind: Counter() for kind in kinds}, [], Driver(originals)
    try:
        for case in range(cases):
            kind = kinds[case % len(kinds)]
            chance = random.Random(f"{seed} {case}")
            with tempfile.TemporaryDirectory() as root:
                folder = Path(shutil.copytree(originals / KINDS[kind], Path(root) / "folder"))
                done = mutate(folder, chance)
                # An export's tokenizer is what its manifest says; a backbone's is known to the app.
                may_differ = kind != "backbone" and ("*" in done or "tokenizer.json" in done)
                outcome, reason = driver.run(kind, folder, may_differ)
            counts[kind][outcome] += 1
            if outcome not in GOOD:
                faults.append((f"{seed} {case}", kind, done, outcome, reason))
            if progress:
                progress(case, kind, done, outcome, reason)
    finally:
        driver.stop()
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    if options.serve:
        serve(options.folder)
        return

    def progress(case, kind, done, outcome, reason):
        if options.verbose or outcome not in GOOD:
            sys.stdout.write(f"{case} {kind} {outcome}\n    {done}\n    {reason}\n")
            sys.stdout.flush()

    counts, faults = fuzz(options.folder, options.cases, options.seed, tuple(options.kinds), progress)
    for kind, outcomes in counts.items():
        sys.stdout.write(f"{kind}: {sum(outcomes.values())} tried, {dict(outcomes)}\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
