"""Pseudo-labels against a plain reference: a forward per sentence, means over sub-words, sklearn's prediction."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BYTE_LEVEL, SENTENCES
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from transformers import AutoModel

from modeling_mtpf.data.words import IGNORE, align_labels, encode_words, load_word_tokenizer, split_words
from modeling_mtpf.errors import DataError
from modeling_mtpf.pretraining.pseudo_labels import (
    PseudoLabelSettings,
    WordEncoder,
    assign,
    label_corpus,
    summary,
)

TEXTS = [
    *SENTENCES,
    "Noor and Ada take the 7:30pm train to London.",
    "don't @ me",
    "a\u200bb \u200b c",
    "I'll see 東京.",
]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"{text} {number}"}) for number in range(12) for text in TEXTS]
    file.write_text("\n".join(lines) + "\n")
    return file


def settings_for(folder, **kwargs) -> PseudoLabelSettings:
    return PseudoLabelSettings(teacher=str(folder), **({"clusters": 6, "sample_words": 500} | kwargs))


def reference_vectors(folder, sentences, layer) -> list[np.ndarray | None]:
    """One unit vector per word, from one sentence at a time, without padding."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = load_word_tokenizer(str(folder))
    vectors = []
    for words in sentences:
        encoding = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoding, output_hidden_states=True).hidden_states[layer][0]
        for index in range(len(words)):
            own = [position for position, word in enumerate(encoding.word_ids(0)) if word == index]
            mean = hidden[own].mean(0) if own else None
            vectors.append(None if mean is None else (mean / mean.norm()).numpy())
    return vectors


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_word_vectors_equal_the_reference(encoders, architecture, layer):
    sentences = [split_words(text) for text in TEXTS]
    expected = reference_vectors(encoders[architecture], sentences, layer)
    model = AutoModel.from_pretrained(encoders[architecture])
    encoder = WordEncoder(model, load_word_tokenizer(str(encoders[architecture])), layer, 128)
    found, covered = encoder(sentences)
    assert covered.tolist() == [vector is not None for vector in expected]
    np.testing.assert_allclose(found, np.stack([v for v in expected if v is not None]), atol=1e-5)
    if architecture not in BYTE_LEVEL:
        assert not covered.all()  # BERT's normaliser maps a zero-width space to nothing


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_labels_equal_kmeans_prediction(encoders, architecture, corpus, tmp_path):
    folder = label_corpus(
        str(corpus), settings_for(encoders[architecture], shard_rows=40), tmp_path / "labels"
    )
    shards = sorted(folder.glob("shard-*.parquet"))
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert len(shards) > 1 and [file.name for file in folder.iterdir() if "partial" in file.name] == []
    centroids = load_file(folder / "centroids.safetensors")["centroids"]
    reference = KMeans(n_clusters=6, init=centroids, n_init=1, max_iter=1).fit(centroids)
    reference.cluster_centers_ = centroids.astype(np.float64)
    vectors = reference_vectors(encoders[architecture], [row["words"] for row in rows], -1)
    found = [cluster for row in rows for cluster in row["clusters"]]
    assert len(found) == len(vectors)
    for vector, cluster in zip(vectors, found, strict=True):
        expected = IGNORE if vector is None else reference.predict(vector[None].astype(np.float64))[0]
        assert cluster == expected
    report = json.loads((folder / "clusters.json").read_text())
    assert (
        sum(c["size"] for c in report["clusters"]) == report["words"] == sum(v is not None for v in vectors)
    )
    assert report["words_ignored"] == sum(v is None for v in vectors)
    assert [w for row in rows for w in row["words"]] == [
        w for line in corpus.read_text().splitlines() for w in split_words(json.loads(line)["text"])
    ]
    assert "clusters (median" in summary(folder)


def test_labelling_is_deterministic_and_reused(encoders, corpus, tmp_path):
    settings = settings_for(encoders["bert"])
    first = label_corpus(str(corpus), settings, tmp_path / "a")
    second = label_corpus(str(corpus), settings, tmp_path / "b")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    before = (first / "shard-00000.parquet").stat().st_mtime_ns
    label_corpus(str(corpus), settings, tmp_path / "a")
    assert (first / "shard-00000.parquet").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other data or settings"):
        label_corpus(str(corpus), settings_for(encoders["bert"], clusters=7), tmp_path / "a")


def test_nmi_tells_informative_clusters_from_chance(encoders, corpus, tmp_path):
    gold = tmp_path / "gold.jsonl"
    words = ["ada", "london", "monday"]
    rows = [{"tokens": [w], "ner_tags": [f"B-{w.upper()}"]} for w in words for _ in range(10)]
    gold.write_text("\n".join(map(json.dumps, rows)))
    folder = label_corpus(
        str(corpus), settings_for(encoders["bert"], clusters=40), tmp_path / "a", gold=str(gold)
    )
    assert json.loads((folder / "clusters.json").read_text())["gold"]["nmi"] > 0.5
    flat = label_corpus(
        str(corpus), settings_for(encoders["bert"], clusters=1), tmp_path / "b", gold=str(gold)
    )
    assert json.loads((flat / "clusters.json").read_text())["gold"]["nmi"] == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clusters": 5000}, "5000 clusters need at least as many words"),
        ({"layer": 9}, "layer 9 does not exist"),
    ],
)
def test_impossible_settings_leave_nothing_behind(encoders, corpus, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        label_corpus(str(corpus), settings_for(encoders["bert"], **change), tmp_path / "labels")
    assert not list(tmp_path.glob("labels*"))


def test_assign_takes_the_nearest_centroid():
    rng = np.random.default_rng(0)
    vectors, centroids = (
        rng.normal(size=(50, 8)),
        rng.normal(size=(7, 8)) * [[1], [2], [3], [1], [5], [1], [1]],
    )
    distances = ((vectors[:, None] - centroids[None]) ** 2).sum(-1)
    assert assign(vectors, centroids).tolist() == distances.argmin(1).tolist()


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_labels_sit_on_first_subwords_and_lost_words_are_counted(encoders, architecture):
    tokenizer = load_word_tokenizer(str(encoders[architecture]))
    words = ["Lovelace", "xyzzyx", "\u200b", "Monday"]
    inputs, word_ids = encode_words(tokenizer, [words, words[:1]], max_length=64)
    labels, lost = align_labels(word_ids, [[7, 8, 9, 6], [5]])
    kept = labels[0][labels[0] != IGNORE].tolist()
    gone = architecture == "bert"
    assert kept == ([7, 8, 6] if gone else [7, 8, 9, 6]) and lost == int(gone)
    assert labels.shape == inputs["input_ids"].shape and labels.shape[1] % 16 == 0
    first = [word_ids[0].tolist().index(i) for i in (0, 1, 3)]
    assert [labels[0, position].item() for position in first] == [7, 8, 6]
    _, short_ids = encode_words(tokenizer, [words], max_length=6)
    aligned, lost = align_labels(short_ids, [[7, 8, 9, 6]])
    assert lost == 4 - (aligned != IGNORE).sum() > 0
