"""Evaluate a backbone and its adapters on the task list, and report regimes side by side: ``mtpf benchmark``.

All tasks of one regime, a smoke run, and the report of several files:

    python eval/benchmark.py --backbone me/encoder --adapter_ner me/encoder-ner --adapter_tc me/encoder-tc \
        --regime tpl --seeds 0,1,2 --output eval/results/tpl.json --cache_dir cache
    python eval/benchmark.py --regime base --tasks snips --quick --output quick.json
    python eval/benchmark.py --report eval/results/base.json,eval/results/tpl.json --output report.md

"""

import sys

from modeling_mtpf.cli.main import main as mtpf


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    return mtpf(["benchmark", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
