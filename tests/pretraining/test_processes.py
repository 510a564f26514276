"""Several processes against one on the joined batch: losses, gradients, gathered negatives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]

WORKER = """
import sys, json, torch
from torch import distributed
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/pretraining"]
import test_processes
distributed.init_process_group("gloo")
test_processes.work({folder!r}, distributed.get_rank(), distributed.get_world_size())
distributed.destroy_process_group()
"""


def families():
    from test_joint import FixedNer, FixedTc

    from modeling_mtpf import LoraSettings
    from modeling_mtpf.pretraining.families.ner import NerSettings
    from modeling_mtpf.pretraining.families.tc import TcSettings

    ner = FixedNer("ner", NerSettings(lora=LoraSettings(r=4)))
    settings = TcSettings(
        weight=0.5,
        symmetric=True,
        learn_temperature=True,
        keep_similarities=0.7,
        keep_vectors=0.3,
        lora=LoraSettings(r=4),
    )
    tc = FixedTc("tc", settings)
    for family in (ner, tc):
        family.prepare(None)
    return [ner, tc]


def share(batches, rank, world):
    """One process's part of a joined batch: every world-th sentence, every world-th pair."""
    from modeling_mtpf.data.words import IGNORE
    from modeling_mtpf.pretraining.families.base import FamilyBatch

    ner, tc = batches["ner"], batches["tc"]
    rows, labels = ner.rows[rank::world], ner.labels[rank::world]
    words = sum(int((own != IGNORE).sum()) for own in labels)
    texts = int(tc.targets["texts_per_row"])
    size = len(tc.rows) // texts
    own = [
        row for column in range(texts) for row in tc.rows[column * size : (column + 1) * size][rank::world]
    ]
    return {
        "ner": FamilyBatch(rows, labels, {"labelled_words": torch.tensor(words)}),
        "tc": FamilyBatch(own, None, tc.targets),
    }


def joined():
    from test_joint import fixed_ner, fixed_tc

    return {"ner": fixed_ner(0), "tc": fixed_tc(0, pairs=6, texts_per_row=3)}


def model_for(folder: Path, recompute: bool):
    from conftest import randomize

    from modeling_mtpf import MtpfModel
    from modeling_mtpf.pretraining.joint import JointModel

    torch.manual_seed(0)
    joint = (
        JointModel(MtpfModel.from_pretrained(folder / "encoder"), families(), True, recompute).double().eval()
    )
    randomize(joint, 3, 0.1, within="lora_B")
    return joint


def work(folder: str, rank: int, world: int) -> None:
    """What each process does: a step on its part of the batch, once with DDP and once with FSDP."""
    from test_joint import plan
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from modeling_mtpf.pretraining.checkpoint import load_checkpoint, save_checkpoint

    for kind in ("ddp", "fsdp"):
        own = Path(folder, kind)
        own.mkdir(exist_ok=True)
        joint = model_for(Path(folder), recompute=True)
        wrapped = fully_shard(joint) if kind == "fsdp" else DistributedDataParallel(joint)
        optimizer = torch.optim.AdamW(joint.parameters(), lr=1e-3, eps=1e-3)
        batch = plan(share(joined(), rank, world))
        output = wrapped(batch)
        output.loss.backward()
        gradients = {name: full(p.grad) for name, p in joint.named_parameters() if p.grad is not None}
        save_file(gradients, own / f"gradients-{rank}.safetensors")
        losses = {name: loss.item() for name, loss in output.losses.items()}
        (own / f"losses-{rank}.json").write_text(json.dumps(losses))
        optimizer.step()
        optimizer.zero_grad()
        checkpoint = save_checkpoint(own, 1, joint, optimizer, {}, keep=1)
        wrapped(batch).loss.backward()  # away from the checkpoint, and back
        optimizer.step()
        load_checkpoint(checkpoint, joint, optimizer)
        again = wrapped(batch).loss
        (own / f"after-{rank}.json").write_text(json.dumps(again.item()))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP may have sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@pytest.mark.slow
def test_two_processes_are_one_on_the_joined_batch(encoders, tmp_path):
    """With cached gradients, hard negatives, both directions, unequal numbers of words; DDP and FSDP."""
    from test_joint import plan

    (tmp_path / "encoder").symlink_to(encoders["bert"])
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]

    joint = model_for(tmp_path, recompute=False)
    optimizer = torch.optim.AdamW(joint.parameters(), lr=1e-3, eps=1e-3)
    output = joint(plan(joined()))
    output.loss.backward()
    expected = {name: p.grad.clone() for name, p in joint.named_parameters() if p.grad is not None}
    assert "objectives.tc.log_temperature" in expected
    optimizer.step()
    after = joint(plan(joined())).loss.item()
    for kind in ("ddp", "fsdp"):
        own = tmp_path / kind
        ranks = [json.loads((own / f"losses-{rank}.json").read_text()) for rank in range(2)]
        for name, loss in output.losses.items():
            assert sum(found[name] for found in ranks) / 2 == pytest.approx(loss.item(), rel=1e-12)
            assert ranks[0][name] != pytest.approx(ranks[1][name], rel=1e-3)
        for rank in range(2):
            found = load_file(own / f"gradients-{rank}.safetensors")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-13, name
        stored = load_file(own / "checkpoints" / "step-1" / "model.safetensors")
        for name, value in joint.state_dict().items():
            assert (stored[name] - value).norm() <= 1e-9 * value.norm() + 1e-12, name
        loaded = [json.loads((own / f"after-{rank}.json").read_text()) for rank in range(2)]
        assert sum(loaded) / 2 == pytest.approx(after, rel=1e-9)
