"""Small random encoders of every supported architecture, with tokenizers made on the spot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches beyond this machine
os.environ["OMP_NUM_THREADS"] = "1"  # models here are tiny: threads would only wait for each other
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # Each worker keeps to its cores, and so do the scripts that it starts: two that both take all cores
    # make every product wait for a thread that has lost its core.
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if own := set(cores[int(worker.removeprefix("gw")) :: workers]):
        os.sched_setaffinity(0, own)

import numpy as np
import pytest
import torch
from hub_server import HubServer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_mtpf import AdapterHead, LoraSettings, MtpfConfig, MtpfModel
from modeling_mtpf.hub import push_backbone
from modeling_mtpf.model.backbone_identity_mtpf import backbone_state_dict
from modeling_mtpf.model.delta_mtpf import (
    add_tokens,
    embedding_key,
    finish,
    own_model,
    set_tensor,
    write_delta,
)
from modeling_mtpf.model.predict_mtpf import text_tokenizer
from modeling_mtpf.model.scope_mtpf import Scope
from modeling_mtpf.model.texts_mtpf import TextTokenizer

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "electra", "modernbert")
BYTE_LEVEL = ("roberta", "modernbert")
SENTENCES = [
    "Ada Lovelace met Charles Babbage in London on Monday.",
    "can you remind me to buy 3 tickets for the concert tomorrow?",
    "Noor's train leaves at 7:30pm from gate 12, don't be late!",
    "café naïve 東京 🙂 e\u0301clair",
    "Hi",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(byte_level: bool) -> PreTrainedTokenizerFast:
    """Train a tokenizer of a few hundred pieces: WordPiece like BERT's, or byte-level BPE like RoBERTa's."""
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    else:
        # Not trained: the trainer of WordPiece gives another vocabulary in every process.
        text = " ".join(SENTENCES).lower()
        letters = sorted({*text, *"abcdefghijklmnopqrstuvwxyz0123456789.,:?!'"} - {" "})
        words = sorted({word for word in text.split() if word.isalpha()} - set(letters))
        pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def encoder_config(architecture: str, vocab_size: int, **overrides):
    """Build the config of a 4-layer encoder of width 32."""
    common = {"vocab_size": vocab_size, "pad_token_id": 0, "max_position_embeddings": 132}
    if architecture == "distilbert":
        common |= {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64}
    else:
        common |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        common["intermediate_size"] = 64
    if architecture == "electra":
        common["embedding_size"] = 16
    if architecture == "modernbert":
        # A window of 16 tokens, so that local and global layers differ on the test sentences.
        common |= {"local_attention": 16, "cls_token_id": 2, "sep_token_id": 3}
        common |= {"bos_token_id": 2, "eos_token_id": 3}
    return CONFIG_MAPPING[architecture](**(common | overrides))


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.2, within: str = "") -> torch.Generator:
    """Give the matrices with ``within`` in their names large random values: a missed module then shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and within in name:
                parameter.normal_(0, std, generator=generator)
    return generator


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that want real data where there is none."""
    if not os.environ.get("MTPF_DATA"):
        without = [item for item in items if item.get_closest_marker("data")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(autouse=True)
def separate_runs():
    """Forget accelerate's settings after each test: they are global, and a second run may want others."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Folders of stock encoders with tokenizers, by architecture."""
    folders = {}
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp("encoders") / architecture
        tokenizer = make_tokenizer(architecture in BYTE_LEVEL)
        torch.manual_seed(0)
        model = AutoModel.from_config(encoder_config(architecture, len(tokenizer)))
        randomize(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[architecture] = folder
    return folders


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture
def load(encoders):
    """Load an `MtpfModel` in eval mode, with named adapters whose weights are random."""

    def load_model(architecture: str = "bert", adapters: dict[str, LoraSettings] | None = None, **kwargs):
        model = MtpfModel.from_pretrained(encoders[architecture], **kwargs).eval()
        for number, (name, settings) in enumerate((adapters or {}).items()):
            model.add_adapter(name, settings)
            randomize(model, number, within=f".{name}.")
        return model

    return load_model


@pytest.fixture
def batch(encoders):
    """A padded batch of the test sentences for an architecture."""

    def tokenize(architecture: str = "bert") -> dict[str, torch.Tensor]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(encoders[architecture])
        return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))

    return tokenize


def add_scope(model: MtpfModel, name: str) -> None:
    """Give a text app a scope with random numbers, in which about half of `SENTENCES` are."""
    with torch.no_grad():
        inputs = [text_tokenizer(model)._backend.encode(text).ids for text in SENTENCES]
        states = [model.encode_adapters([name], input_ids=torch.tensor([ids]))[name] for ids in inputs]
        logits = model.heads[name](torch.cat([state.mean(1) for state in states])).float().numpy()
    generator, labels = np.random.default_rng(0), logits.shape[1]
    sizes = ((labels, 2), (labels, 2), (2, 2))
    scope = Scope(*(abs(generator.normal(0, 0.5, size)) for size in sizes), np.zeros(()))
    scope.threshold = np.median(scope.scores(logits))
    model.heads[name].scope = scope.rounded()


def assert_close(results, expected, most: float = 1e-3) -> None:
    """Compare predictions: all is equal but the scores, which other batches and processors round differently.

    The large random weights of these encoders enlarge rounding: score differences of 4e-5 were seen.
    """
    assert type(results) is type(expected) and len(results) == len(expected), (results, expected)
    if isinstance(expected, dict) and "score" in expected:
        assert results == {**expected, "score": pytest.approx(expected["score"], abs=most)}
    elif isinstance(expected, dict):
        assert results.keys() == expected.keys()
        for name in expected:
            assert_close(results[name], expected[name], most)
    else:
        for one, other in zip(results, expected, strict=True):
            assert_close(one, other, most)


WITHOUT_PACKAGE = """
import sys
class _Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_mtpf", "hub_cards", "mtpf"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, _Absent())
"""


@pytest.fixture
def fresh_process(tmp_path):
    """Run Python code in a new process and return the JSON that it prints last; maybe without the package."""

    def run(code: str, *, package: bool = True, **environment: str):
        prelude = "" if package else WITHOUT_PACKAGE
        modules = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
        variables = {**os.environ, **modules, **environment}
        done = subprocess.run(
            [sys.executable, "-c", prelude + code], capture_output=True, text=True, env=variables, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


def config_of(architecture: str, **overrides) -> MtpfConfig:
    """Build an MTPF config around a small encoder."""
    return MtpfConfig(encoder_config=encoder_config(architecture, 300, **overrides))


# The local Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub that this process uses by default, with an empty cache, away from the user's own."""
    with HubServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        # huggingface_hub has read its variables when it was imported.
        patched = {
            "ENDPOINT": server.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        }
        patched["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in patched.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        # transformers keeps a client of the first address; to an ended server it tries again for 47 seconds.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield server


@pytest.fixture
def published(hub, folders):
    """The commit of a backbone on the local Hub."""
    return push_backbone(folders / "backbone", "mtpf/encoder")


@pytest.fixture
def backbone(folders, tmp_path):
    """A copy of the backbone's folder to damage."""
    return Path(shutil.copytree(folders / "backbone", tmp_path / "backbone"))


@pytest.fixture
def entities(folders, tmp_path):
    """A copy of an app's folder to damage."""
    return Path(shutil.copytree(folders / "entities", tmp_path / "entities"))


@pytest.fixture
def no_waiting(monkeypatch):
    """Try failed requests again at once."""
    monkeypatch.setattr("modeling_mtpf.hub.client.RETRY_WAITS", (0.0, 0.0))


LABELS = {
    "entities": ("token-classification", ["O", "B-PER", "I-PER"]),
    "intent": ("text-classification", [f"intent {number}" for number in range(5)]),
}


@pytest.fixture(scope="session")
def folders(encoders, tmp_path_factory) -> Path:
    """Folders as training leaves them: ``backbone``, the TPL ``ner``, apps ``entities`` and ``intent``."""
    root = tmp_path_factory.mktemp("run")
    model = MtpfModel.from_pretrained(encoders["bert"]).eval()
    for seed, name in enumerate(("ner", *LABELS)):
        model.add_adapter(name, LoraSettings(r=4))
        generator = randomize(model, seed, within=f".{name}.")
        if name in LABELS:
            torch.manual_seed(seed)
            model.heads[name] = AdapterHead(*LABELS[name], 32)
            with torch.no_grad():  # centred and steep, so that some words are entities and some are not
                tokenizer = PreTrainedTokenizerFast.from_pretrained(encoders["bert"])
                model.heads[name].tokenizer_sha256 = TextTokenizer(tokenizer).sha256
                inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
                mean = model.encode_adapters([name], **inputs)[name].mean((0, 1))
                model.heads[name].weight.normal_(0, 5, generator=generator)
                model.heads[name].bias.copy_(-model.heads[name].weight @ mean)
    model.config.regime = "tpl"
    model.save_pretrained(root / "backbone")
    PreTrainedTokenizerFast.from_pretrained(encoders["bert"]).save_pretrained(root / "backbone")
    (root / "backbone" / "training.json").write_text(json.dumps(TRAINING))
    for name in ("ner", *LABELS):
        metrics = {"ner": {"loss": 0.6}, "entities": {"entity_f1": 0.8}, "intent": {"accuracy": 0.67}}[name]
        family = "tc" if name == "intent" else "ner"
        task = {"family": family, "metrics": metrics, "training_data": "made-up messages"}
        model.save_adapter(root / name, name, task=task)
    return root


TOKENS = ["lovelace met", "babbage in", "gate 12"]


def write_standalone(backbone: Path, folder: Path, name: str = "airline", **options) -> Path:
    """Write a standalone app of made-up values: two changed matrices, changed rows, and three new tokens."""
    base = MtpfModel.from_pretrained(backbone).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone)
    app, grown = own_model(base, share=False), add_tokens(tokenizer, TOKENS)
    generator, key = torch.Generator().manual_seed(3), embedding_key(app.backbone)
    for path, value in list(backbone_state_dict(app.backbone).items()):
        if path.endswith(("layer.1.attention.self.value.weight", "layer.3.output.dense.weight")):
            set_tensor(app.backbone, path, value + torch.randn(value.shape, generator=generator) / 4)
    rows = app.backbone.get_input_embeddings().weight.detach()
    new = torch.randn(len(grown) - len(rows), rows.shape[1], generator=generator)
    set_tensor(app.backbone, key, torch.cat([rows, new]))
    head = AdapterHead(*LABELS["intent"], 32)
    with torch.no_grad():
        head.weight.normal_(0, 3, generator=generator)
        head.bias.zero_()
    head.tokenizer_sha256 = TextTokenizer(grown).sha256
    finish(app, name, head, grown)
    task = {"family": "tc", "metrics": {"accuracy": 0.67}, "training_data": "made-up messages"}
    return write_delta(folder, base, app, name, TOKENS, task=task, **options)


SHAPE = {"batch_size": 32, "max_length": 48, "weight": 1.0}
TRAINING = {
    "regime": "tpl",
    "start": "packaged",
    "families": [
        {"name": "ner", "data": "text", "first": 4.6, "last": 0.6, **SHAPE},
        {"name": "tc", "data": "pairs", "first": 0.03, "last": 0.05, **SHAPE},
    ],
    "datasets": [],
    "adapters": ["ner", "tc"],
    "assumptions": [["steps", 150], ["seed", 0]],
    "versions": {"python": "3.11", "torch": "2.13"},
}
