"""Run PEFT's common tests on `MtpfModel`, and on the stock class those that ours does not pass.

Called in a process of its own, because PEFT's tests are a package `tests` like ours, with the folder of its
source distribution, that of this package and that of our tests on the path:

    python peft_suite.py OUTPUT.json ARCHITECTURE...

Both classes load the same folder, written by ours. The output has for each test that ours does not pass
``[architecture, config, test, ours, stock, message]``, and how many passed, failed and were skipped.
"""

import collections
import contextlib
import copy
import importlib
import inspect
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import transformers
from peft.utils import constants
from transformers import AutoModel

from modeling_mtpf import MtpfModel
from modeling_mtpf.model.configuration_mtpf import encoder_layout

OPTIONS = {"use_reentrant": [True, False], "dtype": [torch.float16, torch.bfloat16]}
"""Values of the argument that some of the tests take beyond the model and the config."""

PROMPTS = {"PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig"}
FOR_EVERY_METHOD = {"_test_merge_layers", "_test_load_multiple_adapters", "_test_save_pretrained"}
"""What the methods other than LoRA, IA3 and prompts are tested for; all tests take minutes and say the same."""

KEEP_INITIAL = ("training", "lora_conversion", "low_cpu", "attr", "layer_indexing")
"""Parts of the names of tests that want an adapter's own initial weights, not random ones."""


def load_tests() -> types.ModuleType:
    """Import PEFT's tests of feature extraction without diffusers and without the Hub."""
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].__dict__["StableDiffusionPipeline"] = type("NoPipeline", (), {})
    common = importlib.import_module("tests.testing_common")
    common.__dict__["hub_online_once"] = lambda _: contextlib.nullcontext()
    return importlib.import_module("tests.test_feature_extraction_models")


def generate(model, return_dict_in_generate=True, output_scores=True, **inputs):
    """Stand in for text generation, which some of the tests look at: the states are the scores."""
    return types.SimpleNamespace(scores=[model(**inputs)[0]])


def name_default_targets(architecture: str) -> None:
    """Let PEFT, where no target is named, choose the same modules for both classes."""
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    lora.setdefault(architecture, list(encoder_layout(architecture).lora_targets))
    for name, modules in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(modules, dict):
            modules.pop("mtpf", None)
            if architecture in modules:
                modules["mtpf"] = modules[architecture]


def cases(tests: types.ModuleType, architecture: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number of a config, the name of a common test, and further arguments of the test."""
    functions = inspect.getmembers(tests.PeftCommonTester, inspect.isfunction)
    for number, (config, settings) in enumerate(tests.ALL_CONFIGS):
        every = config.__name__ in {"LoraConfig", "IA3Config", *PROMPTS}
        plain_lora = config.__name__ == "LoraConfig" and "trainable_token_indices" not in settings
        if architecture != "bert" and not plain_lora:
            continue
        for name, function in functions:
            parameters = list(inspect.signature(function).parameters)[1:]
            if parameters[:3] != ["model_id", "config_cls", "config_kwargs"] or "generate" in name:
                continue
            if every or name in FOR_EVERY_METHOD:
                option = next((key for key in OPTIONS if key in parameters), None)
                for value in OPTIONS.get(option, [None]):
                    yield number, name, {} if option is None else {option: value}


def run(tests, cls, folder: Path, number: int, name: str, options: dict[str, Any]) -> tuple[str, str]:
    """Run one test; return ``passed``, ``skipped`` or ``failed``, and why."""
    config, settings = tests.ALL_CONFIGS[number]
    settings = copy.deepcopy(settings)
    if not any(part in name for part in KEEP_INITIAL):
        settings = tests.set_init_weights_false(config, settings)
    tester = tests.TestPeftFeatureExtractionModel()
    tester.transformers_class, tester.torch_device = cls, "cpu"
    torch.manual_seed(0)
    try:
        getattr(tester, name)(str(folder), config, settings, **options)
    except pytest.skip.Exception as reason:
        return "skipped", str(reason)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"[:300]
    return "passed", ""


def main(output: str, *architectures: str) -> None:
    """Run all and write the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tests = load_tests()
    transformers.PreTrainedModel.generate = generate
    rows, counts = [], collections.Counter()
    for architecture in architectures:
        name_default_targets(architecture)
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / architecture
            torch.manual_seed(0)
            MtpfModel(conftest.config_of(architecture)).save_pretrained(folder)
            for number, name, options in cases(tests, architecture):
                ours, message = run(tests, MtpfModel, folder, number, name, options)
                counts[ours] += 1
                if ours == "passed":
                    continue
                stock, _ = run(tests, AutoModel, folder, number, name, options)
                if (ours, stock) != ("skipped", "skipped"):
                    config = f"{tests.ALL_CONFIGS[number][0].__name__} {number}"
                    rows.append([architecture, config, f"{name} {options}", ours, stock, message])
    Path(output).write_text(json.dumps({"rows": rows, **counts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
