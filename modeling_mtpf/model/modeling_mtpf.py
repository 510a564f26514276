"""MTPF models: any BERT-like encoder as a shared backbone, with any number of named adapters.

The wrapper holds the stock encoder under ``backbone``; its weights are stored without that prefix, so one
folder serves `MtpfModel`, stock transformers, sentence-transformers and PEFT alike.
"""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .adapter_methods_mtpf import AdapterMethods
from .adapters_mtpf import active_adapter, check_loaded
from .configuration_mtpf import MtpfConfig
from .errors_mtpf import MtpfError
from .predict_mtpf import Predictor
from .prefix_mtpf import prefixes_of
from .storage_methods_mtpf import StorageMethods
from .trunk_mtpf import prefixed, run_layers, run_trunk, tail_views, uncompiled
from .views_mtpf import CHANGES, inference_views


def mean_pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average the vectors ``(batch, tokens, hidden)`` of each text's real tokens, those with mask 1.

    Returns ``(batch, hidden)`` in the dtype of ``hidden_states``; zeros for a row without tokens.
    """
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


class MtpfPreTrainedModel(AdapterMethods, StorageMethods):  # type: ignore[misc]
    """Base of all MTPF models: the backbone, its adapters and their heads, saving and loading."""

    config_class = MtpfConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MtpfConfig, add_pooling_layer: bool = True):
        if not add_pooling_layer:
            raise MtpfError(
                f"{type(self).__name__} has no add_pooling_layer=False: adapters name their backbone by all "
                "its weights, the pooler's included; leave the argument out."
            )
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.encoder_config)
        self.heads = nn.ModuleDict()

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_position_embeddings(self) -> Any:
        """Return the encoder's position embedding, where the stock encoder does (DistilBERT)."""
        return self.backbone.get_position_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Change the longest input, where the stock encoder can (DistilBERT)."""
        self.backbone.resize_position_embeddings(new_num_position_embeddings)

    def encode(self, input_ids=None, attention_mask=None, **kwargs) -> Any:
        """Run the stock encoder with the active adapter and return its own output.

        Raises:
            TypeError: An argument that the encoder does not know and would silently ignore, for instance
                PEFT's ``adapter_names``.
        """
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        if not getattr(self.config, "type_vocab_size", 0):
            inputs.pop("token_type_ids", None)  # as stock encoders without segment embeddings do
        unknown = sorted(set(inputs) - self._encoder_arguments())
        if unknown:
            encoder = type(uncompiled(self.backbone)).__name__
            raise TypeError(
                f"{type(self).__name__} got unknown argument {unknown[0]!r}, which {encoder} does not take; "
                "to use adapters call model.encode_adapters(adapters=[...]) or model.use_adapter(name)."
            )
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):
                inputs.setdefault(name, getattr(self.config, name))
        inputs.setdefault("return_dict", True)
        encoder = self.backbone
        if any(prefixes_of(encoder, name) for name in self.adapters):
            encoder = prefixed(encoder, active_adapter(encoder))
        return encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def _encoder_arguments(self) -> set[str]:
        named = inspect.signature(type(uncompiled(self.backbone)).forward).parameters
        return {*named, *TransformersKwargs.__annotations__, "token_type_ids", "return_dict"} - {"kwargs"}

    def encode_adapters(self, adapters: list[str | None], **inputs: Any) -> dict[str | None, torch.Tensor]:
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
        encoder = self.backbone
        names = [name for name in adapters if name is not None]
        with CHANGES:
            for name in names:
                check_loaded(encoder, name)
            views = None if torch.is_grad_enabled() else inference_views(encoder)
            if views is not None and views.in_eval_mode(encoder):
                tails = {name: views.tail(encoder, name) for name in adapters}
                depth = max([1, *(len(layers) for layers in tails.values())])
                tails = {name: views.on_top(depth, layers) for name, layers in tails.items()}
                encoder = views.bare
            else:
                depth = max((self.adapter_depth(name) for name in names), default=1)
                tails = {name: tail_views(encoder, depth, name) for name in adapters}
        trunk = run_trunk(encoder, depth, **inputs)
        return {name: run_layers(encoder, trunk, layers) for name, layers in tails.items()}

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

    def __init__(self, config: MtpfConfig, **kwargs):
        super().__init__(config, **kwargs)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Run the encoder with the active adapter; arguments and output are the stock encoder's."""
        kwargs |= _named(token_type_ids, position_ids, inputs_embeds)
        return self.encode(input_ids, attention_mask, **kwargs)

    def predict(
        self,
        texts: Any,
        adapters: list[str] | None = None,
        *,
        adapter_names: Iterable[str] | None = None,
        column: str | None = None,
        tokenizer: Any = None,
        token: str | None = None,
        **options: Any,
    ) -> Any:
        """Apply several apps to the same texts, or one app to each, running the trunk once per batch.

        Safe to call from several threads, also while others add, replace or delete adapters: a call uses the
        apps as they were when it began. The model's mode neither matters nor changes.

        Args:
            texts: One text, or anything that yields texts: a list, a generator, a pandas Series, a column of
                a `datasets.Dataset`. Long texts are read in overlapping windows. A NER app labels a word in
                the window that shows most of its surroundings; a TC app's probabilities are the mean over the
                windows, weighted by their length.
            adapters: Names of loaded apps (adapters with a head), all for every text: an app, a bundle, or
                one of its parts as ``bundle/part``, or ``part`` where nothing else has this name.
            adapter_names: Instead of ``adapters``, one name for each text.
            column: Where ``texts`` is a table or yields dicts: what to read; ``text`` by default.
            tokenizer: The backbone's tokenizer; by default read from where the backbone came from.
            token: Hub token, to read the tokenizer from a private repo; by default that of ``hf auth login``.
            **options: ``top_k``, ``threshold``, ``in_scope``, ``batch_tokens``, ``batch_size``, ``portion``,
                ``max_characters`` of `Predictor`.

        Returns:
            With ``adapters``, for each app one result per text, shaped like transformers' pipelines: a list
            of ``{"entity_group", "score", "word", "start", "end"}``, or one ``{"label", "score"}``, with
            ``top_k`` a list of them. With ``adapter_names``, one result per text. The result of a bundle is a
            dict from part to result. Offsets count the characters of the given text.

        Raises:
            AdapterError: An unknown adapter, or one without a head.
            TypeError: A text that is not a string.
            ValueError: A text longer than ``max_characters``; an unknown column; names and texts differ in
                number.

        Example:
            >>> model.predict(["Call Ada", "Lunch?"], adapter_names=["entities", "intent"])  # doctest: +SKIP
        """
        if adapters is not None:
            adapters = list(dict.fromkeys(adapters)) if not isinstance(adapters, (str, bytes)) else adapters
        options = {**options, "column": column, "tokenizer": tokenizer, "token": token}
        rows = self.predict_stream(texts, adapters, adapter_names=adapter_names, **options)
        if adapters is None:
            return list(rows)
        results: dict[str, list] = {name: [] for name in adapters}
        for row in rows:
            for name, result in row.items():
                results[name].append(result)
        return results

    def predict_stream(
        self,
        texts: Any,
        adapters: list[str] | None = None,
        *,
        adapter_names: Iterable[str] | None = None,
        column: str | None = None,
        tokenizer: Any = None,
        token: str | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Yield the results of one text after the other, in flat memory; for streams of any length.

        Reads ``portion`` texts ahead (1,024 by default; 1 for a dialogue). Arguments and errors are those of
        `predict`; unknown ``adapters`` are refused by the call itself, a bad text, or an unknown one of
        ``adapter_names``, when its portion is reached.

        Returns:
            For each text, in order: with ``adapters`` a dict from app to result, with ``adapter_names`` the
            result.
        """
        return Predictor(self, tokenizer, token, **options).stream(texts, adapters, adapter_names, column)


class _MtpfTaskModel(MtpfPreTrainedModel):
    """Base of the task classes: dropout and a linear classifier on the encoder."""

    dropout_rates: tuple[str, ...] = ("classifier_dropout", "hidden_dropout_prob", "dropout")
    """Where stock configs have the rate of the dropout before the classifier."""

    def __init__(self, config: MtpfConfig, **kwargs):
        super().__init__(config, **kwargs)
        self.num_labels = config.num_labels or 2
        rates = [getattr(config, name, None) for name in self.dropout_rates]
        self.dropout = nn.Dropout(next((float(rate) for rate in rates if rate is not None), 0.1))
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()
        self._freeze_pooler()

    def _freeze_pooler(self) -> None:
        """Exclude the pooler, which no task class uses, from training: DDP wants all gradients.

        It stays in the model: adapters name their backbone by the hash of all its weights.
        """
        pooler = getattr(self.backbone, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        finished = MtpfPreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        model._freeze_pooler()  # loading has replaced every parameter
        return finished


class MtpfForTokenClassification(_MtpfTaskModel):
    """Backbone with a linear layer on every token, for transformers' own training recipes and pipelines."""

    head_kind = "token-classification"

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Return logits ``(batch, tokens, labels)``; with labels ``(batch, tokens)`` also the loss.

        The loss is transformers' ``loss_function``: the cross-entropy over all labels but -100, divided by
        ``num_items_in_batch`` where the trainer counts them, by the number of labels otherwise.
        """
        kwargs |= _named(token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(input_ids, attention_mask, **kwargs)
        logits = self.classifier(self.dropout(outputs[0]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, **_states(outputs))


class MtpfForSequenceClassification(_MtpfTaskModel):
    """Backbone with a linear layer on the mean of the token vectors."""

    head_kind = "text-classification"
    dropout_rates = ("seq_classif_dropout", *_MtpfTaskModel.dropout_rates)

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Return logits ``(batch, labels)`` and, with ``labels``, the loss.

        The loss is transformers' ``loss_function`` for ``config.problem_type``: cross-entropy, mean squared
        error (regression) or binary cross-entropy (several labels a text); without a problem type, the number
        of labels and the dtype of ``labels`` decide.
        """
        kwargs |= _named(token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(input_ids, attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones(outputs[0].shape[:2], device=outputs[0].device)
        logits = self.classifier(self.dropout(mean_pool(outputs[0], attention_mask)))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                pooled_logits=logits.float(),
                config=self.config,
                num_items_in_batch=num_items_in_batch,
            )
        return SequenceClassifierOutput(loss=loss, logits=logits, **_states(outputs))


def _named(token_type_ids: Any, position_ids: Any, inputs_embeds: Any) -> dict[str, Any]:
    # Named in the signatures because Trainer drops the data set's columns that are not.
    return {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}


def _states(outputs: Any) -> dict[str, Any]:
    return {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}


# Lets stock PeftModel.from_pretrained(MtpfModel, ...) find the modules behind the stock key names of an
# adapter.
register_checkpoint_conversion_mapping("mtpf", [PrefixChange(prefix_to_add="backbone")], overwrite=True)
