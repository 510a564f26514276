"""Every setting of a fit is read by a method, or refused there."""

import sys
from dataclasses import fields, is_dataclass, replace

import pytest
from test_apps import FLOAT, ner_data, tc_data

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation import tokens as tokens_module
from modeling_mtpf.adaptation.methods.registry import METHODS, uses
from modeling_mtpf.adaptation.settings import LoraShape, SparseSettings
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import RecipeError

OTHER = {
    **{"seed": 1, "max_length": 32, "learning_rate": 1e-9, "batch_size": 2, "steps": 4, "evaluations": 2},
    **{"patience": 2, "class_weights": "balanced", "mixed_precision": "float32", "stored_dtype": "float32"},
    **{"cache_gb": 0.5, "progress": True, "refit": False, "size": "small"},
    **{"lora.layers": 1, "lora.r": 2, "lora.targets": ["attention.self.query"]},
    **{"sparse.budget": 0.5, "sparse.choice": "worst", "sparse.beta": 0.5, "sparse.score_batches": 2},
    **{"sparse.learning_rate": 1e-9, "sparse.head_learning_rate": 1e-9, "sparse.vocabulary": 0.5},
}
"""A value of each setting that is not its default. With such rates no score rises, so that patience is read."""

FITS = [(*key, False) for key in METHODS] + [("ner", "sparse", True), ("tc", "sparse", True)]


def test_names_of_settings(capsys):
    assert LoraShape(targets=["query, key", "value"]).targets == ["query", "key", "value"]
    with pytest.raises(RecipeError, match="size is 'lage'; did you mean 'large'. choose one of"):
        FitSettings(size="lage")


def settings_with(names: list[str]) -> FitSettings:
    whole = {name: OTHER[name] for name in names if "." not in name}
    for part, kind in (("lora", LoraShape), ("sparse", SparseSettings)):
        prefix = f"{part}."
        whole[part] = kind(**{n.removeprefix(prefix): OTHER[n] for n in names if n.startswith(prefix)})
    return FitSettings(**whole)


def options(family: str, method: str, standalone: bool, load, encoders) -> dict:
    model = load("bert"), load_word_tokenizer(str(encoders["bert"]))
    data = {"ner": ner_data, "tc": tc_data}[family]()
    return {"data": data, "family": family, "method": method, "standalone": standalone, "backbone": model}


def test_the_values_are_of_all_settings():
    names = [
        f"{field.name}.{part.name}" if is_dataclass(value) else field.name
        for field in fields(FitSettings)
        for value in [getattr(FitSettings(), field.name)]
        for part in (fields(value) if is_dataclass(value) else [field])
    ]
    assert list(OTHER) == names and settings_with(names).changed() == names
    assert FitSettings().changed() == []


@pytest.mark.parametrize("family, method, standalone", FITS)
def test_a_setting_is_read_or_refused(family, method, standalone, load, encoders, monkeypatch):
    """What a fit reads is recorded, but for what checks, copies or fills in all settings alike."""
    monkeypatch.setattr(tokens_module, "LEAST_TEXTS", 2)
    read: set[str] = set()

    def recording(kind: type, prefix: str) -> type:
        def get(self, name: str):
            frame = sys._getframe(1)
            general = frame.f_code.co_name in ("__post_init__", "__eq__", "for_family", "changed")
            if not general and frame.f_globals["__name__"] != "dataclasses":
                read.add(prefix + name)
            return object.__getattribute__(self, name)

        return type(kind.__name__, (kind,), {"__getattribute__": get})

    used = [name for name in OTHER if uses(family, method, name, standalone)]
    if (family, method) == ("tc", "sparse"):  # with one label a text the head starts from a probe
        used.remove("learning_rate")
    given = replace(settings_with([n for n in used if n != "cache_gb"]), **FLOAT)
    parts = {
        "lora": recording(LoraShape, "lora.")(**vars(given.lora)),
        "sparse": recording(SparseSettings, "sparse.")(**vars(given.sparse)),
    }
    changed = recording(FitSettings, "")(**{**vars(given), **parts})
    arguments = options(family, method, standalone, load, encoders)
    fit_app(**arguments, settings=changed)
    assert set(used) - read == set() and read & set(OTHER) == set(used)


@pytest.mark.parametrize("family, method, standalone", FITS)
def test_a_setting_that_a_method_does_not_use_is_refused(family, method, standalone, load, encoders):
    unused = [name for name in OTHER if not uses(family, method, name, standalone)]
    assert unused
    arguments = options(family, method, standalone, load, encoders)
    what = f"standalone apps of {family}" if standalone else f"the method {method} for {family}"
    for name in unused:
        with pytest.raises(RecipeError, match=f"^{name} is not a setting of {what}; leave it out"):
            fit_app(**arguments, settings=settings_with([name]))


@pytest.mark.parametrize("name", [name for name in OTHER if name not in ("max_length", "progress")])
def test_what_an_app_of_label_names_does_not_use_is_refused(name, tmp_path, capsys):
    value = OTHER[name][0] if isinstance(OTHER[name], list) else str(OTHER[name]).lower()
    command = ["adapt", "--family", "tc", "--zero_shot", "--labels", "a,b", f"--{name}", value]
    assert main([*command, "--output_dir", str(tmp_path / "app")]) == 2
    assert f"--{name.partition('.')[0]} is not for --zero_shot" in capsys.readouterr().err
