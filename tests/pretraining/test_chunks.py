"""Layout of a step's rows: nothing lost, few shapes, little padding."""

import numpy as np
import pytest
import torch

from modeling_mtpf.data.words import IGNORE
from modeling_mtpf.pretraining.chunks import ChunkShape, chunk_shape, plan_chunks
from modeling_mtpf.pretraining.families.base import FamilyBatch


def random_batches(seed: int, sizes: dict[str, int], longest: int = 60) -> dict[str, FamilyBatch]:
    rng = np.random.default_rng(seed)
    batches = {}
    for name, size in sizes.items():
        rows = [rng.integers(5, 1000, rng.integers(2, longest)) for _ in range(size)]
        labels = [rng.integers(0, 9, len(row)) for row in rows] if name == "ner" else None
        batches[name] = FamilyBatch(rows, labels, {"n": torch.tensor(size)})
    return batches


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_there_once_and_finds_its_place(seed):
    rng = np.random.default_rng(seed)
    shape = ChunkShape(
        tokens=int(rng.choice([64, 256, 1000])),
        length_multiple=int(rng.choice([1, 8, 16])),
        row_tokens=int(rng.choice([0, 32, 64])),
        max_length=60,
        padding=int(rng.choice([0, 20])),
    )
    batches = random_batches(seed, {"ner": int(rng.integers(1, 40)), "tc": int(rng.integers(1, 40))})
    plan = plan_chunks(batches, shape, pad_token_id=0)
    given: dict[str, list] = {name: [] for name in batches}
    for chunk in plan.chunks:
        ids, mask = chunk.inputs["input_ids"], chunk.inputs["attention_mask"]
        assert mask[:, 0].all() and ids.shape == mask.shape
        for name, (start, stop) in chunk.spans.items():
            for place in range(start, start + chunk.num_rows[name]):
                size = int(mask[place].sum())
                labels = chunk.labels[name][place - start] if name in chunk.labels else None
                assert mask[place, :size].all() and (labels is None or (labels[size:] == IGNORE).all())
                given[name].append(
                    (ids[place, :size].tolist(), None if labels is None else labels[:size].tolist())
                )
            if name in chunk.labels:  # filling counts for nothing
                assert chunk.labels[name].shape[0] == stop - start
                assert (chunk.labels[name][chunk.num_rows[name] :] == IGNORE).all()
    for name, batch in batches.items():
        assert len(given[name]) == len(batch.rows)
        for row, position in enumerate(plan.positions[name].tolist()):
            ids, labels = given[name][position]
            assert ids == batch.rows[row].tolist()
            assert labels is None or labels == batch.labels[row].tolist()
    assert plan.num_real_tokens == sum(len(row) for batch in batches.values() for row in batch.rows)


def test_few_shapes_and_little_padding_on_cpu():
    shape = chunk_shape(torch.device("cpu"), 128)
    shapes, tokens, padding = set(), 0, 0
    for seed in range(40):
        batches = random_batches(seed, {"ner": 128, "tc": 512}, longest=128)
        plan = plan_chunks(batches, shape, pad_token_id=0)
        shapes |= {tuple(chunk.inputs["input_ids"].shape) for chunk in plan.chunks}
        assert all(chunk.inputs["input_ids"].numel() <= 4096 for chunk in plan.chunks)
        tokens += plan.num_real_tokens
        padding += plan.num_tokens - plan.num_real_tokens
    assert padding / (tokens + padding) < 0.13  # half of a multiple of 16 at a mean length of 65 is 0.11
    assert len({rows * length for rows, length in shapes}) < 50


def test_hardly_any_padding_where_shapes_are_free():
    shape = chunk_shape(torch.device("cpu"), 64, few_shapes=False)
    tokens = padding = 0
    for seed in range(40):
        plan = plan_chunks(random_batches(seed, {"ner": 24, "tc": 32}), shape, pad_token_id=0)
        chunks = [chunk.inputs["input_ids"] for chunk in plan.chunks]
        assert all(ids.numel() <= shape.tokens for ids in chunks)
        assert len(chunks) <= 2 + plan.num_real_tokens / 150  # few beginnings, too
        tokens += plan.num_real_tokens
        padding += plan.num_tokens - plan.num_real_tokens
    assert padding / (tokens + padding) < 0.13


def test_a_row_longer_than_a_chunk_is_a_chunk():
    batch = FamilyBatch([np.arange(100), np.arange(3)])
    plan = plan_chunks({"tc": batch}, ChunkShape(64, 16, 32, 512), 0)
    assert [tuple(chunk.inputs["input_ids"].shape) for chunk in plan.chunks] == [(1, 112), (2, 16)]


def test_padding_stops_at_the_longest_the_encoder_reads():
    plan = plan_chunks({"tc": FamilyBatch([np.arange(19)])}, ChunkShape(64, 16, 0, 20), 0)
    assert plan.chunks[0].inputs["input_ids"].shape == (1, 20)


def test_moving_applies_to_every_tensor():
    plan = plan_chunks(random_batches(0, {"ner": 3, "tc": 2}), ChunkShape(), 0)
    moved = plan.to(torch.device("meta"))
    chunk = moved.chunks[0]
    tensors = [
        *chunk.inputs.values(),
        *chunk.labels.values(),
        *moved.positions.values(),
        moved.targets["tc"]["n"],
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.num_real_tokens == plan.num_real_tokens
