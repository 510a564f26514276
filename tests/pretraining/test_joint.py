"""The joint step: who gets which gradient, and that a third family needs no change of the package."""

import numpy as np
import pytest
import torch
from conftest import randomize
from torch import nn

from modeling_mtpf import LoraSettings
from modeling_mtpf.data.words import IGNORE
from modeling_mtpf.pretraining.chunks import ChunkShape, JointBatch, plan_chunks
from modeling_mtpf.pretraining.diagnostics import gradient_cosine, tail_similarity
from modeling_mtpf.pretraining.families.base import (
    FAMILY_CLASSES,
    Family,
    FamilyBatch,
    FamilySettings,
    Objective,
    register_family,
)
from modeling_mtpf.pretraining.families.contrastive import similarity_drift
from modeling_mtpf.pretraining.families.ner import ClusterObjective, NerFamily, NerSettings
from modeling_mtpf.pretraining.families.tc import ContrastiveObjective, TcFamily, TcSettings
from modeling_mtpf.pretraining.joint import JointModel, families_of_regime, parameter_groups


def fixed_ner(step: int) -> FamilyBatch:
    """Five sentences of different lengths, with labels on most positions."""
    rng = np.random.default_rng(step)
    rows = [rng.integers(5, 100, size) for size in (16, 7, 12, 16, 3)]
    labels = [rng.integers(0, 5, len(row)) for row in rows]
    for own in labels:
        own[0] = IGNORE
    words = sum(int((own != IGNORE).sum()) for own in labels)
    return FamilyBatch(rows, labels, {"labelled_words": torch.tensor(words)})


def fixed_tc(step: int, pairs: int = 3, texts_per_row: int = 2) -> FamilyBatch:
    """Pairs of different lengths, longer than the sentences of NER."""
    rng = np.random.default_rng(1000 + step)
    rows = [rng.integers(5, 100, rng.integers(4, 25)) for _ in range(pairs * texts_per_row)]
    return FamilyBatch(rows, None, {"texts_per_row": torch.tensor(texts_per_row)})


class FixedNer(NerFamily):
    """The NER objective on ready-made batches."""

    def prepare(self, context) -> None:
        self.num_clusters = 5

    def batch(self, step, rank=0, world_size=1):
        return fixed_ner(step)


class FixedTc(TcFamily):
    """The TC objective on ready-made batches."""

    def prepare(self, context) -> None:
        pass

    def batch(self, step, rank=0, world_size=1):
        return fixed_tc(step)


SHAPE = ChunkShape(tokens=128, length_multiple=8, row_tokens=32, max_length=24)
"""Several chunks of several shapes for a handful of rows."""


def plan(batches: dict[str, FamilyBatch], shape: ChunkShape = SHAPE) -> JointBatch:
    return plan_chunks(batches, shape, pad_token_id=0)


def padded(rows: list[np.ndarray], fill: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


@pytest.fixture
def make(load):
    """Build a joint model of fixed families in float64 without dropout, and a batch of step 0."""

    def build(architecture="bert", task_primary=True, names=("ner", "tc"), keep_similarities=0.0, **weights):
        torch.manual_seed(0)
        settings = {"ner": NerSettings, "tc": TcSettings}
        families = []
        for name in names:
            family = {"ner": FixedNer, "tc": FixedTc}[name](
                name, settings[name](weight=weights.get(name, 1.0), lora=LoraSettings(r=4))
            )
            family.prepare(None)
            families.append(family)
            if name == "tc":
                family.settings.keep_similarities = keep_similarities
        joint = JointModel(load(architecture), families, task_primary).double().eval()
        randomize(joint, 3, 0.1, within="lora_B")  # zero at the start, which would hide lora_A's gradient
        return joint, {family.name: family.batch(0) for family in families}

    return build


def gradients(joint, loss) -> dict[str, torch.Tensor]:
    joint.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in joint.named_parameters() if p.grad is not None}


def separate(joint, batches, name) -> torch.Tensor:
    """The loss of one family by a plain pass of the whole encoder, without trunk, tails or joining."""
    batch = batches[name]
    ids, mask = padded(batch.rows, 0), padded([np.ones_like(row) for row in batch.rows], 0)
    labels = None if batch.labels is None else padded(batch.labels, IGNORE)
    with joint.model.use_adapter(joint.adapters[name]):
        hidden = joint.model(input_ids=ids, attention_mask=mask)[0]
    objective = joint.objectives[name]
    return objective.loss(objective(hidden, mask, labels), batch.targets)[0]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "electra", "modernbert"])
def test_gradient_routing(make, architecture):
    joint, batches = make(architecture, ner=1.0, tc=0.5)
    found = gradients(joint, joint(plan(batches)).loss)
    alone = {name: gradients(joint, separate(joint, batches, name)) for name in batches}
    weight = {"ner": 1.0, "tc": 0.5}
    checked = {"ner": 0, "tc": 0, "backbone": 0}
    for name, gradient in found.items():
        owner = next(
            (f for f in ("ner", "tc") if f".{f}." in name or name.startswith(f"objectives.{f}.")), None
        )
        if owner:  # exactly its own family's loss, nothing of the other's
            expected = weight[owner] * alone[owner][name]
            other = "tc" if owner == "ner" else "ner"
            assert name not in alone[other] or not alone[other][name].any()
        else:
            expected = sum(weight[f] * alone[f].get(name, torch.zeros_like(gradient)) for f in weight)
        checked[owner or "backbone"] += 1
        assert (gradient - expected).norm() <= 1e-7 * expected.norm() + 1e-13, name
    assert checked["ner"] >= 6 and checked["tc"] >= 6 and checked["backbone"] > 20


def test_no_gradient_of_one_family_reaches_the_other_exactly(make):
    joint, batches = make()
    losses = joint(plan(batches)).losses
    for own, other in (("ner", "tc"), ("tc", "ner")):
        found = gradients(joint, joint(plan(batches)).losses[own])
        theirs = [
            g for name, g in found.items() if f".{other}." in name or name.startswith(f"objectives.{other}.")
        ]
        assert not any(gradient.any() for gradient in theirs)  # exact zero
        assert any(g.any() for name, g in found.items() if f".{own}." in name)
    assert losses.keys() == {"ner", "tc"}


def test_naive_has_no_lora_and_the_same_sum(make):
    joint, batches = make(task_primary=False)
    assert not [name for name, _ in joint.named_parameters() if "lora" in name]
    found = gradients(joint, joint(plan(batches)).loss)
    expected = gradients(joint, separate(joint, batches, "ner") + separate(joint, batches, "tc"))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-8) < 1e-7, name


def test_both_adapters_and_the_backbone_move_after_two_steps(make):
    joint, _ = make()
    before = {name: value.clone() for name, value in joint.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(joint, 1e-3, 1e-2, 0.01))
    families = [FixedNer("ner", NerSettings()), FixedTc("tc", TcSettings())]
    for step in range(2):
        joint(plan({family.name: family.batch(step) for family in families})).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in joint.state_dict().items() if not torch.equal(value, before[name])}
    for part in ".lora_A.ner. .lora_B.ner. .lora_A.tc. .lora_B.tc. embeddings objectives.ner".split():
        assert all(name in moved for name in before if part in name and "position_ids" not in name), part


def test_every_parameter_is_in_one_group_with_its_rate(make):
    joint, _ = make()
    groups = parameter_groups(joint, 1e-5, 1e-3, 0.1)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(rate)
    for name, parameter in joint.named_parameters():
        if "pooler" in name:
            assert id(parameter) not in rate
        elif "lora_" in name or "objectives" in name:
            assert rate[id(parameter)] == (1e-3, 0.0), name
        else:
            assert rate[id(parameter)] == (1e-5, 0.1 if parameter.dim() > 1 else 0.0), name


def test_gradient_cosine_against_flat_vectors(make):
    joint, batches = make()
    found = gradient_cosine(joint, plan(batches), SHAPE)
    alone = [gradients(joint, separate(joint, batches, name)) for name in batches]
    shared = [n for n in alone[0] if "lora" not in n and n.startswith("model.backbone") and n in alone[1]]
    for group, part in (("layer_1", "layer.1."), ("all", "")):
        first, second = (torch.cat([g[n].flatten() for n in shared if part in n]) for g in alone)
        assert found[group] == pytest.approx(
            nn.functional.cosine_similarity(first, second, dim=0).item(), abs=1e-6
        )
    assert set(found) == {"embeddings", "layer_0", "layer_1", "layer_2", "layer_3", "all"}
    joint.zero_grad()
    joint.train()
    joint.model.backbone.embeddings.eval()
    modes = [module.training for module in joint.modules()]
    numbers = torch.random.get_rng_state()
    gradient_cosine(joint, plan(batches), SHAPE)
    assert all(p.grad is None for p in joint.parameters())
    assert [module.training for module in joint.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), numbers)  # a run is the same with and without it


def test_regimes():
    names = ["ner", "tc", "qa"]
    assert families_of_regime("base", names) == []
    assert families_of_regime("qa", names) == ["qa"]
    assert families_of_regime("naive", names) == families_of_regime("tpl", names) == names


def test_a_third_family_is_one_registration(load, tmp_path, make):
    """A toy family that predicts a text's length; trained alongside the two others."""

    class LengthObjective(Objective):
        def __init__(self, hidden_size):
            super().__init__()
            self.head = nn.Linear(hidden_size, 1)

        def forward(self, hidden_states, attention_mask, labels):
            return self.head(hidden_states[:, 0])

        def loss(self, rows, targets):
            return (rows.squeeze(-1) - targets["length"]).pow(2).mean(), {"length_accuracy": torch.zeros(())}

    @register_family("length")
    class LengthFamily(Family):
        def prepare(self, context):
            pass

        def batch(self, step, rank=0, world_size=1):
            rows = fixed_ner(step).rows
            return FamilyBatch(rows, None, {"length": torch.tensor([len(row) / 16 for row in rows]).double()})

        def objective(self, hidden_size):
            return LengthObjective(hidden_size)

    try:
        families = [FixedNer("ner", NerSettings()), FixedTc("tc", TcSettings())]
        families.append(FAMILY_CLASSES["length"]("length", FamilySettings(lora=LoraSettings(r=2, layers=3))))
        for family in families:
            family.prepare(None)
        joint = JointModel(load("bert"), families, task_primary=True).double()
        output = joint(plan({family.name: family.batch(0) for family in families}))
        output.loss.backward()
        assert output.losses.keys() == {"ner", "tc", "length"} and joint.depth == 3
        assert joint.model.adapters == ["ner", "tc", "length"]
        assert all(p.grad is not None for n, p in joint.named_parameters() if ".length." in n)
    finally:
        FAMILY_CLASSES.pop("length")


def test_a_batch_without_labelled_words_costs_nothing():
    objective = ClusterObjective(8, 3)
    rows = objective(torch.randn(2, 4, 8, requires_grad=True), None, torch.full((2, 4), IGNORE))
    loss, _ = objective.loss(rows, {"labelled_words": torch.tensor(0)})
    loss.backward()
    assert loss.item() == 0.0 and not objective.head.weight.grad.any()


def test_uniformity_tells_collapse_from_spread():
    objective = ContrastiveObjective(TcSettings())
    spread = objective.loss(torch.randn(64, 16), {})[1]["uniformity"]
    collapsed = objective.loss(torch.ones(64, 16) + 0.001 * torch.randn(64, 16), {})[1]["uniformity"]
    assert spread < -2 and collapsed > -0.01


def test_tail_similarity_is_one_for_equal_adapters(make):
    joint, batches = make()
    found = tail_similarity(joint, plan(batches))
    assert set(found) == {"layer_2", "layer_3"} and all(value < 0.999 for value in found.values())
    with torch.no_grad():
        for name, parameter in joint.named_parameters():
            if ".tc." in name:
                parameter.copy_(dict(joint.named_parameters())[name.replace(".tc.", ".ner.")])
    assert tail_similarity(joint, plan(batches)) == pytest.approx({"layer_2": 1.0, "layer_3": 1.0})
    assert tail_similarity(make(task_primary=False)[0], plan(batches)) == {}


def test_tail_similarity_looks_at_all_tokens_of_a_batch(make):
    joint, batches = make()
    whole, cut = (plan_chunks(batches, ChunkShape(tokens, 32, 0, 32), 0) for tokens in (4096, 64))
    assert len(whole.chunks) == 1 and len(cut.chunks) > 3
    assert tail_similarity(joint, cut) == pytest.approx(tail_similarity(joint, whole), rel=1e-5)


# Keeping what the start knows


def test_drift_is_measured_from_the_start_and_trains_the_student_alone(make, load):
    joint, batches = make(names=("tc",), keep_similarities=1.0)
    joint.objectives["tc"].settings.contrastive_weight = 0.0
    before = {name: value.clone() for name, value in joint.start[0].state_dict().items()}
    assert not any("start" in name for name in joint.state_dict())
    optimizer = torch.optim.SGD(joint.parameters(), lr=0.01)
    joint.train()
    for _ in range(2):
        optimizer.zero_grad()
        joint(plan(batches)).loss.backward()
        optimizer.step()
    assert not any(parameter.grad is not None for parameter in joint.start[0].parameters())
    assert not any(module.training for module in joint.start[0].modules())
    after = joint.start[0].state_dict()
    assert all(torch.equal(value, after[name].to(value.dtype)) for name, value in before.items())

    joint.eval()
    output = joint(plan(batches))
    batch = batches["tc"]
    ids, mask = padded(batch.rows, 0), padded([np.ones_like(row) for row in batch.rows], 0)
    stock = load("bert").double().eval()
    start = joint.objectives["tc"](stock(input_ids=ids, attention_mask=mask)[0], mask, None)
    expected = similarity_drift(output.rows["tc"], start, 0.05)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6) and expected.item() > 1e-6


def test_an_unchanged_student_has_not_drifted(load):
    family = FixedTc("tc", TcSettings(keep_similarities=1.0, keep_vectors=1.0, contrastive_weight=0.3))
    joint = JointModel(load("bert"), [family], task_primary=True).double().eval()
    output = joint(plan({"tc": fixed_tc(0)}))
    metrics = output.metrics["tc"]
    assert metrics["similarity_drift"].item() == pytest.approx(0, abs=1e-12)
    assert metrics["vector_drift"].item() == pytest.approx(0, abs=1e-12)
    assert output.loss.item() == pytest.approx(0.3 * metrics["contrast"].item())


# Gradient caching


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("texts_per_row", [2, 4])
def test_cached_gradients_equal_plain_ones_with_dropout(make, symmetric, texts_per_row):
    """Also with hard negatives, a learnt temperature, drift from the start, and two accumulated batches."""
    joint, _ = make(keep_similarities=0.5)
    settings = TcSettings(temperature=0.1, symmetric=symmetric, learn_temperature=True, keep_similarities=0.5)
    joint.objectives["tc"] = ContrastiveObjective(settings).double()
    joint.train()
    found = {}
    for recompute in (False, True):
        joint.recompute = recompute
        joint.zero_grad()
        torch.manual_seed(7)
        for step in range(2):
            batch = plan({"ner": fixed_ner(step), "tc": fixed_tc(step, 8, texts_per_row)})
            assert len(batch.chunks) > 3
            (joint(batch).loss / 2).backward()
        found[recompute] = {
            name: p.grad.clone() for name, p in joint.named_parameters() if p.grad is not None
        }
    assert found[True].keys() == found[False].keys() and "objectives.tc.log_temperature" in found[True]
    for name, gradient in found[False].items():
        assert (found[True][name] - gradient).norm() <= 1e-10 * gradient.norm() + 1e-14, name
    joint.zero_grad()
    torch.manual_seed(8)  # the masks matter: other ones give other gradients
    joint(batch).loss.backward()
    name = "model.backbone.encoder.layer.0.output.dense.weight"
    assert (dict(joint.named_parameters())[name].grad - found[False][name]).norm() > 1e-3 * found[False][
        name
    ].norm()


@pytest.mark.slow
def test_cached_rows_are_not_held(make):
    """Only one chunk's activations are alive at a time: counted as saved bytes, forward and backward."""
    joint, _ = make(names=("tc",))
    joint.train()
    peaks = {}
    for pairs in (64, 256):
        batch = plan({"tc": fixed_tc(0, pairs)})
        for recompute in (False, True):
            joint.recompute = recompute
            peaks[pairs, recompute] = peak_saved(lambda batch=batch: joint(batch).loss.backward())
    assert peaks[256, False] > 3.5 * peaks[64, False]
    # What grows is the loss over all vectors, with the square of the batch.
    assert peaks[256, True] < 2 * peaks[64, True] < 0.2 * peaks[64, False]


def peak_saved(function) -> int:
    """Largest number of bytes that autograd holds for the backward pass at any time."""
    live, peak = {}, 0

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            live[id(self)] = tensor.numel() * tensor.element_size()
            nonlocal peak
            peak = max(peak, sum(live.values()))

        def __del__(self):
            live.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        function()
    return peak


@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_and_compiles_few_times(make):
    """Batches of many shapes: forward and backward, with other batch sizes and lengths each time."""
    from torch._dynamo.utils import counters

    joint, _ = make()
    expected = {}
    for step in range(4):
        batch = plan({"ner": fixed_ner(step), "tc": fixed_tc(step, 3 + step)})
        expected[step] = gradients(joint, joint(batch).loss)
    counters.clear()
    joint.compile_trunk(
        backend="aot_eager"
    )  # traced and differentiated as for inductor, without a C++ compiler
    for step, wanted in expected.items():
        batch = plan({"ner": fixed_ner(step), "tc": fixed_tc(step, 3 + step)})
        found = gradients(joint, joint(batch).loss)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= 1e-7 * gradient.norm() + 1e-12, name
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
