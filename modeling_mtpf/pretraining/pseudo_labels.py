"""NER pseudo-labels: teacher vectors per word → mini-batch k-means → a cluster id for every word (SPEC 1.3).

The corpus is read twice: a seeded sample of its pieces fits the centroids, then every word is assigned. Only
one batch of vectors is in memory at a time.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import save_file
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import normalized_mutual_info_score
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..adapter_files_mtpf import backbone_sha256
from ..data.packaged_encoder import PACKAGED, resolve_encoder
from ..data.sources import fingerprint, open_source, source_name
from ..data.words import IGNORE, encode_words, load_word_tokenizer, split_pieces
from ..errors import DataError

logger = logging.getLogger(__name__)

LABEL_COLUMNS = {"words": "words", "clusters": "integers"}
"""Columns of a labelled shard and their kinds."""

CLUSTERS_FILE = "clusters.json"
CENTROIDS_FILE = "centroids.safetensors"


@dataclass
class PseudoLabelSettings:
    """How a corpus is labelled.

    Attributes:
        teacher: ``packaged``, a folder or a Hub id (the paper: ``numind/NuNER-v2.0``).
        revision: Commit of the teacher's repo.
        layer: Hidden state that is clustered: 0 the embeddings, -1 the last.
        clusters: K (the paper: 200).
        max_words: Texts are cut into pieces of at most so many words, at a sentence end where there is one.
        max_length: Longest piece in sub-words; words beyond get the ignore label and are counted.
        batch_size: Pieces per forward pass.
        sample_words: Words that fit the centroids, about; a seeded sample of the pieces.
        max_texts: Use only so many texts (0: all).
        shard_rows: Pieces per output file.
        seed: Seed of the sample and of k-means.
    """

    teacher: str = PACKAGED
    revision: str | None = None
    layer: int = -1
    clusters: int = 200
    max_words: int = 40
    max_length: int = 128
    batch_size: int = 64
    sample_words: int = 200_000
    max_texts: int = 0
    shard_rows: int = 50_000
    seed: int = 0


class WordEncoder:
    """A frozen teacher that gives one unit vector per word: the mean of the word's sub-words.

    Args:
        model: Any encoder that returns hidden states.
        tokenizer: Its tokenizer, made for split words.
        layer: Hidden state to read.
        max_length: Longest row in sub-words.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int, max_length: int
    ):
        depth = model.config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise DataError(
                f"teacher layer {layer} does not exist; this teacher has hidden states 0 to {depth}."
            )
        self.model, self.tokenizer, self.layer, self.max_length = model.eval(), tokenizer, layer, max_length

    @torch.inference_mode()
    def __call__(self, sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 ``(words with a vector, hidden)`` and a mask ``(all words,)`` of which those are.

        A word without a vector was cut off, or the tokenizer maps it to nothing.
        """
        inputs, word_ids = encode_words(self.tokenizer, sentences, self.max_length)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer].float()
        starts = np.cumsum([0, *map(len, sentences)])
        rows, columns = np.nonzero(word_ids >= 0)
        slots = torch.from_numpy(starts[rows] + word_ids[rows, columns]).to(hidden.device)
        total = hidden.new_zeros(int(starts[-1]), hidden.shape[-1])
        total.index_add_(0, slots, hidden[torch.from_numpy(rows), torch.from_numpy(columns)])
        covered = np.zeros(int(starts[-1]), dtype=bool)
        covered[slots.cpu().numpy()] = True
        # The mean and the sum of sub-words have the same direction: normalising makes them equal.
        vectors = torch.nn.functional.normalize(total, dim=-1).cpu().numpy()
        return vectors[covered], covered


def load_teacher(settings: PseudoLabelSettings) -> WordEncoder:
    """Load the teacher, on an accelerator if there is one.

    Raises:
        DataError: It cannot be loaded, or has no such layer.
    """
    teacher = resolve_encoder(settings.teacher)
    try:
        revision = settings.revision or "main"
        model = AutoModel.from_pretrained(teacher, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"The teacher {settings.teacher!r} cannot be loaded: {reason}") from error
    tokenizer = load_word_tokenizer(teacher, settings.revision)
    limit = min(settings.max_length, tokenizer.model_max_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return WordEncoder(model.to(device), tokenizer, settings.layer, limit)


def fit_clusters(
    encoder: WordEncoder, pieces: Sequence[list[str]], settings: PseudoLabelSettings
) -> MiniBatchKMeans:
    """Fit k-means on a seeded sample of the pieces, one batch of vectors at a time.

    Raises:
        DataError: The sample has fewer words than there are clusters.
    """
    kmeans = MiniBatchKMeans(
        n_clusters=settings.clusters,
        random_state=settings.seed,
        batch_size=4096,
        n_init=3,
        reassignment_ratio=0.01,
    )
    order = np.random.Generator(np.random.PCG64(settings.seed)).permutation(len(pieces))
    # partial_fit initialises from its first batch, which therefore must be several times K.
    first_batch, waiting, seen = max(4096, 10 * settings.clusters), [], 0
    total = min(settings.sample_words, sum(map(len, pieces)))
    progress = tqdm(total=total, desc="k-means", unit=" words", smoothing=0.05)
    for start in range(0, len(order), settings.batch_size):
        vectors, _ = encoder([pieces[i] for i in order[start : start + settings.batch_size]])
        waiting.append(vectors)
        seen += len(vectors)
        progress.update(len(vectors))
        if sum(map(len, waiting)) >= first_batch:
            kmeans.partial_fit(np.concatenate(waiting))
            waiting = []
        if seen >= settings.sample_words:
            break
    progress.close()
    if seen < settings.clusters:
        raise DataError(f"{settings.clusters} clusters need at least as many words; the corpus has {seen}.")
    rest = np.concatenate(waiting) if waiting else np.empty((0, 0), dtype=np.float32)
    if len(rest) and (hasattr(kmeans, "cluster_centers_") or len(rest) >= settings.clusters):
        kmeans.partial_fit(rest)
    return kmeans


def assign(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the nearest centroid of each vector by one matrix product: int64 ``(words,)``."""
    # |v - c|² = |v|² - 2 v·c + |c|², and |v|² is the same for all centroids.
    return np.argmin((centroids**2).sum(1) - 2.0 * vectors @ centroids.T, axis=1)


def label_corpus(source: str, settings: PseudoLabelSettings, folder: Path, gold: str | None = None) -> Path:
    """Label a source of raw text and write the shards, the centroids and ``clusters.json``.

    The folder appears only when it is complete. One that was made from the same source with the same settings
    is used again.

    Args:
        source: A source with the column ``text``.
        settings: How to label.
        folder: The result; must not hold anything else.
        gold: A NER source (``tokens``, ``ner_tags``): NMI between clusters and entity types is reported.

    Raises:
        DataError: The source is empty or malformed, or the folder holds other labels.
    """
    if settings.clusters < 1:
        raise DataError(f"The number of clusters is {settings.clusters}; it must be at least 1.")
    dataset = open_source(source, {"text": "text"})
    gold_rows = None if gold is None else open_source(gold, {"tokens": "words", "ner_tags": "words"})
    encoder = load_teacher(settings)
    made_from = {
        **asdict(settings),
        "source": source_name(source),
        "fingerprint": fingerprint(source, dataset),
        "teacher_sha256": backbone_sha256(encoder.model),
    }
    if (folder / CLUSTERS_FILE).is_file():
        if json.loads((folder / CLUSTERS_FILE).read_text("utf-8"))["made_from"] == made_from:
            logger.info("Using the pseudo-labels in %s", folder)
            return folder
        raise DataError(
            f"{folder} holds pseudo-labels of other data or settings; remove it or choose another folder."
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DataError(f"{folder} is not an empty folder; choose another output folder.")

    if settings.max_texts:
        dataset = dataset.select(range(min(settings.max_texts, len(dataset))))
    pieces = list(split_pieces(dataset["text"], settings.max_words))
    kmeans = fit_clusters(encoder, pieces, settings)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    centroids = kmeans.cluster_centers_.astype(np.float32)
    save_file({"centroids": centroids}, partial / CENTROIDS_FILE)
    counts = _write_shards(encoder, pieces, centroids, settings, partial)
    report = {"made_from": made_from, **_sizes(counts, settings)}
    if gold is not None and gold_rows is not None:
        nmi = gold_nmi(encoder, centroids, gold_rows, settings)
        report["gold"] = {"source": source_name(gold), "nmi": nmi}
    (partial / CLUSTERS_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(folder)
    return folder


def _batches(pieces: Sequence[list[str]], size: int) -> Iterator[list[list[str]]]:
    for start in range(0, len(pieces), size):
        yield list(pieces[start : start + size])


def _write_shards(encoder, pieces, centroids, settings: PseudoLabelSettings, folder: Path) -> dict[str, Any]:
    words_per_cluster: list[Counter] = [Counter() for _ in range(settings.clusters)]
    ignored = 0
    words, clusters, shard = [], [], 0
    schema = pa.schema([("words", pa.list_(pa.string())), ("clusters", pa.list_(pa.int32()))])
    progress = tqdm(total=len(pieces), desc="pseudo-labels", unit=" sentences", smoothing=0.05)
    for batch in _batches(pieces, settings.batch_size):
        vectors, covered = encoder(batch)
        labels = np.full(len(covered), IGNORE, dtype=np.int32)
        labels[covered] = assign(vectors, centroids)
        ignored += int((~covered).sum())
        for piece in batch:
            own, labels = labels[: len(piece)].tolist(), labels[len(piece) :]
            words.append(piece)
            clusters.append(own)
            for word, cluster in zip(piece, own, strict=True):
                if cluster != IGNORE:
                    words_per_cluster[cluster][word] += 1
        progress.update(len(batch))
        if len(words) >= settings.shard_rows:
            pq.write_table(pa.table([words, clusters], schema=schema), folder / f"shard-{shard:05d}.parquet")
            words, clusters, shard = [], [], shard + 1
    if words:
        pq.write_table(pa.table([words, clusters], schema=schema), folder / f"shard-{shard:05d}.parquet")
    progress.close()
    return {"words_per_cluster": words_per_cluster, "ignored": ignored}


def _sizes(counts: dict[str, Any], settings: PseudoLabelSettings) -> dict[str, Any]:
    sizes = [sum(counter.values()) for counter in counts["words_per_cluster"]]
    total = sum(sizes)
    tiny = 0.05 * total / settings.clusters  # under a twentieth of the mean size
    return {
        "words": total,
        "words_ignored": counts["ignored"],
        "empty_clusters": sizes.count(0),
        "tiny_clusters": sum(0 < size < tiny for size in sizes),
        "clusters": [
            {"id": i, "size": size, "top_words": [word for word, _ in counter.most_common(10)]}
            for i, (size, counter) in enumerate(zip(sizes, counts["words_per_cluster"], strict=True))
        ],
    }


def gold_nmi(
    encoder: WordEncoder, centroids: np.ndarray, rows: Dataset, settings: PseudoLabelSettings
) -> float:
    """Normalised mutual information between clusters and entity types over the words of a gold NER set.

    0 means that clusters know nothing of the types; words outside entities count as one type of their own.
    """
    types: list[str] = []
    found: list[int] = []
    for start in range(0, len(rows), settings.batch_size):
        batch = rows[start : start + settings.batch_size]
        vectors, covered = encoder(batch["tokens"])
        tags = [tag.partition("-")[2] or "O" for row in batch["ner_tags"] for tag in row]
        if len(tags) != len(covered):
            raise DataError(
                f"The gold set's rows {start + 1} to {start + len(batch['tokens'])} have unequal "
                "numbers of tokens and tags."
            )
        types += [tag for tag, ok in zip(tags, covered, strict=True) if ok]
        found += assign(vectors, centroids).tolist()
    return float(normalized_mutual_info_score(types, found))


def summary(folder: Path) -> str:
    """Describe labelled shards in a few lines: words, sizes, some clusters with their top words."""
    report = json.loads((folder / CLUSTERS_FILE).read_text("utf-8"))
    clusters = report["clusters"]
    sizes = sorted(cluster["size"] for cluster in clusters)
    lines = [
        f"{folder}: {report['words']:,} words in {len(clusters)} clusters "
        f"(median {sizes[len(sizes) // 2]:,} words, largest {sizes[-1]:,}, empty {report['empty_clusters']}, "
        f"tiny {report['tiny_clusters']}); {report['words_ignored']:,} words ignored.",
    ]
    if "gold" in report:
        lines.append(f"NMI with the entity types of {report['gold']['source']}: {report['gold']['nmi']:.3f}")
    shown = sorted(clusters, key=lambda cluster: -cluster["size"])[:: max(1, len(clusters) // 8)]
    lines += [f"  {c['id']:>4} {c['size']:>8,}  {' '.join(c['top_words'][:8])}" for c in shown]
    return "\n".join(lines)


__all__ = [
    "CENTROIDS_FILE",
    "CLUSTERS_FILE",
    "LABEL_COLUMNS",
    "PseudoLabelSettings",
    "WordEncoder",
    "assign",
    "fit_clusters",
    "gold_nmi",
    "label_corpus",
    "summary",
]
