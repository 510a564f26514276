"""A server whose apps are added, replaced and removed while it answers, on one machine or many."""

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(kw_only=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_texts: Texts of a request.
        max_characters: Characters of its texts together; nothing else is predicted meanwhile.
        max_body: Bytes of its body.
    """

    max_texts: int = 128
    max_characters: int = 50_000
    max_body: int = 1_000_000
