"""Standalone apps: what is trained, what comes back from the folder, and what is refused."""

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES, assert_close
from safetensors.torch import load_file, save_file
from test_apps import FLOAT, TEXTS, ner_data, tc_data
from test_sparse import WIDE
from transformers import AutoModel, AutoTokenizer

from modeling_mtpf import AdapterError, MtpfModel
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation import tokens as tokens_module
from modeling_mtpf.adaptation.settings import LoraShape
from modeling_mtpf.adaptation.tokens import mine_tokens
from modeling_mtpf.cli.main import run_command
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError, RecipeError
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.model.backbone_identity_mtpf import backbone_state_dict
from modeling_mtpf.model.delta_mtpf import add_tokens
from modeling_mtpf.model.texts_mtpf import TextTokenizer

FILES = ["README.md", "delta.safetensors", "head.safetensors", "patterns.md", "task.json"]


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """The texts of these tests are a dozen."""
    monkeypatch.setattr(tokens_module, "LEAST_TEXTS", 2)


@pytest.fixture
def setting(load, encoders):
    return load("bert"), load_word_tokenizer(str(encoders["bert"]))


def settings(dtype="float32", **sparse) -> FitSettings:
    sparse = replace(WIDE, **{"vocabulary": 1.0, "budget": 0.3, **sparse})
    options = {"steps": 60, "batch_size": 4, "learning_rate": 2e-2, "max_length": 64}
    return FitSettings(sparse=sparse, stored_dtype=dtype, **options, **FLOAT)


def fitted(setting, folder, family="tc", name="airline", lora=None, **options):
    data = {"tc": tc_data, "ner": ner_data}[family]()
    return fit_app(
        data,
        family,
        method="sparse",
        standalone=True,
        backbone=setting,
        output_dir=folder,
        name=name,
        settings=replace(settings(**options), lora=lora or LoraShape()),
    )


@pytest.fixture(scope="module")
def delta(tmp_path_factory, encoders):
    """Folder of a TC app with new tokens."""
    folder = tmp_path_factory.mktemp("delta") / "airline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "LEAST_TEXTS", 2)
        model = MtpfModel.from_pretrained(encoders["bert"]).eval()
        fitted((model, load_word_tokenizer(str(encoders["bert"]))), folder)
    return folder


@pytest.mark.parametrize("family", ["tc", "ner"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_applied_delta_is_the_trained_model(setting, load, tmp_path, family, dtype):
    model, tokenizer = setting
    digest = backbone_sha256(model.backbone)
    app = fitted(setting, tmp_path / "airline", family, dtype=dtype)
    assert app.metrics["accuracy" if family == "tc" else "entity_f1"] > 0.6
    assert backbone_sha256(model.backbone) == digest and model.adapters == [] and app.model is not model
    trained = backbone_state_dict(app.model.backbone)
    backbone = model.config.name_or_path
    whole = MtpfModel.from_pretrained(tmp_path / "airline", backbone=backbone)
    shared = load("bert")
    assert shared.load_adapter(tmp_path / "airline", standalone=True) == "airline"
    base, details = backbone_state_dict(shared.backbone), app.record["seeds"]["0"]
    for loaded in (whole, shared.standalone["airline"]):
        tensors = backbone_state_dict(loaded.backbone)
        assert tensors.keys() == trained.keys()
        assert all(torch.equal(tensors[key], value) for key, value in trained.items())
    same = {key for key, value in trained.items() if torch.equal(value[: len(base[key])], base[key])}
    changed = {key.removesuffix(".weight") for key in trained.keys() - same}
    assert changed == set(details["trained"]) and details["trained_share"] <= 0.3
    pointers = {p.data_ptr() for p in shared.backbone.parameters()}
    for key, value in backbone_state_dict(shared.standalone["airline"].backbone).items():
        if key in same and value.shape == base[key].shape and value.is_floating_point():
            assert value.data_ptr() in pointers  # memory is that of the backbone
    expected = app.model.predict(TEXTS, adapters=["airline"], tokenizer=app_tokenizer(app))
    for loaded in (whole, shared):
        assert loaded.predict(TEXTS, adapters=["airline"]) == expected
    assert sorted(path.name for path in (tmp_path / "airline").iterdir()) == FILES


def app_tokenizer(app):
    return app.model.__dict__["_mtpf_tokenizer"]


def test_two_fits_with_one_seed_write_the_same_bytes(setting, delta, tmp_path):
    fitted(setting, tmp_path / "again", name="airline")
    for file in ("delta.safetensors", "head.safetensors", "patterns.md"):
        assert (tmp_path / "again" / file).read_bytes() == (delta / file).read_bytes()


def test_everything_is_trained_with_the_whole_budget(setting, tmp_path):
    model, _ = setting
    app = fitted(setting, tmp_path / "end-to-end", budget=1.0, vocabulary=0.0)
    base, trained = backbone_state_dict(model.backbone), backbone_state_dict(app.model.backbone)
    same = [key for key in base if torch.equal(base[key], trained[key])]
    assert all("pooler" in key or "position_ids" in key or "token_type_ids" in key for key in same)
    again = MtpfModel.from_pretrained(tmp_path / "end-to-end", backbone=model.config.name_or_path)
    assert all(torch.equal(value, trained[key]) for key, value in backbone_state_dict(again.backbone).items())


@pytest.mark.parametrize("options", [{"vocabulary": 0.0}, {}, {"budget": 1.0, "vocabulary": 0.0}])
def test_matrices_of_the_last_layers_compete_where_that_is_asked(setting, tmp_path, options):
    model, _ = setting
    app = fitted(setting, tmp_path / "upper", lora=LoraShape(layers=2), **options)
    base, trained = backbone_state_dict(model.backbone), backbone_state_dict(app.model.backbone)
    changed = [key for key in base if not torch.equal(base[key], trained[key][: len(base[key])])]
    assert changed and all(re.search(r"layer\.[23]\.", key) for key in changed)
    again = MtpfModel.from_pretrained(tmp_path / "upper", backbone=model.config.name_or_path)
    assert again.predict(TEXTS, ["airline"]) == app.model.predict(
        TEXTS, ["airline"], tokenizer=app.model.__dict__.get("_mtpf_tokenizer") or setting[1]
    )


def test_a_shape_that_a_standalone_app_has_not_is_refused(setting, tmp_path):
    with pytest.raises(RecipeError, match="lora.r is not a setting of standalone apps"):
        fitted(setting, tmp_path / "ranked", lora=LoraShape(r=4))
    with pytest.raises(MtpfError, match="layers"):
        fitted(setting, tmp_path / "deep", lora=LoraShape(layers=99))


def test_ordinary_and_standalone_apps_in_one_call(setting, delta, load, folders):
    model, tokenizer = load("bert"), setting[1]
    model.load_adapter(folders / "intent", check_backbone=False)
    model.load_adapter(delta, standalone=True)
    model.load_adapter(delta, adapter_name="second", standalone=True)
    texts = [*TEXTS, "", "word " * 200]
    names = ["airline", "intent", "second"]
    together = model.predict(texts, adapters=names, tokenizer=tokenizer)
    assert list(together) == names and together["airline"] == together["second"]
    for name in names:
        assert_close(model.predict(texts, adapters=[name], tokenizer=tokenizer)[name], together[name])
    mixed = [names[number % 3] for number in range(len(texts))]
    expected = [together[name][number] for number, name in enumerate(mixed)]
    assert_close(model.predict(texts, adapter_names=mixed, tokenizer=tokenizer), expected)
    for asked in (model.use_adapter, model.set_adapter, model.adapter_depth):
        with pytest.raises(AdapterError, match="'airline' is standalone: .* shares no trunk"):
            with asked("airline"):
                pass
    with pytest.raises(AdapterError, match="shares no trunk"):
        model.encode_adapters(["airline"], **tokenizer("a", return_tensors="pt"))
    with pytest.raises(AdapterError, match="is already loaded"):
        model.load_adapter(delta, standalone=True)
    model.load_adapter(delta, standalone=True, replace=True)
    model.delete_adapter(["airline", "second"])
    assert list(model.standalone) == [] and model.adapters == ["intent"]


def test_an_applied_copy_is_a_stock_model(delta, encoders, tmp_path):
    copy = tmp_path / "whole"
    run_command(["apply-delta", str(delta), "--backbone", str(encoders["bert"]), "--output", str(copy)])
    whole = MtpfModel.from_pretrained(delta, backbone=encoders["bert"]).eval()
    stock, tokenizer = (
        AutoModel.from_pretrained(copy / "backbone"),
        AutoTokenizer.from_pretrained(copy / "backbone"),
    )
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(stock(**inputs).last_hidden_state, whole(**inputs).last_hidden_state)
    model = MtpfModel.from_pretrained(copy / "backbone")
    model.load_adapter(copy / "app")
    assert model.predict(TEXTS, adapters=["airline"]) == whole.predict(TEXTS, adapters=["airline"])
    with pytest.raises(MtpfError, match="exists already"):
        run_command(["apply-delta", str(delta), "--backbone", str(encoders["bert"]), "--output", str(copy)])


@pytest.mark.slow
def test_the_runner_gives_what_predict_gives(delta, encoders, tmp_path):
    from modeling_mtpf.export import export_onnx
    from modeling_mtpf.export.runner import Runner

    copy = tmp_path / "whole"
    run_command(["apply-delta", str(delta), "--backbone", str(encoders["bert"]), "--output", str(copy)])
    export_onnx(copy / "backbone", [copy / "app"], tmp_path / "phone")
    whole = MtpfModel.from_pretrained(delta, backbone=encoders["bert"]).eval()
    results = Runner(tmp_path / "phone").predict(TEXTS, ["airline"])["airline"]
    expected = whole.predict(TEXTS, adapters=["airline"])["airline"]
    assert [row["label"] for row in results] == [row["label"] for row in expected]
    assert [row["score"] for row in results] == pytest.approx([row["score"] for row in expected], abs=1e-3)


# ------------------------------------------------------------------------------------------------ refusals


def other_mask(change):
    def damage(folder):
        tensors = load_file(folder / "delta.safetensors")
        key = next(key for key in tensors if key.endswith(".rows"))
        tensors[key] = change(tensors[key].clone())
        save_file(tensors, folder / "delta.safetensors")

    return damage


def beyond(mask):
    mask[-1] |= 1  # the last bit is beyond the rows
    return mask


def more(mask):
    mask[0] ^= 128
    return mask


def edit_task(change):
    def damage(folder):
        task = json.loads((folder / "task.json").read_text())
        change(task)
        (folder / "task.json").write_text(json.dumps(task))

    return damage


def tensors_changed(change):
    def damage(folder):
        tensors = load_file(folder / "delta.safetensors")
        change(tensors)
        save_file(tensors, folder / "delta.safetensors")

    return damage


def a_matrix(tensors):
    return next(key for key in tensors if "layer" in key and not key.endswith(".rows"))


DAMAGES = {
    "a mask with a row beyond": (other_mask(beyond), "and beyond"),
    "a mask with another row": (other_mask(more), "are stored"),
    "a mask that is cut": (other_mask(lambda mask: mask[:-1].clone()), "is not a mask of"),
    "a mask of numbers": (other_mask(lambda mask: mask.float()), "is not a mask of"),
    "a mask alone": (
        tensors_changed(lambda t: t.pop(next(k for k in t if k + ".rows" in t))),
        "has no",
    ),
    "a foreign tensor": (tensors_changed(lambda t: t.update(x=torch.zeros(2))), "no tensor for 'x'"),
    "another shape": (
        tensors_changed(lambda t: t.update({a_matrix(t): torch.zeros(3, 3)})),
        "another backbone",
    ),
    "not a number": (tensors_changed(lambda t: t[a_matrix(t)].fill_(float("nan"))), "not finite"),
    "no new rows": (
        edit_task(lambda t: t["delta"].update(tokens=t["delta"]["tokens"][:-1])),
        "another backbone",
    ),
    "more rows": (edit_task(lambda t: t["delta"].update(rows=10**7)), "another backbone"),
    "another token": (edit_task(lambda t: t["delta"]["tokens"].__setitem__(0, "zz zz")), "another tokenizer"),
    "a token twice": (
        edit_task(lambda t: t["delta"]["tokens"].__setitem__(0, t["delta"]["tokens"][1])),
        "already",
    ),
    "another backbone": (edit_task(lambda t: t["backbone"].update(sha256="0" * 64)), "another backbone"),
    "another tokenizer": (edit_task(lambda t: t["backbone"].update(tokenizer="0" * 64)), "another tokenizer"),
    "no record": (edit_task(lambda t: t.pop("delta")), "does not describe a standalone app"),
    "a record that is not one": (edit_task(lambda t: t.update(delta={"rows": 3})), "'delta' in task.json"),
    "a name of a path": (edit_task(lambda t: t.update(name="../x")), "'name' in task.json"),
    "no head": (lambda folder: (folder / "head.safetensors").unlink(), "its head is missing"),
    "a file that is cut": (
        lambda folder: (folder / "delta.safetensors").write_bytes(
            (folder / "delta.safetensors").read_bytes()[:-9]
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_delta_is_refused_before_anything_changes(delta, load, tmp_path, what):
    folder = shutil.copytree(delta, tmp_path / "damaged")
    damage, message = DAMAGES[what]
    damage(folder)
    model = load("bert")
    before = {key: value.clone() for key, value in backbone_state_dict(model.backbone).items()}
    with pytest.raises(AdapterError) as raised:
        model.load_adapter(folder, standalone=True)
    text = str(raised.value)
    assert message in text and "\n" not in text and "Traceback" not in text
    assert list(model.standalone) == [] and model.adapters == []
    assert all(torch.equal(value, before[key]) for key, value in backbone_state_dict(model.backbone).items())


def test_the_wrong_way_to_load_is_told(delta, folders, load):
    model = load("bert")
    with pytest.raises(AdapterError, match="shares no trunk; load it with standalone=True"):
        model.load_adapter(delta)
    with pytest.raises(AdapterError, match="is not a standalone app; load it without standalone=True"):
        model.load_adapter(folders / "intent", standalone=True)
    with pytest.raises(AdapterError, match="another backbone"):
        load("distilbert").load_adapter(delta, standalone=True)


def test_a_standalone_app_is_sparse_and_starts_from_the_backbone(setting):
    for options in ({"method": "lora"}, {"adapter": "x/y", "method": "sparse"}):
        with pytest.raises(RecipeError, match="standalone app is fitted by the method sparse"):
            fit_app(tc_data(), "tc", standalone=True, backbone=setting, **options)


# ------------------------------------------------------------------------------------------------- tokens


def texts_with(tokens: list[str], seed: int) -> list[str]:
    """Texts of odd words, blanks and marks around the tokens, in any case."""
    generator = random.Random(seed)
    words = [
        *tokens,
        "Ada",
        "x",
        "é",
        "don't",
        "3.5",
        "東京",
        "🙂",
        "_",
        "foo_bar",
        "e\u0301",
        ".",
        "  ",
        "\u00a0",
    ]
    texts = []
    for _ in range(60):
        parts = [generator.choice(words) for _ in range(generator.randrange(8))]
        parts = [generator.choice([str, str.upper, str.title])(part) for part in parts]
        texts.append(generator.choice([" ", "", "  ", "-"]).join(parts))
    return texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_offsets_stay_exact_with_new_tokens(encoders, architecture):
    tokenizer = load_word_tokenizer(str(encoders[architecture]))
    tokens = ["lovelace met", "concert", "gate 12", "naïve", "o'clock"]
    grown = add_tokens(tokenizer, tokens)
    first = len(tokenizer)
    old, new = TextTokenizer(tokenizer), TextTokenizer(grown)
    seen = 0
    for text in [*SENTENCES, *(text for seed in range(5) for text in texts_with(tokens, seed))]:
        (before,), (after,) = old([text]), new([text])
        covered = [set(), set()]
        for number, tokens_of in enumerate((before, after)):
            for start, stop in tokens_of.encoding.offsets:
                assert 0 <= start <= stop <= len(text)
                covered[number] |= {at for at in range(start, stop) if not text[at].isspace()}
        assert covered[0] == covered[1]
        starts = [start for start, _ in after.encoding.offsets]
        assert starts == sorted(starts)
        for token, (start, stop) in zip(after.ids, after.encoding.offsets, strict=True):
            if token >= first:
                seen += 1
                surface = text[start:stop].strip()
                assert tokenizer.backend_tokenizer.normalizer is None or surface
                around = text[stop : stop + 1], text[max(0, start - 1) : start]
                assert not any(one.isascii() and one.isalnum() for one in around)
        words = [after.words(text)[1:], before.words(text)[1:]]
        borders = [{int(x) for part in pair for x in part} for pair in words]
        assert borders[0] <= borders[1]  # a new token joins words, and never begins or ends inside one
    assert seen > 20


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_single_words_leave_the_words_as_they_are(encoders, architecture):
    tokenizer = load_word_tokenizer(str(encoders[architecture]))
    texts = [f"{a} the overdraft of overdrafts {b}" for a in ("Please", "why") for b in "abcdef"] * 2
    found = mine_tokens(texts, tokenizer, 1.0, single_words=True)
    old, new = TextTokenizer(tokenizer), TextTokenizer(add_tokens(tokenizer, found.tokens))
    for text in texts:
        (before,), (after,) = old([text]), new([text])
        assert [w.tolist() for w in before.words(text)[1:]] == [w.tolist() for w in after.words(text)[1:]]


def test_patterns_are_closed_counted_and_ranked(encoders, monkeypatch):
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    texts = (
        ["my train leaves now"] * 5 + ["the train leaves"] * 3 + ["my gate", "the gate", "now my", "Hi"] * 4
    )
    found = mine_tokens(texts, tokenizer, 1.0)
    pieces = {text: tokenizer.tokenize(text) for text in texts}
    for one in found.patterns:
        size = len(one.pieces)
        holds = [
            any(tuple(p[at : at + size]) == one.pieces for at in range(len(p) - size + 1))
            for p in map(pieces.get, texts)
        ]
        assert one.texts == sum(holds)
        alone = [np.log(np.mean([piece in pieces[text] for text in texts])) for piece in one.pieces]
        assert one.score == pytest.approx((np.log(np.mean(holds)) - sum(alone)) / size)
    by_text = {one.text: one.texts for one in found.patterns}
    assert len(by_text) == len(found.patterns) and set(found.tokens) <= set(by_text)
    assert [one.score for one in found.patterns] == sorted((o.score for o in found.patterns), reverse=True)
    assert found.length[1] < found.length[0]
    page = found.page()
    assert all(re.search(rf"\| {re.escape(token)} \|.*\| yes \|", page) for token in found.tokens)
    assert mine_tokens(texts, tokenizer, 0.0).tokens == []


def test_a_stream_of_any_length_is_mined_from_a_sample(encoders, monkeypatch):
    monkeypatch.setattr(tokens_module, "SAMPLE", 50)
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    stream = (f"train {number % 7} leaves now" for number in range(5000))
    found = mine_tokens(stream, tokenizer, 0.5, seed=3)
    again = mine_tokens((f"train {number % 7} leaves now" for number in range(5000)), tokenizer, 0.5, seed=3)
    assert found.texts == 50 and found == again
