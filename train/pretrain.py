"""Pre-finetune one encoder for all families: one forward, one backward, a LoRA for each family.

The demo (a few minutes on 2 cores), an own recipe with overrides, going on after an interruption, and several
processes on one machine:

    accelerate launch train/pretrain.py
    accelerate launch train/pretrain.py my.yaml --regime naive --steps 5000
    python train/pretrain.py my.yaml --resume auto
    torchrun --nproc_per_node 2 train/pretrain.py my.yaml

"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

# Few batch shapes occur (see pretraining/chunks.py); oneDNN keeps a compiled kernel for each.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo lies beside this script, not in the package

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "accelerate", "datasets", "sklearn", "yaml", "tqdm", "matplotlib", "syntok")

import datasets
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.pretraining.checkpoint import clear_leftovers, read_state
from modeling_mtpf.pretraining.curves import draw_run
from modeling_mtpf.pretraining.diagnostics import adapter_movement, backbone_movement
from modeling_mtpf.pretraining.joint import JointModel
from modeling_mtpf.pretraining.loop import Interrupted, Progress, train
from modeling_mtpf.pretraining.publish import save_run
from modeling_mtpf.pretraining.recipe import Recipe, load_recipe, resolved, usage
from modeling_mtpf.pretraining.run_record import (
    PACKAGES,
    RUN_FILE,
    MetricsLog,
    check_same_run,
    hardware,
    lock_folder,
    open_output_dir,
    summary,
    write_run_file,
)
from modeling_mtpf.pretraining.setup import load_backbone, make_accelerator, prepare_families, whole_model
from modeling_mtpf.version import versions
from train.demo import apps as demo

DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


def run(arguments: list[str]) -> None:
    """Carry out one run, from arguments to the saved folders."""
    recipe = load_recipe(arguments, DEMO_RECIPE)
    datasets.disable_progress_bars()  # local files open in a moment; the bars that matter are ours
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(recipe)
    folder, checkpoint = open_output_dir(recipe.output_dir, recipe.resume)
    with lock_folder(folder) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        if recipe.resume == "auto" and (folder / RUN_FILE).is_file():
            print(f"{folder} holds the finished run; there is nothing to resume.")
        else:
            pretrain(recipe, accelerator, folder, checkpoint)


def pretrain(recipe: Recipe, accelerator: Accelerator, folder: Path, checkpoint: Path | None) -> None:
    """Train from the start or from a checkpoint, and save everything."""
    started = time.time()
    if recipe.demo:
        demo.add_demo_data(recipe, folder, accelerator)
    model = load_backbone(recipe)
    families, context = prepare_families(recipe, model, folder, accelerator)
    data = {family.name: family.describe() for family in families}
    facts = {
        "recipe": resolved(recipe),
        "data": data,
        "start_sha256": backbone_sha256(model),
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
    }
    state = read_state(checkpoint) if checkpoint else {}
    if checkpoint:
        check_same_run(facts, checkpoint, state)
    step = state.get("step", 0)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    joint = JointModel(model, families, recipe.regime == "tpl", recipe.gradient_cache)
    if accelerator.is_main_process:
        clear_leftovers(folder)
    log = MetricsLog(folder, accelerator.is_main_process, accelerator.device, step, state.get("log"))
    if families:
        progress = Progress(step, checkpoint, {**state, "newest": step}, facts)
        train(recipe, joint, families, accelerator, log, folder, progress)
    log.close()
    counts = log.total_counts()
    joint = whole_model(recipe, joint, families, accelerator)
    model = joint.model
    accelerator.wait_for_everyone()
    accelerator.end_training()  # ends the process group, too: nothing may wait for others from here on
    if not accelerator.is_main_process:
        return
    joint.to("cpu").eval()
    record = {
        "regime": recipe.regime,
        "recipe": resolved(recipe),
        "versions": versions(*PACKAGES),
        "hardware": hardware(accelerator),
        "data": {name: {**own, **counts.get(name, {})} for name, own in data.items()},
        "first": log.lines[0] if log.lines else {},
        "last": log.lines[-1] if log.lines else {},
        "moved": {"backbone": backbone_movement(before, model.backbone), **adapter_movement(joint)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "resumed_at": step or None,
    }
    save_run(folder, model, context.tokenizer, record)
    if log.lines:
        draw_run(folder, recipe.regime, log.lines)
    write_run_file(folder, record)
    print(summary(folder, record))
    if recipe.demo and recipe.regime == "tpl":
        print(demo.show_apps(folder, model, context.tokenizer))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; a user's mistake ends in one sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nKeys, their defaults and meanings:\n{usage()}")
        return 0
    try:
        run(arguments)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + 15  # as of a process that SIGTERM has ended
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
