"""Files of texts to predict: read as the data of apps is, or refused with file, line and reason."""

import gzip
import io
import json

import pandas
import pytest

from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.data.text_files import CONLL
from modeling_mtpf.data.texts import read_text_lines, read_texts
from modeling_mtpf.errors import DataError

TEXTS = ["Ada is in Rome .", "Noor , too"]
TAGS = [["B-PER", "O", "O", "B-LOC", "O"], ["B-PER", "O", "O"]]
LINES = "__label__x Ada is in Rome .\n__label__x __label__y\tNoor , too\n"


def conll(column: str = "{word} {tag}") -> str:
    rows = (zip(text.split(), tags, strict=True) for text, tags in zip(TEXTS, TAGS, strict=True))
    return "\n".join("".join(f"{column.format(word=w, tag=t)}\n" for w, t in row) for row in rows)


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMS = {
    "fastText": ("a.txt", LINES, None),
    "fastText, packed": ("a.txt.gz", gzip.compress(LINES.encode(), mtime=0), None),
    "no labels": ("a.txt", "".join(f"{text}\n" for text in TEXTS), "body"),
    "table without names": ("a.csv", "".join(f'x,"{text}"\n' for text in TEXTS), "2"),
    "tsv without names": ("a.tsv", "".join(f"x\t{text}\n" for text in TEXTS), "2"),
    "spaCy": ("a.jsonl", lines(*([text, {"entities": []}] for text in TEXTS)), None),
    "GLiNER": ("a.json", json.dumps([{"tokenized_text": text.split(), "ner": []} for text in TEXTS]), None),
    "words": ("a.jsonl", lines(*({"tokens": text.split(), "ner_tags": []} for text in TEXTS)), None),
    "named words": ("a.jsonl", lines(*({"parts": text.split(), "n": 1} for text in TEXTS)), "parts"),
    "Prodigy": ("a.jsonl", lines(*({"text": t, "tokens": [{"text": t}], "answer": "reject"} for t in TEXTS)), None),
    **{f"CoNLL, {ending}": (f"eng{ending}", conll(), "text") for ending in CONLL},
    "CoNLL, columns": ("a.bio", conll("O {word} {tag}"), "2"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, column", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_texts(tmp_path, name, content, column):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(read_texts(str(path), column)) == TEXTS


def test_parquet_and_lines_of_a_pipe(tmp_path):
    pandas.DataFrame({"text": TEXTS, "n": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert list(read_texts(str(tmp_path / "a.parquet"))) == TEXTS
    assert list(read_text_lines(io.BufferedReader(io.BytesIO(LINES.encode())), "standard input")) == TEXTS


@pytest.mark.parametrize(
    "name, content, column, message",
    [
        ("a.xlsx", b"PK\x03\x04\x14\x00\x06\x00", None, "a.xlsx, line 1 has zero bytes: it is not text"),
        ("a.txt", b"PK\x03\x04\x14\x00\x06\x00", None, "a.txt, line 1 has zero bytes"),
        ("a.parquet", b"PAR1\x15\x04", None, "a.parquet cannot be read as parquet"),
        ("a.conll", b"1 Ada B-PER\n2 is O\n", None, r"a.conll has numbers .*\(in predict --column\)"),
        ("a.conll", b"Ada\n", None, "a.conll, line 1: 'Ada' is not a token with a tag"),
        ("a.jsonl", b'[["a"], {}]\n', None, "not an object with keys"),
        ("a.jsonl", b'{"text": "a", "n": 1}\n', "n", "line 1: 'n' is int, not a string"),
    ],
)
@pytest.mark.parametrize("encoding", [None, "latin-1"])
def test_what_is_not_text_says_where_and_why(tmp_path, name, content, column, message, encoding):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_texts(str(tmp_path / name), column, encoding))


def test_fitting_reads_the_same_lines(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    data = load_app_data(tmp_path / "a.txt", "tc", validation=tmp_path / "a.txt")
    assert data.train.inputs == list(read_texts(str(tmp_path / "a.txt")))
    assert data.train.labels == [["x"], ["x", "y"]] and data.multi_label
