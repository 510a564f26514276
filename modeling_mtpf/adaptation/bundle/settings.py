"""The parts of a bundle, and the settings that all methods of making one share."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError, first_line
from ...settings import nearest
from ..settings import FitSettings

_CHOICES = {"loss": ("auto", "labels", "distil"), "heads": ("auto", "retrained", "frozen")}


@dataclass
class Part:
    """One app of a bundle.

    Attributes:
        name: Its name in the bundle.
        family: ``ner`` or ``tc``; with an app its own by default.
        data: Its labelled data, as `fit_app` takes it; composing needs none.
        adapter: Folder or Hub id of the app, which composing needs and joint training does not use.
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
        weight = row.get("weight")
        if weight is not None and (type(weight) not in (int, float) or not abs(weight) <= 1e3):
            raise RecipeError(f"The weight of part {number} of {file} is {weight!r}; it must be a number.")
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
    """

    temperature: float = 2.0
    loss: str = "auto"
    heads: str = "auto"
    text_column: str = "text"
    max_texts: int = 20_000
    rank: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature >= 1:
            raise RecipeError(f"temperature is {self.temperature}; it must be a number of at least 1.")
        for name in ("rank", "max_texts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"{name} is {value}; it must be at least 1.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(known)}.")
