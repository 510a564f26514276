"""MTEB's few-shot classification on frozen text vectors."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from ..metrics import text_scores

DRAWS = 10
SEED = 42
"""MTEB's number of draws and seed."""


def few_shot_rows(labels: Sequence[str], samples_per_label: int, seed: int = SEED) -> list[np.ndarray]:
    """Draw training rows as MTEB's classification tasks do, and return the row numbers of each draw.

    One list of all row numbers is shuffled again and again, and each draw takes the first
    ``samples_per_label`` rows of every label (mteb, ``AbsTaskClassification._undersample_data``). The
    generator is seeded before every draw, as mteb's evaluators do.
    """
    order = np.arange(len(labels))
    draws = []
    for _ in range(DRAWS):
        np.random.RandomState(seed).shuffle(order)
        taken: Counter[str] = Counter()
        rows = []
        for row in order.tolist():
            taken[labels[row]] += 1
            if taken[labels[row]] <= samples_per_label:
                rows.append(row)
        draws.append(np.array(rows))
    return draws


def few_shot(
    pool: Callable[[np.ndarray], np.ndarray],
    pool_labels: Sequence[str],
    test: np.ndarray,
    test_labels: Sequence[str],
    samples_per_label: int = 8,
    seed: int = SEED,
) -> list[dict[str, float]]:
    """Return the scores of each of the ten draws of MTEB's few-shot classification.

    Args:
        pool: Gives the vectors of some rows of the training pool, float32 ``(rows, width)``.
        pool_labels: Labels of the pool.
        test: Vectors of the test set, float32 ``(rows, width)``.
        test_labels: Its labels.
        samples_per_label: 8 on most of MTEB's tasks, 16 or 32 on some.
        seed: MTEB's is 42.
    """
    scores = []
    for rows in few_shot_rows(pool_labels, samples_per_label, seed=seed):
        probe = LogisticRegression(max_iter=100, random_state=seed)
        vectors = pool(rows)
        with threadpool_limits(1, user_api="blas"):  # as in adaptation.methods.probe
            probe.fit(vectors, [pool_labels[row] for row in rows])
        scores.append(probe_scores(probe, test, test_labels))
    return scores


def probe_scores(probe: LogisticRegression, vectors: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Score a probe on the vectors ``(texts, width)`` of labelled texts."""
    predicted = list(probe.predict(vectors))
    return text_scores(labels, predicted, probe.predict_proba(vectors), list(probe.classes_))
