"""Fine-tune an encoder on several NER sets at once, to serve as a stronger teacher for pseudo-labels.

Each set has its own linear head over its own types, because a word that is outside in one set may be an
entity in another; the encoder is shared. A run may be cut into pieces: the same command resumes from
``STATE`` in the output folder until ``--epochs`` are done.

    python train/ner_teacher.py --data ner/multiconer2_en ner/snips --epochs 2 --output_dir teacher
    python train/ner_teacher.py --data ner/multiconer2_en ner/snips --epochs 2 --output_dir teacher \
        --minutes 7

"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, get_linear_schedule_with_warmup

from modeling_mtpf.data.batches import length_sorted_batches, padded_length, rows_of_length
from modeling_mtpf.data.encoding import encode_rows, padded
from modeling_mtpf.data.packaged_encoder import resolve_encoder
from modeling_mtpf.data.sources import open_source
from modeling_mtpf.data.words import IGNORE, align_labels, load_word_tokenizer
from modeling_mtpf.devices import wants_few_shapes
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.settings import ScriptParser, check_same_arguments

STATE = "_training_state.pt"
DECISIVE = ("data", "encoder", "layers", "epochs", "learning_rate", "tokens", "sentences", "seed", "bf16")
"""Arguments that must be the same when a run is resumed."""
MAX_LENGTH = 96


class TaggedSet:
    """The sentences of one NER set with the id of each word's type; 0 is outside.

    Args:
        folder: Holds ``train.parquet`` with ``tokens`` and IOB2 ``ner_tags``.
        most: Use at most this many sentences, drawn at random (0: all).
        seed: Seed of that draw.
    """

    def __init__(self, folder: Path, most: int = 0, seed: int = 0):
        source = open_source(folder / "train.parquet", {"tokens": "words", "ner_tags": "words"})
        if 0 < most < len(source):
            drawn = np.random.Generator(np.random.PCG64(seed)).choice(len(source), most, replace=False)
            rows = source[np.sort(drawn)]
        else:
            rows = source[:]
        self.name, self.words = folder.name, rows["tokens"]
        self.types = ["O", *sorted({tag[2:] for tags in rows["ner_tags"] for tag in tags if tag != "O"})]
        ids = {name: number for number, name in enumerate(self.types)}
        self.labels = [[ids[tag[2:] or "O"] for tag in tags] for tags in rows["ner_tags"]]


def epoch_batches(sets: list[TaggedSet], tokens: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Return one epoch's batches ``(set, rows)`` in random order: rows of similar length from one set."""
    rng = np.random.Generator(np.random.PCG64(seed))
    batches = []
    for number, tagged in enumerate(sets):
        order = rng.permutation(len(tagged.words))
        lengths = [min(2 + int(1.3 * len(tagged.words[row])), MAX_LENGTH) for row in order]
        batches += [(number, order[rows]) for rows, _ in length_sorted_batches(lengths, tokens, MAX_LENGTH)]
    return [batches[i] for i in rng.permutation(len(batches))]


def full_batch(tokenizer, tagged: TaggedSet, rows: np.ndarray, tokens: int, few_shapes: bool):
    """Tokenize and pad rows; for few shapes, pad to a multiple and fill up with empty rows."""
    encoded = encode_rows(tokenizer, [tagged.words[row] for row in rows], MAX_LENGTH)
    length = int(encoded.lengths.max())
    if few_shapes:
        length = padded_length(length, MAX_LENGTH)
    inputs = encoded.inputs(range(len(rows)), length)
    aligned = [
        align_labels(ids, tagged.labels[row])[0] for ids, row in zip(encoded.word_ids, rows, strict=True)
    ]
    labels = torch.from_numpy(padded(aligned, length, IGNORE))
    if not few_shapes:
        return inputs, labels
    missing = max(0, rows_of_length(length, tokens) - len(labels))
    inputs = {key: nn.functional.pad(value, (0, 0, 0, missing)) for key, value in inputs.items()}
    inputs["attention_mask"][len(labels) :, 0] = 1  # attention over nothing is NaN
    return inputs, nn.functional.pad(labels, (0, 0, 0, missing), value=IGNORE)


def train(arguments: argparse.Namespace) -> bool:
    """Train for the epochs or the minutes that are left; return whether all epochs are done."""
    torch.manual_seed(arguments.seed)
    sets = [TaggedSet(Path(folder), arguments.sentences, arguments.seed) for folder in arguments.data]
    encoder = resolve_encoder(arguments.encoder)
    tokenizer = load_word_tokenizer(encoder)
    depth = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    backbone = AutoModel.from_pretrained(encoder, dtype=torch.float32, **depth)
    heads = nn.ModuleList(nn.Linear(backbone.config.hidden_size, len(tagged.types)) for tagged in sets)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.ModuleDict({"encoder": backbone, "heads": heads}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, fused=True)
    epochs = [epoch_batches(sets, arguments.tokens, arguments.seed + e) for e in range(arguments.epochs)]
    plan = [batch for epoch in epochs for batch in epoch]
    schedule = get_linear_schedule_with_warmup(optimizer, len(plan) // 20, len(plan))
    state_file, step = arguments.output_dir / STATE, 0
    facts = {key: str(getattr(arguments, key)) for key in DECISIVE}
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True, map_location=device)
        check_same_arguments(facts, state.get("facts", {}), state_file)
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    model.train()
    few_shapes = wants_few_shapes(device, "bf16" if arguments.bf16 else "float32")
    started, seen, losses = time.time(), 0, []
    while step < len(plan) and time.time() - started < 60 * arguments.minutes:
        number, rows = plan[step]
        inputs, labels = full_batch(tokenizer, sets[number], rows, arguments.tokens, few_shapes)
        inputs, labels = {key: value.to(device) for key, value in inputs.items()}, labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            logits = heads[number](backbone(**inputs).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + labels.numel()
        losses.append(loss.item())
        if step % 50 == 0:
            rate = seen / (time.time() - started)
            print(f"step {step}/{len(plan)} loss {np.mean(losses[-50:]):.3f} {rate:.0f} tokens/s", flush=True)
    if step < len(plan):
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"facts": facts, "step": step, **states}, state_file)
        return False
    state_file.unlink(missing_ok=True)
    save_teacher(arguments, sets, backbone, tokenizer, losses)
    return True


def save_teacher(arguments: argparse.Namespace, sets: list[TaggedSet], backbone, tokenizer, losses) -> None:
    """Write encoder, tokenizer and the record ``teacher.json``."""
    backbone.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    record = {
        "encoder": arguments.encoder,
        "layers": backbone.config.num_hidden_layers,
        "sets": {tagged.name: {"sentences": len(tagged.words), "types": tagged.types[1:]} for tagged in sets},
        "epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "tokens_per_batch": arguments.tokens,
        "seed": arguments.seed,
        "last_loss": float(np.mean(losses[-100:])) if losses else None,
    }
    (arguments.output_dir / "teacher.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; status 3 says that the minutes were over before the epochs."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="folders of NER sets with train.parquet")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--encoder", default="packaged", help="packaged, a folder or a Hub id")
    parser.add_argument("--layers", type=int, default=0, help="lowest layers to keep (0: all)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch, padding included")
    parser.add_argument("--sentences", type=int, default=0, help="most sentences of each set (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and save after this time")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast, where the device is fast at it")
    try:
        return 0 if train(parser.parse_args(arguments)) else 3
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
