"""Entity tagging schemes, recognised and brought to IOB2."""

from collections.abc import Sequence

from ..errors import DataError

SCHEMES = ("auto", "IOB1", "IOB2", "BIOES")
SINGLE, END = ("S", "U"), ("E", "L")
"""Prefixes of one-word entities and of last words in BIOES, and in its variant BILOU."""


def split_tag(tag: str) -> tuple[str, str]:
    """Return prefix and type: ``("B", "PER")``; ``("O", "")`` for no entity.

    Raises:
        DataError: The tag has no prefix of any scheme.

    Example:
        >>> split_tag("B-PER")
        ('B', 'PER')
    """
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    if not dash or not kind or prefix not in ("B", "I", *SINGLE, *END):
        raise DataError(
            f"Tag {tag!r} is of no scheme; use O, and B-<type> and I-<type> (IOB1 or IOB2), or BIOES. A bare "
            "type does not say where an entity ends."
        )
    return prefix, kind


def detect_scheme(tags: Sequence[Sequence[str]]) -> str:
    """Tell the scheme from where the prefixes occur.

    In IOB2 every entity starts with B; in IOB1 only one that follows another of its type; the tags of BIOES
    speak for themselves. Tags that fit IOB1 and IOB2 alike (there are no two such neighbours) are IOB2.

    Raises:
        DataError: An unknown tag, or entities that start in both ways; with the rows.
    """
    starts: dict[str, int] = {}  # "I", or "B" where IOB1 has none: the first row of each
    for row, own in enumerate(tags, start=1):
        before = ""
        for tag in own:
            try:
                prefix, kind = split_tag(tag)
            except DataError as error:
                raise DataError(f"Row {row}: {error}") from None
            if prefix in (*SINGLE, *END):
                return "BIOES"
            if prefix in "BI" and kind != before:
                starts.setdefault(prefix, row)
            before = kind
    if len(starts) == 2:
        raise DataError(
            f"The tags are neither IOB1 nor IOB2: in row {starts['I']} an entity starts with I-, in row "
            f"{starts['B']} with B-. Correct them, or pass --scheme IOB2 to read every such I- as a start."
        )
    return "IOB1" if "I" in starts else "IOB2"


def to_iob2(tags: Sequence[Sequence[str]], scheme: str = "auto") -> tuple[list[list[str]], str]:
    """Bring tags to IOB2.

    Args:
        tags: Tags of each sentence.
        scheme: ``auto`` to detect it, or one of `SCHEMES`.

    Returns:
        The IOB2 tags, and the scheme they came in.

    Raises:
        DataError: See `detect_scheme`.

    Example:
        >>> to_iob2([["I-PER", "I-PER", "B-PER", "O"]])
        ([['B-PER', 'I-PER', 'B-PER', 'O']], 'IOB1')
        >>> to_iob2([["B-PER", "E-PER", "S-LOC"]])
        ([['B-PER', 'I-PER', 'B-LOC']], 'BIOES')
    """
    if scheme not in SCHEMES:
        raise DataError(f"Unknown tag scheme {scheme!r}; choose one of: {', '.join(SCHEMES)}.")
    found = detect_scheme(tags) if scheme == "auto" else scheme
    converted = []
    for own in tags:
        row, before = [], ""
        for tag in own:
            prefix, kind = split_tag(tag)
            if prefix != "O":
                start = prefix in ("B", *SINGLE) or kind != before
                row.append(f"{'B' if start else 'I'}-{kind}")
            else:
                row.append("O")
            before = "" if prefix in (*SINGLE, *END) else kind
        converted.append(row)
    return converted, found


__all__ = ["SCHEMES", "detect_scheme", "split_tag", "to_iob2"]
