"""Label every word of a text source with the cluster id of its teacher vector: the same as ``mtpf label``.

With the packaged encoder as teacher; with another one, several K and gold NER sets; on many GPUs:

    python train/pseudo_label.py --text texts.parquet --output_dir labels
    python train/pseudo_label.py --text owner/corpus --teacher numind/NuNER-v2.0 --layer -1,-7 \
        --clusters 50,200,800 --gold news.jsonl messages.jsonl --output_dir labels
    accelerate launch train/pseudo_label.py --text texts/ --output_dir labels

A run that was stopped is resumed by the same command.
"""

import sys

from modeling_mtpf.cli.main import main as mtpf


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    return mtpf(["label", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
