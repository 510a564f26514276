"""Scores against sklearn and counting by hand, the verdict on K, and the page that shows them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from test_word_vectors import reference_vectors, settings_for

from modeling_mtpf.errors import DataError
from modeling_mtpf.labelling.label import label_corpus
from modeling_mtpf.labelling.quality import held_out_purity, purity, score, verdict
from modeling_mtpf.labelling.statistics import ClusterStatistics
from modeling_mtpf.labelling.summary import summary

TYPES = ("PER", "LOC", "DATE", "ORG")


@pytest.fixture
def words():
    """Types, rows' halves, and clusters of four kinds for 4,000 words, half of them outside."""
    rng = np.random.default_rng(0)
    types = rng.choice(["O", *TYPES], 4000, p=[0.5, 0.125, 0.125, 0.125, 0.125])
    second_half = np.arange(4000) // 10 % 2 == 1
    exact = np.searchsorted(np.unique(types), types)
    return types, second_half, exact, rng


def statistics_of(number: int, empty: int = 0) -> ClusterStatistics:
    sizes = np.full(number, 1000, dtype=np.int64)
    sizes[:empty] = 0
    return ClusterStatistics(sizes)


def test_scores_equal_sklearn_and_counting(words):
    types, second_half, exact, rng = words
    clusters = np.where(rng.random(4000) < 0.3, rng.integers(0, 9, 4000), exact)
    clusters[:100] = -1
    scores = score(types, clusters, second_half)
    types, clusters, second_half = types[100:], clusters[100:], second_half[100:]
    inside = types != "O"
    assert scores.words == 3900 and scores.words_cut_off == 100 and scores.entity_words == inside.sum()
    assert scores.nmi == pytest.approx(normalized_mutual_info_score(types, clusters))
    assert scores.nmi_entities == pytest.approx(normalized_mutual_info_score(types[inside], clusters[inside]))
    table = contingency_matrix(types, clusters)
    assert scores.purity == pytest.approx(table.max(axis=0).sum() / 3900)
    assert scores.purity_of_one_cluster == pytest.approx((types == "O").mean())
    persons = clusters[(types == "PER")]
    counts = sorted((int((persons == c).sum()) for c in set(persons)), reverse=True)
    least = next(n for n in range(1, 10) if sum(counts[:n]) >= 0.8 * len(persons))
    assert scores.clusters_of_type["PER"] == least
    right = 0
    for half in (False, True):
        scored = inside & (second_half == half)
        for cluster, kind in zip(clusters[scored], types[scored], strict=True):
            others = types[inside & (second_half != half) & (clusters == cluster)]
            names, votes = np.unique(others, return_counts=True)
            right += len(names) > 0 and names[votes.argmax()] == kind
    assert scores.purity_held_out == pytest.approx(right / inside.sum())


def test_purity_rises_with_random_clusters_but_held_out_purity_does_not(words):
    types, second_half, _, rng = words
    plain, held = [], []
    for number in (1, 50, 2000):
        clusters = rng.integers(0, number, 4000)
        plain.append(purity(types, clusters))
        held.append(held_out_purity(types, clusters, second_half))
    assert plain[2] > plain[1] + 0.1 and held[2] < held[0] + 0.02


def test_the_verdict_names_a_k_that_is_too_low_too_high_and_right(words):
    types, second_half, exact, rng = words
    merged = {"PER": 0, "LOC": 0, "DATE": 1, "ORG": 1, "O": 2}
    clusters = {
        3: np.array([merged[t] for t in types]),
        5: exact,
        50: exact * 10 + rng.integers(0, 10, 4000),
        4000: rng.permutation(4000),
    }
    curve = {k: {"gold": score(types, labels, second_half)} for k, labels in clusters.items()}
    statistics = {k: statistics_of(k) for k in clusters}
    said = verdict(curve, statistics)
    assert said[3].startswith("K = 3 is too low for these types: K = 5 tells them apart better")
    assert "2 of 4 types have no cluster of their own" in said[3]
    assert said[5].startswith("K = 5 fits these types")
    assert said[50].startswith("K = 50 is higher than these types need: K = 5 tells them apart as well")
    assert said[4000].startswith("K = 4000 is higher than these types need")
    alone = verdict({3: curve[3]}, statistics)[3]
    assert alone.startswith("K = 3 looks too low for these types, or the teacher does not know them")
    wasted = verdict({50: curve[50]}, {50: statistics_of(50, empty=8)})[50]
    assert wasted.startswith("K = 50 is too high for this corpus") and "8 empty" in wasted
    assert "Give a gold NER set with --gold" in verdict({3: {}}, statistics)[3]


@pytest.fixture
def gold(tmp_path) -> list[str]:
    rows = [
        {"tokens": [w, "."], "ner_tags": [f"B-{w.upper()}", "O"]}
        for w in ("ada", "london")
        for _ in range(15)
    ]
    for name in ("news", "chat"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(tmp_path / "news.jsonl"), str(tmp_path / "chat.jsonl")]


@pytest.fixture
def corpus(tmp_path) -> Path:
    texts = [f"Ada met <script>alert({n})</script> in London on Monday, said Noor." for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "texts.jsonl"


def test_gold_scores_are_those_of_the_nearest_centroids(encoders, corpus, gold, tmp_path):
    folder = label_corpus(str(corpus), settings_for(encoders["bert"], clusters="8"), tmp_path / "a", gold)
    report = json.loads((folder / "clusters.json").read_text())
    centroids = load_file(folder / "centroids.safetensors")["centroids"]
    sentences = [["ada", "."]] * 15 + [["london", "."]] * 15
    vectors = np.stack(reference_vectors(encoders["bert"], sentences))
    nearest = ((vectors[:, None] - centroids) ** 2).sum(-1).argmin(1)
    types = ["ADA", "O"] * 15 + ["LONDON", "O"] * 15
    for entry in report["gold"]:
        assert entry["nmi"] == pytest.approx(normalized_mutual_info_score(types, nearest), abs=1e-5)
        assert entry["words"] == 60 and entry["entity_words"] == 30
    assert [entry["source"].split("/")[-1] for entry in report["gold"]] == ["news", "chat"]
    one = label_corpus(str(corpus), settings_for(encoders["bert"], clusters="1"), tmp_path / "b", gold)
    assert json.loads((one / "clusters.json").read_text())["gold"][0]["nmi"] == 0.0


def test_the_page_shows_everything_and_runs_nothing(encoders, corpus, gold, tmp_path):
    settings = settings_for(encoders["bert"], clusters="4,8")
    folder = label_corpus(str(corpus), settings, tmp_path / "labels", gold)
    for path in ("report.html", "k8/report.html"):
        page = (folder / path).read_text()
        assert "data:image/png;base64," in page and "<script" not in page
        assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
        for head in ("Is K too high or too low?", "NMI", "purity", "entropy of sizes"):
            assert head in page
        for gold_set in ("news", "chat"):
            assert gold_set in page
    report = json.loads((folder / "k8/clusters.json").read_text())
    assert report["verdict"].partition(";")[0] in page and "&lt;" in page
    assert all(cluster["top_words"] for cluster in report["clusters"] if cluster["size"])
    assert page.count("<mark>") >= 8 and "K = 4" in (folder / "report.html").read_text()
    assert "NMI" in summary(folder)


def test_another_gold_set_is_measured_without_labelling_again(encoders, corpus, gold, tmp_path, monkeypatch):
    settings = settings_for(encoders["bert"], clusters="4")
    folder = label_corpus(str(corpus), settings, tmp_path / "labels")
    assert json.loads((folder / "clusters.json").read_text())["gold"] == []
    before = (folder / "shard-00000.parquet").stat().st_mtime_ns
    label_corpus(str(corpus), settings, tmp_path / "labels", gold)
    assert len(json.loads((folder / "clusters.json").read_text())["gold"]) == 2
    assert (folder / "shard-00000.parquet").stat().st_mtime_ns == before
    direct = label_corpus(str(corpus), settings, tmp_path / "direct", gold)
    for file in ("clusters.json", "report.html"):
        assert (folder / file).read_bytes() == (direct / file).read_bytes()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "row 1, has 2 tokens but 1 tags"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "has no entity; its tags must look like B-PER"),
        ({"tokens": ["a"], "tags": ["O"]}, "has no column 'ner_tags'"),
    ],
)
def test_a_bad_gold_set_is_refused_before_anything_else(encoders, corpus, tmp_path, row, message):
    (tmp_path / "gold.jsonl").write_text(json.dumps(row) + "\n")
    settings, gold = settings_for(encoders["bert"]), str(tmp_path / "gold.jsonl")
    with pytest.raises(DataError, match=message):
        label_corpus(str(corpus), settings, tmp_path / "out", gold)
    assert not list(tmp_path.glob("out*"))
