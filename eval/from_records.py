"""What studies share: records that are computed once and checked, and pages that are filled in from them."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from modeling_mtpf.errors import DataError
from modeling_mtpf.evaluation.records import add_record, read_records, record_key


def add_missing(
    output: Path,
    keys: list[dict[str, Any]],
    facts: dict[str, Any],
    run: Callable[[], Iterable[dict[str, Any]]],
) -> None:
    """Add the records of a regime to a file, unless all are there.

    Args:
        output: The file.
        keys: Beginnings of the records, which have one regime.
        facts: What ``config`` of all records of this regime must hold.
        run: Computes the records.

    Raises:
        DataError: The file has records of this regime with other facts.
    """
    regime = keys[0]["regime"]

    def check(records: list[dict[str, Any]]) -> None:
        for record in records:
            for key, value in facts.items() if record["regime"] == regime else ():
                if record["config"][key] != value:
                    raise DataError(
                        f"{output} has records of {regime} with other {key}: {record['config'][key]}, not "
                        f"{value}; choose another --records."
                    )

    records = read_records(output)
    check(records)
    if set(map(record_key, keys)) <= set(map(record_key, records)):
        return
    for record in run():
        add_record(output, record, check)
        print(*(record[key] for key in ("regime", "task", "seed", "protocol", "value")), flush=True)


def fill(document: str, study: str, tables: Mapping[str, Callable[[Any], str]], records: Any) -> str:
    """Return the document with what is between ``<!-- STUDY: NAME -->`` and ``<!-- end -->`` computed.

    Raises:
        DataError: A mark names a table that does not exist, or there are no records.
    """

    def filled(mark: re.Match) -> str:
        if mark[1] not in tables:
            raise DataError(f"There is no table {mark[1]!r} of the {study}; known: {', '.join(tables)}.")
        return f"<!-- {study}: {mark[1]} -->\n\n{tables[mark[1]](records)}\n\n<!-- end -->"

    return re.sub(rf"<!-- {study}: (\w+) -->.*?<!-- end -->", filled, document, flags=re.DOTALL)
