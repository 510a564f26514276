"""Contrastive loss against float64 arithmetic; samplers as pure functions."""

import numpy as np
import pytest
import torch

from modeling_mtpf.errors import DataError
from modeling_mtpf.pretraining.contrastive import info_nce
from modeling_mtpf.pretraining.sampling import EpochSampler, SourceSampler, distinct_rows


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_equals_an_independent_float64_sum(symmetric):
    rng = np.random.default_rng(0)
    a, p = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    unit = [x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, p)]
    scores = unit[0] @ unit[1].T / 0.1

    def cross_entropy(scores):
        return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)])

    expected = cross_entropy(scores)
    if symmetric:
        expected = (expected + cross_entropy(scores.T)) / 2
    loss, accuracy = info_nce(torch.tensor(a), torch.tensor(p), 0.1, symmetric)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == pytest.approx((scores.argmax(1) == np.arange(7)).mean())


def test_info_nce_stays_in_float32_under_autocast():
    a, p = torch.randn(16, 32), torch.randn(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(a, p)[0]
    assert inside.dtype == torch.float32 and inside.item() == info_nce(a, p)[0].item()


def test_epochs_hold_every_row_once_and_depend_on_seed_and_step_only():
    sampler = EpochSampler(10, 4, seed=1)
    drawn = [row for step in range(5) for row in sampler.rows(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    again = EpochSampler(10, 4, seed=1)
    assert [again.rows(step) for step in (4, 0, 2)] == [sampler.rows(step) for step in (4, 0, 2)]
    assert EpochSampler(10, 4, seed=2).rows(0) != sampler.rows(0)
    assert all(
        len(EpochSampler(3, 8, seed=0).rows(step)) == 8 for step in range(4)
    )  # more rows than there are


def test_sources_are_drawn_by_size_with_temperature_and_cap():
    sampler = SourceSampler([9000, 1000, 100], temperature=2.0, cap=4000, seed=3)
    expected = np.sqrt([4000, 1000, 100])
    np.testing.assert_allclose(sampler.shares, expected / expected.sum())
    draws = [sampler.choose(step) for step in range(4000)]
    counts = np.bincount([source for source, _ in draws]) / 4000
    np.testing.assert_allclose(counts, sampler.shares, atol=0.03)
    # The turn counts earlier draws of the same source, from whichever step one starts.
    assert [turn for source, turn in draws if source == 2] == list(range(sum(s == 2 for s, _ in draws)))
    assert SourceSampler([9000, 1000, 100], 2.0, 4000, seed=3).choose(3999) == draws[3999]


def test_no_text_comes_twice_in_a_batch():
    texts = [("a", "b"), ("a", "c"), ("d", "b"), ("e", "f"), ("g", "h"), ("f", "i")]
    for step in range(20):
        rows = distinct_rows([0, 1, 3], 6, lambda row: texts[row], seed=0, step=step, name="pairs")
        found = [text for row in rows for text in texts[row]]
        assert len(rows) == 3 and len(found) == len(set(found))
        assert rows == distinct_rows([0, 1, 3], 6, lambda row: texts[row], seed=0, step=step, name="pairs")


def test_a_source_without_enough_distinct_texts_is_named():
    with pytest.raises(DataError, match="'faq' has too few distinct texts for a batch of 3"):
        distinct_rows([0, 1, 2], 3, lambda row: ("same", str(row)), seed=0, step=0, name="faq")
