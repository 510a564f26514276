"""What studies share: a command line, a plan, records that are computed once, pages that are filled in."""

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from modeling_mtpf.errors import DataError, MtpfError, RecipeError
from modeling_mtpf.evaluation.records import add_record, read_records, record_key
from modeling_mtpf.settings import ScriptParser

ROOT = Path(__file__).parents[1]
METRICS = {"ner": "entity_f1", "tc": "accuracy"}
TIMED = 40
"""Texts that are predicted one by one to time a prediction."""


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


def milliseconds(opened: Any, texts: list[str], names: list[str]) -> float:
    """Median CPU time of one text with all apps."""
    model, tokenizer = opened
    times = []
    for text in texts[:TIMED]:
        started = time.process_time()
        model.predict([text], adapters=names, tokenizer=tokenizer)
        times.append(time.process_time() - started)
    return round(1000 * statistics.median(times), 3)


def name_of(part: str) -> str:
    """Return a name of an adapter for a part."""
    return part.replace("/", "-")


def read_plan(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Return the plan and the chosen methods; set the number of threads."""
    plan = yaml.safe_load(options.plan.read_text("utf-8"))
    torch.set_num_threads(options.threads)
    methods = options.only or list(plan["methods"])
    for option, names, known in (
        ("only", methods, plan["methods"]),
        ("groups", options.groups, plan["groups"]),
    ):
        if unknown := set(names) - set(known):
            raise RecipeError(f"--{option}: the plan has no {min(unknown)!r}; it has: {', '.join(known)}.")
    return plan, methods


def study(
    description: str,
    run: Callable[[argparse.Namespace], None],
    write_report: Callable[[list[dict[str, Any]], Path], list[Path]],
    files: tuple[Path, Path],
    add_options: Callable[[argparse.ArgumentParser], None],
    arguments: list[str] | None,
) -> int:
    """Run a study from the command line.

    Args:
        description: Of the script.
        run: Computes the records of a plan that are not there.
        write_report: Takes records and the folder ``docs``; returns the files that it has written.
        files: Plan and records by default.
        add_options: Adds options of ``run`` to those that all studies have.
        arguments: Of the command line.
    """

    def report(options: argparse.Namespace) -> None:
        for file in write_report(read_records(options.records), ROOT / "docs"):
            print(file)

    parser = ScriptParser(description=description)
    commands = parser.add_subparsers(required=True)
    about = "compute the records of the plan that are not there", "fill in the pages from the records"
    for function, text in zip((run, report), about, strict=True):
        command = commands.add_parser(function.__name__, help=text)
        command.set_defaults(function=function)
        command.add_argument("--records", type=Path, default=files[1], help="file of the raw records")
        if function is run:
            command.add_argument("--plan", type=Path, default=files[0])
            command.add_argument("--data", help="folder of the data; by default that of MTPF_DATA")
            command.add_argument("--only", nargs="+", help="methods; by default all of the plan")
            command.add_argument("--seeds", type=int, nargs="+", help="by default all of the plan")
            command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
            add_options(command)
    options = parser.parse_args(arguments)
    try:
        options.function(options)
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_groups(parser: argparse.ArgumentParser, group: str) -> None:
    """Add the options of a study that has groups of apps on several backbones."""
    parser.add_argument("--groups", nargs="+", default=[group], help="of the plan")
    parser.add_argument("--backbone", nargs="+", default=["packaged"], help="NAME=FOLDER, or packaged")
