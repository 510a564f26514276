"""Sizes, top words and examples of the clusters, read from the shards in flat memory."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.words import IGNORE

COUNTED_WORDS = 200
"""Words that a cluster's counter is cut back to when it has twice as many. That keeps memory flat, and the
frequent words, the only ones shown, in the counter."""
TOP_WORDS = 10
EXAMPLES = 3
CONTEXT_WORDS = 6


@dataclass
class ClusterStatistics:
    """Sizes and contents of all clusters.

    Attributes:
        sizes: Words in each cluster, int64 ``(K,)``.
        ignored: Words without a cluster.
        rows: Sentences.
        top_words: Most frequent words of each cluster.
        examples: Words in context ``(left, word, right)`` of each cluster, one from a shard.
    """

    sizes: np.ndarray
    ignored: int = 0
    rows: int = 0
    top_words: list[list[str]] = field(default_factory=list)
    examples: list[list[tuple[str, str, str]]] = field(default_factory=list)

    @property
    def words(self) -> int:
        """Words that have a cluster."""
        return int(self.sizes.sum())

    @property
    def empty(self) -> int:
        """Clusters without words."""
        return int((self.sizes == 0).sum())

    @property
    def tiny(self) -> int:
        """Clusters that are not empty but have under a twentieth of the mean size."""
        return int(((self.sizes > 0) & (self.sizes < 0.05 * self.sizes.mean())).sum())

    @property
    def entropy(self) -> float:
        """Entropy of the sizes in bits; log2 K if all are equal."""
        shares = self.sizes[self.sizes > 0] / max(1, self.words)
        return float(-(shares * np.log2(shares)).sum())


def cluster_statistics(shards: list[Path], clusters: int) -> ClusterStatistics:
    """Count the labels of shards, one shard in memory at a time."""
    result = ClusterStatistics(np.zeros(clusters, dtype=np.int64), examples=[[] for _ in range(clusters)])
    counters: list[Counter] = [Counter() for _ in range(clusters)]
    for shard in shards:
        table = pq.read_table(shard, columns=["words", "clusters"]).combine_chunks()
        words, labels = (pc.list_flatten(table.column(name)) for name in table.column_names)
        ids = labels.to_numpy()
        result.rows += table.num_rows
        result.ignored += int((ids == IGNORE).sum())
        result.sizes += np.bincount(ids[ids >= 0], minlength=clusters)
        _count(words, labels, counters)
        _add_examples(table, ids, result.examples)
    result.top_words = [[word for word, _ in _most_frequent(counter, TOP_WORDS)] for counter in counters]
    return result


def _most_frequent(counter: Counter, number: int) -> list[tuple[str, int]]:
    """Return words and counts, by count, then by word: the order of counting must not matter."""
    return heapq.nsmallest(number, counter.items(), key=lambda item: (-item[1], item[0]))


def _count(words: pa.ChunkedArray, labels: pa.ChunkedArray, counters: list[Counter]) -> None:
    table = pa.table({"word": words, "cluster": labels})
    counts = table.group_by(["word", "cluster"]).aggregate([([], "count_all")])
    for word, cluster, count in zip(*(column.to_pylist() for column in counts.columns), strict=True):
        if cluster != IGNORE:
            counters[cluster][word] += count
    for number, counter in enumerate(counters):
        if len(counter) > 2 * COUNTED_WORDS:
            counters[number] = Counter(dict(_most_frequent(counter, COUNTED_WORDS)))


def _add_examples(table: pa.Table, ids: np.ndarray, examples: list[list[tuple[str, str, str]]]) -> None:
    """Add one word in context to each cluster that wants one: the first in this shard."""
    clusters, first = np.unique(ids, return_index=True)
    starts = table.column("words").chunk(0).offsets.to_numpy() if table.num_rows else np.zeros(1)
    for cluster, position in zip(clusters.tolist(), first.tolist(), strict=True):
        if cluster < 0 or len(examples[cluster]) == EXAMPLES:
            continue
        row = int(np.searchsorted(starts, position, side="right")) - 1
        words, at = table.column("words")[row].as_py(), position - int(starts[row])
        left, right = words[max(0, at - CONTEXT_WORDS) : at], words[at + 1 : at + 1 + CONTEXT_WORDS]
        examples[cluster].append((" ".join(left), words[at], " ".join(right)))
