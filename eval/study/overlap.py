"""Count the test texts of benchmark sets that occur in training data, whole or in part.

Texts are compared in lower case and without punctuation; raw text is cut into sentences first. A model or a
teacher that has seen a test text looks better than it is.

    python eval/study/overlap.py --test ner/crossner_politics tc/banking77 \
        --train pairs wikipedia.parquet:6000 ner/multiconer2_en/train.parquet --output overlap.json

A source is a file or a folder of files with ``tokens``, ``anchor`` and ``positive``, or ``text``; ``:6000``
takes its first 6,000 rows.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from modeling_mtpf.data.sources import open_source
from modeling_mtpf.errors import DataError, MtpfError
from modeling_mtpf.labelling.segmentation import split_sentences
from modeling_mtpf.settings import ScriptParser

SHORTEST = 4
"""Shorter texts, like "See also", do not count as seen."""
RUN = 8
"""Number of words in a row that two texts seldom share by chance or as a name."""

Words = tuple[str, ...]


def plain(text: str) -> Words:
    """Return the words of a text without case and punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


def runs(words: Words) -> Iterator[Words]:
    """Yield all runs of `RUN` words."""
    return (words[start : start + RUN] for start in range(len(words) - RUN + 1))


@dataclass
class TestTexts:
    """The test texts of one set, and which of them occur in each source.

    Attributes:
        texts: Each without case and punctuation.
        whole: Source → rows of texts that occur in it completely.
        part: Source → rows of texts that share a run of words with it.
    """

    texts: list[Words]
    whole: dict[str, set[int]] = field(default_factory=dict)
    part: dict[str, set[int]] = field(default_factory=dict)


def mark(tests: dict[str, TestTexts], sources: dict[str, Iterable[Words]]) -> None:
    """Note in every test set which of its texts occur in the sources."""
    whole: dict[Words, list[tuple[str, int]]] = {}
    part: dict[Words, list[tuple[str, int]]] = {}
    for name, test in tests.items():
        for row, words in enumerate(test.texts):
            if len(words) >= SHORTEST:
                whole.setdefault(words, []).append((name, row))
            for run in runs(words):
                part.setdefault(run, []).append((name, row))
    for source, texts in sources.items():
        for words in texts:
            for name, row in whole.get(words, ()):
                tests[name].whole.setdefault(source, set()).add(row)
            for run in runs(words):
                for name, row in part.get(run, ()):
                    tests[name].part.setdefault(source, set()).add(row)


def read_texts(path: Path, rows: int | None = None) -> Iterator[Words]:
    """Yield the texts of a file, each side of a pair and each sentence of raw text by itself.

    Raises:
        DataError: It has none of the columns ``tokens``, ``anchor`` and ``positive``, ``text``.
    """
    columns = set(pq.read_schema(path).names)
    if "tokens" in columns:
        table = open_source(path, {"tokens": "words"})
        texts = (" ".join(words) for words in table[:rows]["tokens"])
    elif {"anchor", "positive"} <= columns:
        table = open_source(path, {"anchor": "text", "positive": "text"})[:rows]
        texts = (text for side in ("anchor", "positive") for text in table[side])
    elif "text" in columns:
        table = open_source(path, {"text": "text"})
        raw = table[:rows]["text"]
        if "label" in columns:
            texts = iter(raw)
        else:
            cut = (split_sentences(text, sys.maxsize) for text in raw)
            texts = (" ".join(sentence.words) for sentences in cut for sentence in sentences)
    else:
        raise DataError(f"{path} has neither tokens, nor anchor and positive, nor text; it has {columns}.")
    return (plain(text) for text in texts)


def training_texts(source: str) -> Iterator[Words]:
    """Yield the texts of all files of a source, ``path`` or ``path:rows``."""
    name, _, rows = source.partition(":")
    path = Path(name)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"There is no Parquet file at {path}.")
    for file in tqdm(files, desc=path.name):
        yield from read_texts(file, int(rows) if rows else None)


def source_label(source: str) -> str:
    """Name a source without its local path: the folder of a split, else the file or folder."""
    path = Path(source.partition(":")[0])
    return f"{path.parent.parent.name}/{path.parent.name}" if path.stem == "train" else path.stem


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--test", nargs="+", type=Path, required=True, help="folders with test.parquet")
    parser.add_argument(
        "--train", nargs="+", required=True, help="files or folders, :ROWS for the first ones"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args(arguments)
    try:
        tests = {
            f"{folder.parent.name}/{folder.name}": TestTexts(list(read_texts(folder / "test.parquet")))
            for folder in options.test
        }
        labels = [source_label(source) for source in options.train]
        if len(set(labels)) < len(labels):
            raise DataError(f"Two sources have the same name: {', '.join(sorted(labels))}.")
        mark(tests, {source_label(source): training_texts(source) for source in options.train})
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = {
        name: {
            "texts": len(test.texts),
            "whole": {source: len(rows) for source, rows in test.whole.items()},
            "part": {source: len(rows) for source, rows in test.part.items()},
        }
        for name, test in tests.items()
    }
    for name, count in counts.items():
        print(f"{name} ({count['texts']} texts): whole {count['whole']}, in part {count['part']}")
    if options.output:
        sources = {source_label(source): source.partition(":")[2] or "all" for source in options.train}
        record = {"sources": sources, "shortest": SHORTEST, "run": RUN, "tasks": counts}
        options.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
