"""Joint training: one LoRA and a head a part, from the labels of all parts; a step is one part's batch."""

import torch
from torch import nn

from ...model.trunk_mtpf import adapter_modules, encoder_layers
from ..tail_training import add_app
from .low_rank import LowRank, Matrices
from .registry import BundleFit, Job, register_bundle_method
from .training import fresh_heads, objective_of, train_bundle

_FRESH = "bundle-in-training"


class PlainLora:
    """A LoRA that is trained as it is; it starts fresh, or from that of a loaded adapter."""

    def __init__(self, job: Job):
        model = job.model
        shape = job.settings.shape(len(encoder_layers(model.backbone)), started=job.start is not None)
        add_app(model, _FRESH, None, job.start, shape)
        self.pairs: dict[str, tuple[nn.Parameter, nn.Parameter, float]] = {}
        for path, module in adapter_modules(model.backbone, _FRESH):
            down, up = (
                nn.Parameter(part[_FRESH].weight.detach().clone()) for part in (module.lora_A, module.lora_B)
            )
            self.pairs[path] = down, up, module.scaling[_FRESH]
        model.delete_adapter(_FRESH)
        self.parameters = [parameter for down, up, _ in self.pairs.values() for parameter in (down, up)]

    def matrices(self, part: str | None) -> Matrices:
        """Return the LoRA, which is the same for every part."""
        return {path: LowRank(down, up * scale) for path, (down, up, scale) in self.pairs.items()}


@register_bundle_method("joint", needs="data")
@register_bundle_method("shared", needs="data")
def fit_joint(job: Job) -> BundleFit:
    """Train one LoRA and all heads; the methods differ in the order of the parts, see ``job.rounds``."""
    torch.manual_seed(job.settings.seed)
    heads = fresh_heads(job)
    lora = PlainLora(job)
    return train_bundle(job, lora, heads, objective_of(job, lora))
