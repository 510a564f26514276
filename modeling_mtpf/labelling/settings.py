"""Settings of pseudo-labelling."""

from dataclasses import dataclass, field

from ..data.packaged_encoder import PACKAGED
from ..devices import PRECISIONS
from ..errors import DataError
from ..settings import COMMAS

CHOICES = {"pooling": ("mean", "first"), "precision": PRECISIONS, "bad_rows": ("error", "skip")}


@dataclass
class PseudoLabelSettings:
    """How a corpus is labelled.

    Attributes:
        column: Column of the source that holds the text.
        encoding: Of text files, e.g. latin-1; by default that of the byte order mark, else UTF-8.
        bad_rows: What to do with a row that has no text, or a word of more than 1,000 characters: ``error``,
            or ``skip``, which leaves it out and counts it.
        max_texts: Number of texts to use (0: all).
        max_words: A sentence of more words is cut into equal parts.
        keep_offsets: Write two more columns: ``row``, the text's row in the source, and ``starts``, where in
            it each word begins, in characters.
        teacher: ``packaged``, a folder or a Hub id (the paper: ``numind/NuNER-v2.0``).
        revision: Commit of the teacher's repo.
        layer: Hidden state that is clustered, 0 the embeddings, -1 the last; several, as ``-1,-7``, are
            concatenated.
        pooling: A word's vector is the ``mean`` of its sub-words, or the ``first`` of them.
        normalize: Scale each vector to length 1 (L2).
        max_length: Longest row in sub-words; words beyond get the ignore label and are counted.
        batch_tokens: Sub-words per forward pass, padding included (0: 2,048 on CPUs, 65,536 on GPUs).
        precision: ``auto`` (bf16 where the device is fast at it), ``bf16`` or ``float32``.
        clusters: K (the paper: 200); several, as ``50,200,800``, are compared in one pass over the teacher,
            each in its folder.
        spherical: Keep the centroids on the unit sphere: clusters by angle.
        sample_words: Approximate number of words that fit the centroids, from a seeded sample of the texts.
        shard_characters: Approximate number of characters in a shard of consecutive texts; 1,000,000 are
            about 170,000 English words.
        seed: Seed of the sample and of k-means.
    """

    column: str = "text"
    encoding: str | None = None
    bad_rows: str = "error"
    max_texts: int = 0
    max_words: int = 40
    keep_offsets: bool = False
    teacher: str = PACKAGED
    revision: str | None = None
    layer: str = field(default="-1", metadata=COMMAS)
    pooling: str = "mean"
    normalize: bool = True
    max_length: int = 128
    batch_tokens: int = 0
    precision: str = "auto"
    clusters: str = field(default="200", metadata=COMMAS)
    spherical: bool = False
    sample_words: int = 200_000
    shard_characters: int = 1_000_000
    seed: int = 0

    def __post_init__(self):
        self.layer, self.clusters = str(self.layer), str(self.clusters)
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise DataError(f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(accepted)}.")
        for name in ("max_words", "max_length", "batch_tokens", "sample_words", "shard_characters"):
            least = 0 if name == "batch_tokens" else 1
            if getattr(self, name) < least:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.spherical and not self.normalize:
            raise DataError("Spherical clusters need vectors of length 1; leave normalize on.")
        if min(self.cluster_numbers) < 1:
            raise DataError(f"The number of clusters is {min(self.cluster_numbers)}; it must be at least 1.")
        if len(set(self.cluster_numbers)) < len(self.cluster_numbers):
            raise DataError(f"clusters is {self.clusters!r}: a number occurs twice.")
        _ = self.layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden states whose concatenation is clustered."""
        return _numbers("layer", self.layer)

    @property
    def cluster_numbers(self) -> tuple[int, ...]:
        """All K that are compared."""
        return _numbers("clusters", self.clusters)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{name} is {text!r}; it must be a number, or several with commas.") from None
