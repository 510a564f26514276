"""Run transformers' common tests on our classes, and on the stock class those that ours do not pass.

Called in a process of its own, because transformers' tests are a package `tests` like ours, with the folder of
its source distribution, that of this package and that of our tests on the path:

    python transformers_suite.py OUTPUT.json ARCHITECTURE...

The output has for each test that ours do not pass ``[architecture, class, test, ours, stock, message]``, and
how many passed.
"""

import importlib
import json
import os
import random
import sys
import tempfile
import types
import unittest
from pathlib import Path

import conftest
import torch
import transformers
from transformers.models.auto import modeling_auto

from modeling_mtpf import MtpfConfig, MtpfForSequenceClassification, MtpfForTokenClassification, MtpfModel

CLASSES = {
    "Model": (MtpfModel, "feature-extraction", "AutoModel", "MODEL_MAPPING_NAMES"),
    "ForTokenClassification": (
        MtpfForTokenClassification,
        "token-classification",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    "ForSequenceClassification": (
        MtpfForSequenceClassification,
        "text-classification",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
MODEL_TYPES = {"bert": "Bert", "distilbert": "DistilBert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
MODEL_TYPES |= {"electra": "Electra", "modernbert": "ModernBert"}


def add_what_the_distribution_lacks() -> None:
    """Stand in for the modules of transformers' tests that its source distribution leaves out."""

    def module(name, **contents):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(contents)

    transformers.utils.direct_transformers_import = lambda *_: transformers
    for package in ("exporters", "generation", "utils", "pipelines"):
        module(f"tests.{package}")
    module("tests.exporters.test_export", ExportTesterMixin=type("NoExport", (), {}))
    module("tests.generation.test_utils", GenerationTesterMixin=type("NoGeneration", (), {}))
    module("tests.utils.test_configuration_utils", config_common_kwargs={})
    for task, (arguments, name) in PIPELINES.items():
        contents = {name: pipeline_test(task, arguments)}
        module(f"tests.pipelines.test_pipelines_{task.replace('-', '_')}", **contents)


PIPELINES = {
    "feature-extraction": ({}, "FeatureExtractionPipelineTests"),
    "token-classification": ({}, "TokenClassificationPipelineTests"),
    "text-classification": ({}, "TextClassificationPipelineTests"),
    "zero-shot": ({"candidate_labels": ["polite", "rude"]}, "ZeroShotClassificationPipelineTests"),
}


def pipeline_test(task: str, arguments: dict) -> type:
    """Make the part of transformers' pipeline tests that runs a pipeline and looks at its results."""

    class Test:
        def get_test_pipeline(self, model, tokenizer, dtype="float32", **_):
            name = "zero-shot-classification" if task == "zero-shot" else task
            return transformers.pipeline(
                name, model=model, tokenizer=tokenizer, dtype=dtype, **arguments
            ), TEXTS

        def run_pipeline_test(self, pipeline, examples):
            one, several = pipeline(examples[0]), pipeline(examples)
            assert len(several) == len(examples) and type(several[0]) is type(
                one if task != "text-classification" else one[0]
            )
            keys = {
                "token-classification": {"entity", "score", "index", "word", "start", "end"},
                "text-classification": {"label", "score"},
                "zero-shot": {"sequence", "labels", "scores"},
            }.get(task)
            if keys:
                first = one if isinstance(one, dict) else one[0]
                assert set(first) == keys, first

    return Test


TEXTS = ["Ada Lovelace met Charles Babbage in London", "can you remind me to buy 3 tickets?"]


class Tester:
    """What transformers' tests ask of a model: a small config and inputs."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 2
    is_training = True

    def __init__(self, architecture: str, ours: bool):
        self.architecture, self.ours = architecture, ours

    def get_config(self):
        layers = {"n_layers": 2} if self.architecture == "distilbert" else {"num_hidden_layers": 2}
        if self.architecture == "modernbert":
            layers["global_attn_every_n_layers"] = 2
        config = conftest.encoder_config(self.architecture, 99, **layers)
        return MtpfConfig(encoder_config=config) if self.ours else config

    def prepare_config_and_inputs_for_common(self):
        numbers = random.Random(0)
        ids = [[numbers.randrange(5, 99) for _ in range(self.seq_length)] for _ in range(self.batch_size)]
        mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        return self.get_config(), {"input_ids": torch.tensor(ids), "attention_mask": mask}


def make_case(models: Path, architecture: str, part: str, ours: bool) -> type:
    """Build a test case from the mixins for one class, ours or the stock one."""
    common = importlib.import_module("tests.test_modeling_common")
    pipelines = importlib.import_module("tests.test_pipeline_mixin")
    configs = importlib.import_module("tests.test_configuration_common")
    cls, task, *_ = CLASSES[part]
    if not ours:
        cls = getattr(transformers, MODEL_TYPES[architecture] + part)

    def set_up(self):
        self.model_tester = Tester(architecture, ours)
        config = self.model_tester.get_config()
        inputs = (
            {"encoder_config": config.encoder_config.to_dict()}
            if ours
            else {"num_hidden_layers" if architecture != "distilbert" else "dim": 32}
        )
        self.config_tester = configs.ConfigTester(self, config_class=type(config), **inputs)
        pipelines.TRANSFORMERS_TINY_MODEL_PATH = str(models / architecture)

    contents = {
        "test_resize_position_embeddings": architecture == "distilbert",
        "test_can_init_all_missing_weights_before_2023": True,
    }
    contents |= {"setUp": set_up, "all_model_classes": (cls,), "pipeline_model_mapping": {task: cls}}
    if part == "ForSequenceClassification":
        contents["pipeline_model_mapping"]["zero-shot"] = cls
    if part == "Model":
        for name in dir(configs.ConfigTester):
            if name.startswith(("create_and_test_", "check_")):
                contents[f"test_{name}"] = lambda self, name=name: getattr(self.config_tester, name)()
    bases = (common.ModelTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase)
    return type(f"{architecture}-{part}", bases, contents)


def save_models_for_pipelines(models: Path, architecture: str) -> dict:
    """Write models and tokenizers as the pipeline mixin looks for them; return its summary of them."""
    tokenizer = conftest.make_tokenizer(architecture in conftest.BYTE_LEVEL)
    config = conftest.encoder_config(architecture, len(tokenizer))
    summary = {}
    for part, (ours, *_) in CLASSES.items():
        for cls, its in (
            (ours, MtpfConfig(encoder_config=config)),
            (getattr(transformers, MODEL_TYPES[architecture] + part), config),
        ):
            its.label2id, its.id2label = {"entailment": 0, "other": 1}, {0: "entailment", 1: "other"}
            folder = models / architecture / its.model_type / cls.__name__
            torch.manual_seed(0)
            cls(its).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            summary[cls.__name__] = {
                "tokenizer_classes": ["PreTrainedTokenizerFast"],
                "processor_classes": [],
            }
    return summary


class Result(unittest.TestResult):
    """Outcome and message of each test; a failed part makes the whole fail."""

    def __init__(self):
        super().__init__()
        self.outcomes: dict[str, tuple[str, str]] = {}

    def record(self, test, outcome, message=""):
        name = (
            test.id().rsplit(".", 1)[1]
            if not hasattr(test, "test_case")
            else test.test_case.id().rsplit(".", 1)[1]
        )
        if self.outcomes.get(name, ("passed",))[0] != "failed":
            self.outcomes[name] = (outcome, message)

    def addSuccess(self, test):
        self.record(test, "passed") if test.id().rsplit(".", 1)[1] not in self.outcomes else None

    def addSkip(self, test, reason):
        self.record(test, "skipped", reason)

    def addFailure(self, test, error):
        self.record(test, "failed", self._exc_info_to_string(error, test).strip()[-1500:])

    addError = addFailure

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addFailure(subtest, error)


def run(case: type, names: list[str]) -> dict[str, tuple[str, str]]:
    """Run some tests of a case; return outcome and message of each."""
    result = Result()
    for name in names:
        torch.manual_seed(0)
        case(name).run(result)
    return result.outcomes


def main(output: str, *architectures: str) -> None:
    torch.set_num_threads(1)
    transformers.AutoConfig.register("mtpf", MtpfConfig)
    for ours, _, auto, mapping in CLASSES.values():
        getattr(transformers, auto).register(MtpfConfig, ours)
        getattr(modeling_auto, mapping)["mtpf"] = ours.__name__
    passed, rows, summary = 0, [], {}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = folder
        for architecture in architectures:
            summary |= save_models_for_pipelines(models, architecture)
        (models / "reports").mkdir()
        (models / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
        add_what_the_distribution_lacks()
        for architecture in architectures:
            for part in CLASSES:
                cases = [make_case(models, architecture, part, ours) for ours in (True, False)]
                names = unittest.defaultTestLoader.getTestCaseNames(cases[0])
                ours = run(cases[0], names)
                others = [name for name in names if ours[name][0] != "passed"]
                passed += len(names) - len(others)
                stock = run(cases[1], others)
                rows += [
                    [architecture, part, name, ours[name][0], stock[name][0], ours[name][1]]
                    for name in others
                ]
    Path(output).write_text(json.dumps({"passed": passed, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
