"""Parts that the pictures of the benchmark and of the study share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import Interval


def interval_panel(
    axis: Any,
    rows: Sequence[str],
    series: dict[str, dict[str, Interval]],
    *,
    spacing: float,
    title: str,
    colours: dict[str, str] | None = None,
) -> None:
    """Draw a row for each name, from the top, and in it a mark with its interval for each series.

    Args:
        axis: Of matplotlib.
        rows: Names of the rows, usually of tasks.
        series: Name → row → value; rows may be missing.
        spacing: Distance between neighbouring series in rows.
        title: Of the panel.
        colours: Name of a series → colour; by default matplotlib's.
    """
    for number, (name, values) in enumerate(series.items()):
        shift = spacing * (number - (len(series) - 1) / 2)
        marks = [(values[row], position + shift) for position, row in enumerate(rows) if row in values]
        if marks:
            errors = np.nan_to_num(
                [(value.mean - value.low, value.high - value.mean) for value, _ in marks]
            ).T
            means, positions = zip(*((value.mean, position) for value, position in marks), strict=True)
            style = {"fmt": "o", "markersize": 4, "color": (colours or {}).get(name)}
            axis.errorbar(means, positions, xerr=errors, label=name, **style)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.invert_yaxis()
    decorate(axis, title, grid="x")


def decorate(axis: Any, title: str, *, grid: str = "both", size: int = 10) -> None:
    """Give a panel its title, a grid, and a legend where there is anything to name."""
    axis.set_title(title, fontsize=size)
    axis.grid(alpha=0.3, axis=grid)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def save(figure: Any, path: Path) -> None:
    """Write a picture; the bytes of an SVG file depend only on what it shows."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mtpf"}):
        svg = path.suffix == ".svg"
        figure.savefig(path, dpi=None if svg else 110, metadata={"Date": None} if svg else None)
