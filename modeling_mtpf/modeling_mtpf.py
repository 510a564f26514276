"""MTPF models: any BERT-like encoder as a shared backbone, with any number of named adapters.

The wrapper holds the stock encoder under ``backbone``; its weights are stored without that prefix, so one
folder serves `MtpfModel`, stock transformers, sentence-transformers and PEFT alike.
"""

import inspect
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from .adapter_files_mtpf import (
    backbone_state_dict,
    find_adapter,
    install_adapter,
    read_adapter,
    write_adapter,
)
from .adapters_mtpf import (
    AdapterError,
    AdapterHead,
    LoraSettings,
    active_adapter,
    adapter_depth,
    adapter_names,
    inject_lora,
    lora_config,
    remove_lora,
    set_active_adapter,
    switched_adapter,
)
from .configuration_mtpf import MtpfConfig
from .hub_cache_mtpf import weights_file
from .predict_mtpf import Predictor
from .trunk_mtpf import run_tail, run_trunk

HUB_FILES = (
    "adapter_files_mtpf.py",
    "adapters_mtpf.py",
    "configuration_mtpf.py",
    "hub_cache_mtpf.py",
    "modeling_mtpf.py",
    "predict_mtpf.py",
    "trunk_mtpf.py",
)
"""The code that every published backbone carries: all of it, and nothing else."""

STOCK_PREFIXES = r"^(bert|roberta|distilbert|electra|model)\."
"""What stands before the encoder's keys in checkpoints of stock task models, e.g. masked language models."""


def mean_pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average the token vectors of each text.

    Args:
        hidden_states: ``(batch, tokens, hidden)``.
        attention_mask: ``(batch, tokens)``, 1 for real tokens.

    Returns:
        ``(batch, hidden)`` in the dtype of ``hidden_states``; zeros for a row without tokens.
    """
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


class MtpfPreTrainedModel(PreTrainedModel):
    """Base of all MTPF models: the backbone, its adapters and their heads, saving and loading.

    Adapter methods here replace those of transformers' mixin, which save only the adapter once one is loaded,
    turn gradients off while switching, and record local paths.
    """

    config_class = MtpfConfig
    base_model_prefix = "backbone"
    head_kind: str | None = None
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MtpfConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.encoder_config)
        self.heads = nn.ModuleDict()

    # ---------------------------------------------------------------------------------------- encoder

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's token embedding."""
        self.backbone.set_input_embeddings(value)

    def encode(self, input_ids=None, attention_mask=None, **kwargs) -> Any:
        """Run the stock encoder with the active adapter and return its own output.

        Raises:
            TypeError: An argument that the encoder does not know. It would swallow it silently, for instance
                PEFT's ``adapter_names``.
        """
        unknown = sorted(set(kwargs) - self._encoder_arguments())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unknown argument {unknown[0]!r}; to use adapters call "
                "model.encode_adapters(adapters=[...]) or wrap the call in model.use_adapter(name)."
            )
        if self.config.output_hidden_states:
            kwargs.setdefault("output_hidden_states", True)
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def _encoder_arguments(self) -> set[str]:
        named = inspect.signature(self.backbone.forward).parameters
        common = {"token_type_ids"} if getattr(self.config, "type_vocab_size", 0) else set()
        return {*named, *common, "output_hidden_states", "output_attentions", "return_dict"} - {"kwargs"}

    def encode_adapters(self, adapters: list[str | None], **inputs) -> dict[str | None, torch.Tensor]:
        """Run the trunk once and one short tail per adapter.

        Args:
            adapters: Names of loaded adapters; ``None`` is the bare backbone.
            **inputs: Encoder inputs, e.g. ``input_ids`` and ``attention_mask`` of shape ``(batch, tokens)``.

        Returns:
            For each adapter the last hidden states ``(batch, tokens, hidden)``, bit-equal in eval mode to a
            separate pass inside ``use_adapter``. In training mode the adapters share the trunk's dropout.

        Example:
            >>> states = model.encode_adapters(["ner", "tc"], **tokenizer("Lunch at 1?", return_tensors="pt"))  # doctest: +SKIP
        """  # noqa: E501
        unknown = sorted(set(inputs) - self._encoder_arguments() | {"output_hidden_states"} & set(inputs))
        if unknown:
            raise TypeError(f"encode_adapters got unknown argument {unknown[0]!r}.")
        depth = max((self.adapter_depth(name) for name in adapters if name is not None), default=1)
        trunk = run_trunk(self.backbone, depth, **inputs)
        return {name: run_tail(self.backbone, trunk, name) for name in adapters}

    # --------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return adapter_names(self.backbone)

    def adapter_depth(self, name: str) -> int:
        """Return how many of the last layers an adapter touches."""
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise AdapterError(f"There is no adapter {name!r}; loaded: {known}. Load it with load_adapter.")
        return adapter_depth(self.backbone, name)

    def add_adapter(  # type: ignore[override]
        self, name: str, lora: LoraSettings | None = None, head: AdapterHead | None = None
    ) -> None:
        """Add a fresh, trainable LoRA (and the head of an app); nothing else changes its trainability."""
        settings = lora or LoraSettings(layers=self.config.num_tail_layers)
        inject_lora(self.backbone, name, lora_config(self.backbone, settings), trainable=True)
        if head is not None:
            self.heads[name] = head.to(self.device)

    def load_adapter(  # type: ignore[override]
        self,
        path_or_repo: str | os.PathLike,
        adapter_name: str | None = None,
        revision: str | None = None,
        *,
        token: str | None = None,
        trainable: bool = False,
        check_backbone: bool = True,
        load_config: Any = None,
        adapter_kwargs: dict | None = None,
    ) -> str:
        """Load an adapter folder or Hub repo beside those already loaded.

        All checks (files, shapes, backbone hash, head) come before the first change in memory. Plain forwards
        go on using the adapter they used before: name the new one in ``use_adapter``, ``encode_adapters`` or
        ``predict``. In a task class (``MtpfForTokenClassification``, ...) an app of its kind becomes active
        and its head becomes the classifier, so that transformers' pipelines can use it.

        Args:
            path_or_repo: A folder, or a Hub id ``owner/name``.
            adapter_name: Name in this model; the one recorded in the adapter by default.
            revision: Commit, tag or branch of the Hub repo; pin a commit in production.
            token: Hub token for private repos.
            trainable: Whether its LoRA gets gradients.
            check_backbone: Refuse adapters that were trained on other weights (sha256).
            load_config: Passed by ``AutoModel.from_pretrained(<adapter repo>)``, which wants the adapter
                active.
            adapter_kwargs: Likewise; may carry ``revision`` and ``token``.

        Returns:
            The adapter's name in this model.

        Raises:
            AdapterError: The folder is damaged or incomplete, or does not fit this backbone.
        """
        extra = adapter_kwargs or {}
        folder = find_adapter(path_or_repo, revision or extra.get("revision"), token or extra.get("token"))
        source = weights_file(self.config.name_or_path, getattr(self.config, "source_revision", None))
        files = read_adapter(folder, self.backbone, adapter_name, check_backbone, source)
        if self.head_kind and files.head is not None and files.head.kind != self.head_kind:
            raise AdapterError(
                f"{path_or_repo} is a {files.head.kind} app, but {type(self).__name__} is for "
                f"{self.head_kind}; load it into MtpfModel."
            )
        install_adapter(self.backbone, files, trainable)
        if files.head is not None:
            self.heads[files.name] = files.head.to(self.device)
        if load_config is not None or (self.head_kind and files.head is not None):
            self.set_adapter(files.name)
        if self.head_kind and files.head is not None:
            self._use_head(files.head)
        return files.name

    def _use_head(self, head: AdapterHead) -> None:
        """Make an app's head the classifier of a task class, with its labels, as pipelines expect it."""
        self.classifier = nn.Linear(head.in_features, head.out_features)
        self.classifier.load_state_dict(head.state_dict())
        self.classifier.to(self.device, self.dtype)
        self.config.id2label = dict(enumerate(head.labels))
        self.config.label2id = {label: index for index, label in enumerate(head.labels)}
        self.num_labels = len(head.labels)

    def delete_adapter(self, name: str) -> None:  # type: ignore[override]
        """Take an adapter and its head out of memory; the others are untouched."""
        self.adapter_depth(name)  # raises for an unknown name
        remove_lora(self.backbone, name)
        self.heads.pop(name) if name in self.heads else None

    def set_adapter(self, name: str | None) -> None:  # type: ignore[override]
        """Choose the adapter that plain forwards use from now on; ``None`` for the bare backbone."""
        if name is not None:
            self.adapter_depth(name)
        set_active_adapter(self.backbone, name)

    def active_adapters(self) -> list[str]:
        """Return the adapter that plain forwards use, as a list of none or one."""
        active = active_adapter(self.backbone)
        return [] if active is None else [active]

    @contextmanager
    def use_adapter(self, name: str | None) -> Iterator[None]:
        """Use one adapter (or, with ``None``, the bare backbone) for the plain forwards of a ``with`` block.

        Gradients stay on for all adapters, so a loss computed inside may be back-propagated outside, without
        activation checkpointing. The choice is one per model; threads use `encode_adapters` or `predict`.
        """
        with switched_adapter(self.backbone, name):
            yield

    def save_adapter(
        self,
        folder: str | os.PathLike,
        name: str,
        *,
        backbone_id: str | None = None,
        backbone_revision: str | None = None,
        dtype: torch.dtype | None = None,
        task: dict[str, Any] | None = None,
    ) -> Path:
        """Write one adapter, with its head if it has one, as a folder that PEFT users can load as well.

        Args:
            folder: Where to write; other files there stay.
            name: A loaded adapter.
            backbone_id: Hub id of the published backbone; local paths are refused, they break uploads.
            backbone_revision: Commit of that repo.
            dtype: Type of the stored numbers, by default that in memory; ``torch.float16`` halves the folder.
            task: More for ``task.json``: family, metrics, training data, ...

        Raises:
            AdapterError: No such adapter, or ``backbone_id`` is a local path.
        """
        if backbone_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", backbone_id):
            raise AdapterError(
                f"backbone_id must be a Hub id of the form 'owner/name', not the path {backbone_id!r}."
            )
        head: Any = self.heads[name] if name in self.heads else None
        return write_adapter(
            folder,
            self.backbone,
            name,
            head=head,
            backbone_id=backbone_id,
            backbone_revision=backbone_revision,
            dtype=dtype,
            task=task,
        )

    # ---------------------------------------------------------------------------------------- storage

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does: an MTPF folder, or any stock checkpoint of a supported encoder.

        Raises:
            ValueError: The checkpoint lacks weights of the encoder. transformers alone would only warn and
                go on with random ones.
        """
        kwargs.setdefault("key_mapping", {STOCK_PREFIXES: ""})
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs
    ) -> None:
        """Write the backbone (and the task head of a task class) under stock names, adapters or not.

        The folder also gets the code that loads it with ``trust_remote_code=True``. Adapters are written by
        [`save_adapter`]. Arguments are those of transformers.
        """
        if state_dict is None:
            own = {k: v for k, v in self.state_dict().items() if not k.startswith(("backbone.", "heads."))}
            state_dict = {**backbone_state_dict(self.backbone), **own}
        super().save_pretrained(save_directory, state_dict=state_dict, save_original_format=False, **kwargs)
        here = Path(__file__).parent
        for name in HUB_FILES:
            if here != Path(save_directory).resolve():
                shutil.copyfile(here / name, Path(save_directory) / name)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        missing = [
            key for key in loading_info.missing_keys if key.startswith("backbone.") and ".pooler." not in key
        ]
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the encoder, e.g. {sorted(missing)[0]!r}; "
                f"it is not one of a {model.config.encoder_config.model_type} encoder, or it is incomplete."
            )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # only heads: the encoder initialises its own modules
            nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class MtpfModel(MtpfPreTrainedModel):
    """The shared encoder with its adapters; drop-in for a stock ``AutoModel``.

    Example:
        >>> model = MtpfModel.from_pretrained("runs/demo/backbone")  # doctest: +SKIP
        >>> model.load_adapter("runs/demo/apps/message-entities", adapter_name="entities")  # doctest: +SKIP
        >>> model.predict(["Call Ada at 5pm"], adapters=["entities"])  # doctest: +SKIP
    """

    def __init__(self, config: MtpfConfig):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs) -> BaseModelOutput:
        """Run the encoder with the active adapter; arguments and output are the stock encoder's."""
        return self.encode(input_ids, attention_mask, **kwargs)

    def predict(
        self,
        texts: str | list[str],
        adapters: list[str],
        *,
        tokenizer: Any = None,
        batch_size: int = 32,
        token: str | None = None,
    ) -> dict[str, list]:
        """Apply several apps to the same texts, running the trunk once per batch.

        Args:
            texts: One text or a list of texts, of any length: longer ones are read in overlapping windows.
            adapters: Names of loaded apps (adapters with a head).
            tokenizer: The backbone's tokenizer; by default read from where the backbone came from.
            batch_size: Windows per forward pass.
            token: Hub token, to read the tokenizer from a private repo; by default that of ``hf auth login``.

        Returns:
            For each app one result per text, shaped like transformers' pipelines: a list of
            ``{"entity_group", "score", "word", "start", "end"}`` or one ``{"label", "score"}``.

        Raises:
            AdapterError: An unknown adapter, or one without a head.
            TypeError: A text that is not a string.
        """
        return Predictor(self, tokenizer, token).predict(texts, adapters, batch_size)


class MtpfForTokenClassification(MtpfPreTrainedModel):
    """Backbone with a linear layer on every token, for transformers' own training recipes and pipelines."""

    head_kind = "token-classification"

    def __init__(self, config: MtpfConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> TokenClassifierOutput:
        """Return logits ``(batch, tokens, labels)``; with labels ``(batch, tokens)`` also the loss.

        Label -100 is ignored.
        """
        outputs = self.encode(input_ids, attention_mask, **kwargs)
        logits = self.classifier(self.dropout(outputs[0]))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )


class MtpfForSequenceClassification(MtpfPreTrainedModel):
    """Backbone with a linear layer on the mean of the token vectors."""

    head_kind = "text-classification"

    def __init__(self, config: MtpfConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> SequenceClassifierOutput:
        """Return logits ``(batch, labels)`` and, with ``labels`` ``(batch,)``, the cross-entropy."""
        outputs = self.encode(input_ids, attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones(outputs[0].shape[:2], device=outputs[0].device)
        logits = self.classifier(self.dropout(mean_pool(outputs[0], attention_mask)))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )


def _classifier_dropout(config: MtpfConfig) -> float:
    for name in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return 0.1


# Lets stock PeftModel.from_pretrained(MtpfModel, ...) find the modules behind the stock key names of an
# adapter.
register_checkpoint_conversion_mapping("mtpf", [PrefixChange(prefix_to_add="backbone")], overwrite=True)

__all__ = [
    "HUB_FILES",
    "MtpfForSequenceClassification",
    "MtpfForTokenClassification",
    "MtpfModel",
    "MtpfPreTrainedModel",
    "mean_pool",
]
