"""Cards: their metadata, what they tell, and every example in them, run as it stands."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData

from hub_cards import adapter_card, backbone_card, training_summary
from modeling_mtpf.hub import push_adapter, push_backbone
from modeling_mtpf.hub.client import validate_card
from modeling_mtpf.hub.files import check_text

pytestmark = pytest.mark.hub

BACKBONE, ENTITIES, INTENT, NER = "mtpf/encoder", "mtpf/entities", "mtpf/intent", "mtpf/encoder-ner"
RESULTS = [
    {"task": "Banking77", "metric": "accuracy", "value": 0.796, "family": "tc", "n_test": 3080, "seed": 0}
]


@pytest.fixture
def cards(hub, folders):
    """Publish everything; return the cards by repo."""
    push_backbone(folders / "backbone", BACKBONE, results=RESULTS)
    for repo in (ENTITIES, INTENT, NER):
        folder = folders / {ENTITIES: "entities", INTENT: "intent", NER: "ner"}[repo]
        push_adapter(folder, repo, backbone_id=BACKBONE)
    return {repo: hub.files(repo)["README.md"].decode() for repo in (BACKBONE, ENTITIES, INTENT, NER)}


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


RUN_BLOCKS = """
import contextlib, io, json, os
os.chdir({folder!r})
done = []
for repo, block in json.loads({blocks!r}):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, repo, "exec"), {{"__name__": "__main__"}})
    done.append([repo, out.getvalue()])
print(json.dumps(done))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", [False, True])
def test_every_example_runs_as_it_stands(hub, cards, fresh_process, tmp_path, package):
    todo = [(repo, block) for repo, card in cards.items() for block in blocks(card)]
    for _, block in todo:  # every loader names a revision of every repo
        loads = re.findall(
            r"(?:from_pretrained(?!\(pull)|load_adapter|hf_hub_download|pull|SentenceTransformer)\(", block
        )
        assert block.count("revision=") + block.count('"revision":') == len(loads), block
    todo = [(repo, block) for repo, block in todo if ("modeling_mtpf" in block) == package]
    assert len(todo) == (4 if package else 3 + 2 * 5 + 4)
    code = RUN_BLOCKS.format(folder=str(tmp_path), blocks=json.dumps(todo))
    root = str(Path(__file__).parents[2])
    done = fresh_process(code, package=package, **{**hub.environment(), "PYTHONPATH": root})
    assert [repo for repo, _ in done] == [repo for repo, _ in todo]
    shown = {repo: [out for name, out in done if name == repo] for repo in cards}
    assert any("intent " in out for out in shown[INTENT]) and any(
        "entities" in out for out in shown[ENTITIES]
    )


def test_metadata_is_valid_and_complete(hub, cards):
    for repo, text in cards.items():
        validate_card(repo, ModelCard(text))  # asks the Hub, as every push does
    data = {repo: ModelCard(text).data for repo, text in cards.items()}
    backbone, entities, intent, ner = (data[repo] for repo in (BACKBONE, ENTITIES, INTENT, NER))
    assert (backbone.base_model, backbone.library_name) == (
        "sentence-transformers/all-MiniLM-L6-v2",
        "transformers",
    )
    assert (
        backbone.to_dict()["base_model_relation"] == "finetune"
        and backbone.pipeline_tag == "feature-extraction"
    )
    (result,) = backbone.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("Banking77", "accuracy", 0.796)
    for card in (entities, intent, ner):
        known = card.to_dict()
        assert (known["base_model"], known["base_model_relation"]) == (BACKBONE, "adapter")
        assert (card.library_name, card.license, card.language) == ("peft", "apache-2.0", "en")
        assert {"mtpf", "lora"} <= set(card.tags) and "datasets" not in known
    tasks = ("token-classification", "text-classification", "feature-extraction")
    assert tuple(card.pipeline_tag for card in (entities, intent, ner)) == tasks
    assert entities.metrics == ["f1"] and entities.eval_results[0].metric_value == 0.8
    assert intent.to_dict()["widget"][0]["text"] and intent.eval_results[0].metric_type == "accuracy"
    assert ner.eval_results is None and "widget" not in ner.to_dict()  # training losses are no results


def test_cards_are_finished_and_name_no_local_path(hub, cards, folders):
    for repo, text in cards.items():
        check_text(CommitOperationAdd("README.md", text.encode()))
        assert not re.search(r"More Information Needed|<this repo>|<the backbone>|<its commit>", text)
        assert not re.search(r"None|[Uu]ndefined|\bnan\b", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        assert repo in text and str(folders) not in text
        assert text.count("```") % 2 == 0 and "arxiv.org/abs/2510.07566" in text and "## Licence" in text
        assert "\n\n\n\n" not in text
    assert (
        "`B-PER`" in cards[ENTITIES]
        and "strict F1 over whole entities" in cards[ENTITIES]
        and "| entity_f1 | 0.8 |" in cards[ENTITIES]
    )
    assert hub.head(BACKBONE) in cards[NER] and "assumptions of this implementation" in cards[BACKBONE]
    assert "| Banking77 | accuracy | 0.796 | 3080 |" in cards[BACKBONE]


def test_an_example_with_quotes_is_still_python():
    text = 'He said: "now", \\ and left\n'
    task = {"kind": "text-classification", "labels": ["a", "b"], "name": "app", "examples": [text]}
    card = str(adapter_card(task, {"r": 4, "lora_alpha": 8, "target_modules": []}))
    for block in blocks(card):
        compile(block, "block", "exec")
    assert json.dumps(text) in card and ModelCard(card).data.to_dict()["widget"] == [{"text": text}]


def test_overrides_and_hub_datasets(hub, folders):
    options = {"license": "cc-by-4.0", "language": ["de", "en"], "datasets": ["conll2003"]}
    push_backbone(folders / "backbone", BACKBONE, **options)
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE, **options)
    for repo in (BACKBONE, ENTITIES):
        data = ModelCard(hub.files(repo)["README.md"].decode()).data
        assert (data.license, data.language, data.datasets) == ("cc-by-4.0", ["de", "en"], ["conll2003"])


def record(tmp_path, start: str) -> dict:
    settings = {"batch_size": 4, "max_length": 32, "weight": 1.0, "lora": {"r": 4}}
    pairs = [str(tmp_path / "pairs"), "sentence-transformers/all-nli"]
    return {
        "regime": "tc",
        "recipe": {
            "backbone": start,
            "families": {"tc": {**settings, "pairs": pairs}},
            **{"learning_rate": 5e-5, "adapter_learning_rate": 5e-4, "weight_decay": 0.01, "warmup": 0.05},
            **{"steps": 3, "seed": 0},
        },
        "data": {"tc": {str(tmp_path / "pairs" / "mail.jsonl"): {}, "sentence-transformers/all-nli": {}}},
        "first": {"loss/tc": 1.0},
        "last": {"loss/tc": 0.5},
        "versions": {"torch": "2"},
    }


def test_a_summary_of_a_run_has_no_local_path(tmp_path):
    (tmp_path / "encoder").mkdir()
    local = training_summary(record(tmp_path, str(tmp_path / "encoder")), ["tc"])
    assert str(tmp_path) not in json.dumps(local) and local["start"] is None
    assert local["datasets"] == ["sentence-transformers/all-nli"]
    assert local["families"][0]["data"] == "mail, sentence-transformers/all-nli"
    text = str(backbone_card(local))
    assert "an encoder that it does not name" in text and "base_model" not in text.split("---")[1]
    assert ["tc: weight λ of the loss", 1.0] in local["assumptions"]
    known = training_summary(record(tmp_path, "distilbert-base-uncased"), ["tc"])
    assert backbone_card(known).data.base_model == "distilbert-base-uncased"


def test_a_trained_backbone_without_its_record_is_not_called_untrained():
    text = str(backbone_card(None, config={"mtpf": {"regime": "tpl"}}))
    assert "was not published with it" in text and "Nothing was trained" not in text


def test_an_untrained_backbone_and_an_app_without_metrics_say_so():
    text = str(backbone_card(None))
    assert "Nothing was trained" in text and "has not been evaluated" in text and "model-index" not in text
    task = {"kind": "text-classification", "labels": ["a", "b"], "name": "spam", "dataset": "sms_spam"}
    card = adapter_card({**task, "metrics": {}}, {"r": 4, "lora_alpha": 8, "target_modules": []})
    assert "It has not been evaluated" in str(card) and card.data.datasets == ["sms_spam"]
    nested = {
        **task,
        "metrics": {"test": {"accuracy": 0.5, "note": "x"}, "n": True},
        "protocol": "three seeds",
    }
    text = str(adapter_card(nested, {"r": 4, "lora_alpha": 8, "target_modules": []}))
    assert "| test/accuracy | 0.5 |" in text and "Protocol: three seeds." in text
    assert isinstance(ModelCardData(**yaml.safe_load(text.split("---")[1])), ModelCardData)
