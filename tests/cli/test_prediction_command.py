"""The command `mtpf predict`: files and pipes in, a stream of JSON lines out, mistakes in one line."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.cli.main import main
from modeling_mtpf.hub import push_adapter, push_backbone

TEXTS = ["Ada met Noor in London.", "", "café 東京 🙂", "Hi", "can you remind me?"]


@pytest.fixture
def run(capsys):
    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()  # of fixtures that load models
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def expected(folders):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    names = [model.load_adapter(folders / name) for name in ("entities", "intent")]
    return model.predict(TEXTS, adapters=names)


def assert_lines(out, expected, names=("entities", "intent")):
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    for row, line in enumerate(lines):
        assert set(line["results"]) == set(names)
        for name in names:
            assert without_scores(line["results"][name]) == without_scores(expected[name][row])


def without_scores(result):
    rows = result if isinstance(result, list) else [result]
    return [{key: value for key, value in row.items() if key != "score"} for row in rows]


def test_files_of_lines_and_of_json(run, folders, expected, tmp_path):
    (tmp_path / "a.txt").write_bytes("\n".join(TEXTS[:2]).encode() + b"\n")
    rows = [json.dumps({"body": text, "id": number}) for number, text in enumerate(TEXTS[2:])]
    (tmp_path / "b.jsonl").write_text("\n".join(rows) + "\n")
    apps = ["--adapter", folders / "entities", "--adapter", folders / "intent"]
    options = [*apps, "--backbone", folders / "backbone", "--column", "body"]
    code, out, err = run("predict", *options, tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert code == 0 and err == ""
    assert_lines(out, expected)


def test_bf16_is_that_of_a_model_with_such_weights(run, folders, expected, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    options = ["--adapter", folders / "intent", "--backbone", folders / "backbone", tmp_path / "a.txt"]
    half = MtpfModel.from_pretrained(folders / "backbone", dtype=torch.bfloat16).eval()
    half.load_adapter(folders / "intent")
    code, out, _ = run("predict", *options, "--precision", "bf16")
    results = [json.loads(line)["results"]["intent"] for line in out.splitlines()]
    assert code == 0 and results == half.predict(TEXTS, ["intent"])["intent"]
    assert results != expected["intent"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", b"\xef\xbb\xbf" + "\n".join(TEXTS).encode()),
        ("a.txt", "\n".join(TEXTS).encode("utf-16")),
        ("a.txt.gz", gzip.compress("\n".join(TEXTS).encode(), mtime=0)),
        ("a.JSONL", b"\xef\xbb\xbf" + b"\n".join(json.dumps({"Utterance": text}).encode() for text in TEXTS)),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("a.json", json.dumps([{"data": {"text": text}} for text in TEXTS], indent=1).encode()),
        ("a.csv", b"sep=;\nid;text\n" + b"".join(f"1;{text}\n".encode() for text in TEXTS)),
        ("a.tsv", b"\n".join(f"{text}\t".encode() for text in ["text", *TEXTS])),
        ("a.txt", b"\n".join(f"__label__x {text}".encode() for text in TEXTS)),
        ("a.jsonl", b"\n".join(json.dumps({"tokens": text.split(" ")}).encode() for text in TEXTS)),
    ],
)
def test_files_that_adapt_reads_are_read(run, folders, expected, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    apps = ["--adapter", folders / "entities", "--adapter", folders / "intent"]
    code, out, err = run("predict", *apps, "--backbone", folders / "backbone", tmp_path / name)
    assert code == 0, err
    assert_lines(out, expected)


def test_an_app_on_the_packaged_encoder_needs_no_backbone(run, tmp_path):
    from modeling_mtpf.data.backbones import load_backbone

    model = load_backbone("packaged")
    model.add_adapter("intent", LoraSettings(r=4))
    model.heads["intent"] = AdapterHead("text-classification", ["yes", "no"], 384)
    model.save_adapter(tmp_path / "intent", "intent")
    (tmp_path / "a.txt").write_text("Ada\n")
    outputs = [
        run("predict", "--adapter", tmp_path / "intent", *more, tmp_path / "a.txt")
        for more in ((), ("--backbone", "packaged"))
    ]
    assert outputs[0] == outputs[1] and outputs[0][0] == 0 and "intent" in outputs[0][1], outputs


def test_all_labels_and_a_threshold(run, folders, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(folders / "intent")
    expected = model.predict(TEXTS, adapters=["intent"], top_k=None, threshold=0.2)["intent"]
    assert 0 < sum(map(len, expected)) < 5 * len(TEXTS)
    options = ["--adapter", folders / "intent", "--backbone", folders / "backbone", tmp_path / "a.txt"]
    code, out, _ = run("predict", *options, "--top_k", "0", "--threshold", "0.2")
    assert code == 0
    assert_lines(out, {"intent": expected}, ["intent"])
    threshold = sorted(row["score"] for row in model.predict(TEXTS, adapters=["intent"])["intent"])[2] - 1e-6
    best = model.predict(TEXTS, adapters=["intent"], threshold=threshold)["intent"]
    assert {row["label"] is None for row in best} == {True, False}
    _, out, _ = run("predict", *options, "--threshold", threshold)
    assert_lines(out, {"intent": best}, ["intent"])


@pytest.mark.hub
def test_a_published_app_brings_its_backbone(run, hub, folders, expected, tmp_path, monkeypatch):
    push_backbone(folders / "backbone", "mtpf/encoder")
    commit = hub.head("mtpf/encoder")
    push_adapter(folders / "entities", "mtpf/entities", backbone_id="mtpf/encoder")
    hub.commit("mtpf/encoder", {"README.md": b"moved on"})
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    at = f"mtpf/entities@{hub.head('mtpf/entities')}"
    code, out, err = run("predict", "--adapter", at, tmp_path / "a.txt")
    assert code == 0, err
    assert_lines(out, expected, ["entities"])
    assert any(commit in call.path for call in hub.requests)


def command(folders, *more) -> list[str]:
    options = ["--adapter", folders / "entities", "--backbone", folders / "backbone", *more]
    return [sys.executable, "-m", "modeling_mtpf.cli", "predict", *map(str, options)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_error(folders):
    line = " ".join(command(folders, "--lines_ahead", "4"))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"yes 'Ada met Noor in London.' | head -2000 | {line} | head -3; "
         "echo ${PIPESTATUS[2]} >&2"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 3 and done.stderr.split() == ["0"]


@pytest.mark.slow
def test_answers_come_while_the_input_is_open(folders):
    with subprocess.Popen(
        command(folders, "--lines_ahead", "1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        for text in TEXTS:
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdin.close()
        assert process.stdout.read() == "" and process.wait(60) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "{entities}", "{file}"], "entities records no published backbone; give one with --backbone"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "no/file"], "There is no file no/file"),
        (["--adapter", "./no/app", "--backbone", "{backbone}", "{file}"], "not a Hub id of the form"),
        (["--adapter", "{entities}", "--backbone", "{entities}", "{file}"], "The backbone .* cannot be loaded"),
        (["--adapter", "{ner}", "--backbone", "{backbone}", "{file}"], "is a family's LoRA, not an app"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "{bytes}"], "bytes.txt, line 2 is not UTF-8"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "{json}"], "line 2 has no 'text'; it has: body"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "{csv}"], "line 3 has 3 fields, but the header"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "{twice}"], "line 2 .* it names 'text' twice"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "--column", "x", "{csv}"], "no column 'x'; it has: text"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "--encoding", "x", "{csv}"], "no text encoding 'x'"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "--lines_ahead", "0"], "--lines_ahead is 0"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "--top_k", "-1"], "--top_k is -1; it must be"),
        (["--adapter", "{entities}", "--backbone", "{backbone}", "--threshold", "5"], "--threshold is 5.0; it must"),
        (["--adapter", "{entities}", "--format", "label-studio", "--top_k", "3"], "label-studio belongs to .* leave out --top_k"),
        (["{file}"], "required: --adapter"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(run, folders, tmp_path, arguments, message):
    (tmp_path / "a.txt").write_text("Ada\n")
    (tmp_path / "bytes.txt").write_bytes(b"Ada\n\xff\xfe\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "Ada"}\n{"body": "x"}\n')
    (tmp_path / "rows.csv").write_text("text,n\nAda,1\nAda,1,2\n")
    (tmp_path / "twice.jsonl").write_text('{"text": "Ada"}\n{"text": "a", "text": "b"}\n')
    sources = {name: tmp_path / f"{file}" for name, file in (("csv", "rows.csv"), ("twice", "twice.jsonl"))}
    sources |= {"file": tmp_path / "a.txt", "bytes": tmp_path / "bytes.txt", "json": tmp_path / "rows.jsonl"}
    sources |= {name: folders / name for name in ("entities", "ner", "backbone")}
    code, out, err = run("predict", *(argument.format(**sources) for argument in arguments))
    assert code == 2 and "Traceback" not in err and re.search(message, err), err
    good = [json.loads(line)["text"] for line in out.splitlines()]
    assert good == (
        ["Ada"] if re.search("line [23]", err) else []
    )  # what came before the bad line has its result


def test_help_has_examples(run):
    code, out, _ = run("predict", "--help")
    assert code == 0 and all(word in out for word in ("examples:", "--adapter", "--column", "--lines_ahead"))
