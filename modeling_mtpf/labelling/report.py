"""The quality report: one self-contained HTML page with pictures."""

import base64
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib

from ..files import write_bytes
from .quality import GoldScores
from .statistics import ClusterStatistics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } td.n, th.n { text-align: right }
.verdict { background: #f3f6fa; border-left: 4px solid #4a78b0; padding: .6rem 1rem } .context { color: #666 }
img { max-width: 100% } mark { background: #ffe8a3 }
"""


def write_report(
    path: Path,
    title: str,
    statistics: Mapping[int, ClusterStatistics],
    gold: Mapping[int, dict[str, GoldScores]],
    verdicts: Mapping[int, str],
) -> None:
    """Write the page about one K, or about several with their curve.

    Args:
        path: The page.
        title: Its heading.
        statistics: K → sizes and contents of its clusters.
        gold: K → gold set → scores.
        verdicts: K → what the numbers say about it.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", "<h2>Is K too high or too low?</h2>"]
    parts += [f'<p class="verdict">{html.escape(verdicts[number])}</p>' for number in sorted(statistics)]
    parts += [_picture(statistics, gold), "<h2>Numbers</h2>", _size_table(statistics), _gold_table(gold)]
    for number in sorted(statistics) if len(statistics) == 1 else ():
        parts += [f"<h2>The {number} clusters, largest first</h2>", _cluster_table(statistics[number])]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_bytes(path, page.encode())


def _picture(statistics: Mapping[int, ClusterStatistics], gold: Mapping[int, dict[str, GoldScores]]) -> str:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # chooses its backend at import

    numbers = sorted(statistics)
    sets = list(gold[numbers[0]])
    figure, axes = plt.subplots(1, 3 if sets else 1, figsize=(14 if sets else 6, 4), squeeze=False)
    sizes = axes[0][0]
    for number in numbers:
        ordered = sorted(statistics[number].sizes.tolist(), reverse=True)
        sizes.plot([i / number for i in range(number)], ordered, label=f"K = {number}")
    sizes.set(
        yscale="symlog", xlabel="cluster, largest first (share of K)", ylabel="words", title="Sizes", ylim=0
    )
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
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    alternative = "sizes of the clusters and scores against gold sets"
    return f'<p><img alt="{alternative}" src="data:image/png;base64,{data}"></p>'


def _table(heads: list[str], rows: list[list[str]], numeric: set[int]) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{value}</{tag}>" for i, value in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(heads, 'th')}</tr>{body}</table>"


def _size_table(statistics: Mapping[int, ClusterStatistics]) -> str:
    rows = []
    for number in sorted(statistics):
        found = statistics[number]
        ordered = sorted(found.sizes.tolist())
        values = [
            number,
            found.words,
            found.ignored,
            ordered[len(ordered) // 2],
            ordered[-1],
            found.empty,
            found.tiny,
        ]
        entropy = f"{found.entropy:.2f} of {math.log2(number):.2f}"
        rows.append([f"{value:,}" for value in values] + [entropy])
    heads = ["K", "words", "ignored", "median size", "largest", "empty", "tiny", "entropy of sizes (bits)"]
    return _table(heads, rows, set(range(8)))


def _gold_table(gold: Mapping[int, dict[str, GoldScores]]) -> str:
    rows = []
    for number in sorted(gold):
        for name, s in gold[number].items():
            shares = (s.nmi, s.nmi_entities, s.purity, s.purity_entities, s.purity_held_out)
            base = f"{s.purity_of_one_cluster:.3f} / {s.purity_entities_of_one_cluster:.3f}"
            spread = ", ".join(f"{html.escape(t)} {n}" for t, n in sorted(s.clusters_of_type.items()))
            values = [f"{value:.3f}" for value in shares]
            rows.append([str(number), html.escape(name), *values, base, f"{s.entity_words:,}", spread])
    if not rows:
        return "<p>No gold NER set was given.</p>"
    heads = [
        "K",
        "gold set",
        "NMI",
        "NMI, entities",
        "purity",
        "purity, entities",
        "… held out",
        "purity of one cluster: all / entities",
        "entity words",
        "clusters that hold 80 % of a type",
    ]
    return _table(heads, rows, {0, *range(2, 9)})


def _cluster_table(found: ClusterStatistics) -> str:
    rows = []
    for number in sorted(range(len(found.sizes)), key=lambda k: (-found.sizes[k], k)):
        size = int(found.sizes[number])
        share = f"{size / max(1, found.words):.2%}"
        words = html.escape(" · ".join(found.top_words[number]))
        lines = [
            f"{html.escape(left)} <mark>{html.escape(word)}</mark> {html.escape(right)}"
            for left, word, right in found.examples[number]
        ]
        rows.append(
            [str(number), f"{size:,}", share, words, f'<span class="context">{"<br>".join(lines)}</span>']
        )
    return _table(["id", "words", "share", "top words", "examples"], rows, {0, 1, 2})


__all__ = ["write_report"]
