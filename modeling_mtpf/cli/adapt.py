"""``mtpf adapt``: fit one app to a frozen backbone: your labelled data in, one small adapter folder out."""

import logging
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from ..adaptation import FitSettings, fit_app, zero_shot_app
from ..adaptation.bundle import BundleSettings, fit_bundle
from ..adaptation.bundle.registry import bundle_method
from ..adaptation.bundle.settings import read_parts
from ..devices import available_cores
from ..errors import RecipeError
from ..model.schemas_mtpf import NAME_PATTERN
from ..settings import COMMAS, read_settings

EXAMPLES = """\
  mtpf adapt --family ner --data messages.conll --backbone me/encoder --adapter me/encoder-ner \\
      --output_dir apps/entities
  mtpf adapt --family tc --data intents.csv --output_dir apps/intent
  mtpf adapt --family tc --data tickets.csv.gz --columns.text body --columns.label team --output_dir apps/team
  mtpf adapt --bundle parts.yaml --method joint --output_dir apps/both
  mtpf adapt --family tc --zero_shot --labels billing,delivery --test tickets.csv --output_dir apps/topic
  mtpf adapt --family ner --data owner/set --train_fraction 0.1 --seeds 3 --output_dir apps/low"""


OF_BUNDLE = ("temperature", "rank", "prefix", "prefix_length", "prefix_width")
"""Settings of bundles alone."""


@dataclass(kw_only=True)
class Columns:
    """Where the data is, if not found by itself: names, in files without names the numbers of columns.

    Attributes:
        text: Column of the texts.
        label: Column of their labels (tc).
        tokens: Column of the words (ner); of CoNLL files the first.
        tags: Column of their tags (ner); of CoNLL files the last.
        spans: Column of the character spans (ner).
    """

    text: str | None = None
    label: str | None = None
    tokens: str | None = None
    tags: str | None = None
    spans: str | None = None


@dataclass(kw_only=True)
class AdaptSettings(FitSettings):
    """Where from, where to, and how.

    Attributes:
        bundle: Instead of family and data: a YAML list of parts, each with ``name``, ``family``, ``data`` and
            maybe a ``weight`` of its loss, which are trained together, see docs/compose.md.
        temperature: Of a bundle: a step's part is drawn by size^(1/temperature).
        rank: Of a bundle: rank of the result, by SVD.
        prefix: Of a bundle by ``peml`` or ``prefix``: ``fixed``, ``searched``, ``random`` or ``none``.
        prefix_length: Slots of a fixed prefix.
        prefix_width: Width of the network that makes a fixed prefix.
        family: ``ner`` (a label for each word) or ``tc`` (a label for each text).
        data: CoNLL, JSON-lines, Parquet or delimited file, or texts with character spans as doccano, spaCy,
            Prodigy, Label Studio, BRAT or GLiNER have them; a folder of such files named after their splits
            (train, validation, test) or written by save_to_disk; or a Hub data set
            owner/name[:config][@revision].
        output_dir: New folder for the app. A stopped fit of a bundle resumes with the same command.
        zero_shot: Make the app of the names in ``--labels`` alone, without ``--data`` (tc).
        backbone: ``packaged``, a folder or a Hub id, a stock encoder included.
        backbone_revision: Commit of the backbone's repo.
        adapter: Folder or Hub id of the family's LoRA to start from; a fresh one by default.
        adapter_revision: Commit of the adapter's repo.
        method: ``lora``, or ``probe`` for tc, which takes seconds; ``auto``: lora for ner, for tc the better
            of both by validation; ``sparse``: the most sensitive matrices of the last layers. Of a bundle
            ``joint`` (default), ``shared`` (parts take turns), ``multilora``; ``peml``, with a key/value
            prefix, or ``prefix``, a prefix alone; or ``mtl-lora``, ``poly``, ``c-poly``, ``moe-lora``, which
            give each part an app in a folder of ``output_dir``, see docs/many_apps.md.
        name: Adapter name; made from that of the folder by default.
        validation: Another source for validation; by default the split, else a held-out share of train.
        test: Another source for the test set.
        labels: All labels in order; by default in order of first appearance. Columns of these names, with 1
            or 0, say which texts have them (tc).
        label_separator: Between the labels of a text where they are one string, e.g. ``|`` (tc).
        encoding: Of text files, e.g. latin-1; by default that of the byte order mark, else UTF-8.
        scheme: Tag scheme of NER data: ``auto``, ``IOB1``, ``IOB2`` or ``BIOES``.
        train_fraction: Share of the training data to use.
        validation_fraction: Share of the training data to hold out where there is no validation split.
        seeds: Number of seeds to try, from ``seed`` on; the best by validation is saved.
        standalone: With the method ``sparse``: an encoder of its own for this app, new tokens included. It
            shares no trunk with other apps.
        threads: CPU threads (0: all cores).
        progress: Show progress bars.
    """

    output_dir: str
    family: str | None = None
    data: str | None = None
    bundle: str | None = None
    temperature: float = 2.0
    rank: int | None = None
    prefix: str = "fixed"
    prefix_length: int = 8
    prefix_width: int = 128
    zero_shot: bool = False
    backbone: str = "packaged"
    backbone_revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    method: str = "auto"
    name: str | None = None
    validation: str | None = None
    test: str | None = None
    labels: str | None = field(default=None, metadata=COMMAS)
    columns: Columns = field(default_factory=Columns)
    encoding: str | None = None
    scheme: str = "auto"
    label_separator: str | None = None
    train_fraction: float = 1.0
    validation_fraction: float = 0.1
    seeds: int = 1
    standalone: bool = False
    threads: int = 0
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.zero_shot and (self.family != "tc" or self.data or self.adapter or not self.labels):
            raise RecipeError(
                "--zero_shot is for --family tc with --labels a,b,c, without --data and --adapter."
            )
        default = {f.name: f.default for f in fields(AdaptSettings)}
        changed = [name for name in OF_BUNDLE if getattr(self, name) != default[name]]
        if self.bundle is None and changed:
            raise RecipeError(f"--{changed[0]} is for a --bundle.")
        needed = () if self.bundle is not None or self.zero_shot else ("family", "data")
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise RecipeError(f"--{missing[0]} is missing; give --family and --data, or --bundle.")
        if self.threads < 0:
            raise RecipeError(f"threads is {self.threads}; it must be at least 0.")
        self.name = self.name if self.name is not None else adapter_name(self.output_dir)


def adapter_name(output_dir: str) -> str | None:
    """Return the name that a folder gives to its adapter: PEFT takes few letters, so My Apps is my-apps.

    Raises:
        RecipeError: The folder's name makes no adapter name.
    """
    name = re.sub(r"[^a-z0-9_-]+", "-", Path(output_dir).name.lower()).strip("-") or None
    if name and not NAME_PATTERN.fullmatch(name):
        raise RecipeError(
            f"The folder {output_dir} makes the adapter name {name!r}; give --name 2 to 64 "
            "lower-case letters, digits, '_' or '-', beginning with a letter."
        )
    return name


def _bundle(settings: AdaptSettings) -> str:
    """Train a bundle and return its summary."""
    default = vars(AdaptSettings(output_dir="", name="x", bundle=""))
    used = ("backbone", "backbone_revision", "adapter", "adapter_revision", "name", "seeds", "output_dir")
    ours = {f.name for f in fields(BundleSettings)} | {*used, "bundle", "method", "threads"}
    if extra := [key for key, value in vars(settings).items() if key not in ours and value != default[key]]:
        raise RecipeError(f"--{extra[0]} is not for a bundle; name its parts' data in {settings.bundle}.")
    values = {key: value for key, value in vars(settings).items() if key in used}
    shared = {field.name for field in fields(BundleSettings)} & vars(settings).keys()
    how = BundleSettings(**{key: getattr(settings, key) for key in shared})
    method = "joint" if settings.method == "auto" else settings.method
    bundle_method(method, "data")
    return str(fit_bundle(read_parts(str(settings.bundle)), method, settings=how, **values))


def run(arguments: list[str], prog: str) -> str:
    """Fit the app and return its summary."""
    settings = read_settings(AdaptSettings, arguments, prog, __doc__, EXAMPLES)
    logging.getLogger("modeling_mtpf").setLevel(logging.WARNING)
    torch.set_num_threads(settings.threads or available_cores())
    if settings.bundle is not None:
        return _bundle(settings)
    values = vars(settings).copy()
    fit = FitSettings(**{f.name: values.pop(f.name) for f in fields(FitSettings)})
    for name in ("threads", "bundle", *OF_BUNDLE):
        del values[name]
    values["columns"] = {role: name for role, name in vars(settings.columns).items() if name is not None}
    if values["labels"]:
        values["labels"] = [label.strip() for label in values["labels"].split(",")]
    if values.pop("zero_shot"):
        keys = ("backbone", "backbone_revision", "output_dir", "name", "test", "columns", "encoding")
        used = {*keys, "bundle", "family", "zero_shot", "labels", "max_length", "threads", "progress"}
        default = vars(AdaptSettings(output_dir="", name="x", bundle=""))
        differs = (key for key, value in vars(settings).items() if value != default[key])
        if extra := [key for key in differs if key not in used]:
            raise RecipeError(f"--{extra[0]} is not for --zero_shot, which fits nothing; leave it out.")
        options = {key: values[key] for key in keys}
        return str(zero_shot_app(values["labels"], max_length=fit.max_length, **options))
    return str(fit_app(settings=fit, **values))
