"""Describe a labelled folder: ``clusters.json``, ``report.html``, and a summary of a few lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from ..files import write_bytes
from .html_report import write_report
from .quality import GoldScores, GoldSet, as_record, verdict
from .shards import CENTROIDS_FILE, CLUSTERS_FILE, REPORT_FILE
from .statistics import cluster_statistics
from .teacher import WordEncoder


def describe(
    root: Path,
    folders: dict[int, Path],
    gold: list[GoldSet],
    encoder: WordEncoder,
    made_from: dict[str, Any],
    corpus: dict[str, int],
) -> None:
    """Count the labels, measure them and write the records.

    Args:
        root: The whole result.
        folders: K → folder of its shards; ``root`` itself if there is one K only.
        gold: Sets that the clusters are measured with.
        encoder: The teacher.
        made_from: Settings and data that the labels depend on.
        corpus: Number of texts, and of rows that were left out.
    """
    centroids = {k: load_file(part / CENTROIDS_FILE)["centroids"] for k, part in folders.items()}
    statistics = {k: cluster_statistics(sorted(part.glob("shard-*")), k) for k, part in folders.items()}
    scores: dict[int, dict[str, GoldScores]] = {k: {} for k in folders}
    for gold_set in gold:
        for number, of_k in gold_set.scores(encoder, centroids).items():
            scores[number][gold_set.name] = of_k
    verdicts = verdict(scores, statistics)
    teacher = Path(made_from["teacher"]).name if Path(made_from["teacher"]).exists() else made_from["teacher"]
    title = f"Pseudo-labels of {made_from['source']}: teacher {teacher}, layer {made_from['layer']}"
    for number, part in folders.items():
        contents, gold_scores, said = statistics[number], scores[number], verdicts[number]
        write_report(part / REPORT_FILE, title, {number: contents}, {number: gold_scores}, {number: said})
        columns = zip(contents.sizes.tolist(), contents.top_words, contents.examples, strict=True)
        report = {
            "made_from": made_from,
            "corpus": corpus,
            "words": contents.words,
            "words_ignored": contents.ignored,
            "sentences": contents.rows,
            "empty_clusters": contents.empty,
            "tiny_clusters": contents.tiny,
            "entropy_bits": round(contents.entropy, 6),
            "gold": as_record(gold_scores),
            "verdict": said,
            "clusters": [
                {"id": k, "size": size, "top_words": top, "examples": [" ".join(e).strip() for e in examples]}
                for k, (size, top, examples) in enumerate(columns)
            ],
        }
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_bytes(part / CLUSTERS_FILE, text.encode())
    if len(folders) > 1:
        write_report(root / REPORT_FILE, title, statistics, scores, verdicts)


def summary(folder: Path) -> str:
    """Describe a labelled folder, of one K or of several, in a few lines."""
    parts = [folder]
    if not (folder / CLUSTERS_FILE).is_file():
        several = (file.parent for file in folder.glob(f"k*/{CLUSTERS_FILE}"))
        parts = sorted(several, key=lambda part: int(part.name[1:]))
    lines = [line for part in parts for line in _summary_of(part, detailed=len(parts) == 1)]
    return "\n".join([*lines, f"Report: {folder / REPORT_FILE}"])


def _summary_of(folder: Path, detailed: bool) -> Iterator[str]:
    report = json.loads((folder / CLUSTERS_FILE).read_text("utf-8"))
    clusters = report["clusters"]
    sizes = sorted(cluster["size"] for cluster in clusters)
    yield (
        f"{folder}: {report['words']:,} words in {len(clusters)} clusters "
        f"(median {sizes[len(sizes) // 2]:,} words, largest {sizes[-1]:,}, empty {report['empty_clusters']}, "
        f"tiny {report['tiny_clusters']}); {report['words_ignored']:,} words ignored, "
        f"{report['corpus']['rows_left_out']:,} rows left out."
    )
    for gold in report["gold"]:
        yield (
            f"  {gold['source']}: NMI {gold['nmi']:.3f}, purity of entity words "
            f"{gold['purity_entities']:.3f} (held out {gold['purity_held_out']:.3f})"
        )
    yield f"  {report['verdict']}"
    shown = sorted(clusters, key=lambda cluster: -cluster["size"])[:: max(1, len(clusters) // 8)]
    for cluster in shown if detailed else ():
        yield f"  {cluster['id']:>4} {cluster['size']:>8,}  {' '.join(cluster['top_words'][:8])}"
