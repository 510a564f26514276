"""Labelled folders: against a plain reference, and whatever happens on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from test_word_vectors import TEXTS, reference_vectors, settings_for

from modeling_mtpf.data.encoding import encode_rows
from modeling_mtpf.data.sources import TextStream
from modeling_mtpf.data.words import IGNORE, align_labels, load_word_tokenizer, split_words
from modeling_mtpf.errors import DataError
from modeling_mtpf.labelling.clustering import ClusterFit, assign
from modeling_mtpf.labelling.corpus import survey
from modeling_mtpf.labelling.label import label_corpus
from modeling_mtpf.labelling.settings import PseudoLabelSettings
from modeling_mtpf.labelling.shards import write_shard
from modeling_mtpf.labelling.statistics import cluster_statistics
from modeling_mtpf.labelling.summary import summary

ROOT = Path(__file__).parents[2]
LINES = [f"{text} {number}" for number in range(12) for text in TEXTS]


@pytest.fixture
def corpus(tmp_path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return file


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


def rows_of(folder: Path) -> list[dict]:
    return [row for shard in shards_of(folder) for row in pq.read_table(shard).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_labels_equal_kmeans_prediction(encoders, architecture, corpus, tmp_path):
    settings = settings_for(encoders[architecture], shard_characters=700, max_length=24)
    folder = label_corpus(str(corpus), settings, tmp_path / "labels")
    rows = rows_of(folder)
    assert len(shards_of(folder)) > 3 and not (tmp_path / "labels.partial").exists()
    assert {f.suffix for f in folder.iterdir()} == {".parquet", ".json", ".html", ".safetensors"}
    assert [w for row in rows for w in row["words"]] == [w for line in LINES for w in split_words(line)]
    centroids = load_file(folder / "centroids.safetensors")["centroids"]
    reference = KMeans(n_clusters=6, init=centroids, n_init=1, max_iter=1).fit(centroids)
    reference.cluster_centers_ = centroids.astype(np.float64)
    vectors = reference_vectors(encoders[architecture], [row["words"] for row in rows], max_length=24)
    expected = [IGNORE if v is None else reference.predict(v[None].astype(np.float64))[0] for v in vectors]
    assert [cluster for row in rows for cluster in row["clusters"]] == expected
    report = json.loads((folder / "clusters.json").read_text())
    assert report["words_ignored"] == expected.count(IGNORE) > 0
    sizes = [expected.count(k) for k in range(6)]
    assert [c["size"] for c in report["clusters"]] == sizes and report["words"] == sum(sizes)
    assert "in 6 clusters (median" in summary(folder)


def test_labelling_is_deterministic_and_reused(encoders, corpus, tmp_path):
    settings = settings_for(encoders["bert"])
    first = label_corpus(str(corpus), settings, tmp_path / "a")
    assert contents(first) == contents(label_corpus(str(corpus), settings, tmp_path / "b"))
    before = (first / "shard-00000.parquet").stat().st_mtime_ns
    label_corpus(str(corpus), settings, tmp_path / "a")
    assert (first / "shard-00000.parquet").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other data or settings"):
        label_corpus(str(corpus), settings_for(encoders["bert"], clusters="7"), tmp_path / "a")


def test_several_k_come_from_one_pass_and_equal_single_runs(encoders, corpus, tmp_path):
    settings = settings_for(encoders["bert"], clusters="3,8", shard_characters=900)
    folder = label_corpus(str(corpus), settings, tmp_path / "both")
    assert sorted(f.name for f in folder.iterdir()) == ["k3", "k8", "report.html"]
    for number in (3, 8):
        single = settings_for(encoders["bert"], clusters=str(number), shard_characters=900)
        alone = label_corpus(str(corpus), single, tmp_path / f"alone{number}")
        assert len(shards_of(alone)) > 1
        for shard in shards_of(alone):
            assert shard.read_bytes() == (folder / f"k{number}" / shard.name).read_bytes()
        # The pages differ in nothing, the records in the settings alone.
        assert (alone / "report.html").read_bytes() == (folder / f"k{number}" / "report.html").read_bytes()
    assert summary(folder).count("clusters (median") == 2


def test_every_format_gives_the_same_labels(encoders, corpus, tmp_path):
    plain = [" ".join(line.split()) for line in LINES]
    (tmp_path / "texts.txt").write_text("\n".join(plain) + "\n")
    table = pa.table({"title": ["t"] * len(plain), "body": plain})
    pq.write_table(table, tmp_path / "texts.parquet", row_group_size=7)
    (tmp_path / "texts.json").write_text("".join(json.dumps({"text": line}) + "\n" for line in plain))
    quoted = (line.replace('"', '""') for line in plain)
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f'"{line}"\n' for line in quoted))
    (tmp_path / "parts").mkdir()
    for part in range(2):
        half = pa.table({"text": plain[part * 60 : (part + 1) * 60]})
        pq.write_table(half, tmp_path / "parts" / f"{part}.parquet")
    shards = {}
    for name in ("texts.txt", "texts.parquet", "texts.json", "texts.csv", "parts"):
        column = "body" if name == "texts.parquet" else "text"
        settings = settings_for(encoders["bert"], column=column, shard_characters=900)
        folder = label_corpus(str(tmp_path / name), settings, tmp_path / "out" / name)
        shards[name] = [shard.read_bytes() for shard in shards_of(folder)]
    assert all(part == shards["texts.txt"] for part in shards.values()) and len(shards["parts"]) > 2


HUB = """
import json
from pathlib import Path
from modeling_mtpf.data.sources import TextStream
stream = TextStream("{source}")
print(json.dumps([stream.fingerprint(), [row.text for row in stream]]))
"""


@pytest.mark.slow
@pytest.mark.hub
def test_a_hub_data_set_is_streamed_at_its_commit(hub, fresh_process, tmp_path):
    hub.create("me/texts", repo_type="dataset")
    shas = []
    for version in ("old", "new"):
        pq.write_table(pa.table({"text": [f"{version} {i}" for i in range(5)]}), tmp_path / "a.parquet")
        files = {"data/train-00000.parquet": (tmp_path / "a.parquet").read_bytes()}
        shas.append(hub.commit("me/texts", files, repo_type="dataset"))
    environment = hub.environment()
    for source, sha, version in (("me/texts", shas[1], "new"), (f"me/texts@{shas[0]}", shas[0], "old")):
        fingerprint, texts = fresh_process(HUB.format(source=source), **environment)
        assert texts == [f"{version} {i}" for i in range(5)] and fingerprint == f"me/texts@{sha}"


def test_offsets_lead_back_to_the_text(encoders, corpus, tmp_path):
    settings = settings_for(encoders["bert"], keep_offsets=True, shard_characters=900)
    rows = rows_of(label_corpus(str(corpus), settings, tmp_path / "labels"))
    assert {row["row"] for row in rows} == set(range(len(LINES)))
    for row in rows:
        for word, start in zip(row["words"], row["starts"], strict=True):
            assert LINES[row["row"]][start : start + len(word)] == word


def test_the_sample_is_seeded_and_fair(corpus):
    def sample_of(**settings) -> list[str]:
        return survey(TextStream(corpus), settings_for("x", **settings))[1]

    drawn = [sample_of(sample_words=200, seed=seed) for seed in range(300)]
    assert sample_of(sample_words=200, seed=5) == drawn[5]
    for sample in drawn:
        words = [len(text.split()) for text in sample]
        assert sum(words) >= 200 > sum(words) - max(words)
    counts = {line: sum(line in sample for sample in drawn) for line in LINES}
    share = np.mean(list(counts.values())) / 300
    assert max(abs(c - 300 * share) for c in counts.values()) < 4.5 * np.sqrt(300 * share * (1 - share))
    everything = sample_of(sample_words=10**6)
    assert sorted(everything) == sorted(LINES) and everything != LINES


def test_spherical_clusters_go_by_angle():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plain, spherical = (ClusterFit([5], 0, flag).fit([vectors.copy()])[5] for flag in (False, True))
    np.testing.assert_allclose(np.linalg.norm(spherical, axis=1), 1, atol=1e-6)
    assert np.linalg.norm(plain, axis=1).max() < 0.9
    assert (assign(vectors, spherical) == (vectors @ spherical.T).argmax(1)).all()


def test_assign_takes_the_nearest_centroid():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8))
    centroids = rng.normal(size=(7, 8)) * [[1], [2], [3], [1], [5], [1], [1]]
    distances = ((vectors[:, None] - centroids[None]) ** 2).sum(-1)
    assert assign(vectors, centroids).tolist() == distances.argmin(1).tolist()


def test_statistics_equal_plain_counting(encoders, corpus, tmp_path):
    settings = settings_for(encoders["bert"], shard_characters=900)
    folder = label_corpus(str(corpus), settings, tmp_path / "labels")
    statistics = cluster_statistics(shards_of(folder), 6)
    pairs = [p for row in rows_of(folder) for p in zip(row["words"], row["clusters"], strict=True)]
    for cluster in range(6):
        words = [word for word, c in pairs if c == cluster]
        assert statistics.sizes[cluster] == len(words)
        best = sorted(set(words), key=lambda word: (-words.count(word), word))[:10]
        assert statistics.top_words[cluster] == best
        for left, word, right in statistics.examples[cluster]:
            context = f"{left} {word} {right}".strip()
            assert (word, cluster) in pairs
            assert any(context in " ".join(row["words"]) for row in rows_of(folder))
    shares = statistics.sizes[statistics.sizes > 0] / statistics.sizes.sum()
    assert statistics.entropy == pytest.approx(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_labels_sit_on_first_subwords_and_lost_words_are_counted(encoders, architecture):
    tokenizer = load_word_tokenizer(str(encoders[architecture]))
    words = ["Lovelace", "xyzzyx", "\u200b", "Monday"]
    word_ids = encode_rows(tokenizer, [words], max_length=64).word_ids[0]
    labels, lost = align_labels(word_ids, [7, 8, 9, 6])
    unread = architecture == "bert"
    assert labels[labels != IGNORE].tolist() == ([7, 8, 6] if unread else [7, 8, 9, 6])
    assert lost == int(unread) and labels.shape == word_ids.shape
    assert [labels[word_ids.tolist().index(word)] for word in (0, 1, 3)] == [7, 8, 6]
    short_ids = encode_rows(tokenizer, [words], max_length=6).word_ids[0]
    aligned, lost = align_labels(short_ids, [7, 8, 9, 6])
    assert lost == 4 - (aligned != IGNORE).sum() > 0


# Stopped runs, several processes

KILLED = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from modeling_mtpf.labelling.label import label_corpus
from modeling_mtpf.labelling.settings import PseudoLabelSettings
source, folder, settings = sys.argv[1], Path(sys.argv[2]), PseudoLabelSettings(**json.loads(sys.argv[3]))
rng, kills, seen, took = random.Random(0), 0, set(), 0.0
while True:
    started = time.time()
    child = os.fork()
    if child == 0:
        label_corpus(source, settings, folder)
        os._exit(0)
    if kills < 10 and took:
        time.sleep(rng.uniform(0.1, 0.9) * took)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not took:  # undisturbed, to know how long it takes
        took = time.time() - started
        folder.rename(folder.with_name("undisturbed"))
        continue
    partial = folder.with_name(folder.name + ".partial")
    seen.add(len(list(partial.glob("shard-*"))) if partial.exists() else 0)
    kills += os.WIFSIGNALED(status)
    if kills == 10 and folder.exists():
        break
    if folder.exists():  # it was faster than the kill: once more from the beginning
        shutil.rmtree(folder)
print(json.dumps([kills, sorted(seen), [p.name for p in folder.parent.iterdir()]]))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_the_same(encoders, corpus, tmp_path):
    settings = {
        "teacher": str(encoders["bert"]),
        "clusters": "5,9",
        "shard_characters": 150,
        "batch_tokens": 64,
    }
    folder = str(tmp_path / "out" / "labels")
    command = [sys.executable, "-c", KILLED, str(corpus), folder, json.dumps(settings)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, seen, left = json.loads(done.stdout.splitlines()[-1])
    assert kills == 10 and sorted(left) == ["labels", "undisturbed"]
    resumed, undisturbed = (contents(tmp_path / "out" / name) for name in ("labels", "undisturbed"))
    assert resumed == undisturbed and sum("shard" in name for name in resumed) > 40


def test_a_run_that_was_stopped_while_labelling_keeps_its_shards(encoders, corpus, tmp_path, monkeypatch):
    settings = settings_for(encoders["bert"], shard_characters=400)
    whole = label_corpus(str(corpus), settings, tmp_path / "whole")

    def stop(path, *args, **kwargs):
        if path.name == "shard-00002.parquet":
            raise KeyboardInterrupt
        write_shard(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modeling_mtpf.labelling.label.write_shard", stop)
        label_corpus(str(corpus), settings, tmp_path / "labels")
    partial = tmp_path / "labels.partial"
    assert not (tmp_path / "labels").exists() and len(shards_of(partial)) == 2
    (partial / ".shard-00002.parquet.1.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="holds an unfinished run with other data or settings"):
        label_corpus(str(corpus), settings_for(encoders["bert"], seed=1), tmp_path / "labels")
    times = [shard.stat().st_mtime_ns for shard in shards_of(partial)]
    folder = label_corpus(str(corpus), settings, tmp_path / "labels")
    assert [shard.stat().st_mtime_ns for shard in shards_of(folder)[:2]] == times
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_two_processes_equal_one(encoders, corpus, tmp_path):
    settings = {"teacher": str(encoders["bert"]), "clusters": "4,7", "layer": "-1,-2"}
    settings["shard_characters"] = 500
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    torchrun = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2 --master_port 29573".split()]
    script = [str(ROOT / "train" / "pseudo_label.py"), "--text", str(corpus)]
    done = subprocess.run(
        [*torchrun, *script, *options, "--output_dir", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report: ") == 1  # one process speaks
    label_corpus(str(corpus), PseudoLabelSettings(**settings), tmp_path / "one")
    files = contents(tmp_path / "two")
    assert files == contents(tmp_path / "one") and sum("shard" in name for name in files) > 6


# Bad input

FULL = """
import json, resource, sys
from pathlib import Path
from modeling_mtpf.errors import DataError
from modeling_mtpf.labelling.label import label_corpus
from modeling_mtpf.labelling.settings import PseudoLabelSettings
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
try:
    label_corpus({source!r}, PseudoLabelSettings(**{settings!r}), Path({folder!r}))
except DataError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence_and_the_run_resumes(encoders, tmp_path, fresh_process):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    source, folder = tmp_path / "texts.txt", tmp_path / "labels"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 8)) for _ in range(3000)]
    source.write_text(
        "Ada met Noor.\n" * 40 + "\n".join(" ".join(words[i : i + 10]) for i in range(0, 3000, 10))
    )
    settings = {"teacher": str(encoders["bert"]), "clusters": "4", "shard_characters": 500}
    big = settings | {"shard_characters": 40_000, "sample_words": 100}
    code = FULL.format(limit=9000, source=str(source), settings=big, folder=str(folder))
    message = fresh_process(code)
    assert "shard-00000.parquet cannot be written: File too large. Free space or choose another" in message
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("labels*/*")}
    assert left == {"labels.partial/_plan.json", "labels.partial/centroids.safetensors"}
    done = label_corpus(str(source), PseudoLabelSettings(**big), folder)
    assert len(rows_of(done)) > 100
    tiny = FULL.format(limit=100, source=str(source), settings=settings, folder=str(tmp_path / "none"))
    assert "centroids.safetensors cannot be written" in fresh_process(tiny)
    assert not list(tmp_path.glob("none*"))


def bad_sources(folder: Path) -> None:
    good = pa.table({"text": ["Ada met Noor."] * 50, "number": list(range(50))})
    pq.write_table(good, folder / "good.parquet")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.parquet").write_bytes(b"\x00\xff" * 500)
    damaged = bytearray(whole)
    damaged[4:60] = b"\xff" * 56
    (folder / "damaged.parquet").write_bytes(damaged)
    (folder / "line.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "empty.parquet").write_bytes(b"")
    pq.write_table(good.slice(0, 0), folder / "rowless.parquet")
    (folder / "blank.jsonl").write_text('{"text": ""}\n{"text": " \\n "}\n')
    (folder / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (folder / "long.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"text": "a" * 1_000_000}) + "\n")
    (folder / "latin.txt").write_bytes("Zürich\n".encode("latin-1") * 5)


BAD = {
    "truncated": ("truncated.parquet", {}, r"truncated.parquet cannot be read as parquet: .* fetch it again"),
    "garbage": ("garbage.parquet", {}, "garbage.parquet cannot be read as parquet"),
    "damaged": ("damaged.parquet", {}, "damaged.parquet cannot be read as parquet"),
    "a bad line": ("line.jsonl", {}, "line.jsonl, line 2 is not valid JSON"),
    "no bytes": ("empty.parquet", {}, "empty.parquet is empty"),
    "no rows": ("rowless.parquet", {}, "rowless.parquet holds no words"),
    "no words": ("blank.jsonl", {}, "blank.jsonl holds no words in column 'text'; give another source"),
    "no column": ("good.parquet", {"column": "body"}, "no column 'body'; it has: text, number. .* --column"),
    "numbers": ("good.parquet", {"column": "number"}, "Column 'number' of .* holds int64; text is needed"),
    "null": ("null.jsonl", {}, "null.jsonl, row 2: column 'text' is empty. .*--bad_rows skip"),
    "no spaces": ("long.jsonl", {}, "long.jsonl, row 2: there is a word of more than 1,000 characters"),
    "encoding": ("latin.txt", {}, "latin.txt, line 1 is not UTF-8"),
    "too many clusters": ("good.parquet", {"clusters": "5000"}, "5000 clusters need at least as many words"),
    "no layer": ("good.parquet", {"layer": "9"}, "layer 9 does not exist; it has hidden states 0 to 4"),
    "no teacher": ("good.parquet", {"folder": "./missing"}, "The teacher './missing' cannot be loaded"),
    "no source": ("none.parquet", {}, "no file or folder"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(encoders, tmp_path, fault):
    (tmp_path / "data").mkdir()
    bad_sources(tmp_path / "data")
    name, change, message = BAD[fault]
    settings = settings_for(**{"folder": encoders["bert"], **change})
    with pytest.raises(DataError, match=message) as caught:
        label_corpus(str(tmp_path / "data" / name), settings, tmp_path / "out" / "labels")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"clusters": "0"}, "number of clusters is 0"),
        ({"clusters": "5,x"}, "clusters is '5,x'; it must be a number, or several with commas"),
        ({"clusters": "5,5"}, "a number occurs twice"),
        ({"pooling": "max"}, "pooling is 'max'; choose one of: mean, first"),
        ({"max_words": 0}, "max_words is 0"),
        ({"spherical": True, "normalize": False}, "leave normalize on"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(DataError, match=message):
        settings_for("x", **change)


def test_bad_rows_can_be_left_out_and_are_counted(encoders, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["Ada met Noor in London.", None, "a" * 5000, "", *["Hi there."] * 9]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = settings_for(encoders["bert"], bad_rows="skip", clusters="2")
    folder = label_corpus(str(file), settings, tmp_path / "labels")
    corpus = json.loads((folder / "clusters.json").read_text())["corpus"]
    assert corpus == {"texts": 10, "rows_left_out": 3}
    assert [row["words"][0] for row in rows_of(folder)] == ["Ada", *["Hi"] * 9]


def test_other_files_in_the_way_are_refused(encoders, corpus, tmp_path):
    (tmp_path / "labels.partial").mkdir()
    (tmp_path / "labels.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        label_corpus(str(corpus), settings_for(encoders["bert"]), tmp_path / "labels")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    with pytest.raises(DataError, match="is not an empty folder"):
        label_corpus(str(corpus), settings_for(encoders["bert"]), tmp_path / "full")
