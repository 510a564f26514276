"""A frozen teacher that turns words into vectors."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import CPU_TOKENS, GPU_TOKENS, row_batches
from ..data.encoding import encode_rows, padded
from ..data.packaged_encoder import resolve_encoder
from ..data.words import first_subwords, load_word_tokenizer
from ..devices import precision, uses_bf16
from ..errors import DataError, MissingExtraError, first_line
from .settings import PseudoLabelSettings


class _DeepEnough(Exception):
    """All wanted layers have been computed."""


class LayerReader:
    """Computes chosen hidden states of an encoder (0: the embeddings, -1: the last).

    Layers above the highest of them do not run if the encoder has its layers in one ``ModuleList``.

    Raises:
        DataError: The model gives no hidden states, or has no such layer.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]):
        depth = getattr(model.config, "num_hidden_layers", None)
        if not isinstance(depth, int) or model.config.is_encoder_decoder:
            raise DataError(
                f"A teacher of type {model.config.model_type!r} gives no hidden states for each layer; "
                "choose an encoder such as BERT, RoBERTa or ModernBERT."
            )
        for layer in layers:
            if not -depth - 1 <= layer <= depth:
                raise DataError(
                    f"The teacher's layer {layer} does not exist; it has hidden states 0 to {depth}."
                )
        self.model, self.layers = model.eval(), [layer % (depth + 1) for layer in layers]
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        # The last hidden state may have gone through a norm after the last layer; the others are the inputs
        # of the next layer.
        self.stack = stacks[0] if len(stacks) == 1 and max(self.layers) < depth else None

    @torch.inference_mode()
    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the hidden states side by side, ``(batch, tokens, hidden × number of layers)``."""
        if self.stack is None:
            states = self.model(**inputs, output_hidden_states=True).hidden_states
            if not states:
                raise DataError(
                    f"A teacher of type {self.model.config.model_type!r} gives no hidden states; choose an "
                    "encoder such as BERT, RoBERTa or ModernBERT."
                )
            return torch.cat([states[layer] for layer in self.layers], dim=-1)
        seen: dict[int, torch.Tensor] = {}

        def keep(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == max(self.layers):
                raise _DeepEnough

        with ExitStack() as hooks, suppress(_DeepEnough):
            for layer in set(self.layers):
                handle = self.stack[layer].register_forward_pre_hook(partial(keep, layer), with_kwargs=True)
                hooks.enter_context(handle)  # removes it
            self.model(**inputs)
        return torch.cat([seen[layer] for layer in self.layers], dim=-1)


class WordEncoder:
    """A frozen teacher that gives one vector per word; rows are cut at ``max_length`` sub-words."""

    def __init__(
        self,
        reader: LayerReader,
        tokenizer: PreTrainedTokenizerBase,
        settings: PseudoLabelSettings,
        max_length: int,
        bf16: bool,
    ):
        self.reader, self.tokenizer = reader, tokenizer
        self.pooling, self.normalize = settings.pooling, settings.normalize
        self.max_length, self.bf16 = max_length, bf16
        self.precision = "bf16" if bf16 else "float32"
        self.device = reader.model.device
        self.batch_tokens = settings.batch_tokens or (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS)

    def __call__(self, sentences: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 ``(words with a vector, hidden)`` and a mask ``(all words,)`` of which those are.

        A word without a vector was cut off, or the tokenizer maps it to nothing.
        """
        parts = list(self.batches(sentences))
        covered = np.zeros(sum(map(len, sentences)), dtype=bool)
        slots = np.concatenate([slots for slots, _ in parts]) if parts else np.zeros(0, dtype=np.int64)
        covered[slots] = True
        vectors = np.concatenate([vectors for _, vectors in parts]) if parts else np.zeros((0, 0), np.float32)
        return vectors[np.argsort(slots)], covered

    def batches(self, sentences: list[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each forward pass which words have a vector, and their vectors.

        Sentences of similar length go together, so a batch's words come from all over the list: their
        positions among all words of all sentences, int64 ``(words,)``, and float32 ``(words, hidden)``.
        """
        if not sentences:
            return
        encoded = encode_rows(self.tokenizer, sentences, self.max_length)
        lengths = encoded.lengths
        word_starts = np.cumsum([0, *map(len, sentences)])
        for batch in row_batches(lengths, self.max_length, self.device, self.precision, self.batch_tokens):
            words = padded([encoded.word_ids[row] for row in batch.rows], batch.length, fill=-1)
            slots = np.where(words >= 0, words + word_starts[batch.rows, None], -1)
            slots[batch.real :] = -1
            inputs = encoded.inputs(batch.rows, batch.length)
            if lengths[batch.rows].min() == batch.length:
                inputs.pop("attention_mask", None)  # nothing is padded: attention is faster without a mask
            with precision(self.device, self.precision):
                hidden = self.reader(**{key: value.to(self.device) for key, value in inputs.items()})
            yield self._word_vectors(hidden.flatten(0, 1), slots.reshape(-1))

    def _word_vectors(self, states: torch.Tensor, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = first_subwords(slots)
        if self.pooling == "first":
            vectors = states[torch.from_numpy(first).to(states.device)].float()
        else:
            inside = slots >= 0
            word = torch.from_numpy(np.cumsum(first)[inside] - 1).to(states.device)
            chosen = states[torch.from_numpy(inside).to(states.device)].float()
            vectors = chosen.new_zeros(int(first.sum()), chosen.shape[-1]).index_add_(0, word, chosen)
            vectors /= torch.bincount(word)[:, None]
        if self.normalize:
            vectors = nn.functional.normalize(vectors, dim=-1)
        return slots[first], vectors.cpu().numpy()


def load_teacher(settings: PseudoLabelSettings, device: torch.device | None = None) -> WordEncoder:
    """Load the teacher, by default on an accelerator if there is one.

    Raises:
        DataError: It cannot be loaded, gives no hidden states, or has no such layer.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        teacher = resolve_encoder(settings.teacher, settings.revision)
        model = AutoModel.from_pretrained(
            teacher, revision=settings.revision or "main", trust_remote_code=False, dtype=torch.float32
        )
    except MissingExtraError:
        raise
    except Exception as error:  # safetensors and the Hub client have their own exceptions
        reason = first_line(error)
        raise DataError(f"The teacher {settings.teacher!r} cannot be loaded: {reason}") from error
    reader = LayerReader(model.to(device), settings.layers)
    tokenizer = load_word_tokenizer(teacher, settings.revision)
    bf16 = uses_bf16(device, settings.precision)
    encoder = WordEncoder(reader, tokenizer, settings, _max_length(settings, model, tokenizer), bf16)
    try:
        encoder([["one", "word"]])
    except DataError:
        raise
    except Exception as error:
        name = f"{settings.teacher!r} of type {model.config.model_type!r}"
        reason = first_line(error)
        raise DataError(f"The teacher {name} does not read text as an encoder does: {reason}") from error
    return encoder


def _max_length(settings: PseudoLabelSettings, model, tokenizer) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    if model.config.model_type in ("roberta", "xlm-roberta"):
        positions -= model.config.pad_token_id + 1  # they count positions from there
    return min(settings.max_length, tokenizer.model_max_length, positions)
