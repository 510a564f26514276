"""A model's methods for its adapters: adding, loading, replacing, deleting, choosing, saving."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter_files_mtpf import (
    find_adapter,
    install_adapter,
    read_adapter,
    replace_adapter,
    write_adapter,
)
from .adapters_mtpf import (
    AdapterHead,
    LoraSettings,
    active_adapter,
    adapter_depth,
    adapter_names,
    check_loaded,
    inject_lora,
    lora_config,
    lora_parameters,
    remove_lora,
    set_active_adapter,
)
from .backbone_identity_mtpf import check_in_memory
from .bound_calls_mtpf import execution_device
from .errors_mtpf import AdapterError
from .hub_cache_mtpf import weights_file
from .sources_mtpf import is_hub_id
from .views_mtpf import CHANGES


class AdapterMethods:
    """Mixin for a model with an encoder ``backbone`` and a dict of ``heads``.

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

    def adapter_depth(self, name: str) -> int:
        """Return how many of the last layers an adapter touches."""
        check_loaded(self.backbone, name)
        return adapter_depth(self.backbone, name)

    def add_adapter(  # type: ignore[override]
        self, name: str, lora: LoraSettings | None = None, head: AdapterHead | None = None
    ) -> None:
        """Add a fresh, trainable LoRA (and the head of an app); nothing else changes its trainability."""
        check_in_memory(self.backbone)
        settings = lora or LoraSettings(layers=self.config.num_tail_layers)
        inject_lora(self.backbone, name, lora_config(self.backbone, settings), trainable=True)
        if head is not None:
            self.heads[name] = head.to(execution_device(self))

    def load_adapter(  # type: ignore[override]
        self,
        path_or_repo: str | os.PathLike,
        adapter_name: str | None = None,
        revision: str | None = None,
        *,
        token: str | None = None,
        trainable: bool = False,
        check_backbone: bool = True,
        replace: bool = False,
        load_config: Any = None,
        adapter_kwargs: dict | None = None,
    ) -> str:
        """Load an adapter folder or Hub repo next to those already loaded.

        All checks (files, shapes, backbone hash, head) come before the first change in memory. Plain forwards
        keep using the adapter they used before: name the new one in ``use_adapter``, ``encode_adapters`` or
        ``predict``. In a task class (``MtpfForTokenClassification``, ...) an app of its kind becomes active
        and its head becomes the classifier, so that transformers' pipelines can use it.

        Args:
            path_or_repo: A folder, or a Hub id ``owner/name``.
            adapter_name: Name in this model; the one recorded in the adapter by default.
            revision: Commit, tag or branch of the Hub repo; pin a commit in production.
            token: Hub token for private repos.
            trainable: Whether its LoRA gets gradients.
            check_backbone: Refuse adapters that were trained on other weights (sha256).
            replace: Replace the adapter of this name, if there is one, in one step: another thread finds
                either the old one or the new one, and if the new one cannot be used, the old one stays.
            load_config: Passed by ``AutoModel.from_pretrained(<adapter repo>)``, which wants the adapter
                active.
            adapter_kwargs: Likewise; may carry ``revision`` and ``token``.

        Returns:
            The adapter's name in this model.

        Raises:
            AdapterError: The folder is damaged or incomplete, or does not fit this backbone.
        """
        check_in_memory(self.backbone)
        extra = adapter_kwargs or {}
        folder = find_adapter(path_or_repo, revision or extra.get("revision"), token or extra.get("token"))
        source = weights_file(self.config.name_or_path, getattr(self.config, "source_revision", None))
        files = read_adapter(folder, self.backbone, adapter_name, check_backbone, source)
        if self.head_kind and files.head is not None and files.head.kind != self.head_kind:
            raise AdapterError(
                f"{path_or_repo} is a {files.head.kind} app, but {type(self).__name__} is for "
                f"{self.head_kind}; load it into MtpfModel."
            )
        with CHANGES:
            if replace and files.name in self.adapters:
                replace_adapter(self.backbone, files, trainable)
            else:
                install_adapter(self.backbone, files, trainable)
            if files.head is not None:
                self.heads[files.name] = files.head.to(execution_device(self))
            elif files.name in self.heads:
                self.heads.pop(files.name)
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
        """Remove an adapter and its head from memory; the others are untouched."""
        with CHANGES:
            check_loaded(self.backbone, name)
            if name in self.heads:
                self.heads.pop(name)
            remove_lora(self.backbone, name)

    def adapter_memory(self) -> dict[str, dict[str, int]]:
        """Return the bytes of each adapter: ``lora``, ``head`` and their ``total``."""
        with CHANGES:
            memory = {}
            for name in self.adapters:
                head = self.heads[name].parameters() if name in self.heads else ()
                lora = sum(p.nbytes for p in lora_parameters(self.backbone, name))
                memory[name] = {"lora": lora, "head": sum(p.nbytes for p in head)}
                memory[name]["total"] = sum(memory[name].values())
            return memory

    def set_adapter(self, name: str | None) -> None:  # type: ignore[override]
        """Choose the adapter that plain forwards use from now on; ``None`` for the bare backbone."""
        if name is not None:
            check_loaded(self.backbone, name)
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
        before = active_adapter(self.backbone)
        self.set_adapter(name)
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
        if backbone_id is not None and not is_hub_id(backbone_id):
            raise AdapterError(
                f"backbone_id must be a Hub id of the form 'owner/name', not the path {backbone_id!r}."
            )
        check_in_memory(self.backbone)
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
