"""A model's methods for its files: loading and saving the backbone with the code that opens it."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .adapter_files_mtpf import find_adapter
from .backbone_identity_mtpf import backbone_state_dict, check_finite, check_in_memory
from .delta_mtpf import is_delta, read_delta
from .errors_mtpf import MtpfError, ShapeMismatchError
from .folders_mtpf import read_unchanged
from .hub_cache_mtpf import weights_file
from .packaged_mtpf import PACKAGED, packaged_encoder
from .predict_mtpf import load_tokenizer
from .schemas_mtpf import check_checkpoint, read_task
from .sources_mtpf import backbone_hint, is_hub_id
from .tokenizer_gate_mtpf import has_vocabulary

_LOGGER = logging.getLogger(__name__)

HUB_FILES = (
    "adapter_methods_mtpf.py",
    "adapter_files_mtpf.py",
    "adapters_mtpf.py",
    "backbone_identity_mtpf.py",
    "bound_calls_mtpf.py",
    "configuration_mtpf.py",
    "delta_mtpf.py",
    "errors_mtpf.py",
    "folders_mtpf.py",
    "forks_mtpf.py",
    "gate_mtpf.py",
    "hub_cache_mtpf.py",
    "modeling_mtpf.py",
    "packaged_mtpf.py",
    "predict_mtpf.py",
    "prefix_mtpf.py",
    "results_mtpf.py",
    "schemas_mtpf.py",
    "scope_mtpf.py",
    "sources_mtpf.py",
    "storage_methods_mtpf.py",
    "texts_mtpf.py",
    "tokenizer_gate_mtpf.py",
    "trunk_mtpf.py",
    "views_mtpf.py",
)
"""The code that every published backbone carries: all of it, and nothing else."""

STOCK_PREFIXES = r"^(bert|roberta|distilbert|electra|model)\."
"""Prefixes of the encoder's keys in checkpoints of stock task models, e.g. masked language models."""


class StorageMethods(PreTrainedModel):
    """A model with an encoder ``backbone``, whose weights are stored under their stock names."""

    backbone: Any
    head_kind: str | None
    _unsaved_adapters: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does: an MTPF folder, or any stock checkpoint of a supported encoder.

        ``packaged`` is the encoder of the extra ``demo``. The folder or repo of a standalone app gives the
        whole model with the app in it; its backbone is the one it names, or ``backbone``.

        Raises:
            ValueError: The checkpoint lacks weights of the encoder (transformers would only warn and use
                random ones), or the folder only holds the backbone's.
        """
        source = pretrained_model_name_or_path
        if source and source != PACKAGED and is_delta(source):
            return cls._from_delta(Path(source), *args, **kwargs)
        if source == PACKAGED:
            source = packaged_encoder()
        elif source and not kwargs.get("subfolder") and (hint := backbone_hint(source)):
            raise MtpfError(f"{source} has no config.json.{hint}")
        elif source and not os.path.exists(source) and not is_hub_id(str(source), bare=True):
            raise MtpfError(f"There is no folder {source}, and it is not a Hub id of the form 'owner/name'.")
        if source and kwargs.get("subfolder") and (Path(source) / kwargs["subfolder"]).is_dir():
            source = Path(source) / kwargs.pop("subfolder")  # later the tokenizer is looked for there, too
        if source and not kwargs.get("subfolder"):
            weights = weights_file(str(source), str(kwargs.get("revision") or "main"))
            folder = Path(source) if weights is None else weights.parent
            if (folder / "config.json").is_file():
                check_checkpoint(folder)
        kwargs.setdefault("key_mapping", {STOCK_PREFIXES: ""})
        try:
            return super().from_pretrained(source, *args, **kwargs)
        except OSError as error:
            if "have a file named" not in str(error) or os.path.exists(source) or not is_hub_id(str(source)):
                raise
            try:  # it may be the repo of a standalone app
                app = find_adapter(source, kwargs.pop("revision", None), kwargs.get("token"))
            except MtpfError as reason:
                raise error from reason
            if not is_delta(app):
                raise
        return cls._from_delta(app, *args, **kwargs)

    @classmethod
    def _from_delta(cls, folder: Path, *args: Any, backbone: Any = None, **kwargs: Any) -> Any:
        if cls.head_kind:
            raise MtpfError(f"{folder} is a standalone app; load it with MtpfModel.from_pretrained.")
        recorded = read_task(folder).get("backbone") or {}
        if backbone is None and recorded.get("id"):
            backbone, kwargs["revision"] = recorded["id"], recorded.get("revision") or kwargs.get("revision")
        model = cls.from_pretrained(backbone or PACKAGED, *args, **kwargs)
        source = weights_file(model.config.name_or_path, getattr(model.config, "source_revision", None))
        return read_unchanged(folder, lambda: read_delta(folder, model, source=source))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        state_dict: dict | None = None,
        *,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write the backbone (and the task head of a task class) under stock names, adapters or not.

        The folder also gets the code that loads it with ``trust_remote_code=True`` and, if it has none, the
        tokenizer of the place that the model was loaded from. Adapters are written by [`save_adapter`]; a
        warning names those in training that it has not written as they are now. Arguments are those of
        transformers; with either ``save_original_format`` the names are the stock ones.

        Raises:
            MtpfError: With ``push_to_hub``, as by the method of that name.
        """
        if push_to_hub:
            self.push_to_hub(kwargs.get("repo_id", "OWNER/NAME"))
        kwargs.pop("save_original_format", None)
        check_in_memory(self.backbone)
        if state_dict is None:
            head = {k: v for k, v in self.state_dict().items() if not k.startswith(("backbone.", "heads."))}
            state_dict = {**backbone_state_dict(self.backbone), **head}
        else:  # Trainer gathers the weights itself under FSDP and DeepSpeed
            stock = {key: name for name, key in self._stock_names().items()}
            state_dict = {
                stock.get(key, key): value
                for key, value in state_dict.items()
                if key in stock or not key.startswith(("backbone.", "heads."))
            }
        super().save_pretrained(save_directory, state_dict=state_dict, save_original_format=False, **kwargs)
        if kwargs.get("is_main_process", True) and (unsaved := self._unsaved_adapters()):
            _LOGGER.warning(
                f"{Path(save_directory)} holds the backbone without the adapter in training {unsaved[0]!r}"
                + (f" and {len(unsaved) - 1} more" if unsaved[1:] else "")
                + f"; write it with: model.save_adapter(FOLDER, {unsaved[0]!r})"
            )
        if not kwargs.get("is_main_process", True):
            return
        here = Path(__file__).parent
        for name in HUB_FILES:
            if here != Path(save_directory).resolve():
                shutil.copyfile(here / name, Path(save_directory) / name)
        if not has_vocabulary(os.listdir(save_directory)):
            with suppress(MtpfError):  # of a model that was not loaded, or from a place without a tokenizer
                load_tokenizer(self).save_pretrained(save_directory)

    def _stock_names(self) -> dict[str, str]:
        """Map the stock name of each weight of the encoder to its key in this model."""
        return {
            # LoRA and torch.compile wrap the layers they are for.
            key.replace(".base_layer.", ".").replace("_orig_mod.", ""): f"backbone.{key}"
            for key in self.backbone.state_dict()
            if ".lora_" not in key
        }

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take the encoder's weights under their stock names, too: `save_pretrained` writes those.

        Trainer reads checkpoints by ``load_state_dict``, where only the module's own keys would count.

        Raises:
            MtpfError: They are without the adapter in training: the model would be a mix of two states.
        """
        for name, key in self._stock_names().items():
            if prefix + name in state_dict and prefix + key not in state_dict:
                state_dict[prefix + key] = state_dict.pop(prefix + name)
                self._check_not_in_training()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_not_in_training(self) -> None:
        for key, parameter in self.backbone.named_parameters():
            if ".lora_" in key and parameter.requires_grad:
                raise MtpfError(
                    f"The weights are a backbone's, without the adapter in training {key.split('.')[-2]!r}: "
                    "Trainer cannot resume, or load the best model, with an adapter. Write it with "
                    "save_adapter; continue from from_pretrained and load_adapter(FOLDER, trainable=True)."
                )

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> Any:  # type: ignore[override]
        """Refuse: what transformers would publish lacks the tokenizer, the card, and sometimes the code.

        Raises:
            MtpfError: Always; it names the commands that publish all of it.
        """
        push = "hf upload {repo} FOLDER" if self.head_kind else "mtpf push backbone FOLDER {repo}"
        raise MtpfError(
            "A model alone is not a complete repo: save it and its tokenizer with save_pretrained(FOLDER), "
            f"then publish them with: {push.format(repo=repo_id)}"
        )

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        missing = [
            key for key in loading_info.missing_keys if key.startswith("backbone.") and ".pooler." not in key
        ]
        if load_config.pretrained_model_name_or_path is None:  # a model with random weights is asked for
            return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the encoder, e.g. {sorted(missing)[0]!r}; "
                f"it is not one of a {model.config.encoder_config.model_type} encoder, or it is incomplete."
            )
        # transformers would allocate and fill these first, and raise several lines afterwards.
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            key, stored, expected = sorted(loading_info.mismatched_keys)[0]
            raise ShapeMismatchError(
                f"The checkpoint does not fit its config.json: {key!r} is {tuple(stored)} there and "
                f"{tuple(expected)} in the model; for another number of labels pass "
                "ignore_mismatched_sizes=True."
            )
        finished = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        # Nothing here uses a pooler. A random one would give the backbone another sha256 at each loading, and
        # no adapter would find the backbone that it was trained on.
        for key in loading_info.missing_keys:
            if key.startswith("backbone.") and ".pooler." in key:
                model.get_parameter(key).data.zero_()
        parameters = {key: value for key, value in model.named_parameters() if value.device.type != "meta"}
        check_finite(load_config.pretrained_model_name_or_path, parameters, MtpfError)
        return finished
