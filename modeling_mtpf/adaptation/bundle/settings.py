"""The parts of a bundle, and the settings that all methods of making one share."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError, first_line
from ...model.schemas_mtpf import MAX_PREFIX, MAX_RANK
from ...settings import nearest
from ..settings import FitSettings

_CHOICES = {
    "loss": ("auto", "labels", "distil"),
    "heads": ("auto", "retrained", "frozen"),
    "prefix": ("fixed", "searched", "random", "none"),
}


@dataclass
class Part:
    """One app of a bundle.

    Attributes:
        name: Its name in the bundle.
        family: ``ner`` or ``tc``; with an app its own by default.
        data: Its labelled data, as `fit_app` takes it; composing needs none.
        adapter: Folder or Hub id of the app, ``owner/name@revision`` too, which composing needs and joint
            training does not use.
        weight: Of its loss in joint training (1 by default), of its LoRA in a composition.
    """

    name: str
    family: str | None = None
    data: Any = None
    adapter: str | None = None
    weight: float | None = None


def read_parts(file: str | Path) -> list[Part]:
    """Read the parts of a bundle from a YAML list, or from one under the key ``parts``.

    Raises:
        RecipeError: There is no such file, it is not YAML, or a key is unknown.
    """
    try:
        rows = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} cannot be read as a YAML list of parts: {first_line(error)}.") from error
    rows = rows.get("parts") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"{file} must hold a YAML list of parts, each with name, family and data.")
    known = [f.name for f in fields(Part)]
    for number, row in enumerate(rows, 1):
        if unknown := [key for key in row if key not in known]:
            hint = nearest(str(unknown[0]), known)
            raise RecipeError(
                f"Unknown key {unknown[0]!r} in part {number} of {file}; {hint}known: {', '.join(known)}."
            )
        if not isinstance(row.get("name"), str):
            raise RecipeError(f"Part {number} of {file} has no name.")
    return [Part(**row) for row in rows]


@dataclass
class BundleSettings(FitSettings):
    """Settings of one fit of a bundle.

    Attributes:
        steps: Training steps; 0: the sum of what each part alone would take, without labels as many as for
            an app with that many texts.
        temperature: A step's part is drawn with a probability of size^(1/temperature): 1 is by size, more is
            more even.
        loss: ``labels``; ``distil``, each app's own results on any texts; ``auto``: labels where all
            parts have data and no texts are given.
        heads: ``retrained`` or ``frozen`` heads of the apps; ``auto``: frozen only where nothing else is
            trained.
        text_column: Column of the unlabelled texts.
        max_texts: Unlabelled texts that are read at most.
        rank: Rank of the result, by the best approximation (SVD); by default whatever the method gives.
        prefix: How ``peml`` makes its prefix: by a ``fixed`` network with tanh, by one that is ``searched``
            (about 2.5 times the time), by a ``random`` one of those, or ``none``.
        prefix_length: Slots of a fixed prefix.
        prefix_width: Width of the network that makes a fixed prefix.
    """

    temperature: float = 2.0
    loss: str = "auto"
    heads: str = "auto"
    text_column: str = "text"
    max_texts: int = 20_000
    rank: int | None = None
    prefix: str = "fixed"
    prefix_length: int = 8
    prefix_width: int = 128

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature >= 1:
            raise RecipeError(f"temperature is {self.temperature}; it must be a number of at least 1.")
        for name in ("rank", "max_texts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name} is {value}; it must be at least 1.")
        for name, most in (("prefix_length", MAX_PREFIX), ("prefix_width", MAX_RANK)):
            if not 1 <= (value := getattr(self, name)) <= most:
                raise RecipeError(f"{name} is {value}; it must be from 1 to {most}.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(known)}.")
        changed = self.changed_prefix()
        if self.prefix != "fixed" and changed != "prefix":
            raise RecipeError(f"{changed} is for prefix: fixed; leave it out.")

    def learns_from_labels(self, labelled: bool, texts: bool) -> bool:
        """Say whether a bundle learns from labels, given whether all parts have data, and texts are given."""
        return self.loss == "labels" or (self.loss == "auto" and labelled and not texts)

    def changed_prefix(self) -> str | None:
        """Return a setting of the prefix that is not the default, sizes first."""
        default = {field.name: field.default for field in fields(BundleSettings)}
        names = ("prefix_length", "prefix_width", "prefix")
        return next((name for name in names if getattr(self, name) != default[name]), None)
