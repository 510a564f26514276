"""Bundles: several heads on one LoRA, on disk, in memory and in prediction."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import LABELS, assert_close, randomize
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from modeling_mtpf import AdapterError, AdapterHead, LoraSettings, MtpfForTokenClassification, MtpfModel
from modeling_mtpf.cli.main import main
from modeling_mtpf.model import predict_mtpf
from modeling_mtpf.model.adapter_files_mtpf import find_adapter, write_adapter

TEXTS = ["Ada met Noor in London.", "Hi", "can you remind me to buy 3 tickets?", "café 東京 🙂 " * 12]
PARTS = {
    "entities": ("token-classification", ["O", "B-PER", "I-PER"], 24),
    "intent": ("text-classification", [f"intent {number}" for number in range(5)], 40),
    "moods": ("text-classification", ["glad", "calm"], 32),
}


def load_backbone(folders) -> MtpfModel:
    return MtpfModel.from_pretrained(folders / "backbone").eval()


def heads(width: int = 32) -> dict[str, AdapterHead]:
    made = {}
    for seed, (name, (kind, labels, limit)) in enumerate(PARTS.items()):
        torch.manual_seed(seed)
        made[name] = AdapterHead(kind, labels, width, limit)
        torch.nn.init.normal_(made[name].weight, 0, 5 if kind.startswith("token") else 0.3)
    made["moods"].problem_type = "multi_label_classification"
    return made


@pytest.fixture(scope="module")
def bundle(folders, tmp_path_factory):
    """Folder of a bundle with three parts."""
    model = load_backbone(folders)
    model.add_adapter("both", LoraSettings(r=3, alpha=3), heads())
    randomize(model, 7, 0.3, within=".both.")
    task = {
        "family": None,
        "composition": {
            "method": "joint",
            "weights": {"intent": 0.5},
            "steps": 10,
            "seed": 0,
            "loss": "labels",
        },
        "parts": [{"name": "entities", "family": "ner", "metrics": {"entity_f1": 0.8}, "source": "messages"}],
    }
    return model.save_adapter(tmp_path_factory.mktemp("bundles") / "both", "both", task=task)


@pytest.fixture
def model(folders, bundle):
    model = load_backbone(folders)
    model.load_adapter(bundle)
    return model


def test_a_bundle_is_that_many_apps_on_one_lora(model, folders, bundle, tmp_path):
    """The same LoRA saved once for each head gives, one app at a time, what the bundle gives at once."""
    assert list(model.parts("both")) == ["both/entities", "both/intent", "both/moods"]
    expected, least = {}, min(limit for _, _, limit in PARTS.values())
    for part, head in model.parts("both").items():
        single = load_backbone(folders)
        limit, head.max_length = head.max_length, least  # the parts of a bundle share their windows
        write_adapter(tmp_path / part, model.backbone, "both", heads={"both": head})
        head.max_length = limit
        name = single.load_adapter(tmp_path / part)
        expected[part.partition("/")[2]] = single.predict(TEXTS, [name])[name]
    assert len({str(rows) for rows in expected.values()}) == 3
    rows = [dict(zip(expected, row, strict=True)) for row in zip(*expected.values(), strict=True)]
    assert model.predict(TEXTS, adapters=["both"]) == {"both": rows}
    names = ["intent", "both/entities", "both"]
    found = model.predict(TEXTS, adapters=names)
    assert found == {"intent": expected["intent"], "both/entities": expected["entities"], "both": rows}
    mixed = model.predict(TEXTS, adapter_names=["both", "intent", "both/moods", "entities"])
    wanted = [rows[0], expected["intent"][1], expected["moods"][2], expected["entities"][3]]
    assert_close(mixed, wanted)
    assert list(model.predict_stream(iter(TEXTS), ["both"], portion=1))[3]["both"].keys() == PARTS.keys()


def test_a_bundle_of_one_part_is_that_app_bit_for_bit(folders, tmp_path):
    model = load_backbone(folders)
    model.load_adapter(folders / "entities")
    write_adapter(
        tmp_path / "one", model.backbone, "entities", heads={"entities/words": model.heads["entities"]}
    )
    other = load_backbone(folders)
    other.load_adapter(tmp_path / "one", adapter_name="one")
    expected = model.predict(TEXTS, ["entities"])["entities"]
    assert other.predict(TEXTS, ["one"])["one"] == [{"words": row} for row in expected]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (folders / "entities" / file).read_bytes()


def test_one_tail_runs_for_all_parts(model, folders, monkeypatch):
    model.load_adapter(folders / "intent", adapter_name="plain")
    tails, run = [], predict_mtpf.run_layers
    monkeypatch.setattr(predict_mtpf, "run_layers", lambda *args: tails.append(args) or run(*args))
    model.predict("Hi", adapters=["both", "intent", "plain"])
    assert len(tails) == 2  # the bundle's and the plain app's
    tails.clear()
    model.predict(["Hi"] * 4, adapter_names=["both/intent", "entities", "plain", "moods"])
    assert len(tails) == 2 and sorted(len(trunk.hidden_states) for _, trunk, _ in tails) == [1, 3]


def test_a_folder_round_trip_in_a_fresh_process(model, bundle, folders, fresh_process, tmp_path):
    copy = model.save_adapter(tmp_path / "again", "both")
    for file in ("adapter_model.safetensors", "head.safetensors", "adapter_config.json"):
        assert (copy / file).read_bytes() == (bundle / file).read_bytes()
    code = f"""
import json
from transformers import AutoModel
model = AutoModel.from_pretrained({str(folders / "backbone")!r}, trust_remote_code=True)
model.load_adapter({str(copy)!r})
print(json.dumps(model.predict({TEXTS!r}, adapters=["both"])))
"""
    assert_close(fresh_process(code, package=False), model.predict(TEXTS, adapters=["both"]))


def test_stock_peft_loads_the_lora_with_equal_states_merged_or_not(model, bundle, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "backbone")
    inputs = dict(tokenizer(TEXTS[:3], padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = model.encode_adapters(["both"], **inputs)["both"]
        stock = PeftModel.from_pretrained(AutoModel.from_pretrained(folders / "backbone"), bundle).eval()
        assert torch.allclose(stock(**inputs).last_hidden_state, expected, atol=1e-6)
        merged = stock.merge_and_unload()(**inputs).last_hidden_state
        assert torch.allclose(merged, expected, atol=1e-4)
        with model.use_adapter("both"):
            assert torch.equal(model(**inputs).last_hidden_state, expected)
    stored = load_file(bundle / "head.safetensors")
    assert stored.keys() == {f"{part}.{key}" for part in PARTS for key in ("weight", "bias")}
    logits = merged @ stored["entities.weight"].T + stored["entities.bias"]
    found = model.predict(TEXTS[:1], ["both/entities"])["both/entities"][0]
    assert {row["word"] for row in found} <= set(TEXTS[0].replace(".", " .").split()) and logits.shape[
        -1
    ] == 3


def test_names_that_are_ambiguous_or_unknown(model, folders, bundle):
    model.load_adapter(bundle, adapter_name="second")
    with pytest.raises(
        AdapterError, match="Several bundles have a part 'intent'; choose one of: both/intent, s"
    ):
        model.predict(TEXTS, adapters=["intent"])
    before = model.predict(TEXTS, ["second/intent"])
    model.delete_adapter("second")
    assert list(model.heads) == [f"both/{part}" for part in PARTS]
    assert model.predict(TEXTS, ["intent"])["intent"] == before["second/intent"]
    model.load_adapter(folders / "intent")  # an adapter's own name comes first
    assert model.predict(TEXTS, ["intent"])["intent"] != before["second/intent"]
    assert model.predict(TEXTS, ["both/intent"])["both/intent"] == before["second/intent"]
    for name in ("both/", "oth/intent", "both/x", "", "/intent", 3, None):
        with pytest.raises(AdapterError, match="There is no adapter"):
            model.predict(TEXTS, adapters=[name])
    for call in (
        model.delete_adapter,
        model.set_adapter,
        model.adapter_depth,
        partial(model.save_adapter, folders),
    ):
        with pytest.raises(AdapterError, match="a part of a bundle; elsewhere name the whole, 'both'"):
            call("both/intent")
    with pytest.raises(AdapterError, match="both/intent is a part of the bundle .*both, not a folder"):
        model.load_adapter(bundle / "intent")
    for part in ("Intent", "a/b", "", "x" * 65, "a.b"):
        with pytest.raises(AdapterError, match="Part name .* is not allowed"):
            model.add_adapter("third", LoraSettings(r=1), {part: heads()["intent"]})
    assert "third" not in model.adapters


def test_replacing_deleting_and_memory(model, folders, bundle):
    memory = model.adapter_memory()["both"]
    assert memory["head"] == sum(len(labels) * 33 * 4 for _, labels, _ in PARTS.values())
    for folder in (folders / "intent", bundle, folders / "ner"):
        assert model.load_adapter(folder, adapter_name="both", replace=True) == "both"
        fresh = load_backbone(folders)
        fresh.load_adapter(folder, adapter_name="both")
        assert list(model.heads) == list(fresh.heads)
        if fresh.parts("both"):
            assert model.predict(TEXTS, ["both"]) == fresh.predict(TEXTS, ["both"])
    with pytest.raises(AdapterError, match="has no head"):
        model.predict(TEXTS, ["both"])
    model.delete_adapter("both")
    assert model.adapters == [] and len(model.heads) == 0


def test_a_failed_replacement_leaves_the_bundle(model, bundle, tmp_path):
    expected = model.predict(TEXTS, ["both"])
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    (damaged / "head.safetensors").unlink()
    with pytest.raises(AdapterError, match="is a bundle app, but its head is missing"):
        model.load_adapter(damaged, replace=True)
    assert model.predict(TEXTS, ["both"]) == expected


@pytest.mark.slow
def test_sixteen_threads_over_bundles_and_apps_give_what_one_gives(model, bundle, folders):
    model.load_adapter(bundle, adapter_name="second")
    for name in LABELS:
        model.load_adapter(folders / name, adapter_name=f"plain-{name}")
    asked = [
        ["both"],
        ["second/intent", "plain-intent"],
        ["plain-entities", "both/moods"],
        ["second", "both"],
    ]

    def work(number: int):
        mixed = [asked[(number + row) % 4][0] for row in range(len(TEXTS))]
        return model.predict(TEXTS, asked[number % 4]), model.predict(TEXTS, adapter_names=mixed)

    expected = [work(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(4):
            assert list(pool.map(work, range(16))) == expected


def test_a_task_class_takes_the_only_part_of_its_kind(folders, bundle):
    words = MtpfForTokenClassification.from_pretrained(folders / "backbone")
    words.load_adapter(bundle)
    assert torch.equal(words.classifier.weight, load_file(bundle / "head.safetensors")["entities.weight"])
    texts = type(words).__mro__[1].__subclasses__()[1].from_pretrained(folders / "backbone")
    with pytest.raises(AdapterError, match="is a bundle with 2 parts of this kind, but Mtpf"):
        texts.load_adapter(bundle)


# ------------------------------------------------------------------------------------------------ the gate


def with_part(**changes):
    return lambda task: task["parts"][1].update(changes)


def with_composition(**changes):
    return lambda task: task["composition"].update(changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda task: task.update(format_version=1), "the kind 'bundle' and the format version 1"),
        (lambda task: task.update(format_version=4), "made by a newer mtpf"),
        (
            lambda task: task.update(kind="text-classification"),
            "'text-classification' and the format version 2",
        ),
        (lambda task: task.update(parts=[]), "'parts' in task.json must have different names"),
        (lambda task: task.pop("parts"), "'parts' in task.json must have different names"),
        (lambda task: task.update(parts={}), "'parts'"),
        (lambda task: task.update(delta={"rows": 1, "tokens": []}), "'delta'"),
        (lambda task: task.update(parts=[1, 2]), "'parts'"),
        (lambda task: task.update(labels=["a"]), "'labels' in task.json .* left out"),
        (with_part(name="entities"), "'parts' in task.json must have different names"),
        (with_part(name="../x"), "'name' in a part"),
        (with_part(name="other"), "does not fit 10 labels"),
        (with_part(kind="bundle"), "'kind' in a part"),
        (with_part(kind=None), "'kind' in a part"),
        (with_part(labels=None), "a part of task.json has no 'labels'"),
        (with_part(labels=[]), "task.json has no labels"),
        (with_part(labels=["a"] * 5), "holds a label twice"),
        (
            with_part(labels=[f"intent {n}" for n in (1, 0, 2, 3, 4)]),
            "not those that its head was trained with",
        ),
        (with_part(labels=["a", "b"]), "does not fit 7 labels"),
        (with_part(max_length=10**5), "'max_length' in task.json is 100,000, but the backbone"),
        (with_part(max_length=2), "'max_length' in a part"),
        (with_part(problem_type="x"), "'problem_type' in a part"),
        (with_part(metrics=3), "'metrics' in a part"),
        (with_part(family=["ner"]), "'family' in a part"),
        (with_part(more=[[]]), "'more' in a part"),
        (lambda task: task["parts"][0].update(problem_type="multi_label_classification"), "is only for"),
        (with_composition(method="a b"), "'method' in the 'composition'"),
        (with_composition(weights={"intent": "x"}), "'weights' in the 'composition'"),
        (with_composition(steps=-1), "'steps' in the 'composition'"),
        (with_composition(texts=[1]), "'texts' in the 'composition'"),
        (with_composition(more=[[1]]), "'more' in the 'composition'"),
        (lambda task: task.update(composition=3), "'composition'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_record_is_refused_in_one_sentence(model, bundle, tmp_path, change, message):
    folder = shutil.copytree(bundle, tmp_path / "damaged")
    task = json.loads((folder / "task.json").read_text())
    change(task)
    (folder / "task.json").write_text(json.dumps(task))
    with pytest.raises(AdapterError, match=message) as error:
        model.load_adapter(folder, adapter_name="other")
    assert "\n" not in str(error.value) and model.adapters == ["both"]


@pytest.mark.parametrize("key", ["intent.weight", "moods.bias", "more.weight"])
def test_a_damaged_head_is_refused_in_one_sentence(model, bundle, tmp_path, key):
    folder = shutil.copytree(bundle, tmp_path / "damaged")
    tensors = load_file(folder / "head.safetensors")
    labels = json.dumps({part: labels for part, (_, labels, _) in PARTS.items()})
    tensors[key] = torch.zeros(3, 32)
    save_file(tensors, folder / "head.safetensors", {"labels": labels})
    with pytest.raises(AdapterError, match="The head of .* does not fit 10 labels"):
        model.load_adapter(find_adapter(folder), adapter_name="other")


def test_a_record_that_could_not_be_loaded_is_not_written(model, tmp_path):
    for task in ({"composition": {"steps": -1}}, {"parts": [{"name": "intent", "family": 3}]}):
        with pytest.raises(AdapterError, match="'steps'|'family'"):
            model.save_adapter(tmp_path / "x", "both", task=task)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------- command


def test_the_command_predicts_with_bundles_and_their_parts(model, bundle, folders, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS[:3]))
    backbone = ["--backbone", str(folders / "backbone"), str(texts)]
    parts = [f"--adapter={bundle}/{part}" for part in ("intent", "moods")]
    assert main(["predict", *parts, "--adapter", str(bundle), *backbone]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = model.predict(TEXTS[:3], ["both/intent", "both/moods", "both"])
    assert_close({name: [line["results"][name] for line in lines] for name in expected}, expected)
    assert main(["predict", *parts, "--adapter", str(bundle), "--format", "label-studio", *backbone]) == 0
    tasks = json.loads(capsys.readouterr().out)
    assert [row["model_version"] for row in tasks[0]["predictions"]] == [
        *("both/intent", "both/moods", "both/entities", "both/intent", "both/moods")
    ]
    assert main(["predict", "--adapter", f"{bundle}/nothing", *backbone]) == 2
    assert "has no part 'nothing'; it has: entities, intent, moods." in capsys.readouterr().err
    assert main(["predict", "--adapter", f"{folders / 'intent'}/nothing", *backbone]) == 2
    assert "has no part 'nothing'; it has: none, it is one app." in capsys.readouterr().err
