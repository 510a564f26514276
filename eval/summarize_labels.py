"""Gather the scores of labelled folders into one small file without local paths, and print their tables.

    python eval/summarize_labels.py last=labels_last middle=labels_middle --output eval/results/labels.json

With ``--runs`` also how the accuracy of students developed that were trained on such labels:

    python eval/summarize_labels.py last=labels_last --runs last=runs/last --output eval/results/labels.json

"""  # noqa: D208

import argparse
import json
import sys
from pathlib import Path

KEPT = (
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


def label_records(name: str, folder: Path) -> list[dict]:
    """Return one record for each K of a labelled folder."""
    files = [folder / "clusters.json", *folder.glob("k*/clusters.json")]
    reports = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    records = []
    for report in sorted(reports, key=lambda report: len(report["clusters"])):
        settings = {key: report["made_from"][key] for key in (*SETTINGS, "teacher_sha256", "fingerprint")}
        numbers = {key: report[key] for key in KEPT}
        records.append({"teacher": name, "clusters": len(report["clusters"]), **settings, **numbers})
    return records


def run_record(name: str, folder: Path) -> dict:
    """Return the logged accuracies of a student."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    curve = [[line["step"], line[ACCURACY], line["loss/ner"]] for line in lines if ACCURACY in line]
    return {"teacher": name, "step_accuracy_loss": curve}


def tables(records: list[dict], runs: list[dict]) -> str:
    """Return Markdown: mean scores over the gold sets for each teacher and K, and the students' accuracy."""
    lines = ["| teacher | K | " + " | ".join(SCORES) + " | empty | tiny |", "|---" * (len(SCORES) + 4) + "|"]
    for record in records:
        means = [sum(gold[key] for gold in record["gold"]) / max(1, len(record["gold"])) for key in SCORES]
        values = " | ".join(f"{value:.3f}" for value in means)
        empty, tiny = record["empty_clusters"], record["tiny_clusters"]
        lines.append(f"| {record['teacher']} | {record['clusters']} | {values} | {empty} | {tiny} |")
    for run in runs:
        shown = ", ".join(f"{step}: {accuracy:.3f}" for step, accuracy, _ in run["step_accuracy_loss"])
        lines += ["", f"Student of {run['teacher']}, accuracy by step: {shown}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("labels", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    pairs = [argument.partition("=") for argument in given.labels]
    records = [record for name, _, folder in pairs for record in label_records(name, Path(folder))]
    runs = [run_record(name, Path(folder)) for name, _, folder in (run.partition("=") for run in given.runs)]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"labels": records, "students": runs}
    given.output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(tables(records, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
