"""Tables and verdicts of the study, computed from its records, and the documents that hold them."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.study.contrasts import Contrast
from eval.study.records import MAIN_PROTOCOLS, NAMES, REGIMES, Study
from modeling_mtpf.errors import DataError, MtpfError
from modeling_mtpf.evaluation.report import markdown_table
from modeling_mtpf.evaluation.statistics import mean_interval, tasks_of

COMPARABLE = 0.5
"""Points within which two regimes count as comparable."""
FEWEST_SEEDS = 3
"""Pre-finetuning runs that a verdict needs: an interval over tasks says nothing of how runs differ."""


def average_table(study: Study) -> str:
    """Averages of the regimes by start and family, over the tasks and seeds measured for all of them."""
    rows = []
    for start in study.starts:
        for protocol in MAIN_PROTOCOLS.values():
            measured = study.regimes(protocol, start)
            tasks, seeds = study.common(protocol, measured)
            averages = [
                study.average(protocol, variant, tasks, seeds) if variant in measured else "–"
                for variant in (f"{start}/{regime}" for regime in REGIMES)
            ]
            rows.append([start, NAMES[protocol], str(len(tasks)), str(len(seeds)), *averages])
    return markdown_table(["start", "family", "tasks", "seeds", *(f"`{regime}`" for regime in REGIMES)], rows)


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
        for protocol in MAIN_PROTOCOLS.values():
            for first, second in PAIRS:
                result = study.contrast(protocol, f"{start}/{first}", f"{start}/{second}")
                if result is not None:
                    rows.append([start, NAMES[protocol], f"`{first}` − `{second}`", *contrast_cells(result)])
    return markdown_table(["start", "family", "difference", *CONTRAST_HEAD], rows)


CONTRAST_HEAD = ("points [95 % over tasks]", "[95 % over seeds]", "p, paired", "tasks ahead", "seeds")


def contrast_cells(contrast: Contrast) -> list[str]:
    """Return the cells of `CONTRAST_HEAD`."""
    return [
        contrast.over_tasks.as_difference(),
        contrast.over_seeds.bounds(),
        "–" if math.isnan(contrast.p_value) else f"{contrast.p_value:.3f}",
        f"{contrast.wins} of {contrast.tasks}",
        str(len(contrast.seeds)),
    ]


def task_table(study: Study, start: str, protocol: str) -> str:
    """Values of every task."""
    regimes = study.regimes(protocol, start)
    rows = []
    for task in tasks_of(study.cells, protocol):
        values = [study.cells.get((protocol, task, regime)) for regime in regimes]
        if any(values):
            rows.append([task, *(str(mean_interval(list(v.values()))) if v else "–" for v in values)])
    return markdown_table([NAMES[protocol], *(f"`{v.split('/', 1)[1]}`" for v in regimes)], rows)


def all_task_tables(study: Study) -> str:
    """`task_table` of each starting encoder and family."""
    parts = [
        f"**{start}**\n\n{task_table(study, start, protocol)}"
        for start in study.starts
        for protocol in MAIN_PROTOCOLS.values()
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
                result = study.contrast(protocol, variant, reference)
                if variant == reference or result is None:
                    continue
                average = study.average(protocol, variant, *study.common(protocol, [variant, reference]))
                against, (points, _, *rest) = reference.split("/", 1)[1], contrast_cells(result)
                rows.append([start, NAMES[protocol], f"`{name}`", average, f"`{against}`", points, *rest])
    head = ["start", "family", "variant", "average", "against", CONTRAST_HEAD[0], *CONTRAST_HEAD[2:]]
    return markdown_table(head, rows) if rows else "None yet."


def diagnostics_table(study: Study) -> str:
    """Cosine between the families' gradients and CKA between their states, means over steps and seeds."""
    names = {"gradient_cosine": "gradient cosine", "tail_cka": "CKA"}
    means: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in study.runs:
        if run["variant"].split("/", 1)[1] in REGIMES:
            for key, values in run["diagnostics"].items():
                measure, layer = key.split("/")
                by_layer = means.setdefault((run["variant"], names[measure]), {})
                by_layer.setdefault(layer, []).append(float(np.mean(values)))
    layers = sorted({layer for by_layer in means.values() for layer in by_layer}, key=layer_order)
    rows = [
        [f"`{variant}`", measure, *(f"{np.mean(v[layer]):+.3f}" if layer in v else "–" for layer in layers)]
        for (variant, measure), v in sorted(means.items())
    ]
    return markdown_table(["variant", "measure", *(layer.replace("_", " ") for layer in layers)], rows)


def layer_order(name: str) -> tuple[int, int]:
    """Sort key of ``embeddings``, ``layer_0``, … and ``all``: from the bottom of the encoder to the top."""
    kind, _, number = name.partition("_")
    return ("embeddings", "layer", "all").index(kind), int(number or 0)


def cost_table(study: Study) -> str:
    """Cost of each variant, and the size of its weights; seconds of runs that were never interrupted."""
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
    sizes_head = ["backbone moved", "backbone", "adapters"]
    return markdown_table(["variant", "seeds", "steps", "words", "pairs", "seconds", *sizes_head], rows)


def overlap_table(study: Study) -> str:
    """Test texts that occur in the training data."""
    sources = list(study.overlap.get("sources", {}))
    rows = [
        [task, f"{counts['texts']:,}", *(str(counts["whole"].get(source, 0)) for source in sources)]
        for task, counts in study.overlap.get("tasks", {}).items()
    ]
    return markdown_table(["test set", "texts", *sources], rows) if rows else "Not counted yet."


@dataclass(frozen=True)
class Claim:
    """One claim, and the rule that decides it.

    Attributes:
        text: As the paper or the target puts it.
        needs: Contrasts ``(protocol, first, second)``.
        judge: Rule that turns these into the verdict.
    """

    text: str
    needs: tuple[tuple[str, str, str], ...]
    judge: Callable[[list[Contrast]], str]


def all_above(contrasts: list[Contrast]) -> str:
    """Held if every interval over tasks is above zero; not held if one mean is not."""
    if all(c.sign > 0 for c in contrasts):
        return "held"
    return "not held" if any(c.over_tasks.mean <= 0 for c in contrasts) else "undecided"


def all_below(contrasts: list[Contrast]) -> str:
    """Held if every interval over tasks is below zero; not held if one mean is not."""
    if all(c.sign < 0 for c in contrasts):
        return "held"
    return "not held" if any(c.over_tasks.mean >= 0 for c in contrasts) else "undecided"


def comparable(contrasts: list[Contrast]) -> str:
    """Held if no mean is more than `COMPARABLE` points below, whatever the intervals."""
    return "held" if all(c.over_tasks.mean >= -COMPARABLE for c in contrasts) else "not held"


def none_behind(contrasts: list[Contrast]) -> str:
    """Held if no mean is below zero and one interval over tasks is above."""
    behind = any(c.over_tasks.mean < 0 for c in contrasts)
    return "not held" if behind else "held" if any(c.sign > 0 for c in contrasts) else "undecided"


def better_with_two(contrasts: list[Contrast]) -> str:
    """Held if every other number of layers is behind in the mean."""
    return "held" if all(c.over_tasks.mean < 0 for c in contrasts) else "not held"


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


def verdict(claim: Claim, contrasts: list[Contrast | None]) -> str:
    """Judge a claim, if all contrasts that it needs are there with enough seeds."""
    known = [contrast for contrast in contrasts if contrast is not None]
    if len(known) < len(contrasts):
        return "not tested"
    fewest = min(len(contrast.seeds) for contrast in known)
    if fewest < FEWEST_SEEDS:
        return f"undecided: {fewest} of {FEWEST_SEEDS} seeds"
    return claim.judge(known)


def _contrasts(study: Study, start: str, claim: Claim) -> list[Contrast | None]:
    return [study.contrast(p, f"{start}/{first}", f"{start}/{second}") for p, first, second in claim.needs]


def claim_table(study: Study) -> str:
    """Each claim with its verdict for each starting encoder."""
    rows = []
    for claim in CLAIMS:
        for start in study.starts:
            contrasts = _contrasts(study, start, claim)
            numbers = [
                f"`{first}` − `{second}`, {NAMES[p].split(',')[0]}: {contrast.over_tasks.as_difference()}"
                for (p, first, second), contrast in zip(claim.needs, contrasts, strict=True)
                if contrast is not None
            ]
            rows.append([claim.text, start, f"**{verdict(claim, contrasts)}**", "; ".join(numbers) or "–"])
    return markdown_table(["claim", "start", "verdict", "points [95 % over tasks]"], rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "claims": claim_table,
    "averages": average_table,
    "contrasts": contrast_table,
    "tasks": all_task_tables,
    "variants": variant_table,
    "diagnostics": diagnostics_table,
    "cost": cost_table,
    "overlap": overlap_table,
}
MARK = re.compile(r"<!-- (table|points|verdict): (\w+) ([^>]+?) -->.*?<!-- end -->", flags=re.DOTALL)


def fill(document: str, studies: dict[str, Study]) -> str:
    """Return the document with everything between its marks and ``<!-- end -->`` computed from the records.

    ``<!-- table: STUDY NAME -->`` gives one of `TABLES`, ``<!-- points: STUDY PROTOCOL FIRST SECOND -->`` a
    difference with its interval over tasks, and ``<!-- verdict: STUDY START NUMBER -->`` the verdict on a
    claim, by its place in `CLAIMS`.

    Raises:
        DataError: A mark names something that does not exist.
    """
    return MARK.sub(lambda mark: _filled(mark, studies), document)


def _filled(mark: re.Match, studies: dict[str, Study]) -> str:
    kind, name, arguments = mark[1], mark[2], mark[3]
    try:
        content = MARKS[kind](studies[name], *arguments.split())
    except MtpfError:  # of the records
        raise
    except (KeyError, IndexError, ValueError, TypeError) as error:
        known = f"studies: {', '.join(studies)}; tables: {', '.join(TABLES)}"
        raise DataError(f"Nothing fits the mark '{kind}: {name} {arguments}'; known {known}.") from error
    return f"<!-- {kind}: {name} {arguments} -->{content}<!-- end -->"


def _points(study: Study, protocol: str, first: str, second: str) -> str:
    contrast = study.contrast(protocol, first, second)
    if contrast is None:
        raise KeyError("no records of both")
    return contrast.over_tasks.as_difference()


def _verdict(study: Study, start: str, number: str) -> str:
    claim = CLAIMS[int(number) - 1]
    return f"**{verdict(claim, _contrasts(study, start, claim))}**"


MARKS: dict[str, Callable[..., str]] = {
    "table": lambda study, name: f"\n\n{TABLES[name](study)}\n\n",
    "points": _points,
    "verdict": _verdict,
}
