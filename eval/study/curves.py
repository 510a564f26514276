"""Draw the curves of one or more pre-finetuning runs into one picture.

python eval/study/curves.py runs/tpl runs/naive runs/ner runs/tc --output curves.png
"""  # noqa: D208

import json
import sys
from pathlib import Path

from modeling_mtpf.pretraining.curves import draw
from modeling_mtpf.settings import ScriptParser


def read_run(folder: Path) -> tuple[str, list[dict]]:
    """Return the regime and the logged lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    record = folder / "run.json"
    return (json.loads(record.read_text("utf-8"))["regime"] if record.is_file() else folder.name), lines


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train/pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg)")
    parser.add_argument("--smooth", type=int, default=10, help="logged lines per moving mean")
    options = parser.parse_args(arguments)
    for folder in options.runs:
        if not (folder / "metrics.jsonl").is_file():
            print(f"error: {folder} has no metrics.jsonl; name output folders of runs.", file=sys.stderr)
            return 2
    draw(dict(read_run(folder) for folder in options.runs), options.output, options.smooth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
