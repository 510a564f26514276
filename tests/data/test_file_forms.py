"""Files as people and tools write them: each is read rightly, or refused with file, line and reason."""

import gzip
import json

import pytest

from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.data.sources import TextStream, open_source, stream_source
from modeling_mtpf.data.text_files import read_file
from modeling_mtpf.errors import DataError

WANTED = [("Wake me at 7", "alarm"), ("Play jazz", "music"), ("Stop, please", "music"), ("Up at 8", "alarm")]
SENTENCES = [(["Ada", "is", "in", "Rome"], ["B-PER", "O", "O", "B-LOC"]), (["#", "Noor"], ["O", "B-PER"])]


def lines(*rows: str, end: str = "\n") -> str:
    return "".join(row + end for row in rows)


def table(delimiter: str = ",", header: str | None = "text{}label") -> str:
    quoted = [(f'"{text}"' if delimiter in text else text, label) for text, label in WANTED]
    head = [header.format(delimiter)] if header else []
    return lines(*head, *(delimiter.join(row) for row in quoted))


def json_lines(text="text", label="label") -> str:
    return lines(*(json.dumps({text: value, label: name}) for value, name in WANTED))


TEXT_FORMS = {
    "comma": ("a.csv", table(), {}),
    "semicolon": ("a.csv", table(";"), {}),
    "tabs in csv": ("a.csv", table("\t"), {}),
    "bar": ("a.csv", table("|"), {}),
    "tsv": ("a.tsv", table("\t"), {}),
    "tsv of pandas": ("a.tsv", lines("text\tlabel", *(f'"{t}"\t{label}' for t, label in WANTED)), {}),
    "upper case": ("A.CSV", table(), {}),
    "carriage returns": ("a.csv", table().replace("\n", "\r\n"), {}),
    "index of pandas": ("a.csv", lines(",text,label", *(f'{i},"{t}",{x}' for i, (t, x) in enumerate(WANTED))), {}),
    "row names of R": ("a.csv", lines('"","text","label"', *(f'"{i}","{t}","{x}"' for i, (t, x) in enumerate(WANTED))), {}),
    "sep of Excel": ("a.csv", "sep=;\n" + table(";"), {}),
    "blank first lines": ("a.csv", "\n\r\n" + table(), {}),
    "empty last column": ("a.csv", lines("text;label;", *(f"{t};{x};" for t, x in WANTED)), {}),
    "blanks behind commas": ("a.csv", lines("text, label", *(f'"{t}", {x}' for t, x in WANTED)), {}),
    "quotes behind blanks": ("a.csv", lines("text; label", *(f'"{t}"; "{x}"' for t, x in WANTED)), {}),
    "case of names": ("a.csv", table(header="Text{} Label"), {}),
    "utterance": ("a.csv", table(header="utterance{}intent"), {}),
    "named": ("a.csv", table(header="body{}team"), {"text": "body", "label": "Team"}),
    "named next to usual": ("a.csv", lines("text,label,team", *(f'"{t}",x,{x}' for t, x in WANTED)), {"label": "team"}),
    "numbered": ("a.csv", table(header=None), {"text": "1", "label": "2"}),
    "numbered tsv": ("a.tsv", lines(*(f"{x}\t{t}" for t, x in WANTED)), {"text": "2", "label": "1"}),
    "gzip": ("a.csv.gz", gzip.compress(table().encode(), mtime=0), {}),
    "mark": ("a.csv", b"\xef\xbb\xbf" + table().encode(), {}),
    "utf-16": ("a.csv", table("\t").encode("utf-16"), {}),
    "json lines": ("a.jsonl", json_lines(), {}),
    "ndjson": ("a.ndjson", json_lines(), {}),
    "json lines, mark": ("a.jsonl", b"\xef\xbb\xbf" + json_lines().encode(), {}),
    "json lines, gzip": ("a.JSONL.gz", gzip.compress(json_lines("Utterance", "intent").encode(), mtime=0), {}),
    "json": ("a.json", json.dumps([{"text": t, "label": x} for t, x in WANTED], indent=1), {}),
    "json with a head": ("a.json", json.dumps({"version": 1, "data": [{"text": t, "label": x} for t, x in WANTED]}, indent=1), {}),
    "label and its name": ("a.jsonl", lines(*(json.dumps({"text": t, "label": 3, "label_text": x}) for t, x in WANTED)), {}),
    "fastText": ("a.txt", lines(*(f"__label__{x} {t}" for t, x in WANTED)), {}),
    "label first": ("a.txt", lines(*(f"{x} {t}" for t, x in WANTED)), {"label": "1", "text": "2"}),
    "label first, tab": ("a.txt", lines(*(f"{x}\t{t}" for t, x in WANTED)), {"label": "1", "text": "2"}),
}  # fmt: skip


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(data) -> list:
    parts = [part for part in (data.train, data.validation) if part]
    return sorted(pair for part in parts for pair in zip(part.inputs, part.labels, strict=True))


@pytest.mark.parametrize("name, content, columns", TEXT_FORMS.values(), ids=TEXT_FORMS)
def test_texts_with_labels(tmp_path, name, content, columns):
    data = load_app_data(write(tmp_path, name, content), "tc", columns=columns)
    assert rows_of(data) == sorted(WANTED)


def conll(*columns: int, gap: str = "\t") -> str:
    """Sentences with columns: 0 a number, 1 the word, 2 its part of speech, 3 its tag, 4 another layer's."""
    return "\n".join(
        lines(
            *(
                gap.join([str(n), word, "NN", tag, "O"][c] for c in columns)
                for n, (word, tag) in enumerate(zip(*sentence, strict=True), start=1)
            )
        )
        for sentence in SENTENCES
    )


WORD_FORMS = {
    "tabs": ("a.conll", conll(1, 3), {}),
    "blanks": ("a.bio", conll(1, 3, gap=" "), {}),
    "columns between": ("a.conll", conll(1, 2, 3), {}),
    "tags first": ("a.conll", conll(3, 1), {"tokens": "2", "tags": "1"}),
    "numbered": ("a.conll", conll(0, 1, 3, 4), {"tokens": "2", "tags": "3"}),
    "two layers": ("a.conll", conll(1, 3, 4), {"tokens": "1", "tags": "2"}),
    "comments": ("a.tsv", "# a comment\n#\n# newdoc 1\n\n" + conll(1, 3), {}),
    "packed, upper case": ("a.CONLL.gz", gzip.compress(conll(1, 3).encode(), mtime=0), {}),
    "annotated": ("a.annotated", conll(1, 3), {}),
    "utf-16": ("a.txt", conll(1, 3).encode("utf-16"), {}),
    "json lines": ("a.jsonl", lines(*(json.dumps({"tokens": w, "ner_tags": t}) for w, t in SENTENCES)), {}),
    "parts of speech": (
        "a.jsonl",
        lines(*(json.dumps({"words": w, "tags": ["N"] * len(w), "ner": t}) for w, t in SENTENCES)),
        {"tags": "ner"},
    ),
}


@pytest.mark.parametrize("name, content, columns", WORD_FORMS.values(), ids=WORD_FORMS)
def test_words_with_tags(tmp_path, name, content, columns):
    data = load_app_data(write(tmp_path, name, content), "ner", columns=columns)
    assert rows_of(data) == sorted(SENTENCES)


REFUSED = {
    "comma in a text": ("tc", "a.csv", "text,label\nPlay jazz,music\nwhere is it,track,a\n",
        r"a.csv, line 3 has 3 fields, but the header has 2 \(text, label\): 'where is it,track,a'.*in quotes"),
    "too few": ("tc", "a.csv", "text,label\n\"two\nlines\",a\nalone\n", "a.csv, line 4 has 1 fields"),
    "tab in a text": ("tc", "a.tsv", "text\tlabel\na\tb\tc\n", "a.tsv, line 2 has 3 fields.*a tab"),
    "open quote": ("tc", "a.csv", "text,label\na,b\n\"c,d\ne,f\n", "a.csv, line 3: unexpected end of data"),
    "letters after a quote": ("tc", "a.csv", "text,label\n\"a\" b,c\n", "a.csv, line 2: ',' expected after"),
    "one name twice": ("tc", "a.csv", "text,label,text\na,b,c\n", "line 1: two columns are named 'text'"),
    "no names": ("tc", "a.csv", "Play jazz,music\nUp,alarm\n", "no column 'text' or .*it has: Play jazz, music"),
    "two texts": ("tc", "a.csv", "sentence,query,label\na,b,c\n", "columns 'sentence' and 'query', which may each"),
    "two labels": ("tc", "a.csv", "text,label,intent\na,b,c\n", "'label' and 'intent'.*--columns.label intent"),
    "latin-1": ("tc", "a.csv", "text,label\na,b\né,c\n".encode("latin-1"), "a.csv, line 3 is not UTF-8.*--encoding"),
    "utf-16 without a mark": ("tc", "a.csv", "text,label\n".encode("utf-16-le"), "a.csv.*(zero bytes|no column)"),
    "a key twice": ("tc", "a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a", "text": "b"}\n',
        "a.jsonl, line 2 is not valid JSON: it names 'text' twice"),
    "half a character": ("tc", "a.jsonl", '{"text": "a \\ud83d", "label": "b"}\n',
        r"a.jsonl, line 1 .*\\ud83d is half of a surrogate pair"),
    "another key later": ("tc", "a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', "line 2 has no 'label'; it has: text"),
    "list of texts": ("tc", "a.json", '["a", "b"]', r"a.json, line 1 is \['a', 'b'\], not an object"),
    "packed, cut off": ("tc", "a.csv.gz", gzip.compress(b"text,label\na,b\n", mtime=0)[:-9], "a.csv.gz is damaged"),
    "lines of text": ("tc", "a.txt", "Play jazz\n", "a.txt, line 1: 'Play jazz' does not begin with __label__"),
    "carriage returns alone": ("tc", "a.csv", "text,label\ra,b\rc,d\r", "a.csv, line 1 has carriage returns inside; save it"),
    "carriage returns alone, tsv": ("tc", "a.tsv", "text\tlabel\ra\tb\r", "a.tsv, line 1 has carriage returns inside"),
    "a long first field": ("tc", "a.csv", f'"{"a" * 140_000}",b\nx,y\n', "a.csv has no column 'text'.* a{60}, b. Name"),
    "zero bytes": ("tc", "a.txt", "__label__a b\0\n", "a.txt, line 1 has zero bytes"),
    "numbers first": ("ner", "a.conll", conll(0, 1, 3, 4),
        r"a.conll has numbers in its first column \('1  Ada  B-PER  O'\).*--columns.tokens 2 --columns.tags 3"),
    "two layers": ("ner", "a.conll", conll(1, 3, 4), "tags in its columns 2 and 3 .*--columns.tags 2"),
    "token with a blank": ("ner", "a.conll", "Ada B-PER\nNew York B-LOC\n",
        "a.conll, line 2: 'New York B-LOC' has 3 columns, but line 1 has 2"),
    "tags first": ("ner", "a.conll", conll(3, 1), "line 1: Tag 'Ada' is not of a known scheme.*--columns.tags"),
    "parts of speech": ("ner", "a.jsonl", json.dumps({"tokens": ["a"], "tags": ["N"], "ner": ["O"]}),
        "columns 'tags' and 'ner', which may each hold the tags; choose one with --columns.tags"),
    "csv": ("ner", "a.csv", "tokens,tags\n", "a CSV file cannot hold lists of words"),
}  # fmt: skip


@pytest.mark.parametrize("family, name, content, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_says_where_and_why(tmp_path, family, name, content, message):
    with pytest.raises(DataError, match=message):
        load_app_data(write(tmp_path, name, content), family)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"txt": "a"}, "columns.txt is nothing that tc data has; did you mean 'text'"),
        ({"text": "txt"}, "no column 'txt'; did you mean 'text'. it has: text, label"),
        ({"tokens": "text"}, "columns.tokens is nothing that tc data has"),
    ],
)
def test_columns_that_there_are_not(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        load_app_data(write(tmp_path, "a.csv", table()), "tc", columns=columns)


def test_an_encoding_can_be_named(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\né,b\nà,c\nî,b\n".encode("latin-1"))
    assert set(load_app_data(path, "tc", encoding="latin-1").train.inputs) <= {"é", "à", "î"}
    for name in ("latin-9000", "zip"):
        with pytest.raises(DataError, match=f"There is no text encoding '{name}'"):
            load_app_data(path, "tc", encoding=name)


@pytest.mark.parametrize(
    "names",
    [
        ("eng.train", "eng.testa", "eng.testb"),
        ("train.tsv", "devel.tsv", "test.tsv"),
        ("train.CONLL.gz", "development.conll", "wnut.test.annotated"),
    ],
)
def test_splits_by_the_names_of_files(tmp_path, names):
    for name in names:
        write(
            tmp_path,
            name,
            conll(1, 3).encode() if "gz" not in name else gzip.compress(conll(1, 3).encode(), mtime=0),
        )
    data = load_app_data(tmp_path, "ner")
    assert len(data.train) == len(data.validation) == len(data.test) == 2 and not data.held_out


def test_files_that_belong_together_line_by_line(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        write(tmp_path / split, "seq.in", lines(*(" ".join(words) for words, _ in SENTENCES)))
        write(tmp_path / split, "seq.out", lines(*(" ".join(tags) for _, tags in SENTENCES)))
        write(tmp_path / split, "label", lines("one", "two"))
    data = load_app_data(tmp_path, "ner")
    assert (
        data.train.inputs == [words for words, _ in SENTENCES] and len(data.test) == len(data.validation) == 2
    )
    assert load_app_data(tmp_path, "tc").train.labels == ["one", "two"]
    write(tmp_path / "test", "label", "one\n")
    with pytest.raises(DataError, match="seq.in has 2 lines, but label has 1; line by line"):
        load_app_data(tmp_path, "tc")
    write(tmp_path / "test", "seq.out", "O O O\nO O\n")
    with pytest.raises(DataError, match="seq.in, line 1 has 4 tokens but 3 tags"):
        load_app_data(tmp_path, "ner")


# Sources of training: mapped, streamed, and with one bad line


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", ",text\n0,NA\n1,\"a, b\"\n"),
        ("a.csv", "sep=;\ntext;n\nNA;1\na, b;2\n"),
        ("a.tsv", "text\tn\nNA\t1\na, b\t2\n"),
        ("a.CSV.gz", gzip.compress(b"text\nNA\n\"a, b\"\n", mtime=0)),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "NA"}\n{"text": "a, b"}\n'),
        ("a.ndjson", '{"text": "NA"}\n{"text": "a, b"}\n'),
        ("a.txt", "NA\na, b\n".encode("utf-16")),
        ("a.txt", b"\xef\xbb\xbfNA\na, b\n"),
    ],
)  # fmt: skip
def test_sources_of_training_read_the_same_forms(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert open_source(path, {"text": "text"}).to_list() == [{"text": "NA"}, {"text": "a, b"}]
    assert [row["text"] for row in stream_source(path)] == ["NA", "a, b"]
    assert [row.text for row in TextStream(path)] == ["NA", "a, b"]
    assert [row["text"] for _, row in read_file(path)] == ["NA", "a, b"]  # what `mtpf predict` reads


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "anchor,positive\na,b\na,b,c\n", "a.csv, line 3 has 3 fields, but the header has 2"),
        ("a.csv", "text,n\na,b\na\n", "a.csv, line 3 has 1 fields"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "text": "b"}\n',
            "a.jsonl, line 2 .*it names 'text' twice",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', "a.jsonl, line 2 .*half of a surrogate pair"),
    ],
)
def test_sources_of_training_shift_nothing(tmp_path, name, content, message, caplog, capfd):
    path = write(tmp_path, name, content)
    columns = {"anchor": "text", "positive": "text"} if "anchor" in content else {"text": "text"}
    for read in (lambda: open_source(path, columns), lambda: list(TextStream(path, next(iter(columns))))):
        with pytest.raises(DataError, match=message):
            read()
    assert not caplog.text and str(tmp_path) not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [("a.txt", "é\nà\n"), ("a.csv", "text\né\nà\n"), ("a.jsonl", '{"text": "é"}\n{"text": "à"}\n')],
)
def test_a_corpus_of_another_encoding(tmp_path, name, content):
    path = write(tmp_path, name, content.encode("latin-1"))
    assert [row.text for row in TextStream(path, encoding="latin-1")] == ["é", "à"]
    with pytest.raises(DataError, match=f"{name}, line [12] is not UTF-8.*--encoding latin-1"):
        list(TextStream(path))


def test_a_changed_file_is_read_again(tmp_path):
    for text in ("one", "other"):
        path = write(tmp_path, "a.csv", f"text\n{text}\n")
        assert open_source(path, {"text": "text"}).to_list() == [{"text": text}]
