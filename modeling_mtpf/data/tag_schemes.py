"""Entity tagging schemes, recognised and brought to IOB2."""

from collections.abc import Sequence

from ..errors import DataError

SCHEMES = ("auto", "IOB1", "IOB2", "BIOES")
_SINGLE, _END = ("S", "U"), ("E", "L")
"""Prefixes of one-word entities and of last words in BIOES, and in its variant BILOU."""

_Row = list[tuple[str, str]]
"""Prefix and type of each tag; ``("O", "")`` for no entity."""


def to_iob2(
    tags: Sequence[Sequence[str]], scheme: str = "auto", locations: Sequence[str] | None = None
) -> tuple[list[list[str]], str]:
    """Return the tags of each sentence in IOB2, and the scheme that they had.

    Args:
        tags: Tags of each sentence.
        scheme: One of `SCHEMES`; ``auto`` detects it.
        locations: Where each sentence is, for messages; ``row 1`` and so on by default.

    Raises:
        DataError: A tag outside the scheme; with ``auto``, entities that start in several ways; an entity of
            BIOES that does not begin with B or S, or does not end with E or S.

    Example:
        >>> to_iob2([["I-PER", "I-PER", "B-PER", "O"]])
        ([['B-PER', 'I-PER', 'B-PER', 'O']], 'IOB1')
        >>> to_iob2([["B-PER", "E-PER", "S-LOC"]])
        ([['B-PER', 'I-PER', 'B-LOC']], 'BIOES')
    """
    if scheme not in SCHEMES:
        raise DataError(f"Unknown tag scheme {scheme!r}; choose one of: {', '.join(SCHEMES)}.")
    if locations is None:
        locations = [f"row {number}" for number in range(1, len(tags) + 1)]
    rows = [[_split(tag, at) for tag in row] for row, at in zip(tags, locations, strict=True)]
    if scheme == "auto":
        scheme = _detect(rows, locations)
    converted = []
    for row, location in zip(rows, locations, strict=True):
        _check(row, scheme, location)
        iob2, before = [], ""
        for prefix, kind in row:
            start = prefix in ("B", *_SINGLE) or kind != before
            iob2.append("O" if prefix == "O" else f"{'B' if start else 'I'}-{kind}")
            before = "" if prefix in (*_SINGLE, *_END) else kind
        converted.append(iob2)
    return converted, scheme


def _split(tag: str, location: str) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, _, kind = tag.partition("-")
    if not kind or prefix not in ("B", "I", *_SINGLE, *_END):
        raise DataError(
            f"{location}: Tag {tag!r} is not of a known scheme; use O with B-<type> and I-<type> (IOB1, "
            "IOB2), or BIOES. A bare type does not say where an entity ends. "
            "Choose another column of tags with --columns.tags."
        )
    return prefix, kind


def _detect(rows: list[_Row], locations: Sequence[str]) -> str:
    """Tell the scheme from where the prefixes occur.

    In IOB2 every entity starts with B; in IOB1 only one that follows another of its type; BIOES has prefixes
    that the others lack. Tags that fit both IOB1 and IOB2 (no entity follows another of its type) are IOB2.
    """
    starts: dict[str, str] = {}  # "I", or "B" where IOB1 has none → the first location of each
    for row, location in zip(rows, locations, strict=True):
        before = ""
        for prefix, kind in row:
            if prefix in (*_SINGLE, *_END):
                return "BIOES"
            if prefix in "BI" and kind != before:
                starts.setdefault(prefix, location)
            before = kind
    if len(starts) == 2:
        raise DataError(
            f"The tags are neither IOB1 nor IOB2: an entity starts with I- at {starts['I']}, with B- at "
            f"{starts['B']}. Correct them, or pass --scheme IOB2 to read every such I- as a start."
        )
    return "IOB1" if "I" in starts else "IOB2"


def _check(row: _Row, scheme: str, location: str) -> None:
    """Raise for a tag outside the scheme; in BIOES every entity is S, or B, any number of I and E."""
    inside = ""  # type of the entity that has begun and not ended
    for prefix, kind in [*row, ("O", "")]:
        if scheme != "BIOES":
            if prefix in (*_SINGLE, *_END):
                tag = f"{prefix}-{kind}"
                raise DataError(f"{location}: Tag {tag!r} is not of the scheme {scheme}, but of BIOES.")
            continue
        continues = prefix in ("I", *_END)
        if continues and kind != inside:
            raise DataError(f"{location}: {prefix}-{kind} continues an entity that has not begun (BIOES).")
        if inside and not continues:
            raise DataError(f"{location}: an entity of type {inside} has no last word, E-{inside} (BIOES).")
        inside = kind if prefix in ("B", "I") else ""
