"""What a run needs, from its recipe: accelerator, backbone, families with their data."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..data import backbones
from ..data.words import load_word_tokenizer
from ..devices import available_cores, uses_bf16
from ..errors import RecipeError
from ..model.configuration_mtpf import max_tokens
from ..model.modeling_mtpf import MtpfModel
from .families.base import FAMILY_CLASSES, Family, RunContext
from .joint import JointModel, families_of_regime
from .recipe import Recipe


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Start accelerate: device, processes, precision, threads, seed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            # Without this, several processes on a CPU machine do not join each other.
            cpu=processes > 1 and device.type == "cpu",
            mixed_precision="bf16" if uses_bf16(device, recipe.mixed_precision) else "no",
            log_with=recipe.report_to,
            project_dir=recipe.output_dir,
        )
    except ValueError as error:
        raise RecipeError(f"accelerate refuses these settings: {error}") from error
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError(
            "accelerate is configured for gradient accumulation, which would be applied twice; set it in the "
            "recipe (gradient_accumulation_steps) and leave it out of accelerate's configuration."
        )
    if accelerator.num_processes != processes:
        raise RecipeError(
            f"{processes} processes were started, but accelerate joined {accelerator.num_processes}; start "
            "them with torchrun --nproc_per_node, or run one."
        )
    if accelerator.device.type == "cpu" and processes == 1:
        torch.set_num_threads(recipe.threads or available_cores())
    set_seed(recipe.seed)
    return accelerator


def load_backbone(recipe: Recipe) -> MtpfModel:
    """Load the starting encoder in float32.

    Raises:
        MtpfError: There is no such folder or repo, or it is not a supported encoder.
    """
    model = backbones.load_backbone(recipe.backbone, recipe.revision, dtype=torch.float32)
    model.config.regime = recipe.regime
    return model


def prepare_families(recipe: Recipe, model: MtpfModel, folder: Path) -> tuple[list[Family], RunContext]:
    """Open the data of the families that the regime trains."""
    tokenizer = load_word_tokenizer(model.config.name_or_path, recipe.revision)
    context = RunContext(tokenizer, recipe.seed, work_dir=folder)
    encoder = model.config.encoder_config
    if len(tokenizer) > encoder.vocab_size:
        raise RecipeError(
            f"The tokenizer of {recipe.backbone} has {len(tokenizer)} tokens, the encoder's "
            f"embedding {encoder.vocab_size}: they do not belong together."
        )
    families = []
    for name in families_of_regime(recipe.regime, list(recipe.families)):
        family = FAMILY_CLASSES[name](name, recipe.families[name])
        length, limit = family.settings.max_length, max_tokens(encoder)
        if length > limit:
            raise RecipeError(
                f"families.{name}.max_length is {length}, but this encoder reads at most {limit} tokens."
            )
        family.prepare(context)
        families.append(family)
    return families, context


def whole_model(
    recipe: Recipe, joint: JointModel, families: list[Family], accelerator: Accelerator
) -> JointModel:
    """Return the model with all its weights in the main process: FSDP leaves a part in each process."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return joint
    weights = get_model_state_dict(joint, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = JointModel(load_backbone(recipe), families, task_primary=recipe.regime == "tpl")
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    return whole
