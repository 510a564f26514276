"""Gather the scores of labelled folders into one small file without local paths, and print their tables.

    python eval/study/summarize_labels.py last=labels_last middle=labels_middle \
        --output eval/results/labels.json

With ``--runs`` also the accuracy over the steps of students that were trained on such labels:

    python eval/study/summarize_labels.py --runs last=runs/last=labels_last \
        --output eval/results/students.json

"""  # noqa: D208

import json
import math
import sys
from pathlib import Path

from modeling_mtpf.evaluation.report import markdown_table
from modeling_mtpf.settings import ScriptParser

COUNTS = (
    "words",
    "words_ignored",
    "sentences",
    "empty_clusters",
    "tiny_clusters",
    "entropy_bits",
    "corpus",
    "gold",
)
SETTINGS = (
    "layer",
    "pooling",
    "normalize",
    "spherical",
    "sample_words",
    "max_words",
    "bf16",
    "source",
    "seed",
)
SCORES = ("nmi", "nmi_entities", "purity_entities", "purity_held_out")
ACCURACY = "pseudo_label_accuracy/ner"
PARTS = 6


def label_records(name: str, folder: Path) -> list[dict]:
    """Return one record for each K of a labelled folder."""
    files = [folder / "clusters.json", *folder.glob("k*/clusters.json")]
    reports = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    records = []
    for report in sorted(reports, key=lambda report: len(report["clusters"])):
        settings = {key: report["made_from"][key] for key in (*SETTINGS, "teacher_sha256", "fingerprint")}
        numbers = {key: report[key] for key in COUNTS}
        records.append({"teacher": name, "clusters": len(report["clusters"]), **settings, **numbers})
    return records


def run_record(name: str, folder: Path, labels: Path) -> dict:
    """Return the logged accuracies of a student, and the difficulty of its labels.

    Args:
        name: Name of the teacher.
        folder: The run's output folder.
        labels: Folder of the labels (of one K) that it was trained on.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    curve = [[line["step"], line[ACCURACY], line["loss/ner"]] for line in lines if ACCURACY in line]
    if not curve:
        raise SystemExit(f"error: {folder} logged no pseudo-label accuracy; give a run of the NER family.")
    report = json.loads((labels / "clusters.json").read_text("utf-8"))
    largest = max(cluster["size"] for cluster in report["clusters"]) / report["words"]
    return {
        "teacher": name,
        "clusters": len(report["clusters"]),
        "words": report["words"],
        "largest_cluster_share": round(largest, 4),
        "entropy_bits": report["entropy_bits"],
        "step_accuracy_loss": curve,
    }


def table(records: list[dict]) -> str:
    """Return a Markdown table: mean scores over the gold sets for each teacher and K."""
    rows = []
    for record in records:
        gold = record["gold"]
        means = [f"{sum(row[key] for row in gold) / len(gold):.3f}" if gold else "–" for key in SCORES]
        counts = [str(record[key]) for key in ("clusters", "empty_clusters", "tiny_clusters")]
        rows.append([record["teacher"], counts[0], *means, *counts[1:]])
    return markdown_table(["teacher", "K", *SCORES, "empty", "tiny"], rows)


def student_table(runs: list[dict]) -> str:
    """Return a Markdown table: a student's accuracy as means over `PARTS` equal parts of its run.

    Accuracies on different labels do not compare: some labels are easier to guess. So the table also has the
    accuracy of always naming the largest cluster, and the share of the labels' entropy that the student
    explains at the end, 1 - loss / entropy: 0 for knowing only the sizes, 1 for knowing every label.
    """
    rows = []
    for run in runs:
        curve = run["step_accuracy_loss"]
        parts = [curve[len(curve) * i // PARTS : len(curve) * (i + 1) // PARTS] for i in range(PARTS)]
        accuracies = [sum(accuracy for _, accuracy, _ in part) / max(1, len(part)) for part in parts]
        loss = sum(loss for _, _, loss in parts[-1]) / max(1, len(parts[-1]))
        explained = 1 - loss / (run["entropy_bits"] * math.log(2))
        values = [run["largest_cluster_share"], run["entropy_bits"], *accuracies, explained]
        rows.append([run["teacher"], *(f"{value:.3f}" for value in values)])
    parts_head = [f"part {i + 1}" for i in range(PARTS)]
    head = ["teacher", "largest cluster", "entropy (bits)", *parts_head, "entropy explained, last part"]
    return markdown_table(head, rows)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("labels", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=RUN=LABELS")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not options.labels and not options.runs:
        parser.error("give labels, or runs with --runs")
    for run in options.runs:
        if run.count("=") != 2:
            parser.error(f"--runs takes NAME=RUN=LABELS, not {run!r}")
    pairs = [argument.partition("=") for argument in options.labels]
    records = [record for name, _, folder in pairs for record in label_records(name, Path(folder))]
    runs = [run_record(n, Path(run), Path(labels)) for n, run, labels in (r.split("=") for r in options.runs)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"labels": records, "students": runs}
    options.output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print("\n\n".join([table(records)] * bool(records) + [student_table(runs)] * bool(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
