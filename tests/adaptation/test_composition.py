"""Composing apps that exist: exact sums, learned corrections, rivals, and what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_close, randomize
from huggingface_hub import ModelCard
from peft import PeftModel
from test_bundle_training import FLOAT, TEXTS, ner_data, tc_data
from transformers import AutoModel, BertConfig

from modeling_mtpf import AdapterHead, LoraSettings, MtpfConfig, MtpfModel
from modeling_mtpf.adaptation.bundle import BundleSettings, Part, fit_bundle
from modeling_mtpf.adaptation.bundle import fit as fit_module
from modeling_mtpf.adaptation.bundle.composition import Calibrated, dare, ties
from modeling_mtpf.adaptation.bundle.low_rank import install, lora_matrices, run_with
from modeling_mtpf.adaptation.bundle.registry import BUNDLE_METHODS, Job, JobPart
from modeling_mtpf.adaptation.settings import LoraShape
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError, RecipeError
from modeling_mtpf.model.backbone_identity_mtpf import backbone_state_dict
from modeling_mtpf.model.trunk_mtpf import run_trunk

PLAIN = {"stored_dtype": "float32", "mixed_precision": "float32"}
SHORT = {"steps": 30, "evaluations": 3, **PLAIN, **FLOAT}
MERGES = ("mean", "sum", "concat", "ties", "dare", "lorahub")
APPS = {
    "entities": ("token-classification", ["O", "B-PER", "B-LOC"], LoraSettings(r=3, alpha=6, layers=2)),
    "intent": ("text-classification", ["label 0", "label 1"], LoraSettings(r=2, alpha=4, layers=1)),
    "moods": (
        *("text-classification", ["a", "b"]),
        LoraSettings(r=1, alpha=2, layers=3, targets=["attention.self.value"]),
    ),
}
FAMILIES = {"entities": "ner", "intent": "tc", "moods": "tc"}


@pytest.fixture(scope="module")
def apps(encoders, tmp_path_factory):
    """Folders of apps of different rank, depth, modules and kind; ``ner`` has no head."""
    root = tmp_path_factory.mktemp("apps")
    model = MtpfModel.from_pretrained(encoders["bert"]).eval()
    for seed, (name, (kind, labels, shape)) in enumerate(APPS.items()):
        torch.manual_seed(seed)
        problem = "multi_label_classification" if name == "moods" else None
        model.add_adapter(name, shape, AdapterHead(kind, labels, 32, 64, problem))
        randomize(model, seed, 0.3, within=f".{name}.")
        torch.nn.init.normal_(model.heads[name].weight, 0, 1.5)
        model.save_adapter(root / name, name, task={"family": FAMILIES[name]})
    model.add_adapter("ner", LoraSettings(r=2))
    model.save_adapter(root / "ner", "ner")
    return root


@pytest.fixture
def setting(load, encoders):
    return load("bert", {}), load_word_tokenizer(str(encoders["bert"]))


def parts(apps, *names, **data) -> list[Part]:
    return [Part(name, FAMILIES[name], data.get(name), str(apps / name)) for name in names or APPS]


def compose(
    apps, method, setting, *names, texts=None, data=None, output_dir=None, seeds=1, name=None, **options
):
    trains = method not in MERGES or options.get("heads") == "retrained"
    settings = BundleSettings(**{**(SHORT if trains else PLAIN), **options})
    given, more = parts(apps, *names, **(data or {})), {"seeds": seeds, "name": name}
    return fit_bundle(given, method, setting, output_dir, texts, settings=settings, **more)


def job_of(apps, setting, *names) -> Job:
    """The job of a method, with the apps loaded."""
    model, tokenizer = setting
    read = [JobPart(n, FAMILIES[n], None, app=model.load_adapter(apps / n, activate=False)) for n in names]
    return Job(model, tokenizer, read, TEXTS, None, BundleSettings(**SHORT), "both")


@pytest.mark.parametrize("method", ["mean", "sum", "concat"])
def test_one_part_without_correction_is_that_app_bit_for_bit(apps, setting, method):
    model, tokenizer = setting
    for name in APPS:
        bundle = compose(apps, method, setting, name)
        model.load_adapter(apps / name)
        found = model.predict(TEXTS, ["bundle", name], tokenizer=tokenizer)
        assert [row[name] for row in found["bundle"]] == found[name]
        assert torch.equal(model.heads[f"bundle/{name}"].weight, model.heads[name].weight)
        assert bundle.record["composition"]["steps"] == 0
        model.delete_adapter(["bundle", name])


@pytest.mark.parametrize(
    "method, weights", [("mean", [1 / 3] * 3), ("sum", [1] * 3), ("concat", [0.7, -0.2, 2])]
)
def test_merges_are_the_sums_of_what_peft_adds_to_the_weights(
    apps, setting, encoders, batch, method, weights
):
    """An independent reference: PEFT merges each app into a stock encoder, and the differences are added."""
    plain = AutoModel.from_pretrained(encoders["bert"]).eval()
    total = {key: value.clone() for key, value in plain.state_dict().items()}
    for name, weight in zip(APPS, weights, strict=True):
        stock = PeftModel.from_pretrained(AutoModel.from_pretrained(encoders["bert"]), apps / name)
        for key, value in stock.merge_and_unload().state_dict().items():
            total[key] += weight * (value - plain.state_dict()[key])
    given = parts(apps)
    for part, weight in zip(given, weights, strict=True):
        part.weight = weight if method == "concat" else None
    fit_bundle(given, method, setting, name="both", settings=BundleSettings(**PLAIN))
    plain.load_state_dict(total)
    with torch.no_grad():
        states = setting[0].encode_adapters(["both"], **batch())["both"]
        assert torch.allclose(states, plain(**batch()).last_hidden_state, atol=1e-4)
    assert setting[0].adapter_depth("both") == 3


def explicit(model, job, lora, batch, vector):
    """Run the stock encoder with the formula as hooks: W x + sum w_i s_i B_i A_i x + s P2 P1 x, or + p."""
    apps = [lora_matrices(model.backbone, part.app) for part in job.parts]
    hooks = []

    def adding(kind, path):
        def hook(module, inputs, output):
            x, added = inputs[0], 0
            for app in apps:
                if path in app:
                    added = added + (x @ app[path].down.T) @ app[path].up.T / len(apps)
            if vector:
                return output + added + lora._pairs[kind][0]
            down, up = lora._pairs[kind]
            return output + added + 2.0 * (x @ down.T) @ up.T

        return hook

    kinds = {path.split(".", 3)[3] for app in apps for path in app}
    first = min(int(path.split(".")[2]) for app in apps for path in app)
    for layer in range(first, 4):
        for kind in kinds:
            path = f"encoder.layer.{layer}.{kind}"
            module = model.backbone.get_submodule(path)
            hooks.append(module.register_forward_hook(adding(kind, path)))
    try:
        return model(**batch).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("vector", [False, True], ids=["lc++", "lc"])
def test_the_correction_is_its_formula_with_its_gradients(apps, setting, batch, vector):
    model, inputs = setting[0], batch()
    job = job_of(apps, setting, "entities", "intent", "moods")
    lora = Calibrated(job, vector)
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters:
        parameter.data.normal_(0, 0.1, generator=generator)
    model.set_adapter(None)
    trunk = run_trunk(model.backbone, 3, **inputs)
    found = run_with(model.backbone, trunk, lora.matrices(None))
    expected = explicit(model, job, lora, inputs, vector)
    assert torch.allclose(found, expected, atol=1e-5)
    target = torch.randn(found.shape, generator=generator)
    ours = torch.autograd.grad((found * target).sum(), lora.parameters)
    theirs = torch.autograd.grad((expected * target).sum(), lora.parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=max(1e-4, 1e-3 * float(other.abs().max())))
    assert max(gradient.abs().max() for gradient in ours) > 0.1
    if not vector:
        with torch.no_grad():
            install(model, "folded", lora.matrices(None), {})
            states = model.encode_adapters(["folded"], **inputs)["folded"]
        assert torch.allclose(states, expected, atol=1e-5)
        config = model.backbone.peft_config["folded"]
        assert config.r == 3 + 2 + 4 and min(config.rank_pattern.values()) == 4


@pytest.mark.parametrize("targets, size", [(None, 21_504), (["all"], 27_648)])
@pytest.mark.parametrize("layers", [2, 6])
def test_the_correction_is_a_small_share_of_the_encoder(targets, size, layers):
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = MtpfModel(MtpfConfig(encoder_config=BertConfig(**shape))).eval()
    names = "first", "second"
    for name in names:
        model.add_adapter(name, LoraSettings(r=1, layers=layers, targets=targets))
    job = Job(model, None, [JobPart(n, "tc", None, app=n) for n in names], [], None, BundleSettings(), "both")
    total = sum(parameter.numel() for parameter in Calibrated(job).parameters)
    assert total == size <= 0.006 * sum(t.numel() for t in backbone_state_dict(model.backbone).values())


def test_lc_learns_from_the_apps_without_labels_and_folds_into_a_stock_lora(
    apps, setting, encoders, batch, tmp_path
):
    model, tokenizer = setting
    before = {key: value.clone() for key, value in backbone_state_dict(model.backbone).items()}
    mean = compose(apps, "mean", setting, texts=TEXTS)
    model.delete_adapter("bundle")
    done = compose(apps, "lc++", setting, texts=TEXTS, output_dir=tmp_path / "all", stored_dtype="float16")
    after = backbone_state_dict(model.backbone)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    made = done.record["composition"]
    assert made["loss"] == "distil" and made["texts"] == {"texts": 12, "windows": 12}
    assert made["weights"] == dict.fromkeys(APPS, pytest.approx(1 / 3)) and 0 < made["steps"] <= 30
    totals = [sum(m["validation_divergence"] for m in fit.metrics.values()) for fit in (done, mean)]
    assert totals[0] < 0.8 * totals[1]
    again = MtpfModel.from_pretrained(encoders["bert"]).eval()
    again.load_adapter(tmp_path / "all")
    assert_close(again.predict(TEXTS, ["all"]), model.predict(TEXTS, ["all"], tokenizer=tokenizer))
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(encoders["bert"]), tmp_path / "all").eval()
    with torch.no_grad():
        states = again.encode_adapters(["all"], **batch())["all"]
        assert torch.allclose(stock(**batch()).last_hidden_state, states, atol=1e-5)


def test_heads_stay_frozen_or_start_from_the_apps(apps, setting):
    model = setting[0]
    for method, heads, frozen in (
        ("lc++", "frozen", True),
        ("lc++", "auto", False),
        ("mean", "retrained", False),
    ):
        compose(apps, method, setting, "entities", "intent", texts=TEXTS, heads=heads, steps=2)
        for name in ("entities", "intent"):
            model.load_adapter(apps / name)
            old, new = model.heads[name].weight, model.heads[f"bundle/{name}"].weight
            assert torch.equal(old, new) == frozen and torch.allclose(old, new, atol=0.1)
        model.delete_adapter(["bundle", "entities", "intent"])


def test_labels_are_learned_where_all_parts_have_data(apps, setting):
    data = {"entities": ner_data(), "intent": tc_data()}
    before = compose(apps, "mean", setting, *data, data=data)
    setting[0].delete_adapter("bundle")
    done = compose(apps, "lc++", setting, *data, data=data, steps=150, learning_rate=0.02)
    assert done.record["composition"]["loss"] == "labels"
    assert done.record["training_data"] == "; ".join(
        f"{part}: {part} with data in memory, 12 examples" for part in data
    )
    for part, metric in (("entities", "entity_f1"), ("intent", "accuracy")):
        assert done.metrics[part][metric] > max(0.8, before.metrics[part][metric])
    vector = fit_bundle(
        parts(apps, *data, **data), "lc", setting, name="vector", settings=BundleSettings(**SHORT)
    )
    assert vector.metrics["entities"]["entity_f1"] >= 0 and "vector" not in setting[0].adapters
    assert vector.metrics["intent"]["accuracy"] == vector.metrics["intent"]["validation_accuracy"]


def test_a_bundle_reads_inputs_of_the_length_that_it_is_made_for(apps, setting, tmp_path):
    for asked, length in ((128, 64), (64, 64), (16, 16)):  # the default is what all apps read
        compose(
            apps, "mean", setting, texts=TEXTS, max_length=asked, output_dir=tmp_path / str(asked), name="ab"
        )
        task = json.loads((tmp_path / str(asked) / "task.json").read_text())
        assert {part["max_length"] for part in task["parts"]} == {length} == {task["settings"]["max_length"]}
        assert {setting[0].heads[f"ab/{part}"].max_length for part in APPS} == {length}
        setting[0].delete_adapter("ab")
    with pytest.raises(
        MtpfError, match="max_length is 65; the app of the part 'entities' reads 4 to 64 tokens"
    ):
        compose(apps, "mean", setting, max_length=65)


def test_data_without_a_family_has_that_of_its_app(apps, setting):
    texts = [{"text": text, "label": f"label {n % 2}"} for n, text in enumerate(TEXTS)]
    words = [{"tokens": text.split(), "ner_tags": ["B-PER", *["O"] * 4]} for text in TEXTS]
    intent, entities = (
        Part(name, data=data, adapter=str(apps / name))
        for name, data in (("intent", texts), ("entities", words))
    )
    done = fit_bundle([intent], "mean", setting, settings=BundleSettings(**PLAIN))
    assert done.metrics["intent"].keys() >= {"validation_accuracy"}
    with pytest.raises(MtpfError, match="has the label 'I-PER', which its app lacks"):  # it is read as NER
        fit_bundle([entities], "mean", setting, name="other", settings=BundleSettings(**PLAIN))


def test_lorahub_searches_better_weights_than_the_mean(apps, setting):
    mean = compose(apps, "mean", setting, "entities", "intent", texts=TEXTS)
    setting[0].delete_adapter("bundle")
    found = compose(apps, "lorahub", setting, "entities", "intent", texts=TEXTS)
    scores = [fit.record["seeds"]["0"]["validation_score"] for fit in (mean, found)]
    made = found.record["composition"]
    assert made["loss"] == "distil" and made["texts"] == {"texts": 12, "windows": 12} and made["steps"] == 0
    assert str(found).startswith("Bundle 'bundle', lorahub, 0 steps from distil")
    weights = made["weights"]
    assert scores[1] > scores[0] and all(-1.5 <= weight <= 1.5 for weight in weights.values())


def test_ties_and_dare_are_their_papers_rules():
    one, two = torch.tensor([[5.0, -4, 1, 0, 0.1]]), torch.tensor([[3.0, 6, 0, 0.2, 0]])
    # A fifth of five entries is one: 5 of the first, 6 of the second.
    assert ties([one, two], None).tolist() == [[5.0, 6.0, 0.0, 0.0, 0.0]]
    assert ties([one * 10, torch.tensor([[-7.0, 0, 0, 0, 0]])], None).tolist() == [[50.0, 0, 0, 0, 0]]
    matrix = torch.ones(200, 100)
    found = dare([matrix, matrix * 3], np.random.default_rng(0))
    assert found.mean().item() == pytest.approx(2, abs=0.05)
    assert set(found.unique().tolist()) == {0.0, 1.0, 3.0, 4.0}


def test_lc_scores_bundles_learned_from_texts_alone_at_any_rank(apps, setting):
    learned = [compose(apps, "lc", setting, texts=TEXTS, rank=rank).metrics for rank in (None, 99)]
    assert learned[0] == learned[1] and learned[0].keys() == APPS.keys()
    assert all(scores.keys() == {"validation_divergence"} for scores in learned[0].values())
    assert setting[0].adapters == []


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_merged_products_have_the_rank_of_the_apps(apps, setting, method, tmp_path):
    compose(apps, method, setting, output_dir=tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == 5 and set(config["rank_pattern"].values()) == {1, 3, 5}
    assert json.loads((tmp_path / "merged" / "task.json").read_text())["composition"]["loss"] is None


def test_a_rank_is_kept_by_the_best_approximation(apps, setting, tmp_path):
    done = compose(apps, "lc++", setting, texts=TEXTS, rank=2, output_dir=tmp_path / "small")
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == 2 == done.record["composition"]["rank"] and not config["rank_pattern"]


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda p: setattr(p[1], "name", "entities"), {}, "Two parts are named 'entities'"),
        (lambda p: setattr(p[1], "adapter", None), {}, "The part 'intent' has no adapter"),
        (
            lambda p: setattr(p[1], "adapter", p[1].adapter[:-6] + "ner"),
            {},
            "has no head: it is a family's LoRA",
        ),
        (lambda p: setattr(p[1], "family", "ner"), {}, "is of the family 'tc', not 'ner'"),
        (lambda p: None, {"texts": []}, "At least two texts are needed to learn .*, and there are none"),
        (
            lambda p: None,
            {"texts": [" ", "\n"]},
            "At least two texts are needed to learn .*, and there are none",
        ),
        (
            lambda p: None,
            {"texts": ["a", "a"]},
            "At least two texts are needed to learn .*, and there is one",
        ),
        (lambda p: None, {"texts": ["\u200b", "\u200c"]}, "fewer than two have a word"),
        (lambda p: None, {"loss": "labels"}, "learns from data of all parts; the part 'entities' has none"),
        (lambda p: setattr(p[1], "data", tc_data(5)), {}, "has the label 'label 2', which its app lacks"),
        (lambda p: setattr(p[1], "weight", 0.5), {"method": "mean"}, "weights of its own"),
        *(
            (lambda p, weight=weight: setattr(p[1], "weight", weight), {"method": "concat"}, message)
            for weight, message in (
                (
                    float("nan"),
                    "The weight of the part 'intent' is nan; it must be a number from -1000 to 1000",
                ),
                (1e30, "The weight of the part 'intent' is 1e\\+30"),
                ("x", "The weight of the part 'intent' is 'x'"),
            )
        ),
        (lambda p: None, {"texts": ["a b", None]}, "Text 2 is 'None' of the type NoneType, not a string"),
        (lambda p: None, {"texts": [b"ab", b"cd"]}, "Text 1 is .* of the type bytes, not a string"),
        (lambda p: None, {"method": "lc", "output_dir": "x"}, "cannot be stored as a LoRA"),
        (lambda p: None, {"method": "lc+"}, "did you mean 'lc.*'"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_one_sentence(
    apps, setting, tmp_path, change, options, message
):
    given = parts(apps, "entities", "intent")
    change(given)
    method, texts = options.pop("method", "lc++"), options.pop("texts", TEXTS)
    folder = options.pop("output_dir", None)
    settings = BundleSettings(**{**(PLAIN if method in MERGES else SHORT), **options})
    with pytest.raises(MtpfError, match=message) as error:
        fit_bundle(given, method, setting, folder and tmp_path / folder, texts, settings=settings)
    assert "\n" not in str(error.value) and setting[0].adapters == []


TRAINING = {"steps": 9, "evaluations": 2, "patience": 2, "learning_rate": 0.1, "batch_size": 3}
OF_LABELS = {"temperature": 5.0, "class_weights": "balanced"}
NEVER = {"refit": True, "size": "small", "lora": LoraShape(r=2), "prefix": "none"}


@pytest.mark.parametrize(
    "methods, settings, texts, reason",
    [
        ((*MERGES, "lc", "lc++"), NEVER, TEXTS, ""),
        (MERGES, TRAINING | OF_LABELS, TEXTS, " where nothing is trained"),
        (("lc", "lc++"), OF_LABELS, TEXTS, " where it learns from the apps' results"),
        ((*MERGES, "lc", "lc++"), {"max_texts": 9, "text_column": "body"}, None, " without texts"),
        (("mean", "lc++"), {"text_column": "body"}, TEXTS, " of texts in memory"),
        (MERGES, {"loss": "distil"}, None, " without texts, or data of all parts"),
        (("joint", "shared", "poly"), {"heads": "frozen", "max_texts": 9}, None, ""),
    ],
)
def test_settings_that_a_fit_does_not_read_are_refused(apps, methods, settings, texts, reason):
    data = {"entities": ner_data(), "intent": tc_data()}
    for method in methods:
        given = parts(apps, *data, **(data if BUNDLE_METHODS[method].needs == "data" else {}))
        for key, value in settings.items():
            shown = "lora.r" if key == "lora" else key
            with pytest.raises(
                RecipeError, match=f"^The method .* does not use {shown}{reason}; leave it out"
            ):
                fit_bundle(given, method, "nope", texts=texts, settings=BundleSettings(**{key: value}))


@pytest.mark.parametrize(
    "method, labelled, texts, options, message",
    [
        (
            "mean",
            False,
            None,
            {"loss": "labels"},
            "data of all parts; the part 'entities' has none, or leave",
        ),
        (
            "lc++",
            True,
            TEXTS,
            {"loss": "labels"},
            "data of all parts; leave out texts, or leave out the loss",
        ),
        ("mean", True, TEXTS, {"seeds": 2}, "The method mean makes the same bundle with every seed"),
        ("lorahub", True, None, {"seeds": 2}, "The method lorahub makes the same bundle with every seed"),
        ("dare", False, None, {"seeds": 2}, "Seeds are compared on texts, or data of all parts"),
    ],
)
def test_a_loss_or_seeds_without_effect_are_refused(apps, method, labelled, texts, options, message):
    data = {"entities": ner_data(), "intent": tc_data()}
    given = parts(apps, *data, **(data if labelled else {}))
    settings = BundleSettings(loss=options.pop("loss", "auto"))
    with pytest.raises(RecipeError, match=message):
        fit_bundle(given, method, "nope", texts=texts, settings=settings, **options)


def test_seeds_are_compared_where_they_differ(apps, setting):
    found = compose(apps, "dare", setting, texts=TEXTS, seeds=2).record["seeds"]
    assert len({fit["validation_score"] for fit in found.values()}) == 2
    setting[0].delete_adapter("bundle")
    more = {"texts": TEXTS, "heads": "retrained", "steps": 4, "class_weights": "none", "seeds": 2}
    assert len(compose(apps, "mean", setting, **more).record["seeds"]) == 2


def test_texts_that_all_apps_ignore_are_refused(apps, setting, tmp_path):
    model = setting[0]
    given = []
    for name in ("entities", "moods"):
        model.load_adapter(apps / name)
        model.heads[name].bias.data[:] = torch.tensor({"entities": [99.0, 0, 0], "moods": [-99.0, -99]}[name])
        given.append(Part(name, adapter=str(model.save_adapter(tmp_path / name, name))))
        model.delete_adapter(name)
    with pytest.raises(MtpfError, match="The apps find nothing in the 12 texts"):
        fit_bundle(given, "lc++", setting, texts=TEXTS, settings=BundleSettings(**SHORT))


def test_another_backbone_and_bundles_are_refused(apps, setting, load, encoders, tmp_path):
    compose(apps, "mean", setting, output_dir=tmp_path / "all")
    with pytest.raises(MtpfError, match="the part 'more', is a bundle; name the apps it was made of"):
        more = [*parts(apps, "intent"), Part("more", adapter=str(tmp_path / "all"))]
        fit_bundle(more, "mean", setting, settings=BundleSettings(**PLAIN))
    other = load("bert", {})
    randomize(other, 5)
    with pytest.raises(MtpfError, match="trained on another backbone|trained on"):
        fit_bundle(parts(apps), "mean", (other, setting[1]), settings=BundleSettings(**PLAIN))
    assert other.adapters == []


PAGES = ("compose", "many_apps")


def test_every_method_is_documented():
    from pathlib import Path

    page = "".join((Path(__file__).parents[2] / "docs" / f"{name}.md").read_text() for name in PAGES)
    assert all(f"`{method}`" in page for method in BUNDLE_METHODS)


# -------------------------------------------------------------------------------------------- command


def test_the_command_composes_apps(apps, encoders, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = ["--backbone", str(encoders["bert"]), "--progress", "false", "--threads", "1"]
    named = ["--app", str(apps / "entities"), "--app", f"goal={apps / 'intent'}"]
    both = str(tmp_path / "both")
    learned = ["--texts", str(tmp_path / "texts.txt"), "--steps", "2"]
    assert main(["compose", *named, *learned, "--output_dir", both, *options]) == 0
    shown = capsys.readouterr().out
    assert "Bundle 'both', lc++, 2 steps from distil" in shown and "goal (tc), intent" in shown
    assert main(["inspect", both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "bundle" and found["findings"] == []
    assert found["parts"] == {"entities": APPS["entities"][1], "goal": APPS["intent"][1]}
    made = "lc++; loss distil; 2 steps; 12 texts; weights entities 0.5, goal 0.5; rank 9"
    assert found["composition"]["method"] == "lc++" and main(["inspect", both]) == 0
    assert f"made by     {made}\n" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "both" / "README.md")
    assert f"Made by {made}." in card.text and "entities/validation_divergence" in card.text
    assert not card.data.eval_results
    parts = tmp_path / "parts.yaml"
    parts.write_text(
        f"- {{name: one, adapter: {apps / 'intent'}, weight: 0.5}}\n- {{name: two, adapter: {apps / 'moods'}}}"
    )
    more = ["--parts", str(parts), "--method", "concat", "--output_dir", str(tmp_path / "My More")]
    assert main(["compose", *more, *options]) == 0
    assert "Bundle 'my-more', concat, 0 steps" in capsys.readouterr().out
    (tmp_path / "table.csv").write_text("text\na b\nc d\n")
    table = ["--texts", str(tmp_path / "table.csv"), "--text_column", "body"]
    for arguments, message in (
        ([], "Give the apps to compose with --app, once for each, or with --parts."),
        ([*named, "--parts", str(parts)], "Give the apps to compose with --app"),
        ([*named, "--method", "lc"], "The method lc gives scores, no folder: call fit_bundle in Python"),
        (
            [*named, "--method", "joint"],
            "The method joint trains from data; use it with: mtpf adapt --bundle",
        ),
        ([*named, *table], "has no column 'body'; it has: text. Choose with --text_column."),
        (["--app", str(apps / "nope")], f"There is no folder {apps / 'nope'}"),
        (
            ["--app", f"{both}/goal"],
            f"{both}/goal is a part of the bundle {both}, not a folder; name the bundle",
        ),
        ([*named, "--texts", str(tmp_path / "none")], "none"),
    ):
        assert main(["compose", *arguments, "--output_dir", str(tmp_path / "other"), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_an_app_on_the_hub_may_have_a_revision(apps, setting, monkeypatch):
    asked = []

    def find(source, revision, family):
        asked.append((source, revision))
        return apps / "intent", source

    monkeypatch.setattr(fit_module, "find_start", find)
    done = fit_bundle([Part("goal", adapter="me/intent@abc")], "mean", setting)
    assert asked == [("me/intent", "abc")] and done.record["parts"][0]["source"] == "me/intent@abc"
