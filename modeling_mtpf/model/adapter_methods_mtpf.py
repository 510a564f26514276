"""A model's methods for its adapters: adding, loading, replacing, deleting, choosing, saving."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_files_mtpf import (
    PEFT_PREFIX,
    find_adapter,
    install_adapter,
    lora_state_dict,
    read_adapter,
    replace_adapter,
    write_adapter,
)
from .adapters_mtpf import (
    STANDALONE,
    AdapterHead,
    LoraSettings,
    active_adapter,
    adapter_depth,
    adapter_names,
    check_loaded,
    heads_of,
    import_peft,
    inject_lora,
    lora_config,
    lora_parameters,
    named_heads,
    remove_lora,
    set_active_adapter,
    standalone_apps,
    validate_adapter_name,
)
from .backbone_identity_mtpf import bits_digest, check_in_memory
from .bound_calls_mtpf import execution_device
from .configuration_mtpf import encoder_layout
from .delta_mtpf import is_delta, read_delta
from .errors_mtpf import AdapterError, first_line
from .folders_mtpf import read_unchanged
from .hub_cache_mtpf import weights_file
from .predict_mtpf import check_tokenizer, text_tokenizer
from .prefix_mtpf import prefixes_of
from .sources_mtpf import is_hub_id
from .trunk_mtpf import adapter_modules, lora_modules, uncompiled
from .views_mtpf import CHANGES

STOCK_ARGUMENTS = {"is_trainable", "hotswap", "low_cpu_mem_usage", "local_files_only", "load_config"}
"""Arguments of transformers' ``load_adapter`` that this one understands or need not heed."""


LORA_ARGUMENTS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Arguments of PEFT's ``LoraConfig`` that `add_adapter` takes; others do more than add a LoRA."""


class AdapterMethods:
    """Mixin for a model with an encoder ``backbone`` and a dict of ``heads``.

    An adapter is one LoRA with any number of heads: none of a family's LoRA, one of an app, and one for each
    part of a bundle. The key of a head is the app's name, or ``bundle/part``.

    These methods replace those of transformers' mixin, which save only the adapter once one is loaded, turn
    gradients off while switching, and record local paths.
    """

    backbone: Any
    heads: nn.ModuleDict
    config: Any
    device: Any
    dtype: Any
    head_kind: str | None = None

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return adapter_names(self.backbone)

    def parts(self, name: str) -> dict[str, AdapterHead]:
        """Return a loaded adapter's heads by the name that `predict` takes: ``app``, or ``bundle/part``."""
        check_loaded(self.backbone, name)
        return heads_of(self.heads, name)

    @property
    def standalone(self) -> dict[str, Any]:
        """Models of the standalone apps loaded next to the backbone, by name."""
        return standalone_apps(self.backbone)

    def adapter_depth(self, name: str) -> int:
        """Return how many of the last layers an adapter touches."""
        check_loaded(self.backbone, name)
        return adapter_depth(self.backbone, name)

    def add_adapter(  # type: ignore[override]
        self,
        name: Any = None,
        lora: LoraSettings | str | None = None,
        head: AdapterHead | Mapping[str, AdapterHead] | None = None,
        *,
        adapter_config: Any = None,
        adapter_name: str | None = None,
    ) -> None:
        """Add a fresh, trainable LoRA (and the head of an app); nothing else changes its trainability.

        Several heads, by the name of each part, make a bundle. Called as in transformers and
        sentence-transformers, with PEFT's ``LoraConfig`` and maybe a name, it does what it does there: the
        adapter becomes active and the backbone is frozen. `save_pretrained` then still writes the backbone,
        with a warning; the adapter is written by `save_adapter`.

        Raises:
            AdapterError: The name is not allowed, or a target is not a linear module of the encoder's layers.
        """
        check_in_memory(self.backbone)
        config = adapter_config or name
        if hasattr(config, "peft_type"):
            second = lora if isinstance(lora, str) else None
            self._add_as_transformers(config, adapter_name or second or "default")
            return
        settings: Any = lora or LoraSettings(layers=self.config.num_tail_layers)
        name = adapter_name or name
        heads = named_heads(name, head)
        inject_lora(self.backbone, name, lora_config(self.backbone, settings), trainable=True)
        self._set_heads(name, heads, trainable=True)

    def _set_heads(self, name: str, heads: Mapping[str, AdapterHead], trainable: bool) -> None:
        """Set an adapter's heads; in a task class, which runs its classifier instead, without gradients."""
        for key in [key for key in heads_of(self.heads, name) if list(heads) != [key]]:
            self.heads.pop(key)
        for key, head in heads.items():
            self.heads[key] = head.to(execution_device(self)).requires_grad_(trainable and not self.head_kind)

    def _add_as_transformers(self, config: Any, name: str) -> None:
        plain = import_peft().LoraConfig()
        changed = [
            key
            for key, value in vars(config).items()
            if key not in LORA_ARGUMENTS and value != getattr(plain, key, None)
        ]
        if changed or not isinstance(config, type(plain)):
            what = f"{changed[0]}={getattr(config, changed[0])!r}" if changed else type(config).__name__
            raise AdapterError(f"Adapter {name!r} is not a plain LoRA ({what}), which alone can be added.")
        config.task_type = config.task_type or "FEATURE_EXTRACTION"
        with CHANGES:
            try:
                inject_lora(self.backbone, name, config, trainable=True)
            except AdapterError:
                raise
            except Exception as error:  # PEFT's, for targets that the encoder does not have
                raise AdapterError(f"Adapter {name!r} cannot be added: {first_line(error)}") from error
            layers = encoder_layout(self.backbone.config.model_type).layers + "."
            carriers = [
                path
                for path, module in lora_modules(self.backbone)
                if name in module.lora_A or name in module.lora_embedding_A
            ]
            if outside := [path for path in carriers if not path.startswith(layers)]:
                remove_lora(self.backbone, name)
                raise AdapterError(f"Adapter {name!r} targets {outside[0]!r}, which is not in a layer.")
            for key, parameter in self.backbone.named_parameters():
                if ".lora_" not in key:
                    parameter.requires_grad_(False)
            self.set_adapter(name)

    def load_adapter(  # type: ignore[override]
        self,
        path_or_repo: str | os.PathLike | None = None,
        adapter_name: str | None = None,
        revision: str | None = None,
        *,
        token: str | None = None,
        trainable: bool = False,
        check_backbone: bool = True,
        replace: bool = False,
        activate: bool = True,
        standalone: bool = False,
        adapter_kwargs: dict | None = None,
        **stock: Any,
    ) -> str:
        """Load an adapter folder or Hub repo next to those already loaded.

        All checks (files, shapes, backbone hash, head) come before the first change in memory. As in
        transformers the adapter becomes the one that plain forwards use; ``use_adapter``, ``encode_adapters``
        and ``predict`` name theirs. In a task class (``MtpfForTokenClassification``, ...) the head of an app
        of its kind, or of a bundle's only part of its kind, becomes the classifier, so that transformers'
        pipelines can use it.

        Args:
            path_or_repo: A folder, or a Hub id ``owner/name``.
            adapter_name: Name in this model; the one recorded in the adapter by default.
            revision: Commit, tag or branch of the Hub repo; pin a commit in production.
            token: Hub token for private repos.
            trainable: Whether its LoRA and its head get gradients.
            check_backbone: Refuse adapters that were trained on other weights (sha256).
            replace: Replace the adapter of this name, if there is one, in one step: another thread finds
                either the old one or the new one, and if the new one cannot be used, the old one stays.
            activate: Whether plain forwards use it from now on; a replaced adapter stays active or not.
            standalone: Load a standalone app, which changes the encoder. It shares unchanged weights in
                memory but no trunk: `predict` runs it in a pass of its own, and ``model.standalone`` has its
                model.
            adapter_kwargs: Passed by ``AutoModel.from_pretrained(<adapter repo>)``; may carry ``revision``
                and ``token``.
            **stock: Other arguments of transformers: ``is_trainable``, ``hotswap`` (as ``replace``), ...

        Returns:
            The adapter's name in this model.

        Raises:
            AdapterError: The folder is damaged or incomplete, or does not fit this backbone.
            TypeError: An argument that neither knows.
        """
        check_in_memory(self.backbone)
        path_or_repo = stock.pop("peft_model_id", None) or path_or_repo
        if path_or_repo is None or stock.get("adapter_state_dict") is not None:
            raise AdapterError("load_adapter reads a folder or a Hub repo; name it as the first argument.")
        if unknown := sorted(stock.keys() - STOCK_ARGUMENTS):
            raise TypeError(f"load_adapter got unknown argument {unknown[0]!r}.")
        trainable = stock.get("is_trainable", False) or trainable
        swap = stock.get("hotswap", "auto")
        replace = replace or (getattr(self, "_hotswap_enabled", False) if swap == "auto" else swap)
        extra = adapter_kwargs or {}
        folder = find_adapter(path_or_repo, revision or extra.get("revision"), token or extra.get("token"))
        source = weights_file(self.config.name_or_path, getattr(self.config, "source_revision", None))
        if standalone or is_delta(folder):
            if not (standalone and is_delta(folder)):
                how = (
                    "without standalone=True"
                    if standalone
                    else "with standalone=True, for a pass of its own, or make a backbone and an ordinary "
                    "app of it with mtpf apply-delta"
                )
                kind = "not a standalone app" if standalone else "a standalone app, which shares no trunk"
                raise AdapterError(f"{path_or_repo} is {kind}; load it {how}.")
            return self._load_standalone(folder, adapter_name, check_backbone, replace, source)
        files = read_unchanged(
            folder, lambda: read_adapter(folder, self.backbone, adapter_name, check_backbone, source)
        )
        fitting = [head for head in files.heads.values() if head.kind == self.head_kind]
        if self.head_kind and files.heads and len(fitting) != 1:
            number = f"bundle with {len(fitting)} parts of this kind"
            kind = number if fitting else f"{files.task['kind']} app"
            raise AdapterError(
                f"{path_or_repo} is a {kind}, but {type(self).__name__} is for {self.head_kind}; load it "
                "into MtpfModel."
            )
        if "_mtpf_text_tokenizer" in self.__dict__:  # else prediction compares
            for key, head in files.heads.items():
                check_tokenizer(key, head, text_tokenizer(self))
        with CHANGES:
            activate = activate and not (replace and files.name in self.adapters)
            if replace and files.name in self.adapters:
                replace_adapter(self.backbone, files, trainable)
            else:
                install_adapter(self.backbone, files, trainable)
            self._set_heads(files.name, files.heads, trainable)
            if activate:
                self.set_adapter(files.name)
        if self.head_kind and fitting:
            self._use_head(fitting[0])
        return files.name

    def _load_standalone(
        self, folder: Path, name: str | None, check_backbone: bool, replace: bool, source: Path | None
    ) -> str:
        if self.head_kind:
            raise AdapterError(f"{folder} is a standalone app; load it into MtpfModel.")
        own = read_unchanged(folder, lambda: read_delta(folder, self, name, check_backbone, source))
        with CHANGES:
            (name,) = own.adapters
            if not (replace and name in self.standalone):
                validate_adapter_name(self.backbone, name)
            uncompiled(self.backbone).__dict__.setdefault(STANDALONE, {})[name] = own
        return name

    def _use_head(self, head: AdapterHead) -> None:
        """Make an app's head the classifier of a task class, with its labels, as pipelines expect it."""
        self.classifier = nn.Linear(head.in_features, head.out_features)
        self.classifier.load_state_dict(head.state_dict())
        self.classifier.to(self.device, self.dtype)
        self.config.problem_type = head.problem_type  # by which pipelines choose softmax or sigmoid
        self.config.id2label = dict(enumerate(head.labels))
        self.config.label2id = {label: index for index, label in enumerate(head.labels)}
        self.num_labels = len(head.labels)

    def delete_adapter(self, name: str | list[str]) -> None:  # type: ignore[override]
        """Remove an adapter (or several) and its heads from memory; the others are untouched."""
        names = [name] if isinstance(name, str) else list(name)
        with CHANGES:
            for each in names:
                if each not in self.standalone:
                    check_loaded(self.backbone, each)
            for each in names:
                if self.standalone.pop(each, None) is not None:
                    continue
                self._set_heads(each, {}, trainable=False)
                remove_lora(self.backbone, each)

    def adapter_memory(self) -> dict[str, dict[str, int]]:
        """Return the bytes of each adapter: ``lora``, ``head`` (all parts'), ``prefix``, their ``total``."""
        with CHANGES:
            memory = {}
            for name in self.adapters:
                lora = sum(p.nbytes for p in lora_parameters(self.backbone, name))
                head = sum(p.nbytes for head in self.parts(name).values() for p in head.parameters())
                slots = prefixes_of(self.backbone, name).values()
                prefix = sum(slot.key.nbytes + slot.value.nbytes for slot in slots)
                memory[name] = {"lora": lora, "head": head} | ({"prefix": prefix} if prefix else {})
                memory[name]["total"] = sum(memory[name].values())
            return memory

    def set_adapter(self, name: str | list[str] | None) -> None:  # type: ignore[override]
        """Choose the adapter that plain forwards use from now on; ``None`` for the bare backbone."""
        if isinstance(name, (list, tuple)):
            if len(name) != 1:
                raise AdapterError(
                    f"Plain forwards use one adapter, not {len(name)}; encode_adapters and predict take more."
                )
            name = name[0]
        if name is not None:
            check_loaded(self.backbone, name)
            adapter_modules(self.backbone, name)
        self.__dict__.pop("_disabled_adapter", None)
        set_active_adapter(self.backbone, name)

    def active_adapters(self) -> list[str]:
        """Return the adapter that plain forwards use, or would unless disabled, as a list of none or one."""
        active = active_adapter(self.backbone) or self.__dict__.get("_disabled_adapter")
        return [] if active is None else [active]

    def disable_adapters(self) -> None:
        """Use the bare backbone for plain forwards until `enable_adapters` or the next `set_adapter`."""
        self._check_any()
        self.__dict__["_disabled_adapter"] = next(iter(self.active_adapters()), None)
        set_active_adapter(self.backbone, None)

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        self._check_any()
        if (name := self.__dict__.pop("_disabled_adapter", None)) in self.adapters:
            set_active_adapter(self.backbone, name)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """Return an adapter's tensors, by default the active one's, under their stock names."""
        self._check_any()
        if state_dict is not None:
            raise AdapterError("get_adapter_state_dict reads the model in memory; leave state_dict out.")
        name = adapter_name or next(iter(self.active_adapters()), None)
        check_loaded(self.backbone, name)
        return {
            key.removeprefix(PEFT_PREFIX): tensor
            for key, tensor in lora_state_dict(self.backbone, str(name)).items()
        }

    def _check_any(self) -> None:
        if not self.adapters:
            raise AdapterError("No adapter is loaded; load one with load_adapter.")

    @contextmanager
    def use_adapter(self, name: str | None) -> Iterator[None]:
        """Use one adapter (or, with ``None``, the bare backbone) for the plain forwards of a ``with`` block.

        Gradients stay on for all adapters, so a loss computed inside may be back-propagated outside, without
        activation checkpointing. The choice is one per model; threads use `encode_adapters` or `predict`.
        """
        if name is not None:
            check_loaded(self.backbone, name)
            adapter_modules(self.backbone, name)
        before = active_adapter(self.backbone)
        set_active_adapter(self.backbone, name)
        try:
            yield
        finally:
            set_active_adapter(self.backbone, before)

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
        """Write one adapter, with the heads it has, as a folder that PEFT users can load as well.

        Args:
            folder: Where to write; other files there stay.
            name: A loaded adapter.
            backbone_id: Hub id of the published backbone; local paths are refused, they break uploads.
            backbone_revision: Commit of that repo.
            dtype: Type of the stored numbers, by default that in memory; ``torch.float16`` halves the folder.
            task: More for ``task.json``: family, metrics, training data, ...; of a bundle also ``parts``, a
                list with the ``name`` of a part and more about it.

        Raises:
            AdapterError: No such adapter, or ``backbone_id`` is a local path.
        """
        if backbone_id is not None and not is_hub_id(backbone_id):
            raise AdapterError(
                f"backbone_id must be a Hub id of the form 'owner/name', not the path {backbone_id!r}."
            )
        check_in_memory(self.backbone)
        heads = self.parts(name)
        written = write_adapter(
            folder,
            self.backbone,
            name,
            heads=heads,
            backbone_id=backbone_id,
            backbone_revision=backbone_revision,
            dtype=dtype,
            task=task,
            tokenizer_sha256=next((head.tokenizer_sha256 for head in heads.values()), None),
        )
        self.__dict__.setdefault("_written_adapters", {})[name] = self._adapter_digest(name)
        return written

    def _unsaved_adapters(self) -> list[str]:
        """Name the adapters with trainable LoRA that `save_adapter` has not written as they are now."""
        written = self.__dict__.get("_written_adapters", {})
        return [
            name
            for name in self.adapters
            if any(parameter.requires_grad for parameter in lora_parameters(self.backbone, name))
            and written.get(name) != self._adapter_digest(name)
        ]

    def _adapter_digest(self, name: str) -> list[bytes]:
        heads = (p for head in self.parts(name).values() for p in head.parameters())
        return [bits_digest(parameter) for parameter in (*lora_parameters(self.backbone, name), *heads)]
