"""The peers of TC apps, in an environment of their own, on rows that ``frontier.py --write_rows DIR`` drew.

    python eval/frontier_peers.py --rows DIR --encoder FOLDER --methods linear,setfit --output peers.json

``linear`` is sentence-transformers' vectors, normalised, and scikit-learn's logistic regression with the
strength that five folds choose, refitted on train and validation. ``setfit`` is SetFit with its default
settings but for the number of pairs, on the same rows; nothing is chosen by validation.
"""

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_mtpf.settings import ScriptParser

PACKAGES = ("torch", "transformers", "sentence-transformers", "setfit", "scikit-learn")


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
        for path in sorted(Path(arguments.rows).glob("tc-*.json"), key=lambda p: p.stem.rsplit("-", 1)[::-1]):
            task, seed = path.stem.removeprefix("tc-").rsplit("-", 1)
            regime = method if method == "linear" else f"setfit:iterations={arguments.iterations}"
            if any((r["regime"], r["task"], r["seed"]) == (regime, task, int(seed)) for r in records):
                continue
            if arguments.only and task not in arguments.only.split(","):
                continue
            rows = json.loads(path.read_text())
            started = time.process_time()
            if method == "linear":
                value = linear(rows, arguments.encoder, int(seed))
            else:
                value = setfit(rows, arguments.encoder, int(seed), arguments.iterations)
            records.append(
                {
                    "regime": regime,
                    "seed": int(seed),
                    "task": task,
                    "family": "tc",
                    "protocol": "frontier",
                    "metric": "accuracy",
                    "value": value,
                    "cpu_seconds": round(time.process_time() - started, 1),
                    "n_train": len(rows["train"][0]) + len(rows["validation"][0]),
                    "n_test": len(rows["test"][0]),
                    "config": {"encoder": "all-MiniLM-L6-v2"},
                    "versions": {name: version(name) for name in PACKAGES},
                    "date": time.strftime("%Y-%m-%d"),
                }
            )
            output.write_text("[\n" + ",\n".join(json.dumps(r, sort_keys=True) for r in records) + "\n]\n")
            print(task, seed, regime, round(value, 4), records[-1]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
