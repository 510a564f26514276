"""The peers of apps, in environments of their own, on rows that ``frontier.py --write_rows DIR`` drew.

    python eval/frontier_peers.py --rows DIR --encoder FOLDER --methods linear,setfit --output peers.json
    python eval/frontier_peers.py --rows DIR --encoder FOLDER --methods spanmarker --output peers.json

``linear`` is sentence-transformers' vectors, normalised, and scikit-learn's logistic regression with the
strength that five folds choose, refitted on train and validation. ``setfit`` is SetFit with its default
settings but for the number of pairs, on the same rows; nothing is chosen by validation. ``spanmarker`` is
SpanMarker, trained on train and validation with the rate of full fine-tuning in ``frontier.py``.
"""

import json
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_mtpf.settings import ScriptParser

PACKAGES = ("torch", "transformers", "sentence-transformers", "setfit", "scikit-learn", "span-marker")
EPOCHS, LEARNING_RATE, LONGEST = 5, 3e-4, 64
"""Of SpanMarker; and the most sub-words of a text."""


def linear(rows: dict[str, Any], encoder: str, seed: int) -> float:
    """Return test accuracy of logistic regression on sentence vectors."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import KFold

    texts, labels = (rows["train"][side] + rows["validation"][side] for side in (0, 1))
    model = SentenceTransformer(encoder, device="cpu")
    vectors, test = (model.encode(part, normalize_embeddings=True) for part in (texts, rows["test"][0]))
    folds = KFold(5, shuffle=True, random_state=seed)
    probe = LogisticRegressionCV(Cs=[0.1, 1, 10, 100], cv=folds, max_iter=1000, random_state=seed)
    try:
        probe.fit(vectors, labels)
    except ValueError:  # a label with one text is in no other fold
        from sklearn.linear_model import LogisticRegression

        probe = LogisticRegression(C=10, max_iter=1000).fit(vectors, labels)
    return float((probe.predict(test) == np.array(rows["test"][1])).mean())


def setfit(rows: dict[str, Any], encoder: str, seed: int, iterations: int) -> float:
    """Return test accuracy of SetFit."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    model = SetFitModel.from_pretrained(encoder)
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_iterations=iterations,
        seed=seed,
        report_to="none",
        save_strategy="no",
    )
    texts, labels = (rows["train"][side] + rows["validation"][side] for side in (0, 1))
    trainer = Trainer(model, settings, train_dataset=Dataset.from_dict({"text": texts, "label": labels}))
    trainer.train()
    return float((np.asarray(model.predict(rows["test"][0])) == np.array(rows["test"][1])).mean())


def spanmarker(rows: dict[str, Any], encoder: str, seed: int) -> float:
    """Return strict F1 of SpanMarker's entities on test."""
    from datasets import Dataset
    from span_marker import SpanMarkerModel, Trainer
    from transformers import TrainingArguments, set_seed

    set_seed(seed)
    texts, tags = (rows["train"][side] + rows["validation"][side] for side in (0, 1))
    labels = sorted({tag for of_text in tags for tag in of_text} | {"O"})
    numbers = [[labels.index(tag) for tag in of_text] for of_text in tags]
    model = SpanMarkerModel.from_pretrained(
        encoder, labels=labels, model_max_length=LONGEST, marker_max_length=LONGEST
    )
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.1,  # type: ignore[call-arg] # that of transformers 4
        per_device_train_batch_size=16,
        seed=seed,
        report_to="none",
        save_strategy="no",
    )
    dataset = Dataset.from_dict({"tokens": texts, "ner_tags": numbers})
    Trainer(model, settings, train_dataset=dataset).train()
    found, expected = set(), set()
    predictions = model.predict(rows["test"][0], batch_size=32)
    for number, (tags, spans) in enumerate(zip(rows["test"][1], predictions, strict=True)):
        expected |= {(number, *span) for span in entities(tags)}
        found |= {(number, s["label"], s["word_start_index"], s["word_end_index"]) for s in spans}
    return 2 * len(found & expected) / max(1, len(found) + len(expected))


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return type, first word and end of each entity of IOB2 tags."""
    spans: list[tuple[str, int, int]] = []
    for word, tag in enumerate(tags):
        if tag.startswith("B-"):
            spans.append((tag[2:], word, word + 1))
        elif tag.startswith("I-") and spans and spans[-1][0] == tag[2:] and spans[-1][2] == word:
            spans[-1] = (*spans[-1][:2], word + 1)
    return spans


def installed() -> dict[str, str]:
    """Return the versions of the packages that are there."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Measure every cell that the output lacks."""
    parser = ScriptParser(description=__doc__)
    for name in ("rows", "encoder", "methods", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--iterations", type=int, default=5, help="of SetFit: pairs of each kind for a text")
    parser.add_argument("--only", default="", help="sets, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = Path(arguments.output)
    records = json.loads(output.read_text()) if output.exists() else []
    for method in arguments.methods.split(","):
        family = "ner" if method == "spanmarker" else "tc"
        paths = Path(arguments.rows).glob(f"{family}-*.json")
        for path in sorted(paths, key=lambda p: p.stem.rsplit("-", 1)[::-1]):
            task, seed = path.stem.removeprefix(f"{family}-").rsplit("-", 1)
            regime = f"setfit:iterations={arguments.iterations}" if method == "setfit" else method
            if any((r["regime"], r["task"], r["seed"]) == (regime, task, int(seed)) for r in records):
                continue
            if arguments.only and task not in arguments.only.split(","):
                continue
            rows = json.loads(path.read_text())
            started = time.process_time()
            if method == "setfit":
                value = setfit(rows, arguments.encoder, int(seed), arguments.iterations)
            else:
                value = {"linear": linear, "spanmarker": spanmarker}[method](
                    rows, arguments.encoder, int(seed)
                )
            records.append(
                {
                    "regime": regime,
                    "seed": int(seed),
                    "task": task,
                    "family": family,
                    "protocol": "frontier",
                    "metric": "accuracy" if family == "tc" else "entity_f1",
                    "value": value,
                    "cpu_seconds": round(time.process_time() - started, 1),
                    "n_train": len(rows["train"][0]) + len(rows["validation"][0]),
                    "n_test": len(rows["test"][0]),
                    "config": {"encoder": "all-MiniLM-L6-v2"},
                    "versions": installed(),
                    "date": time.strftime("%Y-%m-%d"),
                }
            )
            output.write_text("[\n" + ",\n".join(json.dumps(r, sort_keys=True) for r in records) + "\n]\n")
            print(task, seed, regime, round(value, 4), records[-1]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
