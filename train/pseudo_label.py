"""Label every word of a text source with the cluster id of its teacher vector.

With the packaged encoder as teacher, with another one, and with the NMI to a gold NER set:

    python train/pseudo_label.py --text texts.parquet --output_dir labels
    python train/pseudo_label.py --text owner/corpus --teacher numind/NuNER-v2.0 --output_dir labels
    python train/pseudo_label.py --text texts.jsonl --layer 3 --gold gold.jsonl --output_dir labels

"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "tqdm")

import datasets
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from modeling_mtpf.pretraining.pseudo_labels import PseudoLabelSettings, label_corpus, summary


@dataclass
class Arguments:
    """Where from and where to.

    Attributes:
        text: Source with a column ``text``: a file, a folder or a Hub id.
        output_dir: New folder for shards, centroids and ``clusters.json``.
        gold: NER source (``tokens``, ``ner_tags``) for the NMI between clusters and entity types.
    """

    text: str
    output_dir: str
    gold: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; a user's mistake ends in one sentence and exit status 2."""
    parser = HfArgumentParser(
        (Arguments, PseudoLabelSettings),  # type: ignore[arg-type]
        description=__doc__,
        epilog="\n".join(f"{cls.__doc__}" for cls in (Arguments, PseudoLabelSettings)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where, settings = parser.parse_args_into_dataclasses(arguments)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        folder = label_corpus(where.text, settings, Path(where.output_dir), where.gold)
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
