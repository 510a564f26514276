"""How many test sentences of NER sets occur in the training sets of others, whole or in part.

Sentences are compared in lower case and without punctuation. A teacher that has seen a gold sentence would
make clusters that look better than they are.

    python eval/ner_overlap.py --train ner/multiconer2_en ner/snips --test ner/crossner_politics ner/fin
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from modeling_mtpf.data.sources import open_source
from modeling_mtpf.errors import MtpfError

SHORTEST = 4
"""Sentences of fewer words are no sign of anything: "See also"."""
RUN = 8
"""Words in a row that are shared by chance or as a name now and then, but seldom."""


def sentences(folder: Path, split: str) -> list[tuple[str, ...]]:
    """Return the words of each sentence of a split, without case and punctuation."""
    rows = open_source(folder / f"{split}.parquet", {"tokens": "words"})[:]["tokens"]
    return [tuple(re.findall(r"\w+", " ".join(words).lower())) for words in rows]


def runs(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield all runs of `RUN` words."""
    return (words[start : start + RUN] for start in range(len(words) - RUN + 1))


def overlap(train: list[tuple[str, ...]], test: list[tuple[str, ...]]) -> tuple[int, int]:
    """Return how many test sentences occur in the training set, and how many share a run with it."""
    whole, parts = set(train), {run for words in train for run in runs(words)}
    same = sum(len(words) >= SHORTEST and words in whole for words in test)
    return same, sum(any(run in parts for run in runs(words)) for words in test)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="folders with train.parquet")
    parser.add_argument("--test", nargs="+", type=Path, required=True, help="folders with test.parquet")
    given = parser.parse_args(arguments)
    try:
        train = {folder.name: sentences(folder, "train") for folder in given.train}
        for folder in given.test:
            test = sentences(folder, "test")
            for name, rows in train.items():
                same, part = overlap(rows, test)
                print(f"{folder.name} ({len(test)} sentences) in {name}: {same} whole, {part} in part")
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
