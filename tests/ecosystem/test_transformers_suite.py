"""transformers' own common tests, from the source distribution of the installed version, on our classes."""

import re
from pathlib import Path

import pytest
from conftest import ARCHITECTURES
from distributions import fetch, run_suite

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CLASSES = {"Model", "ForTokenClassification", "ForSequenceClassification"}


def deliberate(architectures) -> set[tuple[str, str, str]]:
    """Read from the page which (architecture, class, test) we do not pass on purpose."""
    rows = re.findall(
        r"^\| `(test_\w+)` \| ([^|]+) \| ([^|]+) \|", PAGE.read_text("utf-8"), flags=re.MULTILINE
    )
    listed = set()
    for test, classes, encoders in rows:
        chosen = {name.removeprefix("Mtpf") for name in re.findall(r"`(\w+)`", classes)} or CLASSES
        known = set(architectures if encoders == "all" else encoders.split(", "))
        assert chosen <= CLASSES and known <= set(ARCHITECTURES), (test, classes, encoders)
        listed |= {(name, part, test) for name in known & set(architectures) for part in chosen}
    return listed


@pytest.mark.slow
@pytest.mark.parametrize("architectures", [ARCHITECTURES[:3], ARCHITECTURES[3:]], ids=" ".join)
def test_all_that_the_stock_class_passes_passes_or_is_documented(tmp_path, architectures):
    sources = fetch("transformers", "parameterized==0.9.0")
    result = run_suite("transformers_suite.py", sources, tmp_path, architectures)
    ours = {tuple(row[:3]): row[5] for row in result["rows"] if row[4] == "passed"}
    allowed = deliberate(architectures)
    assert {key: message for key, message in ours.items() if key not in allowed} == {}
    assert allowed - set(ours) == set(), "these pass; remove them from docs/compatibility.md"
    assert result["passed"] > 300 * len(architectures)
