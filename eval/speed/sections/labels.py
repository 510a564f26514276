"""Pseudo-labelling against a plain loop over transformers."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TEXTS = 3_000
"""Number of texts; about 190,000 words of Wikipedia."""
PLAIN_ROWS = 72
"""Rows of the plain loop's batches: the average of our batches with this text."""
K = 200
SAMPLE_WORDS = 10_000
"""Words that the centroids are fitted to, for both contestants."""

CONTESTANTS = {"mtpf": 99, "plain": 99, "plain_sorted": 99}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Label the same texts with the packaged encoder's last layer in the same precision."""
    import torch

    torch.set_num_threads(options["threads"])
    if contestant == "mtpf":
        return _mtpf(options["text"])
    return _plain(options["text"], by_length=contestant.endswith("sorted"))


def _mtpf(source: str) -> dict[str, float]:
    import json

    from modeling_mtpf.labelling.label import label_corpus
    from modeling_mtpf.labelling.settings import PseudoLabelSettings
    from modeling_mtpf.labelling.stopwatch import Stopwatch

    settings = PseudoLabelSettings(max_texts=TEXTS, sample_words=SAMPLE_WORDS, clusters=str(K))
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


def _plain(source: str, by_length: bool) -> dict[str, float]:
    """Label with the loop over transformers that a user would write for this job.

    From the same file to a labelled one, like ours: texts, sentences (by the same splitter), k-means fitted
    to the vectors of a random sample of as many words, then for one batch of sentences after another, padded
    to its longest (``plain_sorted``: of sentences of similar length): forward pass, word means, ``predict``;
    one Parquet file at the end. It writes no report and cannot be stopped. The work before the loop is also
    timed by itself.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.cluster import MiniBatchKMeans

    from modeling_mtpf.data.sources import TextStream
    from modeling_mtpf.labelling.segmentation import split_sentences

    word_vectors = _plain_teacher()
    started, cpu = time.perf_counter(), time.process_time()
    texts = [row.text or "" for row, _ in zip(TextStream(source), range(TEXTS), strict=False)]
    sentences = [sentence.words for text in texts for sentence in split_sentences(text, 40)]
    total = sum(map(len, sentences))
    mean_words = total / len(sentences)
    drawn = np.random.default_rng(0).choice(len(sentences), int(SAMPLE_WORDS / mean_words), replace=False)
    sample = [sentences[row] for row in drawn]
    vectors = [word_vectors(sample[i : i + PLAIN_ROWS]) for i in range(0, len(sample), PLAIN_ROWS)]
    kmeans = MiniBatchKMeans(K, random_state=0).fit(np.concatenate(vectors))
    looped = time.perf_counter()
    order = sorted(range(len(sentences)), key=lambda row: by_length and len(sentences[row]))
    labels: list = [None] * len(sentences)
    for start in range(0, len(sentences), PLAIN_ROWS):
        rows = order[start : start + PLAIN_ROWS]
        batch = [sentences[row] for row in rows]
        clusters = kmeans.predict(word_vectors(batch))
        ends = np.cumsum([len(words) for words in batch])[:-1]
        for row, of_sentence in zip(rows, np.split(clusters, ends), strict=True):
            labels[row] = of_sentence
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"words": sentences, "clusters": labels}), Path(folder) / "labels.parquet")
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    return {
        "words": total,
        "seconds": round(ended - started, 3),
        "seconds_before_the_loop": round(looped - started, 3),
        "words_per_second": round(total / (ended - started), 1),
        "words_per_second_loop_alone": round(total / (ended - looped), 1),
        "words_per_cpu_second": round(total / cpu, 1),
    }


def _plain_teacher() -> Callable:
    """Return a function from a batch of split sentences to the vectors of all their words, row by row."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    from modeling_mtpf.data.packaged_encoder import packaged_encoder
    from modeling_mtpf.devices import fast_bf16

    tokenizer = AutoTokenizer.from_pretrained(packaged_encoder())
    model = AutoModel.from_pretrained(packaged_encoder()).eval()
    bf16 = fast_bf16(torch.device("cpu"))

    def word_vectors(batch: list[list[str]]) -> np.ndarray:
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
        return np.concatenate(vectors)

    return word_vectors


def compare(medians: dict[str, dict[str, float]]) -> dict[str, tuple[float, str, float]]:
    """Return the judged ratios, each with its limit.

    The last rate compares our whole job with the plain loop alone, without sentences and centroids.
    """
    ours, plain = medians["mtpf"], medians["plain"]
    rate, cpu, loop = "words_per_second", "words_per_cpu_second", "words_per_second_loop_alone"
    return {
        "words per CPU second, mtpf / plain": (ours[cpu] / plain[cpu], ">=", 1.8),
        "words per CPU second, mtpf / plain, sorted by length": (
            ours[cpu] / medians["plain_sorted"][cpu],
            ">=",
            1.15,
        ),
        "words per second, mtpf / plain": (ours[rate] / plain[rate], ">=", 1.8),
        "words per second, mtpf / plain given sentences and centroids": (ours[rate] / plain[loop], ">=", 1.8),
        "clustering and writing, share of the time": (ours["clustering_and_writing_share"], "<=", 0.10),
    }
