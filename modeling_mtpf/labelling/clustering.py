"""Mini-batch k-means over word vectors, for one or several numbers of clusters at once."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from ..errors import DataError

BATCH_WORDS = 4096
"""Least number of words in a k-means step."""


class ClusterFit:
    """Fits the centroids of every K to the same stream of vectors.

    Args:
        cluster_numbers: All K.
        seed: Of the initial centroids and of the order inside a step.
        spherical: Scale the centroids to length 1 after each step.
    """

    def __init__(self, cluster_numbers: Sequence[int], seed: int, spherical: bool = False):
        self.spherical = spherical
        options = {"random_state": seed, "batch_size": BATCH_WORDS, "n_init": 3, "reassignment_ratio": 0.01}
        self.models = {number: MiniBatchKMeans(number, **options) for number in cluster_numbers}
        # partial_fit initialises from its first batch, which therefore must be several times K.
        self.step_words = max(BATCH_WORDS, 10 * max(cluster_numbers))
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def fit(self, parts: Iterable[np.ndarray]) -> dict[int, np.ndarray]:
        """Fit to a stream of vectors, each part float32 ``(words, hidden)``.

        Returns:
            K → centroids, float32 ``(K, hidden)``.

        Raises:
            DataError: There are fewer vectors than clusters.
        """
        waiting: list[np.ndarray] = []
        seen = 0
        for part in parts:
            waiting.append(part)
            seen += len(part)
            if sum(map(len, waiting)) >= self.step_words:
                self._step(np.concatenate(waiting))
                waiting = []
        largest = max(self.models)
        if seen < largest:
            raise DataError(
                f"{largest} clusters need at least as many words; the corpus (or its sample) has {seen}. Ask "
                "for fewer clusters, or give more text."
            )
        if any(map(len, waiting)):
            self._step(np.concatenate(waiting))
        return {number: model.cluster_centers_.astype(np.float32) for number, model in self.models.items()}

    def _step(self, vectors: np.ndarray) -> None:
        self._rng.shuffle(vectors)
        # One thread: sums in another order would give other centroids on a machine with more cores.
        with threadpool_limits(1):
            for model in self.models.values():
                model.partial_fit(vectors)
                if self.spherical:
                    model.cluster_centers_ = normalize(model.cluster_centers_)


def assign(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the nearest centroid of each vector by one matrix product: int64 ``(words,)``."""
    # By PyTorch, because NumPy's threads keep spinning for a while and so slow the teacher's next layers.
    points, centres = torch.from_numpy(vectors), torch.from_numpy(centroids)
    # |v - c|² = |v|² - 2 v·c + |c|², and |v|² is the same for all centroids.
    return torch.addmm((centres**2).sum(1), points, centres.T, alpha=-2.0).argmin(1).numpy()
