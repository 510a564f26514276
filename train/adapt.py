"""Fit one app to a frozen backbone: your labelled data in, one small adapter folder out.

A NER app from the family's LoRA, a TC app, and a tenth of the data with three seeds:

    python train/adapt.py --family ner --data messages.conll --backbone me/encoder --adapter me/encoder-ner \
        --output_dir apps/entities
    python train/adapt.py --family tc --data intents.csv --output_dir apps/intent
    python train/adapt.py --family ner --data owner/set --train_fraction 0.1 --seeds 3 --output_dir apps/low

"""

import logging
import os
import sys
from dataclasses import dataclass, fields

# In bf16 few batch shapes occur (rows × multiples of 16); oneDNN keeps a compiled kernel for each.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from modeling_mtpf.errors import MtpfError, RecipeError, exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval")

import datasets
import torch
from transformers.utils import logging as transformers_logging

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.app import summary
from modeling_mtpf.devices import available_cores
from modeling_mtpf.settings import describe_keys, parse_arguments


@dataclass(kw_only=True)
class Arguments(FitSettings):
    """Where from, where to, and how.

    Attributes:
        family: ``ner`` (a label for each word) or ``tc`` (a label for each text).
        data: CoNLL, JSON-lines, Parquet or CSV file, a folder of such files named after their splits
            (train, validation, test), or a Hub data set owner/name[:config][@revision].
        output_dir: New folder for the app.
        backbone: ``packaged``, a folder or a Hub id, a stock encoder included.
        backbone_revision: Commit of the backbone's repo.
        adapter: Folder or Hub id of the family's LoRA to start from; a fresh one by default.
        adapter_revision: Commit of the adapter's repo.
        method: ``lora``, or ``probe`` for tc; ``auto``: lora for ner, probe for tc.
        name: Adapter name; that of the folder by default.
        validation: Another source for validation; by default the split, else a held-out share of train.
        test: Another source for the test set.
        labels: All labels in order, separated by commas; by default in order of first appearance.
        scheme: Tag scheme of NER data: ``auto``, ``IOB1``, ``IOB2`` or ``BIOES``.
        train_fraction: Share of the training data to use.
        validation_fraction: Share of the training data to hold out where there is no validation split.
        seeds: Number of seeds to try, from ``seed`` on; the best by validation is kept.
        threads: CPU threads (0: all cores).
        progress: Show progress bars.
    """

    family: str
    data: str
    output_dir: str
    backbone: str = "packaged"
    backbone_revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    method: str = "auto"
    name: str | None = None
    validation: str | None = None
    test: str | None = None
    labels: str | None = None
    scheme: str = "auto"
    train_fraction: float = 1.0
    validation_fraction: float = 0.1
    seeds: int = 1
    threads: int = 0
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.threads < 0:
            raise RecipeError(f"threads is {self.threads}; it must be at least 0.")


def run(arguments: Arguments) -> None:
    """Fit the app and print what came of it."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads or available_cores())
    values = vars(arguments).copy()
    settings = FitSettings(**{f.name: values.pop(f.name) for f in fields(FitSettings)})
    values.pop("threads")
    labels = values.pop("labels")
    given = [label.strip() for label in labels.split(",")] if labels else None
    app = fit_app(values.pop("data"), values.pop("family"), settings=settings, labels=given, **values)
    print(summary(app))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; a user's mistake ends in one sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nKeys, their defaults and meanings:\n{describe_keys(Arguments)}")
        return 0
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    try:
        run(parse_arguments(Arguments, arguments))
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
