"""New tokens for a specialised app: word sequences that its texts repeat and its tokenizer cuts into pieces.

A pattern is a run of 2 to 4 pieces of whole words. Kept are those in enough texts that no longer pattern
explains (closed patterns), ranked by how much likelier the run is than its pieces alone.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..model.delta_mtpf import add_tokens
from ..model.schemas_mtpf import TOKEN
from ..model.texts_mtpf import TextTokenizer, plain_backend

SAMPLE = 10_000
"""Texts that are mined, drawn evenly from a stream of any length: memory and time are bounded."""

MOST_PIECES, PIECES_READ = 4, 256
"""Longest pattern, and how many pieces of each text are read."""

LEAST_TEXTS, LEAST_SHARE, LEAST_SCORE = 8, 0.005, 0.3
"""Support and score of a pattern, our assumptions: texts, share of the texts, and nats a piece."""


@dataclass
class Pattern:
    """A closed pattern: its text, pieces, number of texts, and pointwise mutual information per piece."""

    text: str
    pieces: tuple[str, ...]
    texts: int
    score: float


@dataclass
class Patterns:
    """What was found in the texts of an app.

    Attributes:
        patterns: Highest score first.
        tokens: Texts of those that became tokens.
        texts: Texts mined.
        distinct: Distinct tokens in them.
        length: Mean tokens of a text before and with the new ones.
    """

    patterns: list[Pattern]
    tokens: list[str]
    texts: int
    distinct: int
    length: tuple[float, float]

    def page(self, most: int = 1000) -> str:
        """Return the page for a reader, in Markdown."""
        before, after = self.length
        saved = 100 * (1 - after / before) if before else 0.0
        tokens, rows = set(self.tokens), []
        for one in self.patterns[:most]:
            mark = "yes" if one.text in tokens else ""
            text, pieces = (value.replace("|", "\\|") for value in (one.text, " ".join(one.pieces)))
            rows.append(f"| {text} | {pieces} | {one.texts:,} | {one.score:.2f} | {mark} |")
        return "\n".join(
            [
                "# Token patterns",
                "",
                f"{len(self.patterns):,} closed patterns in {self.texts:,} texts with {self.distinct:,} "
                f"distinct tokens; {len(self.tokens):,} became tokens. A text has {before:.1f} tokens "
                f"before and {after:.1f} with them, {saved:.1f} % fewer.",
                "",
                "| pattern | pieces | texts | score | token |",
                "|---|---|---|---|---|",
                *rows,
                "",
            ]
        )


def mine_tokens(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    share: float,
    single_words: bool = False,
    seed: int = 0,
) -> Patterns:
    """Find the patterns of texts and choose new tokens among them.

    Args:
        texts: A stream of any length; `SAMPLE` of them are mined.
        tokenizer: A fast one.
        share: Most new tokens, as a share of the distinct tokens of the texts.
        single_words: Only patterns inside one word: what is labelled by words needs its words.
        seed: Of the sample.
    """
    sample = _sample(texts, seed)
    reader, backend = TextTokenizer(tokenizer), plain_backend(tokenizer)
    encodings = [tokens.encoding for tokens in reader(sample)]
    rows = [encoding.ids[:PIECES_READ] for encoding in encodings]
    found = Counter(piece for ids in rows for piece in set(ids))
    least = max(LEAST_TEXTS, LEAST_SHARE * len(rows))
    counts = _frequent(rows, least)
    surfaces: dict[tuple[int, ...], Counter] = {}
    for text, ids, encoding in zip(sample, rows, encodings, strict=True):
        words, offsets = encoding.word_ids, encoding.offsets
        for start, size in _runs(ids, counts):
            stop = start + size - 1
            borders = (start == 0 or words[start - 1] != words[start]) and (
                stop + 1 == len(words) or words[stop + 1] != words[stop]
            )
            if borders and not (single_words and words[start] != words[stop]):
                found_as = text[offsets[start][0] : offsets[stop][1]].strip()
                if backend.normalizer is not None:
                    found_as = backend.normalizer.normalize_str(found_as).strip()
                surfaces.setdefault(tuple(ids[start : stop + 1]), Counter())[found_as] += 1
    usual = {run: _usual(counted) for run, counted in surfaces.items()}
    whole = {run: surface for run, surface in usual.items() if surface}
    longer = [(part, run) for run in whole for part in (run[1:], run[:-1])]
    explained = {part for part, run in longer if counts[part] == counts[run]}
    patterns = []
    for run, surface in whole.items():
        if run in explained:
            continue
        score = math.log(counts[run] / len(rows)) - sum(math.log(found[piece] / len(rows)) for piece in run)
        pieces = tuple(backend.id_to_token(piece) for piece in run)
        patterns.append(Pattern(surface, pieces, counts[run], score / len(run)))
    patterns.sort(key=lambda one: (-one.score, one.text))
    known = tokenizer.get_vocab()
    good = dict.fromkeys(p.text for p in patterns if p.score > LEAST_SCORE and p.text not in known)
    tokens = list(itertools.islice(good, int(share * len(found))))
    before = float(np.mean([len(encoding) for encoding in encodings])) if rows else 0.0
    grown = TextTokenizer(add_tokens(tokenizer, tokens))(sample) if tokens else []
    after = float(np.mean([len(row.ids) for row in grown])) if tokens else before
    return Patterns(patterns, tokens, len(rows), len(found), (before, after))


def _sample(texts: Iterable[str], seed: int) -> list[str]:
    """Draw `SAMPLE` texts of a stream, each as likely as the others."""
    stream, generator = iter(texts), random.Random(seed)
    sample = list(itertools.islice(stream, SAMPLE))
    for number, text in enumerate(stream, SAMPLE):
        if (position := generator.randrange(number + 1)) < SAMPLE:
            sample[position] = text
    return sample


def _frequent(rows: list[list[int]], least: float) -> Counter:
    """Return the number of texts of each run of pieces that is frequent, as all of its parts are."""
    counts: Counter = Counter()
    for size in range(2, MOST_PIECES + 1):
        level: Counter = Counter()
        for ids in rows:
            runs = (tuple(ids[at : at + size]) for at in range(len(ids) - size + 1))
            level.update({run for run in runs if size == 2 or (run[1:] in counts and run[:-1] in counts)})
        counts.update({run: number for run, number in level.items() if number >= least})
    return counts


def _usual(surfaces: Counter) -> str | None:
    """Return the most frequent text of a run, if it can be a token: words with single blanks between."""
    surface = min(surfaces, key=lambda text: (-surfaces[text], text))
    fits = re.fullmatch(r"\w(?:.*\w)?", surface) and TOKEN.fits(surface) and "  " not in surface
    return surface if fits else None


def _runs(ids: list[int], counts: Counter) -> Iterator[tuple[int, int]]:
    for start in range(len(ids) - 1):
        for size in range(2, min(MOST_PIECES, len(ids) - start) + 1):
            if tuple(ids[start : start + size]) not in counts:
                break
            yield start, size
