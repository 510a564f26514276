"""The quality report: one self-contained HTML page with pictures."""

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path

import jinja2
import matplotlib

from ..files import write_bytes
from .quality import GoldScores
from .statistics import ClusterStatistics

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(
    path: Path,
    title: str,
    statistics: Mapping[int, ClusterStatistics],
    gold: Mapping[int, dict[str, GoldScores]],
    verdicts: Mapping[int, str],
) -> None:
    """Write the page about one K, or about several with their curve; ``gold`` is K → gold set → scores."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title,
        verdicts=verdicts,
        statistics={number: statistics[number] for number in sorted(statistics)},
        gold=gold,
        clusters=_largest_first(*statistics.values()) if len(statistics) == 1 else [],
        picture=_picture(statistics, gold),
        log2=math.log2,
    )
    write_bytes(path, page.encode())


def _largest_first(contents: ClusterStatistics) -> list[tuple]:
    """Return id, size, share of all words, top words and examples of each cluster."""
    shares = contents.sizes / max(1, contents.words)
    columns = contents.sizes.tolist(), shares.tolist(), contents.top_words, contents.examples
    clusters = zip(range(len(shares)), *columns, strict=True)
    return sorted(clusters, key=lambda cluster: (-cluster[1], cluster[0]))


def _picture(statistics: Mapping[int, ClusterStatistics], gold: Mapping[int, dict[str, GoldScores]]) -> str:
    """Plot sizes and scores; return a PNG in base64."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # chooses its backend at import

    numbers = sorted(statistics)
    sets = list(gold[numbers[0]])
    figure, axes = plt.subplots(1, 3 if sets else 1, figsize=(14 if sets else 6, 4), squeeze=False)
    sizes = axes[0][0]
    for number in numbers:
        ordered = sorted(statistics[number].sizes.tolist(), reverse=True)
        sizes.plot([i / number for i in range(number)], ordered, label=f"K = {number}")
    sizes.set(xlabel="cluster, largest first (share of K)", ylabel="words", title="Sizes")
    sizes.set(yscale="symlog", ylim=0)
    sizes.legend()
    panels = {"nmi": "NMI with all types", "purity_held_out": "Purity of entity words (held out)"}
    for axis, (key, title) in zip(axes[0][1:], panels.items(), strict=False):
        if len(numbers) > 1:
            for name in sets:
                axis.plot(numbers, [getattr(gold[k][name], key) for k in numbers], marker="o", label=name)
            axis.set(xscale="log", xlabel="K", xticks=numbers, xticklabels=numbers)
            axis.legend(fontsize=8)
        else:
            axis.barh(sets, [getattr(gold[numbers[0]][name], key) for name in sets])
        axis.set(title=title)
        axis.minorticks_off()
    figure.tight_layout()
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same numbers give the same page.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
