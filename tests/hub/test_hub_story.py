"""The whole story: publish, then load in fresh processes that have the Hub and no package."""

import json

import pytest
import torch
from conftest import SENTENCES
from transformers import PreTrainedTokenizerFast

from modeling_mtpf import MtpfForSequenceClassification, MtpfForTokenClassification, MtpfModel
from modeling_mtpf.errors import AdapterError

pytestmark = [pytest.mark.hub, pytest.mark.slow]

BACKBONE = "mtpf/encoder"
ADAPTERS = {"entities": "mtpf/entities", "intent": "mtpf-org/intent", "ner": "mtpf/encoder-ner"}


PUSH = """
import contextlib, io, json
from modeling_mtpf.cli.main import main

def push(kind, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["push", kind, *arguments]) == 0
    address, sha = out.getvalue().strip().split("/tree/")
    assert address.endswith(arguments[1])
    return sha

folder, backbone, adapters = json.loads({story!r})
shas = {{"backbone": push("backbone", folder + "/backbone", backbone)}}
for name, repo in adapters.items():
    shas[name] = push("adapter", folder + "/" + name, repo, "--backbone", backbone)
print(json.dumps(shas))
"""


def before_publishing(folders, file) -> dict:
    """Write inputs, hidden states and logits of the folders to a file; return the predictions."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "backbone")
    inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for name in ADAPTERS:
        model.load_adapter(folders / name)
    with torch.no_grad():
        states = model.encode_adapters([None, *ADAPTERS], **inputs)
        logits = {name: head(states[name]) for name, head in model.heads.items()}
    torch.save((inputs, states, logits), file)
    return model.predict(SENTENCES, adapters=["entities", "intent"], tokenizer=tokenizer)


def damage_the_heads(hub) -> None:
    """Commit rubbish to every repo: what comes later must not matter to who has pinned a commit."""
    names = (
        "config.json",
        "model.safetensors",
        "modeling_mtpf.py",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    hub.commit(BACKBONE, dict.fromkeys(names, b"damaged"))
    for repo in ADAPTERS.values():
        hub.commit(repo, dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), b"damaged"))


PROLOGUE = """
import json, sys, torch
story = json.loads({story!r})
inputs, states, logits = torch.load(story["expected"])
repo, sha, adapters = story["backbone"], story["sha"], story["adapters"]
found = {{}}
def differs(a, b):
    return float((a - b).abs().max())
"""

TRUSTED = """
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
for name, (adapter, commit) in adapters.items():
    assert model.load_adapter(adapter) == name
with torch.no_grad():
    for name, expected in states.items():
        found[f"hidden states {name}"] = differs(model.encode_adapters([name], **inputs)[name], expected)
predictions = model.predict(story["texts"], adapters=["entities", "intent"])
found["predictions"] = float(predictions != story["predictions"])
found["class"] = type(model).__name__ + " " + type(model).__module__.split(".")[0]

kinds = {"entities": AutoModelForTokenClassification, "intent": AutoModelForSequenceClassification}
for name, auto in kinds.items():
    task = auto.from_pretrained(repo, revision=sha, trust_remote_code=True).eval()
    task.load_adapter(adapters[name][0], revision=adapters[name][1])
    with torch.no_grad():
        own = task(**inputs).logits
    if name == "entities":
        found["classifier entities"] = differs(own, logits[name])
        options = {"model": task, "tokenizer": tokenizer, "aggregation_strategy": "first"}
        tagger = pipeline("token-classification", **options)
        # Not the text of emoji and ideographs: the pipeline joins words that it does not know.
        texts = [text for text in story["texts"] if text.isascii()]
        # Without I-PER: the pipeline takes it also where it continues nothing.
        for head in (task.classifier, model.heads[name]):
            head.bias.data[2] = -1e4
        every = [[tagger(text) for text in texts], model.predict(texts, adapters=[name])[name]]
        found["pipeline entities"] = [
            [[[s["entity_group"], s["start"], s["end"]] for s in row] for row in rows] for rows in every
        ]
    else:
        rows = pipeline("text-classification", model=task, tokenizer=tokenizer)(story["texts"])
        ours = [row["label"] for row in predictions[name]]
        found["pipeline intent"] = float([row["label"] for row in rows] != ours)
print(json.dumps(found))
"""

STOCK = """
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertModel
name = "entities"
adapter, commit = adapters[name]
with torch.no_grad():
    model = AutoModel.from_pretrained(repo, revision=sha, trust_remote_code=False).eval()
    found["untrusted AutoModel"] = differs(model(**inputs)[0], states[None])
    model = PeftModel.from_pretrained(model, adapter, revision=commit).eval()
    found["PeftModel"] = differs(model(**inputs)[0], states[name])
    model = BertModel.from_pretrained(repo, revision=sha).eval()
    model.load_adapter(adapter, adapter_kwargs={"revision": commit})
    found["BertModel.load_adapter"] = differs(model.eval()(**inputs)[0], states[name])
    model = SentenceTransformer(repo, revision=sha, device="cpu").eval()
    found["SentenceTransformer"] = differs(model(dict(inputs))["token_embeddings"], states[None])
    model.load_adapter(adapter, adapter_kwargs={"revision": commit})
    tokens = model.eval()(dict(inputs))["token_embeddings"]
    found["SentenceTransformer.load_adapter"] = differs(tokens, states[name])
found["remote code"] = [name for name in sys.modules if name.startswith("transformers_modules")]
model = AutoModel.from_pretrained(repo, revision=sha, trust_remote_code=True).eval()
for adapter, commit in adapters.values():
    model.load_adapter(adapter, revision=commit)
predictions = model.predict(story["texts"], adapters=["entities", "intent"])
found["pinned predictions"] = float(predictions != story["predictions"])
print(json.dumps(found))
"""


def test_the_whole_story(hub, folders, fresh_process, tmp_path):
    """Push with the command; load by id, trusted; spoil the heads; load the commits with stock libraries."""
    predictions = before_publishing(folders, tmp_path / "expected.pt")
    code = PUSH.format(story=json.dumps([str(folders), BACKBONE, ADAPTERS]))
    shas = fresh_process(code, **hub.environment(home="author"))
    assert shas == {
        "backbone": hub.head(BACKBONE),
        **{name: hub.head(repo) for name, repo in ADAPTERS.items()},
    }
    story = {
        "expected": str(tmp_path / "expected.pt"),
        "predictions": predictions,
        "texts": SENTENCES,
        "backbone": BACKBONE,
        "sha": shas["backbone"],
        "adapters": {name: [repo, shas[name]] for name, repo in ADAPTERS.items()},
    }
    prologue = PROLOGUE.format(story=json.dumps(story))
    found = fresh_process(prologue + TRUSTED, package=False, **hub.environment(home="user"))
    assert found.pop("class") == "MtpfModel transformers_modules"
    spans, ours = found.pop("pipeline entities")
    assert spans == ours and any(ours)
    assert found == dict.fromkeys(found, 0.0) and len(found) == 7

    damage_the_heads(hub)
    found = fresh_process(prologue + STOCK, package=False, **hub.environment(home="stranger"))
    assert found.pop("remote code") == []
    assert found == dict.fromkeys(found, 0.0) and len(found) == 6


def test_task_classes_take_apps_of_their_kind_only(folders):
    model = MtpfForTokenClassification.from_pretrained(folders / "backbone")
    with pytest.raises(AdapterError, match="text-classification app, but MtpfForTokenClassification"):
        model.load_adapter(folders / "intent")
    assert model.adapters == [] and model.config.num_labels == 2
    model.load_adapter(folders / "ner")  # no app: nothing to adopt
    assert model.active_adapters() == ["ner"] and model.classifier.out_features == 2
    model.load_adapter(folders / "entities")
    assert model.active_adapters() == ["entities"] and model.config.id2label == {
        0: "O",
        1: "B-PER",
        2: "I-PER",
    }
    model = MtpfForSequenceClassification.from_pretrained(folders / "backbone")
    model.load_adapter(folders / "intent")
    assert model.num_labels == model.config.num_labels == model.classifier.out_features == 5
