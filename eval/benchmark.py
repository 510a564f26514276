"""Evaluate a backbone and its adapters on the task list, and report regimes side by side.

All tasks of one regime, a smoke run, and the report of several files:

    python eval/benchmark.py --backbone me/encoder --adapter_ner me/encoder-ner --adapter_tc me/encoder-tc \
        --regime tpl --seeds 0,1,2 --output eval/results/tpl.json --cache_dir cache
    python eval/benchmark.py --regime base --tasks snips --quick --output /tmp/quick.json
    python eval/benchmark.py --report eval/results/base.json,eval/results/tpl.json --output report.md

"""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval", "scipy", "matplotlib")

import datasets
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from modeling_mtpf.errors import DataError, RecipeError
from modeling_mtpf.evaluation.benchmark import BenchmarkSettings, plan, run_benchmark
from modeling_mtpf.evaluation.records import read_records
from modeling_mtpf.evaluation.report import draw, published_table, report
from modeling_mtpf.settings import describe_keys, parse_arguments, read_overrides


def benchmark(settings: BenchmarkSettings) -> None:
    """Compute what is missing in the output file, with a bar, and print what the file then holds."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    left = sum(len(unit.jobs) for unit in plan(settings, read_records(settings.output)))
    with tqdm(total=left, desc=settings.regime) as progress:

        def show(record: dict) -> None:
            progress.update()
            name = f"{record['task']} {record['protocol']} seed {record['seed']}"
            progress.write(f"{name:<48} {100 * record['value']:.2f}", file=sys.stderr)

        records = run_benchmark(settings, show)
    print(f"{left} new records, {len(records)} in {settings.output}")


def write_report(values: dict) -> None:
    """Write the report of some record files, with its picture beside it, and print it."""
    unknown = set(values) - {"report", "output", "published"}
    if unknown or "output" not in values:
        raise RecipeError("A report takes --report FILE,FILE --output REPORT.md [--published ENCODER] alone.")
    output, records = Path(values["output"]), []
    for name in str(values["report"]).split(","):
        if not Path(name).is_file():
            raise DataError(f"There is no file {name} of records.")
        records += read_records(name)
    if "published" in values:
        text = published_table(records, str(values["published"]))
    else:
        picture = output.with_suffix(".png")
        draw(records, picture)
        text = report(records, picture.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text.rstrip() + "\n", "utf-8")
    print(text)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; a user's mistake ends in one sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nKeys, their defaults and meanings:\n{describe_keys(BenchmarkSettings)}")
        return 0
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(message)s")
    try:
        if "--report" in arguments:
            write_report(dict(read_overrides(arguments)))
        else:
            benchmark(parse_arguments(BenchmarkSettings, arguments))
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
