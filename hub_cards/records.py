"""What a card is told: the types of the records, checked before they are written into one."""

import math
from typing import Any, TypeVar

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from typing_extensions import NotRequired, TypedDict

from modeling_mtpf.errors import MtpfError

Record = TypeVar("Record")


class CardError(MtpfError):
    """A record that a card is made from lacks something, or holds it in another form."""


class Family(TypedDict):
    """One family in ``training.json``."""

    name: str
    data: str
    first: float | int
    last: float | int
    batch_size: int
    max_length: int
    weight: float | int
    lora: NotRequired[dict[str, Any] | None]


class Training(TypedDict):
    """``training.json``, as `training_summary` returns it."""

    regime: str
    start: NotRequired[str | None]
    start_revision: NotRequired[str | None]
    families: NotRequired[list[dict[str, Any]]]
    datasets: NotRequired[list[str]]
    adapters: NotRequired[list[str]]
    assumptions: NotRequired[list[list[Any]]]
    versions: NotRequired[dict[str, str]]


class Result(TypedDict):
    """One evaluation, as ``eval/benchmark.py`` writes it."""

    task: str
    metric: str
    value: float | int
    family: NotRequired[str | None]
    n_test: NotRequired[int | None]
    protocol: NotRequired[str | None]
    seed: NotRequired[int | None]


class Task(TypedDict):
    """What a card uses of ``task.json``."""

    kind: str
    name: NotRequired[str]
    problem_type: NotRequired[str | None]
    family: NotRequired[str | None]
    labels: NotRequired[list[str] | None]
    parts: NotRequired[list[dict[str, Any]]]
    delta: NotRequired[dict[str, Any] | None]
    max_length: NotRequired[int]
    metrics: NotRequired[dict[str, Any] | None]
    training_data: NotRequired[dict[str, Any] | str | None]
    backbone: NotRequired[dict[str, Any] | None]
    prefix: NotRequired[dict[str, Any] | None]
    composition: NotRequired[dict[str, Any] | None]
    protocol: NotRequired[str | None]
    calibration: NotRequired[dict[str, float] | None]
    dataset: NotRequired[str | None]
    examples: NotRequired[list[str] | None]


def checked(schema: type[Record], record: Any, what: str) -> Record:
    """Return a record with the keys of its schema, after checking their types; other keys are left out.

    Raises:
        CardError: A key is missing, a value is of another type, or a number is not finite.
    """
    if not isinstance(record, dict):
        raise CardError(f"{what} must be an object, not {record!r}.")
    required = getattr(schema, "__required_keys__")  # noqa: B009
    missing = sorted(required - record.keys())
    if missing:
        raise CardError(f"{what} has no {missing[0]!r}; it needs: {', '.join(sorted(required))}.")
    known = {key: value for key, value in record.items() if key in schema.__annotations__}
    for key, value in known.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CardError(f"{key!r} of {what} is {value}; leave it out, or give a number.")
    try:
        validate_typed_dict(schema, known)  # type: ignore[type-var]
    except StrictDataclassError as error:
        reason = str(error).splitlines()
        raise CardError(f"{what} is malformed: {reason[-1].strip()}") from error
    return known  # type: ignore[return-value]
