"""Small random encoders of every supported architecture, with tokenizers made on the spot."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches beyond this machine
os.environ["OMP_NUM_THREADS"] = "1"  # models here are tiny: threads would only wait for each other

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_mtpf import LoraSettings, MtpfConfig, MtpfModel

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
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
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
        common |= {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
    if architecture == "electra":
        common["embedding_size"] = 16
    if architecture == "modernbert":
        # A window of 16 tokens, so that local and global layers differ on the test sentences.
        common |= {
            "local_attention": 16,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
    return CONFIG_MAPPING[architecture](**(common | overrides))


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Give every matrix large random values, so that a missed module changes the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that want real data where there is none."""
    if not os.environ.get("MTPF_DATA"):
        without = [item for item in items if item.get_closest_marker("data")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


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
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if f".{name}." in key:
                        parameter.normal_(0, 0.2, generator=generator)
        return model

    return load_model


@pytest.fixture
def batch(encoders):
    """A padded batch of the test sentences for an architecture."""

    def tokenize(architecture: str = "bert") -> dict[str, torch.Tensor]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(encoders[architecture])
        return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))

    return tokenize


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
    """Run Python code in a new process and return the JSON that it prints last; optionally without the package."""

    def run(code: str, *, package: bool = True, **environment: str):
        prelude = "" if package else WITHOUT_PACKAGE
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", prelude + code], capture_output=True, text=True, env=variables, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


def config_of(architecture: str, **overrides) -> MtpfConfig:
    """Build an MTPF config around a small encoder."""
    return MtpfConfig(encoder_config=encoder_config(architecture, 300, **overrides))
