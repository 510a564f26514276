"""The command ``mtpf``: publish, fetch, inspect and export backbones and adapters, and apply apps to texts.

Exit codes: 0, done; 2, a mistake that the message says how to mend; 130, interrupted. Results go to standard
output, one per line or as JSON; everything else goes to standard error.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MtpfError
from ..hub import HubError, inspect, pull, push_adapter, push_backbone
from ..version import __version__
from .predict import add_predict_parser


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mtpf",
        description="One small encoder for many text apps: publish, fetch, inspect and apply.",
        epilog=_EPILOG,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"mtpf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    push = commands.add_parser("push", help="publish a backbone or an adapter as one commit")
    kinds = push.add_subparsers(dest="kind", metavar="KIND", required=True)
    backbone = kinds.add_parser("backbone", help="publish a backbone folder")
    _add_push_options(backbone)
    backbone.add_argument(
        "--results", metavar="FILE", type=Path, help="JSON list of evaluation records for the card's table"
    )
    backbone.set_defaults(run=_push_backbone)
    adapter = kinds.add_parser("adapter", help="publish an adapter folder, bound to a published backbone")
    _add_push_options(adapter)
    adapter.add_argument("--backbone", metavar="ID", help="Hub id of the published backbone")
    adapter.add_argument(
        "--backbone_revision", metavar="SHA", help="its commit (default: the recorded one, else main)"
    )
    adapter.set_defaults(run=_push_adapter)

    fetch = commands.add_parser("pull", help="fetch a repo, verify every hash, and print its folder")
    fetch.add_argument("repo", metavar="REPO", help="owner/name")
    fetch.add_argument("--revision", help="commit, tag or branch (default: main)")
    fetch.set_defaults(run=_pull)

    look = commands.add_parser("inspect", help="describe a folder or repo, and report what is odd in it")
    look.add_argument("source", metavar="FOLDER_OR_REPO")
    look.add_argument("--revision", help="commit, tag or branch of a repo (default: main)")
    look.add_argument("--json", action="store_true", help="print JSON")
    look.set_defaults(run=_inspect)

    add_predict_parser(commands)

    out = commands.add_parser("export", help="write ONNX graphs and apps for devices, or add apps to them")
    out.add_argument("backbone", metavar="BACKBONE", help="packaged, a folder, or owner/name")
    out.add_argument("--revision", help="commit of the backbone's repo (default: main)")
    out.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]A",
        help="folder or repo of an app; may be given several times",
    )
    out.add_argument(
        "--output", required=True, metavar="DIR", type=Path, help="a new folder, or an export to add to"
    )
    out.add_argument("--int8", action="store_true", help="8-bit weights: a quarter of the size")
    out.add_argument(
        "--calibration", metavar="SOURCE", help="with --int8: raw text that fixes the activations' ranges"
    )
    out.add_argument(
        "--layers", type=int, metavar="N", help="last layers in the tail (default: what the apps need)"
    )
    out.set_defaults(run=_export)
    return parser


_EPILOG = """\
examples:
  mtpf push backbone runs/demo/backbone ada/notes-encoder --private
  mtpf push adapter runs/demo/apps/entities ada/notes-entities --backbone ada/notes-encoder --dry_run
  mtpf inspect ada/notes-entities --json | jq .labels
  mtpf predict --adapter ada/notes-entities --adapter ada/notes-intent notes.txt > results.jsonl
  cd "$(mtpf pull ada/notes-encoder --revision 1f0c3b2)"
  mtpf export ada/notes-encoder --adapter ada/notes-entities --output phone --int8

The token is the one of `hf auth login` or the variable HF_TOKEN.
"""


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("repo", metavar="REPO", help="owner/name; created if need be")
    parser.add_argument("--private", action="store_true", help="create it as a private repo")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument(
        "--dry_run", action="store_true", help="check all, list files and sizes, change nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the plan of a dry run, or the sha, as JSON"
    )
    parser.add_argument("--branch", default="main", help="an existing branch (default: %(default)s)")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    parser.add_argument("--license", default="apache-2.0", help="for the card (default: %(default)s)")
    parser.add_argument(
        "--language", nargs="+", default=["en"], metavar="CODE", help="for the card (default: en)"
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="ID", help="Hub ids of the training data, for the card"
    )


def _push_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("private", "create_pr", "dry_run", "branch", "license", "datasets")
    options = {name: getattr(arguments, name) for name in names}
    languages = arguments.language
    options["language"] = languages[0] if len(languages) == 1 else languages
    return options | ({"commit_message": arguments.message} if arguments.message else {})


def _push_backbone(arguments: argparse.Namespace) -> str:
    results = None
    if arguments.results is not None:
        try:
            results = json.loads(arguments.results.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise HubError(f"--results {arguments.results} cannot be read as JSON: {error}") from error
        if not isinstance(results, list) or not all(isinstance(row, dict) for row in results):
            raise HubError(
                f"--results {arguments.results} must hold a list of records with task, metric, value."
            )
    done = push_backbone(arguments.folder, arguments.repo, results=results, **_push_options(arguments))
    return _show_push(arguments, done)


def _push_adapter(arguments: argparse.Namespace) -> str:
    done = push_adapter(
        arguments.folder,
        arguments.repo,
        backbone_id=arguments.backbone,
        backbone_revision=arguments.backbone_revision,
        **_push_options(arguments),
    )
    return _show_push(arguments, done)


def _show_push(arguments: argparse.Namespace, done: Any) -> str:
    if not arguments.json:
        return str(done)
    return json.dumps(
        {"repo_id": arguments.repo, "sha": done} if isinstance(done, str) else done.to_dict(), indent=2
    )


def _pull(arguments: argparse.Namespace) -> str:
    return str(pull(arguments.repo, arguments.revision))


def _inspect(arguments: argparse.Namespace) -> str:
    found = inspect(arguments.source, arguments.revision)
    return json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if arguments.json else str(found)


def _export(arguments: argparse.Namespace) -> str:
    from ..export import export_onnx  # here: the other commands do without what it imports

    return str(
        export_onnx(
            arguments.backbone,
            arguments.adapter,
            arguments.output,
            int8=arguments.int8,
            calibration=arguments.calibration,
            layers=arguments.layers,
            revision=arguments.revision,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="mtpf: %(message)s")
    logging.getLogger("modeling_mtpf").setLevel(logging.INFO)
    try:
        result = arguments.run(arguments)
        if result is not None:  # else the command has written its results itself
            print(result, flush=True)  # noqa: T201
    except MtpfError as error:
        sys.stderr.write(f"mtpf: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mtpf inspect ... | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
