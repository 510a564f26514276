"""Kill writers at random moments, fill a disk, write to a read-only one: what then loads must be whole.

    python eval/checks/real_faults.py --kills 20

Each writer runs in a process of its own, which gets SIGKILL at a random moment of its work. The small file
systems need the rights of root. Prints a table; exits with 1 where anything is neither old nor new.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub_server import HubServer  # noqa: E402

HUB = HubServer()
HUB.start()
os.environ.update(HUB.environment())  # before the Hub's client is imported

import torch  # noqa: E402
from conftest import encoder_config, make_tokenizer, randomize  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from transformers import AutoModel  # noqa: E402

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel  # noqa: E402
from modeling_mtpf.adaptation import FitSettings, fit_app  # noqa: E402
from modeling_mtpf.data.backbones import open_backbone  # noqa: E402
from modeling_mtpf.errors import MtpfError  # noqa: E402
from modeling_mtpf.export import export_onnx  # noqa: E402
from modeling_mtpf.export.runner import Runner  # noqa: E402
from modeling_mtpf.hub import pull, push_adapter, push_backbone  # noqa: E402
from modeling_mtpf.settings import ScriptParser  # noqa: E402

constants.HF_HUB_OFFLINE = False  # the tests' set-up has turned it on
torch.set_num_threads(1)  # two would wait for each other on a machine with other work
TEXTS = [{"text": f"call Ada number {n}", "label": f"label {n % 2}"} for n in range(40)]
TEXT = ["call Ada in Lisbon"]


class Work:
    """A backbone, two states of an app, and what each of the four writers does with them."""

    def __init__(self, root: Path):
        self.root, self.backbone = root, root / "backbone"
        tokenizer = make_tokenizer(False)
        encoder = AutoModel.from_config(encoder_config("bert", len(tokenizer)))
        randomize(encoder)
        encoder.save_pretrained(self.backbone)
        tokenizer.save_pretrained(self.backbone)
        MtpfModel.from_pretrained(self.backbone).save_pretrained(self.backbone)
        self.results = {}
        for number, label in enumerate(("old", "new")):
            model = MtpfModel.from_pretrained(self.backbone).eval()
            model.add_adapter("app", LoraSettings(r=8, alpha=4 + number))
            model.heads["app"] = AdapterHead("text-classification", [f"{label} {n}" for n in range(9)], 32)
            for key, parameter in model.named_parameters():
                if ".app." in key:
                    torch.nn.init.normal_(parameter)
            self.new = model
            model.save_adapter(root / label, "app", task={"family": "tc", "training_data": label})
            self.results[label] = model.predict(TEXT, ["app"])["app"]
        self.opened = open_backbone(str(self.backbone))
        export_onnx(self.backbone, [f"first={root / 'old'}"], root / "exported")
        push_backbone(self.backbone, "mtpf/encoder")

    def state(self, folder: Path) -> str:
        """Which app a folder holds; `broken` where it is none of the two."""
        model = MtpfModel.from_pretrained(self.backbone).eval()
        try:
            model.load_adapter(folder, "app")
        except MtpfError:
            return "refused"
        result = model.predict(TEXT, ["app"])["app"]
        return next((name for name, known in self.results.items() if known == result), "broken")

    def save(self, folder: Path) -> Callable[[], str]:
        """Save over an adapter."""
        shutil.copytree(self.root / "old", folder / "app")
        self.write = lambda: self.new.save_adapter(folder / "app", "app", task={"training_data": "new"})
        return lambda: self.state(folder / "app")

    def adapt(self, folder: Path) -> Callable[[], str]:
        """Fit an app."""
        settings = FitSettings(steps=12, batch_size=8, evaluations=2, mixed_precision="float32")
        options: dict[str, Any] = {"backbone": self.opened, "settings": settings, "method": "lora"}
        self.write = lambda: fit_app(TEXTS, "tc", output_dir=folder / "app", **options)

        def state() -> str:
            if not (folder / "app").exists():
                return "old"
            model = MtpfModel.from_pretrained(self.backbone).eval()
            whole = model.predict(TEXT, [model.load_adapter(folder / "app")])
            return "new" if whole and (folder / "app" / "README.md").is_file() else "broken"

        return state

    def export(self, folder: Path) -> Callable[[], str]:
        """Add an app to an export."""
        shutil.copytree(self.root / "exported", folder / "phone")
        self.write = lambda: export_onnx(self.backbone, [f"second={self.root / 'new'}"], folder / "phone")

        def state() -> str:
            runner = Runner(folder / "phone", threads=1)
            results = runner.predict(TEXT, list(runner.apps))
            labels = [results[name][0]["label"] for name in runner.apps]
            expected = [self.results["old"][0]["label"], self.results["new"][0]["label"]][: len(labels)]
            return {1: "old", 2: "new"}[len(labels)] if labels == expected else "broken"

        return state

    def push(self, folder: Path) -> Callable[[], str]:
        """Publish an app over another one."""
        repo = f"mtpf/{folder.name}"
        push_adapter(self.root / "old", repo, backbone_id="mtpf/encoder")
        self.write = lambda: push_adapter(self.root / "new", repo, backbone_id="mtpf/encoder")
        return lambda: self.state(pull(repo))


def in_child(write: Callable[[], object], after: float | None = None) -> tuple[float, int]:
    """Run a writer in a process, which is killed after some seconds; return its time and exit status."""
    inner, outer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            begun = time.monotonic()
            write()
            os.write(outer, str(time.monotonic() - begun).encode())
            os._exit(0)
        except MtpfError:
            os._exit(2)
        finally:
            os._exit(1)
    os.close(outer)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(inner) as pipe:
        return float(pipe.read() or 0), status


@contextmanager
def small_disk(folder: Path):
    """Mount 16 MB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, free: int) -> int:
    """Fill a disk up to some bytes; return how many are left."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        file.truncate(max(0, file.tell() - free))
    return shutil.disk_usage(disk).free


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="for each writer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--writers", nargs="+", default=["save", "adapt", "export", "push"])
    options = parser.parse_args(arguments)
    moments, failed = random.Random(options.seed), False
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        for name in options.writers:
            prepare, seen, killed = getattr(work, name), Counter[str](), 0
            for number in range(2):  # the first time takes longer
                (target := work.root / f"{name}-whole-{number}").mkdir()
                state = prepare(target)
                seconds, status = in_child(work.write)
                failed |= status != 0 or state() != "new"
            for number in range(options.kills):
                (target := work.root / f"{name}-{number}").mkdir()
                state = prepare(target)
                _, status = in_child(work.write, moments.uniform(0, 1.05 * seconds))
                killed += status == -signal.SIGKILL
                seen[state()] += 1
                status = in_child(work.write)[1]  # the same command again
                failed |= not (status == 0 or (name == "adapt" and status == 2)) or state() != "new"
            failed |= bool(seen.keys() - {"old", "new"})
            print(
                f"{name:<8} whole in {seconds:.2f} s; {options.kills} kills, {killed} in time: {dict(seen)}"
            )
        for number, fault in enumerate(["full"] * 4 + ["read-only"]):
            for name in (writer for writer in options.writers if writer != "push"):
                with small_disk(work.root / f"{fault}-{name}-{number}") as disk:
                    state = getattr(work, name)(disk)
                    shown = fault
                    if fault == "full":
                        shown = f"{fill(disk, 8192 * number):,} bytes free"
                    else:
                        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
                    status, after = in_child(work.write)[1], state()
                    failed |= (status, after) not in ((2, "old"), (0, "new"))
                    print(f"{shown:<18}{name:<8} exit status {status}, afterwards: {after}", flush=True)
    HUB.stop()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
