"""Entity-level metrics."""

from ..errors import MissingExtraError


def entity_f1(gold: list[list[str]], predicted: list[list[str]]) -> float:
    """Strict IOB2 micro F1 over entities: type and both borders must be right.

    seqeval's defaults are lenient, and ``mode="strict"`` without a scheme scores wrong predictions 1.0.

    Example:
        >>> entity_f1([["B-PER", "I-PER", "O"]], [["B-PER", "O", "O"]])
        0.0
    """
    try:
        from seqeval.metrics import f1_score
        from seqeval.scheme import IOB2
    except ImportError:
        raise MissingExtraError("seqeval", "eval") from None
    return float(f1_score(gold, predicted, mode="strict", scheme=IOB2, zero_division=0))


__all__ = ["entity_f1"]
