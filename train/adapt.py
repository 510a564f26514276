"""Fit one app to a frozen backbone: the same as ``mtpf adapt``.

A NER app from the family's LoRA, a TC app, and a tenth of the data with three seeds:

    python train/adapt.py --family ner --data messages.conll --backbone me/encoder --adapter me/encoder-ner \
        --output_dir apps/entities
    python train/adapt.py --family tc --data intents.csv --output_dir apps/intent
    python train/adapt.py --family ner --data owner/set --train_fraction 0.1 --seeds 3 --output_dir apps/low

"""

import sys

from modeling_mtpf.cli.main import main as mtpf


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    return mtpf(["adapt", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
