"""Label every word of a text source with the cluster id of its teacher vector.

With the packaged encoder as teacher; with another one, several K and gold NER sets; on many GPUs:

    python train/pseudo_label.py --text texts.parquet --output_dir labels
    python train/pseudo_label.py --text owner/corpus --teacher numind/NuNER-v2.0 --layer -1,-7 \
        --clusters 50,200,800 --gold news.jsonl messages.jsonl --output_dir labels
    accelerate launch train/pseudo_label.py --text texts/ --output_dir labels

A run that was stopped goes on with the same command.
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

# Few batch shapes occur (rows × multiples of 16); oneDNN keeps a compiled kernel for each.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "accelerate", "datasets", "sklearn", "syntok", "tqdm")

import datasets
import torch
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from modeling_mtpf.devices import available_cores
from modeling_mtpf.labelling.label import label_corpus
from modeling_mtpf.labelling.settings import PseudoLabelSettings
from modeling_mtpf.labelling.stopwatch import Stopwatch
from modeling_mtpf.labelling.summary import summary


@dataclass
class Arguments:
    """Where from and where to.

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


def start_processes(threads: int) -> PartialState | None:
    """Join the processes that a launcher started; ``None`` for one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Processes wait for the slowest one, which may have hours of work left.
        return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    torch.set_num_threads(threads or available_cores())
    return None


def with_layers(arguments: list[str]) -> list[str]:
    """Write ``--layer -1,-7`` as ``--layer=-1,-7``: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layer":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; a user's mistake ends in one sentence and exit status 2."""
    parser = HfArgumentParser(
        (Arguments, PseudoLabelSettings),  # type: ignore[arg-type]
        description=__doc__,
        epilog="\n".join(f"{cls.__doc__}" for cls in (Arguments, PseudoLabelSettings)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "huggingface_hub", "datasets", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    watch = Stopwatch()
    state = None
    try:
        arguments = with_layers(sys.argv[1:] if arguments is None else arguments)
        where, settings = parser.parse_args_into_dataclasses(arguments)
        state = start_processes(where.threads)
        folder = label_corpus(where.text, settings, Path(where.output_dir), where.gold, state, watch)
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if state is None or state.is_main_process:
        print(summary(folder))
        print(f"Time: {watch}")
    if state is not None:
        state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
