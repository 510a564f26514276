"""Tables and picture of the study of one adapter for many apps, from its records; and their page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.composition_report import groups_of, seed_means
from eval.studies import fill
from eval.study.contrasts import contrast
from modeling_mtpf.evaluation.plots import decorate, save
from modeling_mtpf.evaluation.report import gather, markdown_table
from modeling_mtpf.evaluation.statistics import Cells, mean_interval, tasks_of

PAGE, PICTURE = "many_apps.md", "many_apps.svg"
PROTOCOLS = {"all": "mean", "ner": "NER, strict F1", "tc": "TC, accuracy"}
REFERENCES = ("apps", "apps-one", "shared")
Records = Sequence[dict[str, Any]]


def cells_of(records: Records) -> Cells:
    """Return the values by family, and all of them again under the protocol ``all``."""
    cells = gather(records)
    both = {("all", f"{family}/{task}", regime): v for (family, task, regime), v in cells.items()}
    return {**cells, **both}


def within(cells: Cells, group: str) -> Cells:
    """Return the cells of a group, ``backbone/group``: others may have further apps."""
    return {key: values for key, values in cells.items() if key[2].rpartition("/")[0] == group}


def costs_of(records: Records, regime: str) -> dict[str, float]:
    """Return what a method costs, the mean over seeds."""
    costs = [record["config"]["cost"] for record in records if record["regime"] == regime]
    return {key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]}


def methods_in(records: Records) -> list[tuple[str, list[str]]]:
    """Return each group with its methods, those of `REFERENCES` first."""
    return list(groups_of(records, REFERENCES).items())


def averages(records: Records) -> str:
    """Means over the apps, and what a method stores and costs."""
    cells, rows = cells_of(records), []
    for group, methods in methods_in(records):
        for method in methods:
            regime = f"{group}/{method}"
            means = [seed_means(within(cells, group), name, regime) for name in PROTOCOLS]
            cost = costs_of(records, regime)
            ranks = {record["config"].get("rank") for record in records if record["regime"] == regime}
            rows.append(
                [group, f"`{method}`"]
                + [str(mean_interval(values)) if values else "–" for values in means]
                + [str(len(means[0])), "–" if method == "full" else str(max(ranks, default="–"))]
                + [f"{cost['bytes'] / 1e6:.2f}", f"{cost['tails']:.0f}"]
                + [f"{cost['trained_parameters'] / 1e6:.2f}", f"{cost['cpu_seconds']:.0f}"]
                + [f"{cost['cpu_ms_a_text']:.1f}"]
            )
    costs = ["seeds", "rank", "MB", "tails", "million trained", "CPU s to make", "CPU ms a text"]
    return markdown_table(["apps", "method", *PROTOCOLS.values(), *costs], rows)


def difference(cells: Cells, group: str, first: str, second: str) -> list[str]:
    """Return the cells of one method minus another, with the interval over seeds."""
    results = [contrast(within(cells, group), p, f"{group}/{first}", f"{group}/{second}") for p in PROTOCOLS]
    return [result.over_seeds.as_difference() if result else "–" for result in results]


def differences(records: Records) -> str:
    """Each method minus the references, with the 95 % interval over seeds."""
    cells, rows = cells_of(records), []
    for group, methods in methods_in(records):
        for number, method in enumerate(methods):
            for reference in (name for name in REFERENCES if name in methods[:number]):
                pair = f"`{method}` − `{reference}`"
                rows.append([group, pair, *difference(cells, group, method, reference)])
    return markdown_table(["apps", "difference", *PROTOCOLS.values()], rows)


def targets(records: Records) -> str:
    """The best methods within a budget of bytes: of one tail, and of any, against LoRA an app."""
    cells, rows = cells_of(records), []
    for group, methods in methods_in(records):
        cost = {method: costs_of(records, f"{group}/{method}") for method in methods}

        means = {m: seed_means(within(cells, group), "all", f"{group}/{m}") for m in methods}
        for what, reference, share, most_tails in (
            ("one tail in the bytes of", "apps-one", 1.02, 1),
            ("any in a quarter of the bytes of", "apps", 0.26, np.inf),
        ):
            fitting = [
                method
                for method in methods
                if means[method]
                and reference in methods
                and cost[method]["bytes"] <= share * cost[reference]["bytes"]
                and cost[method]["tails"] <= most_tails
            ]
            if fitting:
                chosen = max(fitting, key=lambda method, means=means: np.mean(means[method]))  # type: ignore
                row = [group, f"{what} `{reference}`", f"`{chosen}`"]
                rows.append([*row, *difference(cells, group, chosen, reference)])
    return markdown_table(["apps", "the best method of", "is", *PROTOCOLS.values()], rows)


def conflict(records: Records) -> str:
    """Cosines between the gradients of the parts of a shared LoRA, the mean over pairs and seeds."""
    rows = []
    for group, methods in methods_in(records):
        for method in methods:
            found: dict[str, list[float]] = {}
            chosen = [r for r in records if r["regime"] == f"{group}/{method}" and "cosines" in r["config"]]
            for record in chosen:
                for other, value in record["config"]["cosines"].items():
                    families = {record["family"], other.partition("-")[0]}
                    kind = "itself" if other == "itself" else " and ".join(sorted(families))
                    found.setdefault(kind, []).append(value)
            if found:
                shown = [f"{np.mean(found[k]):+.3f}" if k in found else "–" for k in ("itself", "ner", "tc")]
                pairs = [v for kind, values in found.items() if kind != "itself" for v in values]
                rows.append(
                    [group, f"`{method}`", *shown, f"{np.mean(found.get('ner and tc', [np.nan])):+.3f}"]
                    + [f"{100 * np.mean(np.array(pairs) < 0):.0f} %"]
                )
    names = ["apps", "method", "itself, other batches", "NER with NER", "TC with TC", "NER with TC"]
    return markdown_table([*names, "pairs below zero"], rows)


def apps(records: Records) -> str:
    """Every app: mean over seeds."""
    cells, rows = cells_of(records), []
    for group, methods in methods_in(records):
        for task in tasks_of(within(cells, group), "all"):
            values = [cells.get(("all", task, f"{group}/{method}"), {}) for method in methods]
            shown = [f"{np.mean(list(v.values())):.1f}" if v else "–" for v in values]
            rows += [
                [group, task, f"`{method}`", value] for method, value in zip(methods, shown, strict=True)
            ]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for group, task, method, value in rows:
        table.setdefault((group, method), {})[task] = value
    names = sorted({row[1] for row in rows})
    return markdown_table(
        ["apps", "method", *names],
        [[*key, *(values.get(name, "–") for name in names)] for key, values in table.items()],
    )


def picture(records: Records) -> str:
    """Link the picture, which exists once there are records."""
    return f"![Quality against stored bytes, with the interval over seeds]({PICTURE})"


TABLES = {
    "picture": picture,
    "averages": averages,
    "differences": differences,
    "targets": targets,
    "conflict": conflict,
    "apps": apps,
}


def draw(records: Records, file: Path) -> None:
    """Draw each method's mean quality against its stored bytes, a panel a group."""
    from matplotlib.figure import Figure

    cells, groups = cells_of(records), methods_in(records)
    figure = Figure(figsize=(9, 4.5 * len(groups)), layout="constrained")
    for axis, (group, methods) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        for method in methods:
            values = seed_means(within(cells, group), "all", f"{group}/{method}")
            if not values:
                continue
            cost, mean = costs_of(records, f"{group}/{method}"), mean_interval(values)
            half = 0 if np.isnan(mean.low) else mean.high - mean.mean
            one = cost["tails"] == 1
            style = {"fmt": "o" if one else "s", "color": "tab:blue" if one else "tab:orange"}
            axis.errorbar(cost["bytes"] / 1e6, mean.mean, yerr=half, markersize=5, capsize=2, **style)
            axis.annotate(
                method, (cost["bytes"] / 1e6, mean.mean), (5, 3), textcoords="offset points", fontsize=7
            )
        axis.set_xscale("log")
        axis.set_xlabel("MB stored (LoRA and heads)")
        axis.set_ylabel("mean of F1 and accuracy, %")
        decorate(axis, f"{group}: circles run one tail, squares one an app")
    save(figure, file)


def write_report(records: Records, docs: Path) -> list[Path]:
    """Fill in the page and draw the picture; return the files."""
    page, picture = docs / PAGE, docs / PICTURE
    page.write_text(fill(page.read_text("utf-8"), "many apps", TABLES, records), "utf-8")
    draw(records, picture)
    return [page, picture]
