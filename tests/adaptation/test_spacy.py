"""The spaCy component: the app's entities at their exact characters, alone, in batches and from disk."""

import pytest
from conftest import SENTENCES

spacy = pytest.importorskip("spacy", reason="needs the extra spacy: pip install 'mtpf[spacy]'")

from modeling_mtpf import AdapterError, MtpfModel  # noqa: E402
from modeling_mtpf import spacy as component  # noqa: E402, F401  it registers itself

TEXTS = [*SENTENCES, "", *(text.replace(" ", "/") for text in SENTENCES), *(text[:20] for text in SENTENCES)]


@pytest.fixture
def pipeline(folders):
    nlp = spacy.blank("en")
    config = {"app": str(folders / "entities"), "backbone": str(folders / "backbone")}
    nlp.add_pipe("mtpf_ner", config=config)
    return nlp


def test_an_app_is_needed():
    with pytest.raises(AdapterError, match="mtpf_ner needs an app: nlp.add_pipe"):
        spacy.blank("en").add_pipe("mtpf_ner")


def spans(doc) -> list[tuple[int, int, str]]:
    return [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]


def test_entities_are_those_of_predict(pipeline, folders, tmp_path):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    name = model.load_adapter(folders / "entities")
    results = model.predict(TEXTS, adapters=[name])[name]
    expected = [[(r["start"], r["end"], r["entity_group"]) for r in rows] for rows in results]
    assert sum(map(len, expected)) > 2
    docs = [pipeline(text) for text in TEXTS]
    assert [spans(doc) for doc in docs] == expected
    assert [doc.text for doc in docs] == TEXTS
    assert [spans(doc) for doc in pipeline.pipe(TEXTS, batch_size=2)] == expected
    pipeline.to_disk(tmp_path / "nlp")
    assert spans(spacy.load(tmp_path / "nlp")(TEXTS[0])) == expected[0]


def test_tokens_are_split_at_borders_and_entities_give_way(pipeline):
    add = pipeline.get_pipe("mtpf_ner")._add
    doc = spacy.blank("en")("Call Paris/Rome with Ada today")
    doc.ents = [doc.char_span(21, 24, label="OLD"), doc.char_span(0, 4, label="VERB")]
    rows = [
        {"start": 5, "end": 10, "entity_group": "LOC"},
        {"start": 11, "end": 13, "entity_group": "LOC"},
        {"start": 21, "end": 30, "entity_group": "PER"},
    ]
    assert spans(add(doc, rows)) == [(0, 4, "VERB"), (5, 10, "LOC"), (11, 13, "LOC"), (21, 30, "PER")]
    assert doc.text == "Call Paris/Rome with Ada today"
