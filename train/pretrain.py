"""Pre-finetune one encoder for all families: one trunk pass, one backward, a LoRA for each family.

The demo (a few minutes on 2 cores), an own recipe with overrides, and many processes:

    accelerate launch train/pretrain.py
    accelerate launch train/pretrain.py my.yaml --regime naive --steps 5000
    torchrun --nproc_per_node 2 train/pretrain.py my.yaml

"""

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

# Few batch shapes occur (rows × multiples of 16); oneDNN keeps a compiled kernel for each.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "accelerate", "datasets", "sklearn", "yaml", "tqdm")

import datasets
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from modeling_mtpf.adapters_mtpf import AdapterError
from modeling_mtpf.pretraining import demo
from modeling_mtpf.pretraining.diagnostics import adapter_movement, backbone_movement, gradient_cosine
from modeling_mtpf.pretraining.joint import JointModel
from modeling_mtpf.pretraining.publish import save_run
from modeling_mtpf.pretraining.recipe import Recipe, load_recipe, resolved, usage
from modeling_mtpf.pretraining.run_record import (
    MetricsLog,
    hardware,
    new_output_dir,
    summary,
    versions,
    write_run_file,
)
from modeling_mtpf.pretraining.setup import (
    load_backbone,
    make_accelerator,
    make_optimizer,
    prepare_families,
    start_trackers,
)

DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


def train(recipe: Recipe, joint: JointModel, families: list, accelerator, log: MetricsLog) -> None:
    """Run the loop: ``recipe.steps`` optimiser steps of the joint loss."""
    optimizer, schedule = make_optimizer(recipe, joint)
    wrapped, optimizer = accelerator.prepare(joint, optimizer)
    parts = recipe.gradient_accumulation_steps
    rank, world = accelerator.process_index, accelerator.num_processes
    start_trackers(recipe, accelerator)
    wrapped.train()
    with tqdm(total=recipe.steps, desc=recipe.regime, disable=not accelerator.is_main_process) as progress:
        for step in range(1, recipe.steps + 1):
            for part in range(parts):
                index = (step - 1) * parts + part
                batches = {family.name: family.batch(index, rank, world) for family in families}
                batches = {name: send(batch, accelerator.device) for name, batch in batches.items()}
                with nullcontext() if part == parts - 1 else accelerator.no_sync(wrapped):
                    output = wrapped(batches)
                    accelerator.backward(output.loss / parts)
                log.add(output, sum(b.inputs["input_ids"].numel() for b in batches.values()), 1 / parts)
            norm = accelerator.clip_grad_norm_(joint.parameters(), recipe.max_grad_norm)
            if not torch.isfinite(norm):
                raise MtpfError(not_finite(step, output))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
            due = bool(recipe.diagnostics_every) and step % recipe.diagnostics_every == 0
            if due or step % recipe.log_every == 0 or step == recipe.steps:
                more = {"gradient_norm": round(float(norm), 4), "learning_rate": schedule.get_last_lr()[0]}
                if due:
                    with accelerator.autocast():
                        cosine = gradient_cosine(joint, batches)
                    more |= {f"gradient_cosine/{group}": round(value, 4) for group, value in cosine.items()}
                line = log.write(step, **more)
                progress.set_postfix({k: f"{v:.3f}" for k, v in line.items() if k.startswith("loss/")})
                accelerator.log(line, step=step)


def not_finite(step: int, output) -> str:
    """Say at which step and, where it can be told, in which family the numbers broke."""
    broken = [name for name, loss in output.losses.items() if not torch.isfinite(loss)]
    family = f"loss of family {broken[0]!r}" if broken else "gradient"
    return (
        f"Step {step}: the {family} is not finite; lower the learning rate or look at the data of this step. "
        "Nothing was saved."
    )


def send(batch, device: torch.device):
    """Move a family's batch to the device."""
    return type(batch)(**send_to_device(asdict(batch), device))


def run(arguments: list[str]) -> None:
    """Carry out one run, from arguments to the saved folders."""
    recipe = load_recipe(arguments, DEMO_RECIPE)
    datasets.disable_progress_bars()  # local files open in a moment; the bars that matter are ours
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(recipe)
    folder = new_output_dir(recipe.output_dir) if accelerator.is_main_process else Path(recipe.output_dir)
    accelerator.wait_for_everyone()
    started = time.time()
    if recipe.demo:
        demo.add_demo_data(recipe, folder, accelerator)
    model = load_backbone(recipe)
    families, context = prepare_families(recipe, model, folder, accelerator)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    joint = JointModel(model, families, task_primary=recipe.regime == "tpl")
    log = MetricsLog(folder, accelerator.is_main_process)
    if families:
        train(recipe, joint, families, accelerator, log)
    log.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()  # ends the process group, too: nothing may wait for others from here on
    if not accelerator.is_main_process:
        return
    joint.to("cpu").eval()
    record = {
        "regime": recipe.regime,
        "recipe": resolved(recipe),
        "versions": versions(),
        "hardware": hardware(accelerator),
        "data": {family.name: family.describe() for family in families},
        "first": log.lines[0] if log.lines else {},
        "last": log.lines[-1] if log.lines else {},
        "moved": {"backbone": backbone_movement(before, model.backbone), **adapter_movement(joint)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
    }
    save_run(folder, model, context.tokenizer, record)
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
    except (MtpfError, AdapterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
