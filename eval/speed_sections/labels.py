"""Pseudo-labelling beside a plain loop over transformers."""

import tempfile
import time
from pathlib import Path

TEXTS = 4_000
"""Texts of the contest of speed; about 230,000 words of Wikipedia."""
PLAIN_ROWS = 64
"""Rows of the plain loop's batches: with padding, about as many tokens as a batch of ours."""
K = 200

CONTESTANTS = {"mtpf": 99, "plain": 99}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Label the same texts with the packaged encoder's last layer in the same precision."""
    import torch

    torch.set_num_threads(options["threads"])
    return _plain(options["text"]) if contestant == "plain" else _mtpf(options["text"])


def _mtpf(source: str) -> dict[str, float]:
    import json

    from modeling_mtpf.labelling.label import label_corpus
    from modeling_mtpf.labelling.settings import PseudoLabelSettings
    from modeling_mtpf.labelling.stopwatch import Stopwatch

    settings = PseudoLabelSettings(max_texts=TEXTS, sample_words=10_000, clusters=str(K))
    watch, started, cpu = Stopwatch(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = label_corpus(source, settings, Path(folder) / "labels", watch=watch)
        words = json.loads((result / "clusters.json").read_text("utf-8"))["words"]
    seconds = time.perf_counter() - started - watch.seconds["start"]  # without loading the teacher
    around = sum(watch.seconds[stage] for stage in ("clustering", "writing", "report"))
    cpu = time.process_time() - cpu
    stages = {f"seconds_{stage}": round(value, 3) for stage, value in watch.seconds.items()}
    return {
        "words": words,
        "seconds": round(seconds, 3),
        "words_per_second": round(words / seconds, 1),
        "words_per_cpu_second": round(words / cpu, 1),  # says more on a machine that does other work
        "clustering_and_writing_share": round(around / seconds, 4),
        **stages,
    }


def _plain(source: str) -> dict[str, float]:
    """A forward pass per batch of sentences as they come, word means, KMeans.predict, one Parquet file.

    Sentences and centroids are given: neither splitting nor fitting is in the time.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from sklearn.cluster import KMeans
    from transformers import AutoModel, AutoTokenizer

    from modeling_mtpf.data.packaged_encoder import packaged_encoder
    from modeling_mtpf.data.streams import TextStream
    from modeling_mtpf.devices import fast_bf16
    from modeling_mtpf.labelling.segmentation import split_sentences

    texts = [row.text or "" for row, _ in zip(TextStream(source), range(TEXTS), strict=False)]
    sentences = [sentence.words for text in texts for sentence in split_sentences(text, 40)]
    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())
    model = AutoModel.from_pretrained(packaged_encoder()).eval()
    bf16 = fast_bf16(torch.device("cpu"))
    centroids = np.random.default_rng(0).normal(size=(K, model.config.hidden_size)).astype(np.float32)
    kmeans = KMeans(K, init=centroids, n_init=1, max_iter=1).fit(centroids)
    labels: list = []
    started, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(sentences), PLAIN_ROWS):
        batch = sentences[start : start + PLAIN_ROWS]
        inputs = tokenizer(
            batch,
            is_split_into_words=True,
            truncation=True,
            max_length=128,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model(**inputs).last_hidden_state.float()
        vectors = []
        for row, words in enumerate(batch):
            word_ids = inputs.word_ids(row)
            tokens = [token for token, word in enumerate(word_ids) if word is not None]
            owners = torch.tensor([word_ids[token] for token in tokens])
            means = torch.zeros(len(words), hidden.shape[-1]).index_add_(0, owners, hidden[row, tokens])
            vectors.append(torch.nn.functional.normalize(means, dim=-1).numpy())
        found = kmeans.predict(np.concatenate(vectors))
        labels += np.split(found, np.cumsum([len(words) for words in batch])[:-1])
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"words": sentences, "clusters": labels}), Path(folder) / "labels.parquet")
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    total = sum(map(len, sentences))
    return {
        "words": total,
        "seconds": round(seconds, 3),
        "words_per_second": round(total / seconds, 1),
        "words_per_cpu_second": round(total / cpu, 1),
    }


def compare(medians: dict[str, dict[str, float]]) -> dict[str, tuple[float, str, float]]:
    """Return the ratios that count, each with its limit."""
    ours, plain = medians["mtpf"], medians["plain"]
    return {
        "words per CPU second, mtpf / plain": (
            ours["words_per_cpu_second"] / plain["words_per_cpu_second"],
            ">=",
            1.8,
        ),
        "words per second, mtpf / plain": (ours["words_per_second"] / plain["words_per_second"], ">=", 1.8),
        "clustering and writing, share of the time": (ours["clustering_and_writing_share"], "<=", 0.10),
    }
