"""Whether entities are found in messages with emoji: recall on test texts as they are, and with emoji added.

    python eval/checks/symbols.py --ner DATA --ner DATA --output eval/results/symbols.json

One app is fitted on a few rows of each set, as they are. In the test texts an emoji, a sign that BERT's
vocabulary knows, or a hashtag follows every entity and a fifth of the other words: ``apart`` from it,
``glued`` to it, or ``between`` it and the next word, without a space. An entity is found where predict gives
its characters and its type.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.checks.calibration import small
from modeling_mtpf.adaptation import fit_app
from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.data.spans import Span
from modeling_mtpf.metrics import span_scores
from modeling_mtpf.settings import ScriptParser

SYMBOLS = {
    "emoji": ["🙂", "👩🏽‍🚀", "🇵🇹", "❤️", "🎉🎉", "👍🏽"],
    "signs": ["→", "★"],
    "hashtags": ["#travel", "#wow", "#tonight"],
}
FORMS = {"apart": " {} ", "glued": "{} ", "between": "{}"}


def message(
    words: list[str], tags: list[str], kind: str, form: str, random: np.random.Generator
) -> tuple[str, list[Span]]:
    """Join words with spaces and symbols; return the text and its entities."""
    text = ""
    spans: list[Span] = []
    for word, tag, following in zip(words, tags, [*tags[1:], "O"], strict=True):
        start, text = len(text), text + word
        if tag[0] == "I":
            spans[-1] = spans[-1]._replace(end=len(text))
        elif tag[0] == "B":
            spans.append(Span(start, len(text), tag[2:]))
        follows = random.random() < (1.0 if tag != "O" else 0.2) and following[0] != "I"
        text += form.format(random.choice(SYMBOLS[kind])) if form and follows else " "
    return text, spans


def measure(source: str, sizes: dict[str, int], apps: Path) -> dict[str, Any]:
    """Fit one app, unless it is there, and score it on its test texts in all forms."""
    data = small(load_app_data(source, "ner"), sizes, 0)
    assert data.test is not None
    model, tokenizer = open_backbone("packaged", None)
    folder = apps / Path(source).name
    if not folder.is_dir():
        fit_app(data, "ner", backbone=(model, tokenizer), output_dir=folder, name="fitted")
    app = model.load_adapter(folder, "app")
    scores = {}
    forms = [(f"{kind} {name}", kind, form) for kind in SYMBOLS for name, form in FORMS.items()]
    forms.remove(("hashtags between", "hashtags", "{}"))  # the next word would be part of it
    for name, kind, form in [("clean", "", ""), *forms]:
        random = np.random.default_rng(0)
        rows = [
            message(*row, kind, form, random) for row in zip(data.test.inputs, data.test.labels, strict=True)
        ]
        results = model.predict([text for text, _ in rows], adapters=[app])[app]
        predicted = [[Span(r["start"], r["end"], r["entity_group"]) for r in result] for result in results]
        scored = span_scores([spans for _, spans in rows], predicted)
        scores[name] = {
            key: round(scored["entity_f1" if key == "f1" else key], 4)
            for key in ("recall", "precision", "f1")
        }
    return {"set": Path(source).name, "scores": scores}


def main() -> None:
    """Run all sets and write one record."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--ner", action="append", required=True, help="a folder or Hub id")
    parser.add_argument("--sizes", default="500,200,500", help="rows of train, validation and test")
    parser.add_argument("--apps", default="runs/symbols", help="where the apps are kept")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    sizes = dict(zip(("train", "validation", "test"), map(int, options.sizes.split(",")), strict=True))
    torch.set_num_threads(1)
    rows = []
    for source in options.ner:
        rows.append(measure(source, sizes, Path(options.apps)))
        print(json.dumps(rows[-1]), flush=True)
    command = " ".join(["python eval/checks/symbols.py", *(Path(part).name for part in sys.argv[1:])])
    Path(options.output).write_text(
        json.dumps({"command": command, "sizes": sizes, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
