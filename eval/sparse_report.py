"""Tables of the study of sparse fine-tuning, from its records, and the pages that hold them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.composition_report import seed_means
from eval.studies import fill
from eval.study.contrasts import contrast
from modeling_mtpf.evaluation.report import gather, markdown_table
from modeling_mtpf.evaluation.statistics import Cells, mean_interval, tasks_of

PAGES = ("sparse_results.md", "apps.md")
FAMILIES = {"tc": "text apps, accuracy", "ner": "NER apps, strict F1", "": "all sets"}
REFERENCES = ("end-to-end", "lora", "sparse-10")
PROTOCOL = "sparse"

Records = Sequence[dict[str, Any]]


def methods_of(records: Records) -> list[str]:
    """Return the methods that have records, in the order of the plan."""
    plan = yaml.safe_load((Path(__file__).parent / "sparse.yaml").read_text("utf-8"))
    order, names = [*plan["methods"], *plan["ablations"]], {record["regime"] for record in records}
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def cells_of(records: Records, family: str) -> Cells:
    """Return the values of a family's sets, or of all sets."""
    chosen = [record for record in records if family in ("", record["family"])]
    return gather(chosen) if chosen else {}


def spread(cells: Cells, method: str) -> str:
    """Return the standard deviation over seeds, mean over the sets, where there are several seeds."""
    values = [list(v.values()) for (_, _, name), v in cells.items() if name == method and len(v) > 1]
    return f"{np.mean([np.std(of_set, ddof=1) for of_set in values]):.2f}" if values else "–"


def averages(records: Records) -> str:
    """Means over the sets by method, and what a method costs."""
    by_family, rows = {family: cells_of(records, family) for family in FAMILIES}, []
    for method in methods_of(records):
        costs = [record["config"]["cost"] for record in records if record["regime"] == method]
        means = [seed_means(cells, PROTOCOL, method) for cells in by_family.values()]
        cost = {key: float(np.mean([one[key] for one in costs])) for key in costs[0]}
        shares = [r["config"]["details"].get("trained_share") for r in records if r["regime"] == method]
        share = "–" if None in shares else f"{np.mean(shares):.1%}"
        rows.append(
            [
                f"`{method}`",
                *(str(mean_interval(values)) if values else "–" for values in means),
                spread(by_family[""], method),
                str(len(costs)),
                share,
                f"{cost['bytes'] / 1e6:.2f}",
                f"{cost['cpu_seconds']:.0f}",
                f"{cost['cpu_ms_a_text']:.1f}",
            ]
        )
    head = ["method", *FAMILIES.values(), "SD over seeds", "fits", "trained", "MB", "CPU s to fit"]
    return markdown_table([*head, "CPU ms a text"], rows)


def ratio(records: Records, first: str, second: str, key: str) -> str:
    """Return the median ratio of a cost between the fits of two methods on the same rows."""
    costs = {(r["regime"], r["task"], r["seed"]): r["config"]["cost"][key] for r in records}
    ratios = [
        value / costs[second, task, seed]
        for (method, task, seed), value in costs.items()
        if method == first and (second, task, seed) in costs
    ]
    return f"{np.median(ratios):.2f}" if ratios else "–"


def differences(records: Records) -> str:
    """Each method minus the references, with the 95 % interval over the sets, and ratios of costs."""
    by_family, rows, methods = {f: cells_of(records, f) for f in FAMILIES}, [], methods_of(records)
    for reference in (name for name in REFERENCES if name in methods):
        for method in methods:
            if method == reference or (method in REFERENCES[: REFERENCES.index(reference)]):
                continue
            row = [f"`{method}` − `{reference}`"]
            for cells in by_family.values():
                result = contrast(cells, PROTOCOL, method, reference)
                row.append(f"{result.over_tasks.as_difference()}" if result else "–")
            costs = (ratio(records, method, reference, key) for key in ("cpu_seconds", "bytes"))
            rows.append([*row, *costs])
    return markdown_table(["difference", *FAMILIES.values(), "of its CPU s", "of its bytes"], rows)


def sets(records: Records) -> str:
    """Every set: the mean over the seeds with its interval."""
    cells, rows = cells_of(records, ""), []
    names = tasks_of(cells, PROTOCOL)
    for method in methods_of(records):
        found = [cells.get((PROTOCOL, task, method)) for task in names]
        rows.append([f"`{method}`", *(str(mean_interval(list(v.values()))) if v else "–" for v in found)])
    return markdown_table(["method", *names], rows)


def tokens(records: Records) -> str:
    """What new tokens and the step to a LoRA do, by set, means over the seeds."""
    rows = []
    for task in sorted({record["task"] for record in records}):
        new, kept, lost = [], [], []
        for record in (record for record in records if record["task"] == task):
            details = record["config"]["details"]
            if record["regime"] == "sparse-10-tokens":
                new.append(details["tokens"])
            elif record["regime"] == "tail":
                kept.append(100 * details["change_kept"])
                lost.append(100 * (record["validation"] - details["validation_before_svd"]))
        means = zip((new, kept, lost), ("{:.0f}", "{:.1f} %", "{:+.2f}"), strict=True)
        rows.append([task, *(form.format(np.mean(values)) if values else "–" for values, form in means)])
    return markdown_table(
        ["set", "new tokens", "change that the LoRA holds", "validation points by that step"], rows
    )


TABLES = {"averages": averages, "differences": differences, "sets": sets, "tokens": tokens}


def write_report(records: Records, docs: Path) -> list[Path]:
    """Fill in the pages; return them."""
    for page in (docs / name for name in PAGES):
        page.write_text(fill(page.read_text("utf-8"), "sparse", TABLES, records), "utf-8")
    return [docs / name for name in PAGES]
