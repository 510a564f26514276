"""Tables and verdicts of the study, each made anew from its records, and the document that holds them."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.study.records import FAMILIES, NAMES, REGIMES, Study
from modeling_mtpf.errors import DataError
from modeling_mtpf.evaluation.contrasts import Contrast
from modeling_mtpf.evaluation.report import mean_interval, tasks_of

COMPARABLE = 0.5
"""Points within which two regimes count as comparable."""
FEWEST_SEEDS = 3
"""Pre-finetuning runs that a verdict needs: an interval over tasks says nothing of how runs differ."""

# ------------------------------------------------------------------------------------------------- tables


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def average_table(study: Study) -> str:
    """Averages of the regimes over the tasks and seeds that all have which there are, by start and family."""
    rows = []
    for start in study.starts:
        for protocol in FAMILIES.values():
            having = [v for v in study.variants(protocol, start) if v.split("/", 1)[1] in REGIMES]
            tasks, seeds = study.common(protocol, having)
            values = [
                study.average(protocol, f"{start}/{regime}", tasks, seeds)
                if f"{start}/{regime}" in having
                else "–"
                for regime in REGIMES
            ]
            rows.append([start, NAMES[protocol], str(len(tasks)), str(len(seeds)), *values])
    return markdown(["start", "family", "tasks", "seeds", *(f"`{regime}`" for regime in REGIMES)], rows)


PAIRS = (
    ("tpl", "base"),
    ("tpl", "naive"),
    ("tpl", "ner"),
    ("tpl", "tc"),
    ("naive", "ner"),
    ("naive", "tc"),
    ("ner", "base"),
    ("tc", "base"),
    ("tpl-bare", "naive"),
)


def contrast_table(study: Study) -> str:
    """The regimes in pairs."""
    rows = []
    for start in study.starts:
        for protocol in FAMILIES.values():
            for first, second in PAIRS:
                found = study.contrast(protocol, f"{start}/{first}", f"{start}/{second}")
                if found is not None:
                    rows.append([start, NAMES[protocol], f"`{first}` − `{second}`", *contrast_cells(found)])
    return markdown(["start", "family", "difference", *CONTRAST_HEAD], rows)


CONTRAST_HEAD = ("points [95 % over tasks]", "[95 % over seeds]", "p, paired", "tasks ahead", "seeds")


def contrast_cells(found: Contrast) -> list[str]:
    """Return the cells of `CONTRAST_HEAD`."""
    seeds = found.over_seeds
    shown = "–" if math.isnan(seeds.low) else f"[{seeds.low:+.2f}, {seeds.high:+.2f}]"
    p_value = "–" if math.isnan(found.p_value) else f"{found.p_value:.3f}"
    ahead = f"{found.wins} of {found.tasks}"
    return [found.over_tasks.as_difference(), shown, p_value, ahead, str(len(found.seeds))]


def task_table(study: Study, start: str, protocol: str) -> str:
    """Values of every task."""
    regimes = [v for v in study.variants(protocol, start) if v.split("/", 1)[1] in REGIMES]
    rows = []
    for task in tasks_of(study.cells, protocol):
        own = [study.cells.get((protocol, task, regime)) for regime in regimes]
        if any(own):
            rows.append([task, *(str(mean_interval(list(v.values()))) if v else "–" for v in own)])
    return markdown([NAMES[protocol], *(f"`{v.split('/', 1)[1]}`" for v in regimes)], rows)


def all_task_tables(study: Study) -> str:
    """`task_table` of each starting encoder and family."""
    parts = [
        f"**{start}**\n\n{task_table(study, start, protocol)}"
        for start in study.starts
        for protocol in FAMILIES.values()
        if study.variants(protocol, start)
    ]
    return "\n\n".join(parts)


def variant_table(study: Study) -> str:
    """Every variant beyond the five regimes, against the one that it differs from."""
    rows = []
    for start in study.starts:
        for protocol in NAMES:
            for variant in study.variants(protocol, start):
                name = variant.split("/", 1)[1]
                if name in REGIMES:
                    continue
                reference = f"{start}/base-tenth" if protocol == "ner10" else f"{start}/{name.split('-')[0]}"
                found = study.contrast(protocol, variant, reference)
                if variant != reference and found is not None:
                    average = study.average(protocol, variant, *study.common(protocol, [variant, reference]))
                    against, shown = reference.split("/", 1)[1], contrast_cells(found)
                    rows.append(
                        [start, NAMES[protocol], f"`{name}`", average, f"`{against}`"]
                        + [shown[0], *shown[2:]]
                    )
    head = ["start", "family", "variant", "average", "against", CONTRAST_HEAD[0], *CONTRAST_HEAD[2:]]
    return markdown(head, rows) if rows else "None yet."


def diagnostics_table(study: Study) -> str:
    """Cosine between the families' gradients and CKA between their states, means over steps and seeds."""
    layers: list[str] = []
    rows = []
    for (variant, key), values in sorted(_diagnostics(study).items()):
        layers += [layer for layer in values if layer not in layers]
        rows.append((variant, key, values))
    order = sorted(layers, key=layer_place)
    body = [
        [f"`{variant}`", key, *(f"{np.mean(v[own]):+.3f}" if own in v else "–" for own in order)]
        for variant, key, v in rows
    ]
    return markdown(["variant", "measure", *(layer.replace("_", " ") for layer in order)], body)


def layer_place(name: str) -> tuple[int, int]:
    """Sort ``embeddings``, ``layer_0``, … and ``all`` as they lie in the encoder."""
    kind, _, number = name.partition("_")
    return ("embeddings", "layer", "all").index(kind), int(number or 0)


def _diagnostics(study: Study) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(variant, measure) → layer → the mean of each run."""
    names = {"gradient_cosine": "gradient cosine", "tail_cka": "CKA"}
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in study.runs:
        if run["variant"].split("/", 1)[1] not in REGIMES:
            continue
        for key, values in run["diagnostics"].items():
            measure, layer = key.split("/")
            own = found.setdefault((run["variant"], names[measure]), {})
            own.setdefault(layer, []).append(float(np.mean(values)))
    return found


def cost_table(study: Study) -> str:
    """What each variant cost and what it leaves to ship; seconds of runs that were never interrupted."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in study.runs):
        runs = [run for run in study.runs if run["variant"] == variant]
        sizes = runs[0]["sizes"]
        adapters = sum(size for name, size in sizes.items() if name.startswith("adapters"))
        words = [run["data"]["ner"]["words_seen"] for run in runs if "ner" in run["data"]]
        recipe, seconds = runs[0]["recipe"], [r["seconds"] for r in runs if not r.get("resumed_at")]
        pairs = recipe["steps"] * recipe["families"]["tc"]["batch_size"] if "tc" in recipe["families"] else 0
        rows.append(
            [
                f"`{variant}`",
                str(len(runs)),
                str(recipe["steps"]),
                f"{np.mean(words):,.0f}" if words else "–",
                f"{pairs:,}" if pairs else "–",
                f"{np.mean(seconds):.0f}" if seconds else "–",
                f"{100 * np.mean([run['moved']['backbone'] for run in runs]):.1f} %",
                f"{sizes['backbone'] / 1e6:.1f} MB",
                f"{adapters / 1e6:.2f} MB" if adapters else "–",
            ]
        )
    head = [
        "variant",
        "seeds",
        "steps",
        "words",
        "pairs",
        "seconds",
        "backbone moved",
        "backbone",
        "adapters",
    ]
    return markdown(head, rows)


def overlap_table(study: Study) -> str:
    """Test texts that occur in what was trained on."""
    sources = list(study.overlap.get("sources", {}))
    rows = [
        [task, f"{own['texts']:,}", *(str(own["whole"].get(source, 0)) for source in sources)]
        for task, own in study.overlap.get("tasks", {}).items()
    ]
    return markdown(["test set", "texts", *sources], rows) if rows else "Not counted yet."


# ------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """One claim, and how the records decide it.

    Attributes:
        text: As the paper or the target puts it.
        needs: Contrasts ``(protocol, first, second)``.
        judge: From these to the verdict.
    """

    text: str
    needs: tuple[tuple[str, str, str], ...]
    judge: Callable[[list[Contrast]], str]


def all_above(found: list[Contrast]) -> str:
    """Held if every interval over tasks is above zero; not held if one mean is not."""
    if all(own.sign > 0 for own in found):
        return "held"
    return "not held" if any(own.over_tasks.mean <= 0 for own in found) else "undecided"


def all_below(found: list[Contrast]) -> str:
    """Held if every interval over tasks is below zero; not held if one mean is not."""
    if all(own.sign < 0 for own in found):
        return "held"
    return "not held" if any(own.over_tasks.mean >= 0 for own in found) else "undecided"


def comparable(found: list[Contrast]) -> str:
    """Held if no mean is more than `COMPARABLE` points below, whatever the intervals."""
    return "held" if all(own.over_tasks.mean >= -COMPARABLE for own in found) else "not held"


def none_behind(found: list[Contrast]) -> str:
    """Held if no mean is below zero and one interval over tasks is above."""
    behind = any(own.over_tasks.mean < 0 for own in found)
    return "not held" if behind else "held" if any(own.sign > 0 for own in found) else "undecided"


def better_with_two(found: list[Contrast]) -> str:
    """Held if every other number of layers is behind in the mean."""
    return "held" if all(own.over_tasks.mean < 0 for own in found) else "not held"


BOTH = ("ner", "mteb")
CLAIMS = (
    Claim(
        "Pre-finetuning for a family helps it", (("ner", "ner", "base"), ("mteb", "tc", "base")), all_above
    ),
    Claim("… and harms the other", (("ner", "tc", "base"), ("mteb", "ner", "base")), all_below),
    Claim(
        "Naive multi-task is worse than the family's own pre-finetuning",
        (("ner", "naive", "ner"), ("mteb", "naive", "tc")),
        all_below,
    ),
    Claim(
        "TPL is comparable to the better single-family model (at most 0.5 below)",
        tuple((protocol, "tpl", other) for protocol in BOTH for other in ("ner", "tc")),
        comparable,
    ),
    Claim(
        "TPL gains over base in both families (paper: +0.8 NER, +8.8 TC)",
        tuple((protocol, "tpl", "base") for protocol in BOTH),
        all_above,
    ),
    Claim(
        "TPL is at least naive in both, and clearly above in one",
        tuple((protocol, "tpl", "naive") for protocol in BOTH),
        none_behind,
    ),
    Claim(
        "TPL gains with a tenth of the NER data (paper: +8.4)",
        (("ner10", "tpl-tenth", "base-tenth"),),
        all_above,
    ),
    Claim(
        "NER is best with LoRA on the last 2 layers",
        tuple(("ner", f"tpl-layers-{number}", "tpl") for number in (1, 4, 6)),
        better_with_two,
    ),
)


def verdict(claim: Claim, found: list[Contrast | None]) -> str:
    """Judge a claim, where all that it needs is there with enough seeds."""
    known = [own for own in found if own is not None]
    if len(known) < len(found):
        return "not tested"
    fewest = min(len(own.seeds) for own in known)
    if fewest < FEWEST_SEEDS:
        return f"undecided: {fewest} of {FEWEST_SEEDS} seeds"
    return claim.judge(known)


def claim_table(study: Study) -> str:
    """Each claim with its verdict for each starting encoder."""
    rows = []
    for claim in CLAIMS:
        for start in study.starts:
            found = [study.contrast(p, f"{start}/{a}", f"{start}/{b}") for p, a, b in claim.needs]
            numbers = [
                f"`{first}` − `{second}`, {NAMES[p].split(',')[0]}: {own.over_tasks.as_difference()}"
                for (p, first, second), own in zip(claim.needs, found, strict=True)
                if own is not None
            ]
            rows.append([claim.text, start, f"**{verdict(claim, found)}**", "; ".join(numbers) or "–"])
    return markdown(["claim", "start", "verdict", "points [95 % over tasks]"], rows)


# ----------------------------------------------------------------------------------------------- document

BLOCKS: dict[str, Callable[[Study], str]] = {
    "claims": claim_table,
    "averages": average_table,
    "contrasts": contrast_table,
    "tasks": all_task_tables,
    "variants": variant_table,
    "diagnostics": diagnostics_table,
    "cost": cost_table,
    "overlap": overlap_table,
}


def fill(document: str, studies: dict[str, Study]) -> str:
    """Return the document with every ``<!-- table: STUDY NAME -->`` … ``<!-- end -->`` made anew.

    Raises:
        DataError: It names a study or a table that does not exist.
    """

    def block(match: re.Match) -> str:
        own, name = match[1], match[2]
        if own not in studies or name not in BLOCKS:
            known = f"studies: {', '.join(studies)}; tables: {', '.join(BLOCKS)}"
            raise DataError(f"The document wants a table {f'{own} {name}'!r}; known {known}.")
        return f"<!-- table: {own} {name} -->\n\n{BLOCKS[name](studies[own])}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) (\w+) -->.*?<!-- end -->", block, document, flags=re.DOTALL)


__all__ = ["BLOCKS", "CLAIMS", "fill", "layer_place"]
