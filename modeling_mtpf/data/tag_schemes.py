"""Entity tagging schemes, recognised and brought to IOB2."""

from collections.abc import Iterator, Sequence

from ..errors import DataError

SCHEMES = ("auto", "IOB1", "IOB2", "BIOES")
SINGLE, END = ("S", "U"), ("E", "L")
"""Prefixes of one-word entities and of last words in BIOES, and in its variant BILOU."""


def split_tag(tag: str) -> tuple[str, str]:
    """Return prefix and type: ``("B", "PER")``; ``("O", "")`` for no entity.

    Raises:
        DataError: The tag has a prefix of no scheme.

    Example:
        >>> split_tag("B-PER")
        ('B', 'PER')
    """
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    if not dash or not kind or prefix not in ("B", "I", *SINGLE, *END):
        raise DataError(
            f"Tag {tag!r} is not of a known scheme; use O with B-<type> and I-<type> (IOB1, IOB2), or BIOES. "
            "A bare type does not say where an entity ends."
        )
    return prefix, kind


def detect_scheme(tags: Sequence[Sequence[str]], locations: Sequence[str] | None = None) -> str:
    """Tell the scheme from where the prefixes occur.

    In IOB2 every entity starts with B; in IOB1 only one that follows another of its type; BIOES has prefixes
    that the others lack. Tags that fit both IOB1 and IOB2 (no entity follows another of its type) are IOB2.

    Args:
        tags: Tags of each sentence.
        locations: Where each sentence is, for messages; ``row 1`` and so on by default.

    Raises:
        DataError: An unknown tag, or entities that start in both ways; with their locations.
    """
    starts: dict[str, str] = {}  # "I", or "B" where IOB1 has none → the first location of each
    for location, row in _parsed(tags, locations):
        before = ""
        for prefix, kind in row:
            if prefix in (*SINGLE, *END):
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


def _parsed(
    tags: Sequence[Sequence[str]], locations: Sequence[str] | None
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for number, row in enumerate(tags):
        location = locations[number] if locations is not None else f"row {number + 1}"
        try:
            yield location, [split_tag(tag) for tag in row]
        except DataError as error:
            raise DataError(f"{location}: {error}") from None


def to_iob2(
    tags: Sequence[Sequence[str]], scheme: str = "auto", locations: Sequence[str] | None = None
) -> tuple[list[list[str]], str]:
    """Bring tags to IOB2.

    Args:
        tags: Tags of each sentence.
        scheme: ``auto`` to detect it, or one of `SCHEMES`.
        locations: Where each sentence is, for messages.

    Returns:
        The IOB2 tags, and the scheme they came in.

    Raises:
        DataError: See `detect_scheme`; a tag outside the scheme; an entity of BIOES that does not begin with
            B or S, or does not end with E or S.

    Example:
        >>> to_iob2([["I-PER", "I-PER", "B-PER", "O"]])
        ([['B-PER', 'I-PER', 'B-PER', 'O']], 'IOB1')
        >>> to_iob2([["B-PER", "E-PER", "S-LOC"]])
        ([['B-PER', 'I-PER', 'B-LOC']], 'BIOES')
    """
    if scheme not in SCHEMES:
        raise DataError(f"Unknown tag scheme {scheme!r}; choose one of: {', '.join(SCHEMES)}.")
    if scheme == "auto":
        scheme = detect_scheme(tags, locations)
    converted = []
    for location, row in _parsed(tags, locations):
        if scheme == "BIOES":
            _check_bioes(row, location)
        else:
            wrong = [f"{prefix}-{kind}" for prefix, kind in row if prefix in (*SINGLE, *END)]
            if wrong:
                raise DataError(
                    f"{location}: Tag {wrong[0]!r} is not of the scheme {scheme}; with --scheme BIOES it is "
                    "accepted."
                )
        iob2, before = [], ""
        for prefix, kind in row:
            start = prefix in ("B", *SINGLE) or kind != before
            iob2.append("O" if prefix == "O" else f"{'B' if start else 'I'}-{kind}")
            before = "" if prefix in (*SINGLE, *END) else kind
        converted.append(iob2)
    return converted, scheme


def _check_bioes(tags: list[tuple[str, str]], location: str) -> None:
    """Raise unless every entity is S, or B, any number of I and E, all of one type."""
    inside = ""  # type of the entity that has begun and not ended
    for prefix, kind in [*tags, ("O", "")]:
        continues = prefix in ("I", *END)
        if continues and kind != inside:
            raise DataError(f"{location}: {prefix}-{kind} continues an entity that has not begun (BIOES).")
        if inside and not continues:
            raise DataError(f"{location}: an entity of type {inside} has no last word, E-{inside} (BIOES).")
        inside = kind if prefix in ("B", "I") else ""
