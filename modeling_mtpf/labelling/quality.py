"""Whether clusters tell entity types apart: scores against gold NER sets, and what they say about K."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from ..data.sources import Source, open_source, source_name
from ..errors import DataError
from .clustering import assign
from .statistics import ClusterStatistics
from .teacher import WordEncoder

OUTSIDE = "O"
MIN_TYPE_WORDS = 20
"""A type with fewer gold words says nothing about clusters."""
MIXED = 0.25
"""Clusters mix types if more than this share of the entity words lies in clusters of another type."""
GAIN = 0.01
"""A smaller difference in purity does not count."""


@dataclass
class GoldScores:
    """How the clusters of one K fit one gold NER set; the scores are between 0 and 1, more is better.

    Attributes:
        nmi: Normalised mutual information of clusters and types, ``O`` as one type of its own; 0 is chance.
        nmi_entities: The same over the words of entities alone.
        purity: See `purity`. High for any clusters if most words are ``O``: compare it with one cluster's.
        purity_entities: The same over the words of entities alone.
        purity_held_out: `held_out_purity` over the words of entities; it falls when K is too high.
        purity_of_one_cluster: Purity of K = 1.
        purity_entities_of_one_cluster: Purity over entity words of K = 1.
        clusters_of_type: Type → how many clusters hold four fifths of its words.
        types_without_cluster: Types that are the most frequent entity type of no cluster.
        words: Words that were scored.
        entity_words: Those of entities.
        words_cut_off: Words that the teacher did not see.
    """

    nmi: float
    nmi_entities: float
    purity: float
    purity_entities: float
    purity_held_out: float
    purity_of_one_cluster: float
    purity_entities_of_one_cluster: float
    clusters_of_type: dict[str, int]
    types_without_cluster: list[str]
    words: int
    entity_words: int
    words_cut_off: int


class GoldSet:
    """A gold NER set (``tokens``, ``ner_tags``).

    Raises:
        DataError: It is malformed, or has no entity.
    """

    def __init__(self, source: Source):
        self.name = source_name(source)
        if isinstance(source, (str, Path)) and Path(source).is_file():
            self.name = f"{Path(source).resolve().parent.name}/{self.name}"
        self.rows: Dataset = open_source(source, {"tokens": "words", "ner_tags": "words"})
        types: list[str] = []
        self.row_of_word: list[int] = []
        for number, row in enumerate(self.rows):
            words, tags = len(row["tokens"]), row["ner_tags"]
            if words != len(tags):
                raise DataError(
                    f"The gold set {self.name}, row {number + 1}, has {words} tokens but {len(tags)} tags."
                )
            types += [tag.partition("-")[2] or OUTSIDE for tag in tags]
            self.row_of_word += [number] * words
        self.types = np.asarray(types)
        if not (self.types != OUTSIDE).any():
            raise DataError(f"The gold set {self.name} has no entity; its tags must look like B-PER and O.")

    def scores(self, encoder: WordEncoder, centroids: Mapping[int, np.ndarray]) -> dict[int, GoldScores]:
        """Score every K in one pass of the teacher."""
        labels = {number: np.full(len(self.types), -1, dtype=np.int64) for number in centroids}
        for start in range(0, len(self.rows), 1000):
            words = self.rows[start : start + 1000]["tokens"]
            before = int(np.searchsorted(self.row_of_word, start))
            for slots, vectors in encoder.batches(words):
                for number, centres in centroids.items():
                    labels[number][before + slots] = assign(vectors, centres)
        second_half = np.asarray(self.row_of_word) % 2 == 1
        return {number: score(self.types, clusters, second_half) for number, clusters in labels.items()}


def score(types: np.ndarray, clusters: np.ndarray, second_half: np.ndarray) -> GoldScores:
    """Score the clusters of words (-1: none) against their types (``O`` outside), each ``(words,)``.

    ``second_half`` tells which words are in the second half of the sentences, for `held_out_purity`.
    """
    seen = clusters >= 0
    cut_off = int((~seen).sum())
    types, clusters, second_half = types[seen], clusters[seen], second_half[seen]
    entity = types != OUTSIDE
    entity_types, entity_clusters = types[entity], clusters[entity]
    names, counts = np.unique(entity_types, return_counts=True)
    table = contingency_matrix(entity_types, entity_clusters)  # types × clusters that occur
    with_cluster = set(names[table.argmax(0)]) if len(names) else set()
    widths = {}
    for name, row, count in zip(names, table, counts, strict=True):
        if count >= MIN_TYPE_WORDS:
            widths[str(name)] = int(np.searchsorted(np.sort(row)[::-1].cumsum(), 0.8 * count) + 1)
    return GoldScores(
        nmi=float(normalized_mutual_info_score(types, clusters)),
        nmi_entities=float(normalized_mutual_info_score(entity_types, entity_clusters)),
        purity=purity(types, clusters),
        purity_entities=purity(entity_types, entity_clusters),
        purity_held_out=held_out_purity(entity_types, entity_clusters, second_half[entity]),
        purity_of_one_cluster=purity(types, np.zeros_like(clusters)),
        purity_entities_of_one_cluster=purity(entity_types, np.zeros_like(entity_clusters)),
        clusters_of_type=widths,
        types_without_cluster=[name for name in widths if name not in with_cluster],
        words=len(types),
        entity_words=len(entity_types),
        words_cut_off=cut_off,
    )


def purity(types: np.ndarray, clusters: np.ndarray) -> float:
    """Share of words whose type is the most frequent one of their cluster.

    Example:
        >>> purity(np.array(["a", "a", "b", "b"]), np.array([0, 0, 0, 1]))
        0.75
    """
    return float(contingency_matrix(types, clusters).max(0).sum() / len(types)) if len(types) else 0.0


def held_out_purity(types: np.ndarray, clusters: np.ndarray, second_half: np.ndarray) -> float:
    """Purity with each cluster's type found on the other half; a cluster unseen there counts as wrong."""
    right = 0
    for test in (second_half, ~second_half):
        if test.all() or not test.any():
            return 0.0
        names, known = np.unique(types[~test]), np.unique(clusters[~test])
        best = names[contingency_matrix(types[~test], clusters[~test]).argmax(0)]
        type_of = dict(zip(known.tolist(), best.tolist(), strict=True))
        right += sum(type_of.get(c) == t for c, t in zip(clusters[test].tolist(), types[test], strict=True))
    return right / len(types)


def verdict(
    curve: Mapping[int, dict[str, GoldScores]], statistics: Mapping[int, ClusterStatistics]
) -> dict[int, str]:
    """Say for each K in words whether it is too low or too high for the types of the gold sets."""
    numbers = sorted(curve)
    held_out = {k: float(np.mean([s.purity_held_out for s in curve[k].values()] or [0.0])) for k in numbers}
    return {k: _verdict_of(k, numbers, held_out, curve[k], statistics[k]) for k in numbers}


def _verdict_of(number, numbers, held_out, gold: dict[str, GoldScores], contents: ClusterStatistics) -> str:
    wasted = (contents.empty + contents.tiny) / len(contents.sizes)
    tail = f"{contents.empty} empty and {contents.tiny} tiny clusters of {number}."
    if not gold:
        hint = " K is too high for this corpus: many clusters hold next to nothing." if wasted > 0.1 else ""
        return f"{tail}{hint} Give a gold NER set with --gold to see whether K fits your entity types."
    mixed = 1 - float(np.mean([s.purity_entities for s in gold.values()]))
    missing = sorted({name for s in gold.values() for name in s.types_without_cluster})
    types = sum(len(s.clusters_of_type) for s in gold.values())
    widths = [width for s in gold.values() for width in s.clusters_of_type.values()]
    facts = (
        f"{mixed:.0%} of the entity words lie in clusters that mean another type; "
        f"{len(missing)} of {types} types have no cluster of their own"
        f"{' (' + ', '.join(missing[:8]) + ')' if missing else ''}; a type is spread over "
        f"{int(np.median(widths)) if widths else 0} clusters (median); {tail}"
    )
    best = max(numbers, key=lambda k: held_out[k])
    smallest = min(k for k in numbers if held_out[k] >= held_out[best] - GAIN)
    if wasted > 0.1:
        return f"K = {number} is too high for this corpus. {facts}"
    on_held_out = f"(purity on held-out words {held_out[smallest]:.3f}, here {held_out[number]:.3f})"
    if number > smallest and held_out[number] <= held_out[smallest] + GAIN:
        return (
            f"K = {number} is higher than these types need: K = {smallest} tells them apart as well "
            f"{on_held_out}. {facts}"
        )
    if number < smallest:
        return (
            f"K = {number} is too low for these types: K = {smallest} tells them apart better {on_held_out}. "
            f"{facts}"
        )
    if mixed > MIXED and number == max(numbers):
        return (
            f"K = {number} looks too low for these types, or the teacher does not know them: try a higher K, "
            f"and another layer or teacher if that does not help. {facts}"
        )
    return f"K = {number} fits these types. {facts}"


def as_record(gold: Mapping[str, GoldScores]) -> list[dict]:
    """Return the scores as plain values for ``clusters.json``."""
    return [
        {"source": name, **{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(scores).items()}}
        for name, scores in gold.items()
    ]
