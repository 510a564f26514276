"""``mtpf label``: label every word of a text source with the cluster id of its teacher vector."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from ..devices import available_cores
from ..labelling.label import label_corpus
from ..labelling.settings import PseudoLabelSettings
from ..labelling.stopwatch import Stopwatch
from ..labelling.summary import summary
from ..settings import read_settings

EXAMPLES = """\
  mtpf label --text texts.parquet --output_dir labels
  mtpf label --text owner/corpus --teacher numind/NuNER-v2.0 --layer -1,-7 --clusters 50 200 800 \\
      --gold news.jsonl messages.jsonl --output_dir labels
  accelerate launch -m modeling_mtpf.cli label --text texts/ --output_dir labels

A run that was stopped is resumed by the same command."""


@dataclass(kw_only=True)
class LabelSettings(PseudoLabelSettings):
    """Where from, where to, and how.

    Attributes:
        text: Source of raw text: a file, a folder of files (Parquet, JSON lines, CSV, text), or a Hub id
            ``owner/name`` or ``owner/name@revision``.
        output_dir: New folder for shards, centroids, ``clusters.json`` and ``report.html``; with several K,
            it has a folder ``k<K>`` for each.
        gold: NER sources (``tokens``, ``ner_tags``) that the clusters are measured with.
        threads: CPU threads of a single process (0: all cores; ``accelerate launch`` alone would leave one).
    """

    text: str
    output_dir: str
    gold: list[str] = field(default_factory=list)
    threads: int = 0


def run(arguments: list[str], prog: str) -> str | None:
    """Label the corpus and return the summary."""
    values = vars(read_settings(LabelSettings, arguments, prog, __doc__, EXAMPLES)).copy()
    text, output_dir, gold, threads = (values.pop(name) for name in ("text", "output_dir", "gold", "threads"))
    watch, state = Stopwatch(), None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Processes wait for the slowest one, which may have hours of work left.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    else:
        torch.set_num_threads(threads or available_cores())
    folder = label_corpus(text, PseudoLabelSettings(**values), Path(output_dir), gold, state, watch)
    shown = f"{summary(folder)}\nTime: {watch}" if state is None or state.is_main_process else None
    if state is not None:
        state.destroy_process_group()
    return shown
