"""Peak memory of pseudo-labelling at one and four times the corpus, with the packaged encoder as teacher."""

import tempfile
from pathlib import Path

TEXTS = 3_000
"""Texts of the smaller corpus, with Wikipedia 190,000 words; the larger one has four times as many."""
LAYER = "1"
"""Hidden state: the number of layers decides most of the time and none of the memory."""

CONTESTANTS = {"mtpf_1x": 1, "mtpf_4x": 1}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Label the corpus; the peak is that of the calling process."""
    import json

    import torch

    from modeling_mtpf.labelling.label import label_corpus
    from modeling_mtpf.labelling.settings import PseudoLabelSettings

    torch.set_num_threads(options["threads"])
    texts = TEXTS if contestant == "mtpf_1x" else 4 * TEXTS
    with tempfile.TemporaryDirectory() as folder:
        settings = PseudoLabelSettings(max_texts=texts, sample_words=50_000, layer=LAYER)
        result = label_corpus(options["text"], settings, Path(folder) / "labels")
        return {"words": json.loads((result / "clusters.json").read_text("utf-8"))["words"]}


def compare(medians: dict[str, dict[str, float]]) -> dict[str, tuple[float, str, float]]:
    """Return the judged ratios, each with its limit."""
    small, large = medians["mtpf_1x"]["peak_mb"], medians["mtpf_4x"]["peak_mb"]
    return {
        "peak memory at 4x / at 1x": (large / small, "<=", 1.10),
        "peak memory at 4x, GB": (large / 1000, "<=", 2.5),
    }
