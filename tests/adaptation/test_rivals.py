"""Published ways of sharing LoRA among apps: what they compute, how they fold, and the apps they give."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import assert_close
from peft import PeftModel
from peft.tuners.poly import PolyConfig
from peft.tuners.poly.layer import Linear as PolyLinear
from test_bundle_training import FLOAT, TEXTS, ner_data, parts, tc_data
from torch.nn.functional import linear
from transformers import AutoModel

from modeling_mtpf import LoraSettings, MtpfModel
from modeling_mtpf.adaptation import tail_training
from modeling_mtpf.adaptation.bundle import BundleSettings, Part, fit_bundle, rivals
from modeling_mtpf.adaptation.bundle.low_rank import run_with
from modeling_mtpf.adaptation.bundle.rivals import RIVALS, SCALE, CPoly, MoeLora, MtlLora, MultiLora, Poly
from modeling_mtpf.adaptation.bundle.training import FromLabels
from modeling_mtpf.adaptation.settings import LoraShape, SparseSettings
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.app_data import Examples
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.model.trunk_mtpf import run_trunk

OUT, INTO, RANK, PARTS = 7, 5, 6, 3
APART = [name for name in RIVALS if name != "multilora"]
SHORT = {"steps": 6, "evaluations": 3, "learning_rate": 0.02, **FLOAT}


@pytest.fixture
def setting(load, encoders):
    return load("bert", {}), load_word_tokenizer(str(encoders["bert"]))


# -------------------------------------------------------------------------- what the papers' formulas give


def mtl_lora(lora: MtlLora, x: torch.Tensor, part: int) -> torch.Tensor:
    exponentials = [torch.exp(w / 0.1) for w in lora.choice[part]]
    inner = linear(linear(x, lora.down), lora.turn[part])
    return sum(e / sum(exponentials) * linear(inner, up) for e, up in zip(exponentials, lora.up, strict=True))


def multilora(lora: MultiLora, x: torch.Tensor, part: int) -> torch.Tensor:
    found, first = torch.zeros(len(x), OUT, dtype=x.dtype), 0
    for number, size in enumerate(lora.ranks):
        of_copy = slice(first, first := first + size)
        found = found + linear(linear(x, lora.down[of_copy]), lora.up[:, of_copy]) * lora.scales[:, number]
    return found


def poly(lora: Poly, x: torch.Tensor, part: int) -> torch.Tensor:
    shares = 1 / (1 + torch.exp(-lora.choice[part]))
    down, up = (
        sum(share / shares.sum() * skill for share, skill in zip(shares, skills, strict=True))
        for skills in (lora.down, lora.up)
    )
    return linear(linear(x, down), up)


def c_poly(lora: CPoly, x: torch.Tensor, part: int) -> torch.Tensor:
    special = linear(linear(x, lora.special_down[part]), lora.special_up[part])
    return poly(lora, x, part) + special


def moe_lora(lora: MoeLora, x: torch.Tensor, part: int) -> torch.Tensor:
    exponentials, found, first = torch.exp(lora.gate[part]), 0, 0
    for number, size in enumerate(lora.ranks):
        of_expert = slice(first, first := first + size)
        expert = linear(linear(x, lora.down[of_expert]), lora.up[:, of_expert])
        found = found + exponentials[number] / exponentials.sum() * expert
    return found


FORMULAS = {
    "mtl-lora": mtl_lora,
    "multilora": multilora,
    "poly": poly,
    "c-poly": c_poly,
    "moe-lora": moe_lora,
}


def trained(name: str, rank: int = RANK) -> torch.nn.Module:
    """Return a rival for one linear layer in float64, with random numbers everywhere."""
    torch.manual_seed(0)
    lora = RIVALS[name](OUT, INTO, rank, PARTS).double().eval()
    for parameter in lora.parameters():
        parameter.data.normal_()
    return lora


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("rank", [2, 3, RANK])
def test_the_folded_lora_is_the_papers_formula_with_its_gradients(name, rank):
    lora, x = trained(name, rank), torch.randn(4, INTO, dtype=torch.float64)
    weights = torch.randn(4, OUT, dtype=torch.float64)
    for part in range(PARTS):
        pair = lora.folded(part)
        assert pair.down.shape == (rank, INTO) and pair.up.shape == (OUT, rank) and pair.bias is None
        found, expected = linear(linear(x, pair.down), pair.up), SCALE * FORMULAS[name](lora, x, part)
        assert torch.allclose(found, expected, atol=1e-12, rtol=1e-12)
        gradients = [
            torch.autograd.grad((output * weights).sum(), list(lora.parameters()), allow_unused=True)
            for output in (found, expected)
        ]
        for of_fold, of_formula in zip(*gradients, strict=True):
            assert (of_fold is None) == (of_formula is None)
            assert of_fold is None or torch.allclose(of_fold, of_formula, atol=1e-10, rtol=1e-10)


def test_poly_is_that_of_peft_outside_of_training():
    """Its layer divides by the rank, where ours multiplies by a scale."""
    lora, x = trained("poly"), torch.randn(2, 4, INTO, dtype=torch.float64)
    base = torch.nn.Linear(INTO, OUT).double().requires_grad_(False)
    config = PolyConfig(r=RANK, n_tasks=PARTS, n_skills=Poly.skills, n_splits=1)
    layer = PolyLinear(base, "default", config).double().eval()
    theirs = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    for stored, ours in zip(theirs, (lora.down, lora.up), strict=True):
        stored.data.copy_(ours.detach().transpose(1, 2)[None])
    layer.poly_router["default"].module_logits.data.copy_(torch.stack(list(lora.choice)))
    for part in range(PARTS):
        pair = lora.folded(part)
        found = linear(linear(x, pair.down), pair.up)
        expected = (layer(x, task_ids=torch.tensor([part, part])) - base(x)) * RANK * SCALE
        assert torch.allclose(found, expected, atol=1e-12)
        ours = torch.autograd.grad(found.pow(2).sum(), [lora.down, lora.up])
        of_peft = torch.autograd.grad(expected.pow(2).sum(), theirs)
        for one, other in zip(ours, of_peft, strict=True):
            assert torch.allclose(one, other[0].transpose(1, 2), atol=1e-9)


@pytest.mark.parametrize("name", RIVALS)
def test_a_fresh_one_changes_nothing_and_a_step_moves_all_that_a_part_uses(name):
    torch.manual_seed(0)
    lora = RIVALS[name](OUT, INTO, RANK, PARTS)
    pair = lora.folded(1)
    assert not (pair.up @ pair.down).any()
    optimizer, x = torch.optim.AdamW(lora.parameters(), lr=0.1, weight_decay=0.01), torch.randn(4, INTO)
    before = {key: value.detach().clone() for key, value in lora.named_parameters()}
    for _ in range(3):
        pair = lora.folded(1)
        optimizer.zero_grad()
        (linear(linear(x, pair.down), pair.up) - 1).pow(2).sum().backward()
        optimizer.step()
    moved = {key for key, value in lora.named_parameters() if not torch.equal(value, before[key])}
    others = {key for key in before if key[-2:] in (".0", ".2")}
    assert moved == before.keys() - others  # a part's numbers rest in the steps of the others
    for stack in (lora.up,) if lora.up.dim() == 3 else ():  # equal ones would stay equal for ever
        assert not any(torch.allclose(stack[0], other) for other in stack[1:])


# ------------------------------------------------------------------------------------ what a fit gives


@pytest.mark.parametrize("name", RIVALS)
def test_each_part_is_an_app_of_its_own_folder(setting, batch, tmp_path, monkeypatch, fresh_process, name):
    """Its stock LoRA does what was trained, and PEFT reads it; `multilora` gives one bundle."""
    made = []

    def recorded(job, lora, heads, objective):
        made.append(lora)
        return fit(job, lora, heads, objective)

    fit = rivals.train_bundle
    monkeypatch.setattr(rivals, "train_bundle", recorded)
    model, tokenizer = setting
    model.add_adapter("other", LoraSettings(r=2))
    settings = BundleSettings(**SHORT, stored_dtype="float32", lora=LoraShape(2, 4, ["all"]))
    bundle = fit_bundle(parts(), name, setting, tmp_path / "many", settings=settings)
    names = ["entities", "intent", "sets"]
    apart = name in APART
    expected = [f"many-{part}" for part in names] if apart else ["many"]
    assert model.adapters == ["other", *expected] and list(bundle.adapters) == names
    assert sorted(path.name for path in (tmp_path / "many").iterdir() if path.is_dir()) == names * apart
    folders = {part: tmp_path / "many" / part if apart else tmp_path / "many" for part in names}
    with torch.no_grad():
        inputs = batch("bert")
        trunk = run_trunk(model.backbone, 2, **inputs)
        for part, folder in folders.items():
            states = run_with(model.backbone, trunk, made[0].matrices(part))
            app = expected[names.index(part)] if apart else "many"
            found = model.encode_adapters([app], **inputs)[app]
            assert torch.allclose(found, states, atol=2e-6)
            stock = AutoModel.from_pretrained(model.config.name_or_path, trust_remote_code=False)
            peft = PeftModel.from_pretrained(stock.eval(), str(folder))
            assert torch.allclose(peft(**inputs).last_hidden_state, states, atol=2e-6)
            task = json.loads((folder / "task.json").read_text())
            composition = task["composition"]
            assert composition["method"] == name and composition["rank"] == 4
            assert composition["folded"].endswith(".") and composition["trained_parameters"] > 0
            if apart:
                assert task["kind"] != "bundle" and task["method"] == name and task["format_version"] == 1
                assert composition["parts"] == names and "app" in (folder / "README.md").read_text()
    again = MtpfModel.from_pretrained(model.config.name_or_path).eval()
    for folder in dict.fromkeys(folders.values()):
        again.load_adapter(folder)
    keys = list(bundle.adapters.values())
    results = model.predict(TEXTS, keys, tokenizer=tokenizer)
    assert again.predict(TEXTS, keys) == results
    if name == "mtl-lora":
        fresh = fresh_process(
            "import json\nfrom modeling_mtpf import MtpfModel\n"
            f"model = MtpfModel.from_pretrained({str(model.config.name_or_path)!r}).eval()\n"
            f"keys = [model.load_adapter(folder) for folder in {list(map(str, folders.values()))!r}]\n"
            f"print(json.dumps(model.predict({TEXTS!r}, keys)))"
        )
        assert_close(list(fresh.values()), list(results.values()))
    assert f"Bundle 'many', {name}, 6 steps from labels" in str(bundle)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_learns_all_parts(setting, name):
    settings = BundleSettings(steps=180, evaluations=2, learning_rate=3e-3, **FLOAT)
    bundle = fit_bundle(parts(), name, setting, settings=settings)
    assert bundle.metrics["entities"]["entity_f1"] > 0.8 and bundle.metrics["intent"]["accuracy"] > 0.8


def test_what_a_rival_cannot_do_is_refused(setting, load, tmp_path):
    tpl = load("bert", {"tpl": LoraSettings(r=2)}).save_adapter(tmp_path / "tpl", "tpl")
    setting[0].add_adapter("many-intent", LoraSettings(r=2))
    for method, more, settings, message in (
        ("poly", {"adapter": tpl}, {}, "The method poly starts fresh; leave out --adapter"),
        ("c-poly", {}, {"lora": LoraShape(r=1)}, "c-poly needs a rank of at least 2"),
        ("moe-lora", {"name": "many"}, {}, "An adapter named 'many-intent' is already loaded"),
        ("mtl-lora", {"texts": TEXTS}, {}, "The method mtl-lora trains from labels; leave out texts"),
        (
            "shared",
            {},
            {"loss": "distil"},
            "The method shared trains from labels; leave out texts and the loss",
        ),
        ("shared", {}, {"sparse": SparseSettings(budget=0.5)}, "does not use sparse.budget"),
        ("joint", {}, {"heads": "frozen"}, "The method joint does not use heads; leave it out"),
        ("poly", {}, {"max_texts": 3}, "does not use max_texts"),
        ("prefix", {}, {"lora": LoraShape(r=7)}, "does not use lora.r"),
        ("prefix", {}, {"prefix": "none"}, "leave out prefix: none"),
        ("mtl_lora", {}, {}, "Unknown method 'mtl_lora' of making a bundle; did you mean 'mtl-lora'"),
    ):
        with pytest.raises(MtpfError, match=message):
            fit_bundle(parts(), method, setting, settings=BundleSettings(**SHORT, **settings), **more)
        assert setting[0].adapters == ["many-intent"]


# -------------------------------------------------------------------------------- the order of the parts


def order(sizes: list[int], steps: int, temperature: float, seed: int = 0, start: int = 0) -> list[int]:
    objective = FromLabels.__new__(FromLabels)
    shares = np.array(sizes) ** (1 / temperature)
    objective._shares, objective._rounds = shares / shares.sum(), True
    return list(islice(objective._order(np.random.default_rng([seed, 3])), start, start + steps))


def test_parts_of_one_size_take_turns_in_random_order():
    drawn = np.array(order([9, 9, 9, 9], 400, 2.0)).reshape(100, 4)
    assert (np.sort(drawn, 1) == np.arange(4)).all() and len({tuple(row) for row in drawn}) > 10


def test_larger_parts_come_as_often_as_their_share_says():
    sizes = [100, 400, 900]
    for temperature, shares in ((1.0, [1 / 14, 4 / 14, 9 / 14]), (2.0, [1 / 6, 2 / 6, 3 / 6])):
        counts = Counter(order(sizes, 3000, temperature))
        assert [counts[part] / 3000 for part in range(3)] == pytest.approx(shares, abs=0.02)
    for round_of in np.array(order(sizes, 3000, 2.0)).reshape(-1, 3):
        found = Counter(round_of.tolist())
        assert found[0] <= 1 and found[1] == 1 and 1 <= found[2] <= 2  # half of three, rounded


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("method", ["shared", "poly"])
@pytest.mark.parametrize("seed, evaluation", [(0, 2), (1, 1), (1, 3)])
def test_a_stopped_fit_resumes_to_the_same_files(
    load, encoders, tmp_path, monkeypatch, method, seed, evaluation
):
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    large = tc_data()
    large.train = Examples(TEXTS * 3, large.train.labels * 3)
    two = [Part("entities", "ner", ner_data(), weight=0.5), Part("intent", "tc", large)]
    settings = BundleSettings(**{**SHORT, "steps": 9, "patience": 9})

    def fit(folder: str, **changed) -> None:
        values = {"steps": 9, **changed}
        model = load("bert", {})
        fit_bundle(
            two,
            method,
            (model, tokenizer),
            tmp_path / folder / "many",
            seeds=2,
            settings=BundleSettings(**{**vars(settings), **values}),
        )

    steps = []
    take = tail_training._set_gradients
    monkeypatch.setattr(tail_training, "_set_gradients", lambda *a: steps.append(1) or take(*a))
    fit("whole")
    assert len(steps) == 18
    validate, calls = FromLabels.validate, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 4 * seed + evaluation:  # three evaluations and the final scores of each seed
            raise KeyboardInterrupt
        return validate(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FromLabels, "validate", stopped)
        fit("resumed")
    written = (tmp_path / "resumed" / ".many.fit").is_dir()
    assert written == (4 * seed + evaluation > 1) and not (tmp_path / "resumed" / "many").exists()
    if written:
        with pytest.raises(MtpfError, match="holds a stopped fit with other settings or data; repeat its"):
            fit("resumed", learning_rate=1e-3)
    steps.clear()
    fit("resumed")
    assert len(steps) == 18 - 9 * seed - 3 * (evaluation - 1)
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(names) == (4 if method == "poly" else 2)
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert not (tmp_path / "resumed" / ".many.fit").exists()


def test_a_damaged_state_is_refused(setting, tmp_path):
    (tmp_path / ".many.fit").mkdir()
    for content in (b"", b"no state", b"\x80\x02cos\nsystem\nq\x00."):
        (tmp_path / ".many.fit" / "0-1.pt").write_bytes(content)
        with pytest.raises(MtpfError, match=r"cannot be read; delete .*\.many\.fit to fit from the start"):
            fit_bundle(parts(), "poly", setting, tmp_path / "many", settings=BundleSettings(**SHORT))


# ----------------------------------------------------------------------------------------------- command


def test_the_command_fits_apps_that_predict_takes_by_folder(encoders, tmp_path, capsys):
    rows = [{"text": text, "label": f"label {n % 2}"} for n, text in enumerate(TEXTS * 2)]
    (tmp_path / "intents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = f"{{name: NAME, family: tc, data: {tmp_path / 'intents.jsonl'}}}"
    yaml = tmp_path / "parts.yaml"
    yaml.write_text(f"- {row.replace('NAME', 'one')}\n- {row.replace('NAME', 'two')}\n")
    backbone = ["--backbone", str(encoders["bert"])]
    options = ["--bundle", str(yaml), "--method", "poly", "--steps", "2", "--threads", "1"]
    options += ["--progress", "false", "--lora.r", "4"]
    assert main(["adapt", *backbone, *options, "--output_dir", str(tmp_path / "many")]) == 0
    assert "Bundle 'many', poly, 2 steps from labels" in capsys.readouterr().out
    apps = [str(tmp_path / "many" / part) for part in ("one", "two")]
    (tmp_path / "texts.txt").write_text(TEXTS[0])
    assert (
        main(["predict", *backbone, "--adapter", apps[0], "--adapter", apps[1], str(tmp_path / "texts.txt")])
        == 0
    )
    assert set(json.loads(capsys.readouterr().out)["results"]) == {"many-one", "many-two"}
