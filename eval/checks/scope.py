"""Whether texts out of scope are told: AUROC of an app's scope, and of the probability of its best label.

    python eval/checks/scope.py --tc DATA=OUT --tc DATA --output eval/results/scope.json

OUT has one text a line that belongs to none of the labels. Without it a quarter of the labels is left out of
fitting, and their test texts are out of scope. Intervals are of 200 draws of the test texts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.text_vectors import embed_texts
from modeling_mtpf.data.app_data import AppData, Examples, load_app_data
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.settings import ScriptParser

LEAST, LEFT_OUT = 8, 0.25
"""Training rows of a label that may be left out, and the share of such labels that is."""


def some_of(examples: Examples, labels: set[str], rows: int, each: int, seed: int) -> Examples:
    """Return at most ``rows`` random rows with these labels, at most ``each`` with one label."""
    count: dict[str, int] = {}
    chosen: list[int] = []
    for row in np.random.default_rng(seed).permutation(len(examples)):
        label = str(examples.labels[row])
        count[label] = count.get(label, 0) + 1
        if label in labels and count[label] <= each and len(chosen) < rows:
            chosen.append(int(row))
    return examples.take(np.array(chosen))


def measure(source: str, method: str, each: int, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Fit one app; return its record, and of each test text whether it is in scope and both scores."""
    path, _, out = source.partition("=")
    data = load_app_data(path, "tc")
    assert data.test is not None
    labels, outside = set(data.labels), set()
    if not out:
        known = [name for name in sorted(labels) if data.train.labels.count(name) >= LEAST]
        outside = set(np.random.default_rng(seed).choice(known, int(LEFT_OUT * len(known)), replace=False))
    inside = labels - outside
    train = some_of(data.train, inside, 10**9, each, seed)
    validation = some_of(data.validation, inside, 500, 10**9, seed)
    test = some_of(data.test, inside, 1000, 10**9, seed).inputs
    others = some_of(data.test, outside, 1000, 10**9, seed).inputs
    if out:
        others = Path(out).read_text("utf-8").splitlines()
    fitted = AppData("tc", list(dict.fromkeys(train.labels)), train, validation)
    backbone = open_backbone("packaged", None)
    app = fit_app(fitted, "tc", backbone=backbone, method=method, settings=FitSettings(seed=seed))
    model, texts = app.model, [*test, *others]
    results = model.predict(texts, adapters=[app.name], in_scope=True)[app.name]
    head: Any = model.heads[app.name]
    with torch.no_grad():
        vectors = torch.from_numpy(embed_texts(model, backbone[1], texts, app.name))
        logits = head(vectors.to(head.weight.dtype)).float().numpy()
    is_inside = np.arange(len(texts)) < len(test)
    accepted = np.array([result["in_scope"] for result in results])
    scores = np.stack([is_inside, head.scope.scores(logits), [result["score"] for result in results]])
    record = {
        "set": Path(path).name,
        "out_of_scope": "own texts" if out else f"{len(outside)} labels left out",
        "method": method,
        "seed": seed,
        "rows": {"train": len(train), "validation": len(validation), "in": len(test), "out": len(others)},
        "labels": len(fitted.labels),
        "stored_bytes": sum(part.nbytes for part in head.scope.tensors().values()),
        "auroc": round(float(roc_auc_score(is_inside, scores[1])), 4),
        "auroc_of_best_probability": round(float(roc_auc_score(is_inside, scores[2])), 4),
        "accepted_in_scope": round(float(accepted[is_inside].mean()), 4),
        "accepted_out_of_scope": round(float(accepted[~is_inside].mean()), 4),
    }
    return record, scores


def summary(records: list[dict[str, Any]], scores: list[np.ndarray]) -> dict[str, Any]:
    """Return means over the seeds, with intervals of both scores and of their difference."""
    draws = []
    for number in range(200):
        random = np.random.default_rng(number)
        drawn = [part[:, random.integers(part.shape[1], size=part.shape[1])] for part in scores]
        draws.append(np.mean([[roc_auc_score(part[0], part[i]) for i in (1, 2)] for part in drawn], axis=0))
    low, high = np.quantile(np.c_[draws, np.diff(draws)], [0.025, 0.975], axis=0).round(4).tolist()
    keys = ("auroc", "auroc_of_best_probability", "accepted_in_scope", "accepted_out_of_scope")
    means: dict[str, Any] = {key: round(float(np.mean([row[key] for row in records])), 4) for key in keys}
    means["auroc_interval"] = [low[0], high[0]]
    means["gain"] = round(means["auroc"] - means["auroc_of_best_probability"], 4)
    means["gain_interval"] = [-high[2], -low[2]]
    return {"set": records[0]["set"], "method": records[0]["method"], "seeds": len(records), **means}


def main() -> None:
    """Run all sets and write one record."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--tc", action="append", required=True, help="a folder or Hub id, and =OUT")
    parser.add_argument("--method", action="append", help="probe by default")
    parser.add_argument("--each", type=int, default=20, help="training rows of a label")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, summaries = [], []
    for source in options.tc:
        for method in options.method or ["probe"]:
            pairs = [measure(source, method, options.each, seed) for seed in range(options.seeds)]
            records, scores = map(list, zip(*pairs, strict=True))
            rows += records
            summaries.append(summary(records, scores))
            print(json.dumps(summaries[-1]), flush=True)
            command = " ".join("=".join(Path(part).name for part in each.split("=")) for each in sys.argv[1:])
            content = {
                "command": f"python eval/checks/scope.py {command}",
                "summaries": summaries,
                "rows": rows,
            }
            Path(options.output).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
