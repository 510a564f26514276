"""Annotated texts as the tools for annotating write them, brought to flat rows, and their character spans."""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .columns import COLUMNS
from .spans import Span, tags_of_words
from .text_files import numbered_lines, open_binary
from .words import word_borders

_STARTS = ("start", "start_offset", "start_char", "begin")
_ENDS = ("end", "end_offset", "end_char", "stop")
_KINDS = ("label", "labels", "type", "entity_group", "entity_type", "entity", "kind", "tag")
_TEXTS = ("text", "word")

FORM = '[start, end, "TYPE"] or {"start": ..., "end": ..., "label": "TYPE"}'


def flat_row(row: Any, family: str, location: str, notes: Counter) -> dict[str, Any] | None:
    """Return a row with a column for each part, whichever tool wrote it; ``None`` for one to leave out.

    Knows Label Studio's tasks, Prodigy's answers, spaCy's pairs ``[text, {"entities": ...}]`` and GLiNER's
    ``tokenized_text`` with ``ner``; other rows are returned as they are. Where a tool may give a text several
    labels, they are a list.

    Raises:
        DataError: The row is not an object, or not as the tool that it seems to be of writes it.
    """
    if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], dict):
        row = {"text": row[0], **row[1]}
    if not isinstance(row, dict):
        raise DataError(f'{location} is {str(row)[:60]}, not an object with keys, e.g. {{"text": ...}}.')
    if row.get("answer") in ("reject", "ignore"):
        notes["annotations_rejected"] += 1
        return None
    if "data" in row and any(isinstance(row.get(key), list) for key in ("annotations", "completions")):
        return _label_studio(row, family, location, notes)
    if "tokenized_text" in row and "ner" in row:
        return _gliner(row, location, notes)
    if family == "tc" and isinstance(row.get("cats"), dict):
        return {"text": row.get("text"), "label": _categories(row["cats"], location)}
    if family == "tc" and "label" not in row and isinstance(row.get("accept"), list):
        return {**row, "label": row["accept"]}
    if (
        family == "ner"
        and row.get("answer") == "accept"
        and "text" in row
        and not set(COLUMNS["spans"]) & set(row)
    ):
        return {**row, "spans": []}  # Prodigy writes none where there are none
    return row


def _categories(categories: Mapping[str, Any], location: str) -> list[str]:
    """Return the labels of spaCy's ``cats`` with at least one half."""
    wrong = [value for value in categories.values() if not isinstance(value, (int, float, type(None)))]
    if wrong:
        raise DataError(
            f"{location}: a label in cats has {str(wrong[0])[:40]!r}; write a number from 0 to 1, or true "
            "or false."
        )
    return [label for label, value in categories.items() if value is not None and value >= 0.5]


def _label_studio(
    row: Mapping[str, Any], family: str, location: str, notes: Counter
) -> dict[str, Any] | None:
    key = "annotations" if isinstance(row.get("annotations"), list) else "completions"
    made = [made for made in _objects(row[key], key, location) if not made.get("was_cancelled")]
    if not made:
        notes["tasks_without_annotation"] += 1
        return None
    if len(made) > 1:
        notes["tasks_with_several_annotations"] += 1  # the newest counts
    (data,) = _objects([row["data"]], "data", location)
    columns = {key: value for key, value in data.items() if isinstance(value, str)}
    results = _objects(made[-1].get("result", []), "result", location)
    values = _objects([part.get("value") or {} for part in results], "value", location)
    if others := sum(not (value.get("labels") or value.get("choices")) for value in values):
        notes["results_of_other_types_left_out"] += others
    if family == "ner":
        return {**columns, "spans": [value for value in values if value.get("labels")]}
    chosen = [value["choices"] for value in values if value.get("choices")]
    if not all(isinstance(choices, list) for choices in chosen):
        raise DataError(f"{location}: choices must be a list of labels, not {str(chosen)[:60]}.")
    return {**columns, "label": [choice for choices in chosen for choice in choices]}


def _objects(values: Any, name: str, location: str) -> list[dict[str, Any]]:
    """Return a list of objects of Label Studio, checked."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(
            f"{location}: Label Studio writes objects with keys as {name}, not {str(values)[:60]}; export "
            "it again."
        )
    return values


def label_studio_task(text: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task of Label Studio with what each app predicts for a text as a pre-annotation.

    The controls of the project are named ``label`` (``<Labels>``) and ``choice`` (``<Choices>``), its text
    ``text``; ``model_version`` is the app's name.
    """
    predictions = []
    for app, found in _by_head(results):
        rows = [
            row for row in (found if isinstance(found, list) else [found]) if row.get("label", "") is not None
        ]
        parts: list[dict[str, Any]] = []
        for row in rows:
            if "entity_group" in row:
                value = {"start": row["start"], "end": row["end"], "text": text[row["start"] : row["end"]]}
                value["labels"] = [row["entity_group"]]
                parts.append({"from_name": "label", "type": "labels", "value": value, "score": row["score"]})
        least = min((row["score"] for row in rows), default=0.0)
        if rows and not parts:
            choices = {"choices": [row["label"] for row in rows]}
            parts.append({"from_name": "choice", "type": "choices", "value": choices, "score": least})
        parts = [{"id": f"{app}-{number}", "to_name": "text", **part} for number, part in enumerate(parts)]
        predictions.append({"model_version": app, "score": least, "result": parts})
    return {"data": {"text": text}, "predictions": predictions}


def _by_head(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and result of each app, and of each part of a bundle."""
    for app, found in results.items():
        if isinstance(found, dict) and not isinstance(found.get("score"), float):
            yield from ((f"{app}/{part}", of_part) for part, of_part in found.items())
        else:
            yield app, found


def _gliner(row: Mapping[str, Any], location: str, notes: Counter) -> dict[str, Any]:
    words, tags = row["tokenized_text"], []
    if not isinstance(words, list) or not isinstance(row["ner"], list):
        raise DataError(
            f"{location}: tokenized_text must be a list of words, and ner one of [first, last, type]."
        )
    spans = []
    for value in row["ner"]:
        start, end, kind = _parts(value, location)
        spans.append(_in_range(start, end + 1, kind, len(words), location))
    tags = ["O"] * len(words)
    for start, end, kind in without_overlaps(spans, notes):
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return {"tokens": words, "ner_tags": tags}


def spans_of(text: str, values: Any, location: str, notes: Counter) -> list[Span]:
    """Check the spans of a text as a tool wrote them; return them in order, without blanks at their ends.

    Counts in ``notes``: spans that overlap a longer one, which are left out; those with blanks at their ends;
    those that begin or end inside a word; and those whose every word is labelled as an earlier span's.

    Raises:
        DataError: A span of another form, outside the text, or of other characters than it says.
    """
    if values is None:
        values = []
    if isinstance(values, Mapping) and all(isinstance(column, list) for column in values.values()):
        if len({len(column) for column in values.values()}) < 2:  # a column of structs as a struct of columns
            values = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DataError(f"{location}: spans are a list of {FORM}, not {str(values)[:60]!r}.")
    spans = []
    for value in values:
        span = _in_range(*_parts(value, location), len(text), location)
        said = (
            next((value[key] for key in _TEXTS if value.get(key)), None) if isinstance(value, dict) else None
        )
        if isinstance(said, str) and said != text[span.start : span.end]:
            span = _counted_in_utf16(text, span, said, location)
        covered = text[span.start : span.end]
        start = span.start + len(covered) - len(covered.lstrip())
        end = span.end - len(covered) + len(covered.rstrip())
        if end - start < len(covered):
            notes["spans_with_blanks_at_their_ends" if start < end else "empty_spans_left_out"] += 1
        if start < end:
            spans.append(Span(start, end, span.kind))
    spans = without_overlaps(spans, notes)
    if spans:
        words = word_borders(text)
        starts, ends = (set(borders) for borders in zip(*words, strict=True))
        notes["spans_inside_words"] += sum(s.start not in starts or s.end not in ends for s in spans)
        begun = sum(tag[0] == "B" for tag in tags_of_words(words, spans))
        notes["spans_sharing_a_word_with_another"] += len(spans) - begun
    return spans


def _parts(value: Any, location: str) -> tuple[int, int, str]:
    if isinstance(value, Mapping):
        found: list[Any] = [
            next((value[key] for key in keys if value.get(key) is not None), None)
            for keys in (_STARTS, _ENDS, _KINDS)
        ]
    else:
        found = list(value) if isinstance(value, (list, tuple)) else []
    if len(found) == 3 and isinstance(found[2], list) and len(found[2]) == 1:
        found[2] = found[2][0]
    numbers = all(isinstance(part, int) and not isinstance(part, bool) for part in found[:2])
    if len(found) != 3 or not numbers or not isinstance(found[2], str) or not found[2].strip():
        raise DataError(f"{location}: {str(value)[:80]!r} is not a span; write {FORM}.")
    return found[0], found[1], found[2].strip()


def _in_range(start: int, end: int, kind: str, size: int, location: str) -> Span:
    if not 0 <= start < end <= size:
        raise DataError(f"{location}: the span {start}:{end} ({kind}) is not inside the text, 0:{size}.")
    return Span(start, end, kind)


def _counted_in_utf16(text: str, span: Span, said: str, location: str) -> Span:
    """Return the span in characters, where a tool in JavaScript counted UTF-16 units (an emoji has two)."""
    units = text.encode("utf-16-le")
    before, covered = units[: 2 * span.start], units[2 * span.start : 2 * span.end]
    if covered != said.encode("utf-16-le"):
        raise DataError(
            f"{location}: the span {span.start}:{span.end} covers {text[span.start : span.end][:40]!r}, but "
            f"says {said[:40]!r}; positions are characters of the text, from 0."
        )
    start = len(before.decode("utf-16-le"))
    return Span(start, start + len(said), span.kind)


def without_overlaps(spans: Sequence[Span], notes: Counter) -> list[Span]:
    """Return the spans in order; of those that overlap the longest stays, the others are counted."""
    chosen: list[Span] = []
    for span in sorted(set(spans), key=lambda span: (span.start - span.end, span)):
        at = bisect(chosen, span)
        if (
            chosen[at - 1 : at]
            and chosen[at - 1].end > span.start
            or chosen[at : at + 1]
            and chosen[at].start < span.end
        ):
            notes["overlapping_spans_left_out"] += 1
        else:
            chosen.insert(at, span)
    return chosen


# BRAT


def read_brat(file: Path, encoding: str | None, notes: Counter) -> tuple[str, list[Span]]:
    """Return a text and the entities of the .ann file next to it; events, relations and notes are not read.

    Raises:
        DataError: There is no .ann file, or a line of it that does not fit the text.
    """
    annotations = file.with_suffix(".ann")
    for one, other in ((file, annotations), (annotations, file)):
        if not other.is_file():
            raise DataError(f"{one} has no {other.name} next to it; BRAT has both of every text, if empty.")
    text = "".join(line for _, line in _lines(file, encoding))
    spans = []
    for number, line in _lines(annotations, encoding):
        if not line.startswith("T"):
            continue
        location, parts = f"{annotations}, line {number}", line.rstrip("\r\n").split("\t")
        kind, *borders = parts[1].split() if len(parts) > 2 else [""]
        if ";" in "".join(borders):
            notes["discontinuous_spans_left_out"] += 1
            continue
        if len(borders) != 2 or not all(border.isdecimal() for border in borders):
            raise DataError(f"{location}: {line.strip()[:60]!r} is not 'T1<tab>TYPE start end<tab>text'.")
        span = _in_range(int(borders[0]), int(borders[1]), kind, len(text), location)
        covered = text[span.start : span.end]
        if covered.split() != parts[2].split():
            raise DataError(
                f"{location}: {span.start}:{span.end} covers {covered[:40]!r}, not {parts[2][:40]!r}."
            )
        spans.append(span)
    return text, spans_of(text, spans, str(annotations), notes)


def _lines(file: Path, encoding: str | None) -> list[tuple[int, str]]:
    with open_binary(file) as stream:
        return list(numbered_lines(stream, str(file), encoding))
