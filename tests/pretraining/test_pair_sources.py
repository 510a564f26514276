"""Pair sources: drawn by seed and turn, streamed like mapped, hard negatives, errors that name source and row."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from modeling_mtpf.data.encoding import encode_rows
from modeling_mtpf.data.tokens import text_key, tokenize_columns, tokenize_labelled_words
from modeling_mtpf.data.words import IGNORE, align_labels, load_word_tokenizer
from modeling_mtpf.errors import DataError
from modeling_mtpf.pretraining.chunks import ChunkShape, JointBatch
from modeling_mtpf.pretraining.families.base import RunContext
from modeling_mtpf.pretraining.families.pairs import StreamedPairs
from modeling_mtpf.pretraining.families.tc import TcFamily, TcSettings
from modeling_mtpf.pretraining.loader import joint_batch, load_batches


@pytest.fixture
def context(encoders, tmp_path):
    return RunContext(load_word_tokenizer(str(encoders["bert"])), seed=5, work_dir=tmp_path)


def write(file, rows) -> str:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


def numbered(count: int, **more) -> list[dict]:
    return [
        {"anchor": f"{n} a {n}", "positive": f"b {n}"} | {k: f"{v} {n}" for k, v in more.items()}
        for n in range(count)
    ]


def family_of(context, *sources, **settings) -> TcFamily:
    family = TcFamily(
        "tc", TcSettings(pairs=list(sources), **({"batch_size": 4, "max_length": 16} | settings))
    )
    family.prepare(context)
    return family


def decoded(context, batch) -> list[str]:
    return [context.tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in batch.rows]


def test_tokens_equal_the_tokenizer_and_are_cached(context, encoders, monkeypatch):
    from datasets import Dataset, load_dataset

    texts = ["Ada is late", "Noor's train leaves at 7:30pm from gate 12", "x"]
    table = tokenize_columns(Dataset.from_dict({"anchor": texts}), context.tokenizer, 8, "t")
    expected = context.tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert table["anchor"][:] == expected
    assert table["keys"][0] == [text_key("  ADA is late ")] and text_key("a") != text_key("b")
    file = context.work_dir / "texts.jsonl"
    write(file, [{"anchor": text} for text in texts])
    dataset = load_dataset("json", data_files=str(file), split="train")
    first = tokenize_columns(dataset, context.tokenizer, 8, "t")
    context.tokenizer("other use", padding="max_length", max_length=20)  # leaves its mark on the tokenizer
    again = tokenize_columns(dataset, context.tokenizer, 8, "t")
    assert first.cache_files and first.cache_files == again.cache_files
    assert tokenize_columns(dataset, context.tokenizer, 9, "t").cache_files != first.cache_files


def test_labelled_words_equal_the_padded_alignment(context):
    from datasets import Dataset

    words = [["Ada", "lovelace", "met"], ["\u200b", "x"], ["concert"] * 9]
    labels = [[3, 1, IGNORE], [2, 2], list(range(9))]
    rows = Dataset.from_dict({"words": words, "clusters": labels})
    table = tokenize_labelled_words(rows, context.tokenizer, 8, "words", "clusters", "t")
    encoded = encode_rows(context.tokenizer, words, 8)
    expected, lost = zip(*map(align_labels, encoded.word_ids, labels), strict=True)
    assert sum(table["lost"]) == sum(lost) > 0 and table["words"][:] == [3, 2, 9]
    for row in range(3):
        assert table["ids"][row] == encoded.columns["input_ids"][row].tolist()
        assert table["labels"][row] == expected[row].tolist()


def test_hard_negatives_come_with_their_pairs_and_differ_from_other_rows(context):
    rows = numbered(12, negative="n", negative_2="m")
    family = family_of(context, write(context.work_dir / "hard.jsonl", rows))
    assert family.describe()["hard"]["hard_negatives"] == 2
    batch = family.batch(0)
    assert int(batch.targets["texts_per_row"]) == 4 and len(batch.rows) == 16
    anchors, positives, one, two = np.array(decoded(context, batch)).reshape(4, 4).tolist()
    for place, number in enumerate(batch.row_numbers[:4]):
        n = number - 1
        assert (anchors[place], positives[place], one[place], two[place]) == (
            f"{n}a{n}",
            f"b{n}",
            f"n{n}",
            f"m{n}",
        )
    shared = [{**row, "negative": rows[0]["positive"]} for row in rows]  # everyone's negative is a positive
    with pytest.raises(DataError, match="'shared' has too few distinct texts for a batch of 4"):
        family_of(context, write(context.work_dir / "shared.jsonl", shared)).batch(0)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_comes_once_an_epoch_and_no_step_depends_on_another(context, streaming):
    source = write(context.work_dir / "pairs.jsonl", [*numbered(20), {"anchor": " ", "positive": "x"}])
    settings = {"streaming": streaming, "block_rows": 9, "source_cap": 20}
    family = family_of(context, source, **settings)
    batches = [decoded(context, family.batch(step)) for step in range(10)]
    # A stream is shuffled block by block, and its third block reaches into the second epoch.
    whole = 4 if streaming else 5
    assert len({text for batch in batches[:whole] for text in batch[:4]}) == 4 * whole
    again = family_of(context, source, **settings)
    assert [decoded(context, again.batch(step)) for step in (7, 3, 9, 0)] == [
        batches[n] for n in (7, 3, 9, 0)
    ]
    halves = [decoded(context, family.batch(2, rank, 2)) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(batches[2])


def batches_of(family):
    return partial(joint_batch, families=[family], shape=ChunkShape(max_length=16), pad_token_id=0)


def test_announced_steps_are_delivered_whatever_the_sizes_and_prefetching(context):
    sources = [write(context.work_dir / f"s{n}.jsonl", numbered(n)) for n in (5, 40, 7)]
    family = family_of(context, *sources, source_temperature=2.0)

    def steps(prefetch, first=0) -> list:
        loaded = load_batches(batches_of(family), first, 60, prefetch, torch.device("cpu"))
        return [(b.batches["tc"].source, [row.tolist() for row in b.batches["tc"].rows]) for b in loaded]

    plain = steps(0)
    assert len(plain) == 60
    assert steps(3) == plain and steps(1, first=41) == plain[41:]
    counts = {name: sum(source == name for source, _ in plain) / 60 for name in ("s5", "s40", "s7")}
    shares = np.sqrt([5, 40, 7]) / np.sqrt([5, 40, 7]).sum()
    np.testing.assert_allclose([counts["s5"], counts["s40"], counts["s7"]], shares, atol=0.12)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_row_of_a_stream_is_named_with_its_step(context, prefetch):
    rows = numbered(30)
    rows[17] = {"anchor": "a", "positive": None}
    source = write(context.work_dir / "bad.jsonl", rows)
    family = family_of(context, source, streaming=True, block_rows=8, source_cap=30)
    loaded = load_batches(batches_of(family), 0, 20, prefetch, torch.device("cpu"))
    with pytest.raises(
        DataError, match=r"Step 5, family 'tc': The pair source 'bad', row 18: column 'positive'"
    ):
        for batch in loaded:
            assert isinstance(batch, JointBatch)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_columns_of_other_names_are_a_pair_by_their_order(context, streaming):
    rows = [{"question": f"{n} q {n}", "answer": f"a {n}"} for n in range(8)]
    source = write(context.work_dir / "faq.jsonl", rows)
    family = family_of(context, source, streaming=streaming, block_rows=8, source_cap=8)
    texts = decoded(context, family.batch(0))
    assert all("q" in text for text in texts[:4]) and all(text.startswith("a") for text in texts[4:])
    other = write(context.work_dir / "three.jsonl", [{**row, "id": "x"} for row in rows])
    with pytest.raises(DataError, match="has no column 'anchor'; it has: question, answer, id"):
        family_of(context, other)


def test_a_stream_follows_the_rules_of_whole_sources(context):
    """Hard negatives are checked like the pair, "NA" is a text, and row numbers are those of the source."""
    rows = numbered(20, negative="n")
    rows[0]["anchor"], rows[9]["negative"] = "", " "
    streamed = {"streaming": True, "block_rows": 8, "source_cap": 20}
    family = family_of(context, write(context.work_dir / "p.jsonl", rows), **streamed)
    seen, left_out = {}, 0
    for step in range(6):
        batch = family.batch(step)
        left_out += batch.counts.get("empty_left_out", 0)
        for number, text in zip(batch.row_numbers[:4], decoded(context, batch)[:4], strict=True):
            seen[number] = text
    assert left_out == 3  # two in the first pass, and the first row again, which the third block reaches
    numbers = {number: text.replace("##", "").split("a")[0] for number, text in seen.items()}
    assert all(text == str(number - 1) for number, text in numbers.items())
    assert 1 not in seen and 10 not in seen and max(seen) == 20
    rows[4]["negative"] = None
    broken = family_of(context, write(context.work_dir / "q.jsonl", rows), **streamed)
    with pytest.raises(DataError, match="'q', row 5: column 'negative' holds NoneType"):
        broken.batch(0)
    lines = "anchor,positive\n" + "\n".join(f"{n} x,NA{n}" for n in range(7)) + "\ny,NA\n"
    (context.work_dir / "na.csv").write_text(lines)
    assert len(family_of(context, str(context.work_dir / "na.csv"), **streamed).batch(0).rows) == 8


def test_a_stream_that_runs_dry_or_breaks_off_is_named(context, monkeypatch):
    empty = write(context.work_dir / "dry.jsonl", [{"anchor": "", "positive": "x"}] * 5)
    family = family_of(context, empty, streaming=True, block_rows=8, source_cap=9)
    with pytest.raises(DataError, match="'dry' has run dry: it has no pair with two texts"):
        family.batch(0)
    source = write(context.work_dir / "pairs.jsonl", numbered(9))
    with pytest.raises(DataError, match="'pairs' does not announce its size; set families.tc.source_cap"):
        family_of(context, source, streaming=True, block_rows=8)
    with pytest.raises(DataError, match="block_rows is 3; it must hold a batch of 4"):
        family_of(context, source, streaming=True, block_rows=3, source_cap=9)
    family = family_of(context, source, streaming=True, block_rows=8, source_cap=9)

    def broken(self):
        yield {"anchor": "a", "positive": "b"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(family.sources[0]._stream), "__iter__", broken)
    with pytest.raises(DataError, match="'pairs' broke off after row 1: reset by peer"):
        family.batch(0)
    assert isinstance(family.sources[0], StreamedPairs)
