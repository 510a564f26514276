"""Configuration of an MTPF model: the encoder's own config plus a small ``mtpf`` block.

In memory the encoder's config is nested (``config.encoder_config``). On disk it is flat: the stock encoder
config, with its own ``model_type``, an ``mtpf`` block and the complete ``auto_map``. So the same folder is a
stock BERT (DistilBERT, ...) when loaded without remote code, and an MTPF model when loaded with it.
"""

import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .errors_mtpf import MtpfError
from .schemas_mtpf import check_config

AUTO_MAP = {
    "AutoConfig": "configuration_mtpf.MtpfConfig",
    "AutoModel": "modeling_mtpf.MtpfModel",
    "AutoModelForTokenClassification": "modeling_mtpf.MtpfForTokenClassification",
    "AutoModelForSequenceClassification": "modeling_mtpf.MtpfForSequenceClassification",
}
"""Auto class → class of this package. Saving one class alone would record only its own entry."""

_TASK_KEYS = ("architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version")
_SHARED_KEYS = (*_TASK_KEYS, "output_attentions", "output_hidden_states", "return_dict")
"""Keys that stay at the top of ``config.json`` and belong to the whole model, not to the encoder."""


@dataclass(frozen=True)
class EncoderLayout:
    """Where one encoder architecture keeps the parts that trunk, tails and LoRA need.

    Attributes:
        layers: Path of the ``ModuleList`` of transformer layers inside the stock encoder.
        attention: Path of the self-attention inside a layer.
        final_norm: Name of the norm after the last layer, or ``None``.
        lora_targets: Linear modules of one layer that carry LoRA: query, key and both MLP matrices
            (arXiv 2510.07566, section 4). ModernBERT fuses query, key and value in one matrix.
    """

    layers: str
    attention: str
    final_norm: str | None
    lora_targets: tuple[str, ...]


_BERT_LAYOUT = EncoderLayout(
    layers="encoder.layer",
    attention="attention.self",
    final_norm=None,
    lora_targets=("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense"),
)
ENCODER_LAYOUTS = {
    "bert": _BERT_LAYOUT,
    "roberta": _BERT_LAYOUT,
    "xlm-roberta": _BERT_LAYOUT,
    "electra": _BERT_LAYOUT,
    "distilbert": EncoderLayout(
        layers="transformer.layer",
        attention="attention",
        final_norm=None,
        lora_targets=("attention.q_lin", "attention.k_lin", "ffn.lin1", "ffn.lin2"),
    ),
    "modernbert": EncoderLayout(
        layers="layers",
        attention="attn",
        final_norm="final_norm",
        lora_targets=("attn.Wqkv", "mlp.Wi", "mlp.Wo"),
    ),
}


def encoder_layout(model_type: str) -> EncoderLayout:
    """Return the layout of an encoder architecture.

    Raises:
        ValueError: The architecture is not supported.
    """
    if model_type not in ENCODER_LAYOUTS:
        accepted = ", ".join(sorted(ENCODER_LAYOUTS))
        raise ValueError(
            f"Encoder type {model_type!r} is not supported; choose a checkpoint of one of: {accepted}."
        )
    return ENCODER_LAYOUTS[model_type]


def max_tokens(config: PreTrainedConfig) -> int:
    """Longest input of an encoder in tokens, special tokens included."""
    # RoBERTa counts positions from pad_token_id + 1.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - offset


class MtpfConfig(PreTrainedConfig):
    """Configuration of [`MtpfModel`] and its task classes.

    Attributes:
        encoder_config: Config of the wrapped encoder, as an object or as a dict with ``model_type``.
        num_tail_layers: How many of the last layers carry LoRA by default; 2 in arXiv 2510.07566.
        regime: What the backbone was pre-finetuned for: ``base``, a family name, ``naive`` or ``tpl``.

    Example:
        >>> config = MtpfConfig(encoder_config={"model_type": "bert", "hidden_size": 32}, regime="tpl")
        >>> config.hidden_size, config.encoder_config.model_type
        (32, 'bert')
    """

    model_type = "mtpf"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    num_tail_layers: int = 2
    regime: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.pop("model_type", self.model_type) != self.model_type:
            raise MtpfError(
                "MtpfConfig(...) takes the settings of the encoder as encoder_config={...}; for those of a "
                "config.json use MtpfConfig.from_dict or from_json_file."
            )
        if not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = AutoConfig.for_model(
                **{"model_type": "bert", **(self.encoder_config or {})}
            )
        kwargs.pop("text_config", None)  # of `to_dict`
        super().__post_init__(**kwargs)
        # Auto classes look for their own entry on the config object, too.
        self.__dict__["auto_map"] = dict(AUTO_MAP)

    def __setattr__(self, name: str, value: Any) -> None:
        # vocab_size, hidden_dropout_prob, ...: whatever this config lacks is the encoder's. Written here, it
        # would change nothing but what is read here.
        encoder = self.__dict__.get("encoder_config")
        here = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if not here and isinstance(encoder, PreTrainedConfig) and hasattr(encoder, name):
            setattr(encoder, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # hidden_size, pad_token_id, ...: whatever this config lacks is read from the encoder's.
        # Not rope_parameters: transformers would standardise the encoder's a second time, for this config.
        encoder = self.__dict__.get("encoder_config")
        if name.startswith(("_", "rope_")) or not isinstance(encoder, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(encoder, name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the encoder's config, as composite models of transformers do."""
        return self.encoder_config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Read ``config.json`` and nest the encoder's part, whether MTPF or a stock model wrote it."""
        revision = kwargs.get("revision")
        flat, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_config(flat, f"{pretrained_model_name_or_path} is damaged: ")
        if methods := [key for key in flat if callable(getattr(PreTrainedConfig, key, None))]:
            raise MtpfError(f"{pretrained_model_name_or_path} is damaged: config.json sets {methods[0]!r}.")
        nested = cls._nested(flat) if flat else flat
        # Which commit this is, for whatever is read later from the same repo; it is not written.
        commit = getattr(revision, "resolved", None)
        if nested is not flat and commit is not None:
            nested["source_revision"] = commit
        return nested, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """Build the config from a flat dict, as in ``config.json``, or from a nested one, as of `to_dict`."""
        return super().from_dict(cls._nested(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file) -> Any:
        """Read a ``config.json`` that MTPF or a stock model wrote."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def _nested(cls, flat: dict[str, Any]) -> dict[str, Any]:
        """Move the encoder's part of a flat config into ``encoder_config``; a nested one stays as it is."""
        if flat.get("model_type", cls.model_type) == cls.model_type:
            return flat
        check_config(flat)
        encoder = dict(flat)
        block = encoder.pop("mtpf", None) or {}
        encoder.pop("auto_map", None)
        shared = {key: encoder.pop(key) for key in _SHARED_KEYS if key in encoder}
        shared.pop("transformers_version", None)
        return {**shared, **block, "model_type": cls.model_type, "encoder_config": encoder}

    def to_dict(self) -> dict[str, Any]:
        """Serialise with the encoder's config nested; reading it back ignores ``text_config``."""
        # Where PEFT reads the shape of a composite model's prompts, under names that DistilBERT has, too.
        shape = {key: getattr(self.encoder_config, key) for key in ("hidden_size", "num_attention_heads")}
        return {**super().to_dict(), "text_config": shape}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Serialise as a flat, stock encoder config with an ``mtpf`` block and the complete ``auto_map``."""
        whole = json.loads(super().to_json_string(use_diff=use_diff))
        assert isinstance(self.encoder_config, PreTrainedConfig)
        encoder = json.loads(self.encoder_config.to_json_string(use_diff=True))
        for key in (*_TASK_KEYS, "_name_or_path", "auto_map"):  # the encoder's path is a local one
            encoder.pop(key, None)
        encoder["model_type"] = self.encoder_config.model_type
        shared = {key: whole[key] for key in _SHARED_KEYS if key in whole}
        block = {key: whole[key] for key in ("num_tail_layers", "regime") if key in whole}
        flat = {**encoder, **shared, "auto_map": AUTO_MAP, "mtpf": block}
        return json.dumps(flat, indent=2, sort_keys=True) + "\n"
