"""``mtpf benchmark``: evaluate a backbone and its adapters on the task list, and compare regimes."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ..errors import DataError
from ..evaluation.benchmark import BenchmarkSettings, plan, run_benchmark
from ..evaluation.records import read_records
from ..evaluation.report import draw, published_table, report
from ..settings import COMMAS, read_settings

EXAMPLES = """\
  mtpf benchmark --backbone me/encoder --adapter_ner me/encoder-ner --adapter_tc me/encoder-tc \\
      --regime tpl --seeds 0 1 2 --output eval/results/tpl.json --cache_dir cache
  mtpf benchmark --regime base --tasks snips --quick --output quick.json
  mtpf benchmark --report eval/results/base.json eval/results/tpl.json --output report.md"""


@dataclass(kw_only=True)
class ReportSettings:
    """A report of records that exist.

    Attributes:
        report: Files of records, with commas between them.
        output: Markdown file to write; the picture goes next to it.
        published: Instead of the report, the table of what is published for this encoder.
    """

    report: str = field(metadata=COMMAS)
    output: str
    published: str | None = None


def run(arguments: list[str], prog: str) -> str:
    """Compute the missing records, or write a report of existing ones."""
    logging.getLogger("modeling_mtpf").setLevel(logging.ERROR)
    reports = any(argument.partition("=")[0] == "--report" for argument in arguments)
    cls = ReportSettings if reports else BenchmarkSettings
    settings = read_settings(cls, arguments, prog, __doc__, EXAMPLES)
    if reports:
        return _report(settings)
    missing = sum(len(unit.jobs) for unit in plan(settings, read_records(settings.output)))
    with tqdm(total=missing, desc=settings.regime) as progress:

        def show(record: dict) -> None:
            progress.update()
            name = f"{record['task']} {record['protocol']} seed {record['seed']}"
            progress.write(f"{name:<48} {100 * record['value']:.2f}", file=sys.stderr)

        records = run_benchmark(settings, show)
    return f"{missing} new records, {len(records)} in {settings.output}"


def _report(settings: ReportSettings) -> str:
    """Write the report of some record files, with its picture next to it."""
    output, records = Path(settings.output), []
    for name in settings.report.split(","):
        if not Path(name).is_file():
            raise DataError(f"There is no file {name} of records.")
        records += read_records(name)
    if settings.published is not None:
        text = published_table(records, settings.published)
    else:
        picture = output.with_suffix(".png")
        draw(records, picture)
        text = report(records, picture.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text.rstrip() + "\n", "utf-8")
    return text
