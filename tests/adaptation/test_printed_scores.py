"""The scores that a fit prints are those of what `mtpf predict` gives, in a process of its own, for the test file."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics import precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from modeling_mtpf.cli.main import main

NAMES, PLACES = ["Ada", "Noor", "Grace", "Alan"], ["London", "Paris", "Rome"]


def rows(seed: int, count: int, new: bool) -> list[dict]:
    """Return sentences with words, tags, spans, one label and several; ``new`` adds labels that train lacks."""
    generator, result = np.random.default_rng(seed), []
    for number in range(count):
        name, place = generator.choice(NAMES), generator.choice(PLACES)
        tokens, tags = [name, "is", "in", place, "."], ["B-PER", "O", "O", "B-LOC", "O"]
        if generator.random() < 0.3:  # noise, so that no score is 0 or 1
            tags = ["O", "O", "B-LOC", "I-LOC", "O"]
        if new and number % 7 == 0:
            tags[2:4] = ["B-NEW", tags[3].replace("I-LOC", "I-NEW")]
        if new and number == 0:
            tokens, tags = tokens * 20, tags * 20  # several windows
        starts = np.cumsum([0, *(len(token) + 1 for token in tokens)])
        spans: list = []
        for start, token, tag in zip(starts.tolist(), tokens, tags, strict=False):
            if tag[0] == "B":
                spans.append([start, start + len(token), tag[2:]])
            elif tag[0] == "I":
                spans[-1][1] = start + len(token)
        labels = [
            label for label in ("London", "Ada", "Rome") if (label in tokens) != (generator.random() < 0.2)
        ]
        label = generator.choice([place, place, "other"])
        result.append(
            {
                **{"text": " ".join(tokens), "tokens": tokens, "ner_tags": tags, "spans": spans},
                **{"label": "new" if new and number % 5 == 0 else label, "labels": labels},
            }
        )
    return result


KINDS = {
    "words": ("ner", ["tokens", "ner_tags"]),
    "spans": ("ner", ["text", "spans"]),
    "text": ("tc", ["text", "label"]),
    "sets": ("tc", ["text", "labels"]),
}


def letters(spans, text: str) -> list[str]:
    """Return IOB2 tags of the characters."""
    tags = ["O"] * len(text)
    for start, end, kind in spans:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def recomputed(kind: str, test: list[dict], results: list) -> dict[str, float]:
    """Score what `mtpf predict --top_k 0 --threshold 0` gives by seqeval and scikit-learn."""
    if kind in ("words", "spans"):
        gold = [letters(row["spans"], row["text"]) for row in test]
        found = [[(r["start"], r["end"], r["entity_group"]) for r in result] for result in results]
        tags = [letters(spans, row["text"]) for spans, row in zip(found, test, strict=True)]
        options = {"mode": "strict", "scheme": IOB2}
        scorers = {"entity_f1": entity_f1, "precision": precision_score, "recall": recall_score}
        return {name: score(gold, tags, **options) for name, score in scorers.items()}
    labels = sorted(
        {r["label"] for r in results[0]} | {n for row in test for n in [row["label"], *row["labels"]]}
    )
    scores = [
        [{r["label"]: r["score"] for r in result}.get(name, 0) for name in labels] for result in results
    ]
    if kind == "text":
        gold, best = [row["label"] for row in test], [result[0]["label"] for result in results]
        known = np.array([[name == label for name in labels] for label in gold])
        first = {"accuracy": accuracy_score(gold, best), "macro_f1": f1_score(gold, best, average="macro")}
    else:
        known = np.array([[name in row["labels"] for name in labels] for row in test])
        best = (np.array(scores) >= 0.5)[:, known.any(0)]
        first = {
            f"{how}_f1": f1_score(known[:, known.any(0)], best, average=how) for how in ("micro", "macro")
        }
    occurs = known.any(0)
    precision = average_precision_score(known[:, occurs], np.array(scores)[:, occurs])
    return {**first, "average_precision": precision}


@pytest.mark.slow
def test_printed_scores_are_those_of_what_predict_gives(folders, tmp_path, capsys):
    splits = {"data": rows(0, 24, False), "validation": rows(1, 12, False), "test": rows(2, 25, True)}
    printed, adapters = {}, []
    for kind, (family, columns) in KINDS.items():
        command = ["adapt", "--family", family, "--backbone", str(folders / "backbone"), "--method", "lora"]
        for split, of_split in splits.items():
            file = tmp_path / f"{kind}-{split}.jsonl"
            file.write_text("".join(json.dumps({c: row[c] for c in columns}) + "\n" for row in of_split))
            command += [f"--{split}", str(file)]
        command += ["--steps", "80", "--batch_size", "4", "--learning_rate", "3e-3", "--max_length", "32"]
        assert main([*command, "--output_dir", str(tmp_path / kind), "--progress", "false"]) == 0
        printed[kind] = dict(re.findall(r"^  (\w+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
        adapters += ["--adapter", str(tmp_path / kind)]
    (tmp_path / "test.txt").write_text("".join(row["text"] + "\n" for row in splits["test"]))
    command = [*adapters, "--backbone", str(folders / "backbone"), "--top_k", "0", "--threshold", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "modeling_mtpf.cli", "predict", *command, str(tmp_path / "test.txt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line)["results"] for line in done.stdout.splitlines()]
    for kind in KINDS:
        scores = recomputed(kind, splits["test"], [result[kind] for result in results])
        assert {name: printed[kind][name] for name in scores} == {n: f"{s:.4f}" for n, s in scores.items()}, (
            kind
        )
        assert any(0 < score < 1 for score in scores.values())
