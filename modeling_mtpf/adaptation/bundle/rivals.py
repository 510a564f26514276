"""Published ways of sharing LoRA among apps, trained from the labels of all parts and folded to stock LoRAs.

Each is a module for one linear layer of the encoder, which folds what it has for a part into one matrix pair;
the folded pair is also what is trained through, so that folding costs nothing. ``rank`` is that of the folded
LoRA, whatever a method is made of. A step is one part's batch, as in `shared`. What papers leave open, or say
of language models only, is our assumption and marked [A]; all multiply by `SCALE`, as a fresh LoRA here does.
"""

from functools import partial

import torch
from torch import nn

from ...errors import RecipeError
from .joint import PlainLora
from .low_rank import LowRank, Matrices
from .registry import BundleFit, Job, register_bundle_method
from .training import fresh_heads, objective_of, train_bundle

SCALE = 2.0


def _uniform(*shape: int) -> nn.Parameter:
    """Return matrices that start as those of `torch.nn.Linear` do, by their last dimension."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / shape[-1] ** 0.5)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _for_parts(parts: int, values: nn.Parameter) -> nn.ParameterList:
    """Return a copy for each part; as one tensor, Adam's momentum would move those of all in each step."""
    return nn.ParameterList([nn.Parameter(values.data.clone()) for _ in range(parts)])


class MtlLora(nn.Module):
    """MTL-LoRA (arXiv 2410.09437): A_t = L_t A, B_t = sum_n softmax(w_t / 0.1)_n B_n.

    A and three B are shared; a part has L_t, the identity at the start, and w_t.
    """

    ups, temperature = 3, 0.1

    def __init__(self, out: int, into: int, rank: int, parts: int):
        super().__init__()
        self.down, self.up = _uniform(rank, into), _zeros(self.ups, out, rank)
        self.turn = _for_parts(parts, nn.Parameter(torch.eye(rank)))
        self.choice = nn.ParameterList([_uniform(self.ups) for _ in range(parts)])

    def folded(self, part: int) -> LowRank:
        """Return the LoRA of a part."""
        weights = (self.choice[part] / self.temperature).softmax(0)
        return LowRank(self.turn[part] @ self.down, torch.tensordot(weights * SCALE, self.up, 1))


class MultiLora(nn.Module):
    """MultiLoRA (arXiv 2311.11501): sum_n diag(s_n) B_n A_n, one for all parts.

    The three LoRAs start at random, and their scales s_n, a number for each output, at zero.
    """

    count = 3

    def __init__(self, out: int, into: int, rank: int, parts: int):
        super().__init__()
        self.ranks = _split(rank, self.count)
        self.down = _uniform(rank, into)
        self.up = nn.Parameter(torch.cat([_uniform(out, size) for size in self.ranks], 1).data)
        self.scales = _zeros(out, len(self.ranks))

    def folded(self, part: int) -> LowRank:
        """Return the LoRA of a part."""
        scales = self.scales.repeat_interleave(torch.tensor(self.ranks, device=self.up.device), 1)
        return LowRank(self.down, self.up * scales * SCALE)


class Poly(nn.Module):
    """Polytropon (arXiv 2202.13914): A_t = sum_k w_tk A_k, B_t = sum_k w_tk B_k, w_t = sigmoid(z_t) / sum.

    The skills k are shared, z_t is a part's in each layer. While it trains, w_t is sampled from the relaxed
    Bernoulli distribution of temperature 1, as in the paper: without, equal skills would stay nearly equal.
    """

    skills = 4

    def __init__(self, out: int, into: int, rank: int, parts: int):
        super().__init__()
        self.down, self.up = _uniform(self.skills, rank, into), _zeros(self.skills, out, rank)
        starts = [torch.empty(self.skills).uniform_(-1e-3, 1e-3) for _ in range(parts)]
        self.choice = nn.ParameterList([nn.Parameter(start) for start in starts])

    def folded(self, part: int) -> LowRank:
        """Return the LoRA of a part."""
        logits = self.choice[part]
        if self.training and torch.is_grad_enabled():
            logits = logits + torch.rand(len(logits)).logit(1e-6).to(logits)
        weights = logits.sigmoid() / logits.sigmoid().sum()
        return LowRank(torch.tensordot(weights, self.down, 1), torch.tensordot(weights * SCALE, self.up, 1))


class CPoly(Poly):
    """C-Poly (arXiv 2312.03248): three shared skills as in `Poly`, and one of each part: B_t A_t + B'_t A'_t.

    Both have half of the rank [A].
    """

    skills = 3

    def __init__(self, out: int, into: int, rank: int, parts: int):
        if rank < 2:
            raise RecipeError(
                "The method c-poly needs a rank of at least 2; half of it is of each part alone."
            )
        super().__init__(out, into, rank - rank // 2, parts)
        self.special_down = nn.ParameterList([_uniform(rank // 2, into) for _ in range(parts)])
        self.special_up = _for_parts(parts, _zeros(out, rank // 2))

    def folded(self, part: int) -> LowRank:
        """Return the LoRA of a part."""
        common = super().folded(part)
        down, up = self.special_down[part], self.special_up[part] * SCALE
        return LowRank(torch.cat([common.down, down]), torch.cat([common.up, up], 1))


class MoeLora(nn.Module):
    """MOELoRA (arXiv 2310.18339), gated by task: sum_e softmax(g_t)_e B_e A_e, the experts sharing the rank.

    Four experts, and gates that are free numbers of a part in each layer, equal at the start [A].
    """

    experts = 4

    def __init__(self, out: int, into: int, rank: int, parts: int):
        super().__init__()
        self.ranks = _split(rank, self.experts)
        self.down, self.up = _uniform(rank, into), _zeros(out, rank)
        self.gate = _for_parts(parts, _zeros(len(self.ranks)))

    def folded(self, part: int) -> LowRank:
        """Return the LoRA of a part."""
        sizes = torch.tensor(self.ranks, device=self.up.device)
        return LowRank(self.down, self.up * self.gate[part].softmax(0).repeat_interleave(sizes) * SCALE)


def _split(rank: int, count: int) -> list[int]:
    """Return the ranks of at most ``count`` LoRAs that have a rank together."""
    return [len(range(number, rank, count)) for number in range(min(rank, count))]


Rival = type[MtlLora] | type[MultiLora] | type[Poly] | type[MoeLora]


class RivalLora:
    """A rival's modules for all linear layers that the LoRA of the settings is on."""

    def __init__(self, job: Job, rival: Rival):
        self._numbers = {part.name: number for number, part in enumerate(job.parts)}
        pairs, parts = PlainLora(job).pairs.items(), len(job.parts)
        self._modules = {
            path: rival(len(up), down.shape[1], len(down), parts).to(job.model.device)
            for path, (down, up, _) in pairs
        }
        self.parameters = [p for module in self._modules.values() for p in module.parameters()]

    def matrices(self, part: str | None) -> Matrices:
        """Return the folded LoRA of a part; for ``None`` the first one's, which is on the same layers."""
        number = self._numbers[part] if part is not None else 0
        return {path: module.folded(number) for path, module in self._modules.items()}


RIVALS: dict[str, Rival] = {
    "mtl-lora": MtlLora,
    "multilora": MultiLora,
    "poly": Poly,
    "c-poly": CPoly,
    "moe-lora": MoeLora,
}


def _fit(job: Job, name: str) -> BundleFit:
    rival = RIVALS[name]
    if job.start is not None:
        raise RecipeError(f"The method {name} starts fresh; leave out --adapter, or choose joint or shared.")
    torch.manual_seed(job.settings.seed)
    heads = fresh_heads(job)
    lora = RivalLora(job, rival)
    fit = train_bundle(job, lora, heads, objective_of(job, lora))
    trained = sum(parameter.numel() for parameter in lora.parameters)
    fit.composition |= {"trained_parameters": trained, "folded": str(rival.__doc__).partition("\n")[0]}
    return fit


for _name, _rival in RIVALS.items():
    register_bundle_method(_name, needs="data", apart=_rival is not MultiLora)(partial(_fit, name=_name))
