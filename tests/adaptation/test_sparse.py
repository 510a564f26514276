"""Sparse fine-tuning: which matrices are trained, and that what is stored is what was trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_apps import FLOAT, TEXTS, ner_data, tc_data
from torch import nn
from transformers import AutoModel

from modeling_mtpf import AdapterHead, LoraSettings
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.methods.lora import TailFit, labels_of
from modeling_mtpf.adaptation.methods.sparse import choose_weights, weight_scores, weights_of
from modeling_mtpf.adaptation.settings import LoraShape, SparseSettings
from modeling_mtpf.adaptation.tail_training import shuffled_batches
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError, RecipeError
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.model.adapters_mtpf import lora_targets
from modeling_mtpf.model.modeling_mtpf import mean_pool
from modeling_mtpf.model.trunk_mtpf import encoder_layers

WIDE = SparseSettings(budget=0.5, learning_rate=3e-3)


@pytest.fixture
def setting(load, encoders):
    return load("bert"), load_word_tokenizer(str(encoders["bert"]))


def settings(**changes) -> FitSettings:
    return replace(FitSettings(steps=60, batch_size=4, learning_rate=2e-2, sparse=WIDE, **FLOAT), **changes)


@pytest.mark.parametrize("family", ["ner", "tc"])
@pytest.mark.parametrize("started", [False, True])
def test_a_full_rank_holds_all_that_was_trained(setting, load, tmp_path, family, started):
    model, tokenizer = setting
    digest, data = backbone_sha256(model.backbone), {"ner": ner_data, "tc": tc_data}[family]()
    start = load("bert", {"tpl": None}).save_adapter(tmp_path / "tpl", "tpl") if started else None
    fits = [
        fit_app(
            data,
            family,
            method="sparse",
            backbone=(model, tokenizer),
            adapter=start,
            any_family=True,
            name=name,
            output_dir=tmp_path / name,
            settings=settings(stored_dtype="float32"),  # a matrix of this encoder has a rank of 32
        )
        for name in ("one", "two")
    ]
    details = fits[0].record["seeds"]["0"]
    assert details["change_kept"] == 1.0
    assert details["validation_before_svd"] == details["validation_score"] > 0.8
    assert backbone_sha256(model.backbone) == digest and model.adapters == ["one", "two"]
    states = model.encode_adapters(
        ["one", "two", None], **tokenizer(TEXTS, return_tensors="pt", padding=True)
    )
    assert torch.equal(states["one"], states["two"]) and not torch.equal(states["one"], states[None])
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(model.config.name_or_path), tmp_path / "one")
    with torch.no_grad():
        stock = again(**tokenizer(TEXTS, return_tensors="pt", padding=True)).last_hidden_state
    torch.testing.assert_close(stock, states["one"], atol=1e-4, rtol=1e-4)
    loaded = load("bert")
    loaded.load_adapter(tmp_path / "one")
    results = [m.predict(TEXTS, adapters=["one"], tokenizer=tokenizer) for m in (model, loaded)]
    assert results[0] == results[1]


def test_a_start_that_is_not_trained_keeps_its_effect(setting, load, tmp_path, batch):
    model, tokenizer = setting
    start = load("bert", {"tpl": LoraSettings(layers=3)}).save_adapter(tmp_path / "tpl", "tpl")
    frozen = replace(WIDE, learning_rate=0.0)
    app = fit_app(
        ner_data(),
        "ner",
        method="sparse",
        backbone=(model, tokenizer),
        adapter=start,
        settings=settings(steps=1, sparse=frozen, stored_dtype="float32"),
    )
    model.load_adapter(start)
    states = model.encode_adapters([app.name, "tpl"], **batch("bert"))
    torch.testing.assert_close(states[app.name], states["tpl"], atol=1e-4, rtol=1e-4)


def test_a_lower_rank_reports_what_it_loses(setting):
    shape = LoraShape(r=2)
    app = fit_app(tc_data(), "tc", method="sparse", backbone=setting, settings=settings(lora=shape))
    assert 0 < app.record["seeds"]["0"]["change_kept"] < 1
    assert app.model.backbone.peft_config["app"].r == 2


@pytest.fixture
def fit(setting):
    """A TC app before its training: model, its last layers, their matrices, and settings."""
    model, tokenizer = setting
    torch.manual_seed(0)
    head = AdapterHead("text-classification", tc_data().labels, 32)
    paths = lora_targets(model.backbone, LoraSettings(layers=3, targets=["all"]))
    layers = list(encoder_layers(model.backbone))[-3:]
    fitted = TailFit(model, "app", head, labels_of(tokenizer, tc_data(), 64), 3, settings())
    return model, tokenizer, fitted, head, layers, weights_of(layers, paths)


def test_scores_equal_their_formula_on_a_plain_pass(fit):
    model, tokenizer, fitted, head, layers, weights = fit
    chosen = replace(settings(), sparse=replace(WIDE, score_batches=3, beta=0.7))
    found = weight_scores(model, fitted, layers, weights, chosen)
    data = tc_data()
    gradients: dict[str, list] = {path: [] for path in weights}
    generator = np.random.default_rng([chosen.seed, 3])
    batches = shuffled_batches(fitted.train.encoded.lengths, 4, 64, generator, 1)
    for (rows, _), _ in zip(batches, range(3), strict=False):
        inputs = tokenizer([data.train.inputs[row] for row in rows], return_tensors="pt", padding=True)
        pooled = mean_pool(model.requires_grad_(True)(**inputs).last_hidden_state, inputs["attention_mask"])
        targets = torch.tensor([data.labels.index(data.train.labels[row]) for row in rows])
        model.zero_grad()
        nn.functional.cross_entropy(head(pooled), targets).backward()
        for path in weights:
            gradients[path].append(model.backbone.get_submodule(path).weight.grad.numpy().copy())
    magnitude = {path: np.mean(np.abs(values), axis=0) for path, values in gradients.items()}
    dispersion = {path: value.var(ddof=1) / value.mean() for path, value in magnitude.items()}
    norm = {
        p: np.mean([np.linalg.norm(v) for v in values]) / values[0].size ** 0.5
        for p, values in gradients.items()
    }
    for path in weights:
        expected = dispersion[path] / max(dispersion.values()) + 0.7 * norm[path] / max(norm.values())
        assert found[path] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("choice", ["score", "worst", "random", "layers"])
@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_the_choice_keeps_to_its_order_and_budget(fit, choice, budget):
    model, _, fitted, _, layers, weights = fit
    sparse = SparseSettings(budget=budget, choice=choice)
    chosen, details = choose_weights(model, fitted, layers, weights, settings(sparse=sparse))
    again, _ = choose_weights(model, fitted, layers, weights, settings(sparse=sparse))
    left = budget * sum(p.numel() for p in model.backbone.parameters())
    left -= sum(weights[path].numel() for path in chosen)
    others = [path for path in weights if path not in chosen]
    assert chosen == again and len(chosen) and all(weights[path].numel() > left for path in others)
    assert left >= 0
    if choice in ("score", "worst"):
        sign = 1 if choice == "score" else -1
        ranks = [sign * details["weight_scores"][path] for path in chosen]
        assert ranks == sorted(ranks, reverse=True)
    if choice == "layers":
        assert [".3." in path for path in chosen] == sorted([".3." in path for path in chosen], reverse=True)


def test_what_cannot_be_trained_is_refused_in_one_sentence(setting):
    tiny = settings(sparse=SparseSettings(budget=1e-6))
    with pytest.raises(RecipeError, match=r"sparse.budget is 1e-06 .* its smallest matrix is .*; raise it\."):
        fit_app(tc_data(), "tc", method="sparse", backbone=setting, settings=tiny)
    assert setting[0].adapters == [] and not len(setting[0].heads)
    for wrong in ({"budget": 1.5}, {"choice": "best"}, {"beta": float("nan")}, {"score_batches": 0}):
        with pytest.raises(MtpfError, match=f"sparse.{next(iter(wrong))} is"):
            SparseSettings(**wrong)
