"""Contrastive loss against float64 arithmetic; samplers as pure functions."""

import numpy as np
import pytest
import torch

from modeling_mtpf.errors import DataError
from modeling_mtpf.pretraining.families.contrastive import info_nce, similarity_drift, vector_drift
from modeling_mtpf.pretraining.families.sampling import EpochSampler, Shuffle, SourceSampler, distinct_rows


@pytest.mark.parametrize("negatives", [0, 7, 21])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_equals_an_independent_float64_sum(symmetric, negatives):
    rng = np.random.default_rng(0)
    a, p, n = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)), rng.normal(size=(negatives, 5))
    unit = [x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, p, n)]
    scores = unit[0] @ np.concatenate(unit[1:]).T / 0.1

    def cross_entropy(scores):
        return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)])

    expected = cross_entropy(scores)
    if symmetric:  # hard negatives have no anchor of their own
        expected = (expected + cross_entropy(scores[:, :7].T)) / 2
    more = torch.tensor(n) if negatives else None
    loss, accuracy = info_nce(torch.tensor(a), torch.tensor(p), 0.1, symmetric, more)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert accuracy.item() == pytest.approx((scores.argmax(1) == np.arange(7)).mean())


def test_drift_equals_an_independent_float64_sum():
    rng = np.random.default_rng(0)
    now, start = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))

    def unit(x):
        return x / np.sqrt((x**2).sum(1, keepdims=True))

    def chances(x, row):
        scores = {other: np.exp(unit(x)[row] @ unit(x)[other] / 0.1) for other in range(6) if other != row}
        return {other: score / sum(scores.values()) for other, score in scores.items()}

    divergences = []
    for row in range(6):
        p, q = chances(start, row), chances(now, row)
        divergences.append(sum(p[other] * np.log(p[other] / q[other]) for other in p))
    vectors = torch.tensor(now, requires_grad=True), torch.tensor(start, requires_grad=True)
    drift = similarity_drift(*vectors, 0.1)
    assert drift.item() == pytest.approx(np.mean(divergences), rel=1e-12)
    distance = vector_drift(*vectors)
    assert distance.item() == pytest.approx(1 - (unit(now) * unit(start)).sum(1).mean(), rel=1e-12)
    (drift + distance).backward()
    assert vectors[0].grad.any() and vectors[1].grad is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_shuffle_is_a_permutation_and_looks_random(size):
    order = Shuffle(size, seed=(3, 1))(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(Shuffle(size, seed=(3, 1))(np.array([size - 1])), order[-1:])
    if size >= 1000:
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.1
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
        assert np.mean(order == Shuffle(size, seed=(3, 2))(np.arange(size))) < 0.01
        halves = (order[: size // 2] < size / 2).mean()
        assert abs(halves - 0.5) < 0.1


def test_a_shuffle_of_hundreds_of_millions_gives_a_batch_at_once():
    rows = Shuffle(895_000_000, seed=0)(np.arange(10**8, 10**8 + 4096))
    assert len(set(rows.tolist())) == 4096 and rows.min() >= 0 and rows.max() < 895_000_000
    assert abs(rows.mean() / 895_000_000 - 0.5) < 0.03


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
    texts = [(1, 2), (1, 3), (4, 2), (5, 6), (7, 8), (6, 9)]

    def keys(rows):
        return [texts[row] for row in rows]

    for step in range(20):
        rows = distinct_rows([0, 1, 3], 6, keys, seed=0, step=step, name="pairs")
        found = [text for row in rows for text in texts[row]]
        assert len(rows) == 3 and len(found) == len(set(found))
        assert rows == distinct_rows([0, 1, 3], 6, keys, seed=0, step=step, name="pairs")


def test_a_source_without_enough_distinct_texts_is_named():
    with pytest.raises(DataError, match="'faq' has too few distinct texts for a batch of 3"):
        distinct_rows([0, 1, 2], 3, lambda rows: [(0, row + 1) for row in rows], seed=0, step=0, name="faq")


def test_seeds_that_differ_by_zeros_differ():
    orders = [tuple(Shuffle(50, seed)(np.arange(50))) for seed in (0, (0, 0), (0, 0, 0), (0, 3), (0, 3, 0))]
    assert len(set(orders)) == 5


def test_a_learnt_temperature_leaves_its_floor():
    from modeling_mtpf.pretraining.families.tc import ContrastiveObjective, TcSettings

    objective = ContrastiveObjective(TcSettings(learn_temperature=True))
    with torch.no_grad():
        objective.log_temperature.fill_(-9.0)
    loss, metrics = objective.loss(torch.randn(16, 8), {})
    loss.backward()
    assert objective.log_temperature.grad.abs().item() > 0 and metrics["temperature"].item() == pytest.approx(
        0.01
    )
