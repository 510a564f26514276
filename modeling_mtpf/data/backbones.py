"""Opening a backbone: the packaged encoder, a folder or a Hub id."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import MissingExtraError, MtpfError, first_line
from ..model.configuration_mtpf import encoder_layout
from ..model.modeling_mtpf import MtpfModel
from .packaged_encoder import resolve_encoder
from .words import load_word_tokenizer


def load_backbone(identifier: str, revision: str | None = None, **options: Any) -> MtpfModel:
    """Load a backbone, or a stock encoder of a supported architecture.

    Args:
        identifier: ``packaged``, a folder or a Hub id.
        revision: Commit, tag or branch of its repo.
        **options: Of ``from_pretrained``.

    Raises:
        MtpfError: There is no such folder or repo, or it is not a supported encoder.

    Example:
        >>> load_backbone("runs/demo/backbone", dtype=torch.float32)  # doctest: +SKIP
    """
    try:
        source = resolve_encoder(identifier, revision)
        model = MtpfModel.from_pretrained(source, revision=revision or "main", **options)
        encoder_layout(model.config.encoder_config.model_type)
    except MissingExtraError:
        raise
    except Exception as error:  # there is no end to what transformers raises for an unexpected folder
        raise MtpfError(f"The backbone {identifier!r} cannot be loaded: {first_line(error)[:300]}") from error
    return model


def open_backbone(identifier: str, revision: str | None = None) -> tuple[MtpfModel, PreTrainedTokenizerBase]:
    """Load a frozen backbone in float32, on an accelerator if there is one, and its tokenizer for words.

    Raises:
        MtpfError: As `load_backbone`, or its tokenizer cannot be used.
    """
    model = load_backbone(identifier, revision, dtype=torch.float32)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    tokenizer = load_word_tokenizer(model.config.name_or_path, revision)
    return model.eval().requires_grad_(False), tokenizer
