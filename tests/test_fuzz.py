"""Mutated folders load with the right results or are refused in one sentence, in bounded time and memory."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import LABELS, randomize, write_standalone
from folder_fuzzer import KINDS, fuzz
from test_prefix import add_prefixed, words_head

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.export import export_onnx

CASES, SEED = int(os.environ.get("MTPF_FUZZ_CASES", "240")), int(os.environ.get("MTPF_FUZZ_SEED", "0"))


@pytest.fixture(scope="session")
def originals(folders, tmp_path_factory) -> Path:
    """A backbone, an app and an export; with MTPF_FUZZ_FOLDER they are also copied there."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("backbone", "entities"):
        shutil.copytree(folders / name, root / name)
    model = MtpfModel.from_pretrained(root / "backbone").eval()
    heads = {"words": AdapterHead(*LABELS["entities"], 32), "goal": AdapterHead(*LABELS["intent"], 32)}
    model.add_adapter("bundle", LoraSettings(r=2), heads)
    randomize(model, 1, 0.5, within=".bundle.")
    task = {"composition": {"method": "lc++", "weights": {"words": 0.5}, "steps": 3, "texts": {"texts": 2}}}
    model.save_adapter(root / "bundle", "bundle", task=task)
    add_prefixed(model, "prefix", head=words_head())
    model.save_adapter(root / "prefix", "prefix")
    write_standalone(root / "backbone", root / "delta")
    export_onnx(root / "backbone", [root / "entities"], root / "phone")
    if kept := os.environ.get("MTPF_FUZZ_FOLDER"):
        shutil.copytree(root, kept, dirs_exist_ok=True)
    return root


@pytest.mark.slow
def test_mutated_folders_load_rightly_or_are_refused(originals):
    """MTPF_FUZZ_CASES and MTPF_FUZZ_SEED try others; ``tests/folder_fuzzer.py`` runs thousands."""
    alone = ["bundle", "prefix", "delta"]
    for kinds in ([kind for kind in KINDS if kind not in alone], *([kind] for kind in alone)):
        cases = CASES * len(kinds) // 3
        counts, faults = fuzz(originals, cases, SEED, tuple(kinds))
        assert not faults, "\n".join(map(str, faults))
        assert all(counts[kind]["clear"] > CASES / 12 for kind in kinds), (
            counts
        )  # a mutator that changes nothing finds nothing
