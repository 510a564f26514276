"""The fast dropout: right probability, right scale, the same mask backwards, nothing without training."""

import pytest
import torch
from torch import nn

from modeling_mtpf.pretraining.dropout import FastDropout, fast_dropout, fast_dropout_in


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probability_scale_and_gradient(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = fast_dropout(x, p)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert torch.allclose(
        y[kept].float(), torch.tensor(1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4
    )
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    # Neighbours are independent: four of them come from one number.
    pairs = kept[:, :-1].float() * kept[:, 1:].float()
    assert abs(pairs.mean().item() - (1 - p) ** 2) < 0.002


def test_limits_and_modes():
    x = torch.randn(5, 3)
    assert fast_dropout(x, 0.0) is x and fast_dropout(x, 0.3, training=False) is x
    assert not fast_dropout(x, 1.0).any()
    torch.manual_seed(3)
    first = fast_dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(first, fast_dropout(x, 0.4))


def test_an_encoder_computes_the_same_in_eval_and_is_restored(load, batch, architecture):
    model = load(architecture)
    inputs = batch(architecture)
    expected = model(**inputs)[0]
    before = {name: type(module) for name, module in model.backbone.named_modules()}
    implementation = model.backbone.config._attn_implementation
    with fast_dropout_in(model.backbone):
        assert any(isinstance(module, FastDropout) for module in model.backbone.modules())
        found = model(**inputs)[0]
        mask = inputs["attention_mask"].bool()
        assert (found - expected)[mask].abs().max() < 1e-5
        model.train()
        if architecture != "modernbert":  # which has no dropout by default
            assert (model(**inputs)[0] - expected)[mask].abs().max() > 1e-2
        model.eval()
    assert {name: type(module) for name, module in model.backbone.named_modules()} == before
    assert model.backbone.config._attn_implementation == implementation
    assert torch.equal(model(**inputs)[0], expected)


def test_attention_dropout_is_on_in_training(load, batch):
    model = load("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.backbone.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model.train()
    with fast_dropout_in(model.backbone):
        torch.manual_seed(0)
        one = model(**batch())[0]
        assert not torch.equal(one, model(**batch())[0])
