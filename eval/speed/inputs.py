"""Inputs and runs that the training sections share.

Every contestant sees the same rows in `PASSES` passes; only the last one is timed. A peer whose batches have
new shapes in each pass still compiles kernels for some of them in the last one.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from eval.speed import clock

PASSES = 3
PAIRS_PER_BATCH = 64
SENTENCES_PER_BATCH = 32
MAX_LENGTH = 256
"""Limit of the packaged encoder in sentence-transformers."""
CLUSTERS = 200


def read_pairs(folder: str, count: int = PAIRS_PER_BATCH) -> dict[str, list[tuple[str, str]]]:
    """Return ``count`` pairs of every source, without repeated texts."""
    from modeling_mtpf.data.sources import expand_pair_sources, open_source

    chosen: dict[str, list[tuple[str, str]]] = {}
    for name, source in expand_pair_sources([folder]).items():
        rows = open_source(source, {"anchor": "text", "positive": "text"}).shuffle(seed=0)
        seen: set[str] = set()
        pairs = chosen[name] = []
        for row in rows:
            pair = row["anchor"], row["positive"]
            texts = {text.strip().lower() for text in pair}
            if "" not in texts and len(texts) == 2 and not texts & seen:
                pairs.append(pair)
                seen |= texts
            if len(pairs) == count:
                break
    return {name: pairs for name, pairs in chosen.items() if len(pairs) == count}


def read_sentences(source: str, count: int) -> list[list[str]]:
    """Return the words of the first sentences of a text source, cut at 60 words."""
    from modeling_mtpf.data.sources import open_source, source_files

    file = source_files(source)[0]
    sentences: list[list[str]] = []
    for row in open_source(file, {"text": "text"}):
        for sentence in row["text"].split(". "):
            words = sentence.split()[:60]
            if len(words) > 2:
                sentences.append(words)
        if len(sentences) >= count:
            break
    return sentences[:count]


def labels_of(words: list[str]) -> list[int]:
    """Return a label for each word that depends on the word only."""
    return [sum(word.encode()) % CLUSTERS for word in words]


def peer_labels(word_ids: list[int | None], words: list[str]) -> list[int]:
    """Put each word's label on its first token, as transformers' recipe for token classification does."""
    labels, before = labels_of(words), [None, *word_ids[:-1]]
    return [-100 if w is None or w == last else labels[w] for w, last in zip(word_ids, before, strict=True)]


def our_run(
    options: dict,
    *,
    regime: str,
    steps: int,
    pairs: int = PAIRS_PER_BATCH,
    batches_per_source: int = 1,
    cache: bool = False,
    chunk_tokens: int = 0,
) -> dict[str, float]:
    """Train with this package and time the last pass, tokenizing included.

    Args:
        options: Of ``eval/speed/run.py``.
        regime: ``tc``, ``ner`` or ``tpl``.
        steps: Batches of a pass.
        pairs: Pairs per batch.
        batches_per_source: Batches of a source in a pass.
        cache: Whether gradients are cached.
        chunk_tokens: Size of a chunk; by default that of the device.
    """
    import datasets

    with tempfile.TemporaryDirectory() as work:
        datasets.config.HF_DATASETS_CACHE = Path(work) / "cache"  # tokenizing must not be done already
        inputs = _write_inputs(
            options, Path(work), regime, steps, pairs * batches_per_source, steps // batches_per_source
        )
        recipe = _recipe(inputs, regime, steps, pairs)
        recipe.threads, recipe.output_dir = options["threads"], work
        recipe.gradient_cache, recipe.chunk_tokens = cache, chunk_tokens
        seconds, measured = _timed_run(recipe, batches_per_source)
    return {
        "seconds": round(seconds, 3),
        "pairs_per_second": round(steps * pairs / seconds, 2),
        "sentences_per_second": round(steps * SENTENCES_PER_BATCH / seconds, 2),
        "seconds_per_step": round(seconds / steps, 4),
        **measured,
    }


def _timed_run(recipe: Any, batches_per_source: int) -> tuple[float, dict[str, float]]:
    """Train; return the seconds of tokenizing and of the last pass together, and what else was measured."""
    import psutil

    from modeling_mtpf.pretraining.families.tc import TcFamily
    from modeling_mtpf.pretraining.joint import JointModel
    from modeling_mtpf.pretraining.loop import Loop
    from modeling_mtpf.pretraining.metrics_log import MetricsLog
    from modeling_mtpf.pretraining.setup import load_backbone, make_accelerator, prepare_families

    class Timed(MetricsLog):
        def add(self, *rest: Any) -> None:
            super().add(*rest)
            marks.append(clock.seconds())

    marks: list[float] = []
    folder, joined = Path(recipe.output_dir), recipe.regime == "tpl"
    accelerator, model = make_accelerator(recipe), load_backbone(recipe)
    started = clock.seconds()
    families, _ = prepare_families(recipe, model, folder)
    prepared = clock.seconds() - started
    for family in families:
        if isinstance(family, TcFamily):  # every source once a pass, as for the peer
            family.chooser = InTurn(len(family.sources), batches_per_source)  # type: ignore[assignment]
    joint = JointModel(model, families, joined, recipe.gradient_cache)
    before = psutil.Process().memory_info().rss
    log = Timed(folder, True)
    Loop(recipe, joint, families, accelerator, log, folder).train()
    log.close()
    diagnostics = _time_diagnostics(joint, families, accelerator) if joined else 0.0
    return last_pass(marks) + prepared, {
        "seconds_tokenizing": round(prepared, 3),
        "seconds_diagnostics": round(diagnostics, 4),
        "padding": log.lines[-1]["padding"],
        "before_mb": round(before / (1 << 20), 1),
    }


def _recipe(inputs: dict[str, Any], regime: str, steps: int, pairs: int) -> Any:
    """Return the recipe of all passes over the inputs, without checkpoints, diagnostics and log lines."""
    from modeling_mtpf.pretraining.families.ner import NerSettings
    from modeling_mtpf.pretraining.families.tc import TcSettings
    from modeling_mtpf.pretraining.recipe import Recipe

    settings: dict[str, Any] = {
        "ner": NerSettings(batch_size=SENTENCES_PER_BATCH, max_length=MAX_LENGTH, data=inputs["ner"]),
        "tc": TcSettings(batch_size=pairs, max_length=MAX_LENGTH, pairs=inputs["tc"]),
    }
    return Recipe(
        regime=regime,
        families={name: settings[name] for name in ("ner", "tc") if regime in (name, "tpl")},
        steps=PASSES * steps,
        save_every=0,
        diagnostics_every=0,
        log_every=10**6,
    )


class InTurn:
    """Used instead of `SourceSampler`: all batches of the first source, then those of the next."""

    def __init__(self, sources: int, batches: int):
        self.sources, self.batches = sources, batches

    def choose(self, step: int) -> tuple[int, int]:
        """Return the source of a step, and the number of earlier steps with the same source."""
        passes, position = divmod(step, self.sources * self.batches)
        return position // self.batches, passes * self.batches + position % self.batches


def _write_inputs(
    options: dict, work: Path, regime: str, steps: int, pairs: int, sources: int
) -> dict[str, Any]:
    """Write the rows to files, in the formats of users' data."""
    inputs: dict[str, Any] = {"ner": None, "tc": []}
    if regime in ("tc", "tpl"):
        folder = work / "pairs"
        folder.mkdir()
        rows = read_pairs(options["pairs"], pairs)
        by_length = sorted(rows, key=lambda name: sum(len(a) + len(p) for a, p in rows[name]))
        first = (len(by_length) - sources) // 2  # sources of middle length, if not all are wanted
        for name in by_length[first : first + sources]:
            lines = [json.dumps({"anchor": a, "positive": p}) for a, p in rows[name]]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        inputs["tc"] = [str(folder)]
    if regime in ("ner", "tpl"):
        sentences = read_sentences(options["text"], steps * SENTENCES_PER_BATCH)
        lines = [json.dumps({"words": words, "clusters": labels_of(words)}) for words in sentences]
        (work / "labels.jsonl").write_text("\n".join(lines))
        inputs["ner"] = str(work / "labels.jsonl")
    return inputs


def _time_diagnostics(joint: Any, families: list, accelerator: Any) -> float:
    """Seconds of the second of two measurements of the diagnostics."""
    from modeling_mtpf.devices import wants_few_shapes
    from modeling_mtpf.pretraining.chunks import chunk_shape, plan_chunks
    from modeling_mtpf.pretraining.diagnostics import gradient_cosine, tail_similarity
    from modeling_mtpf.pretraining.dropout import fast_dropout_in

    few_shapes = wants_few_shapes(accelerator.device, accelerator.mixed_precision)
    shape = chunk_shape(accelerator.device, MAX_LENGTH, few_shapes=few_shapes)
    batch = plan_chunks({family.name: family.batch(0) for family in families}, shape, 0)
    started = 0.0
    with fast_dropout_in(joint.model.backbone), accelerator.autocast():
        for _ in range(2):
            started = clock.seconds()
            gradient_cosine(joint, batch, shape)
            tail_similarity(joint, batch)
    return clock.seconds() - started


def last_pass(marks: list[float]) -> float:
    """Seconds of the last pass, from the times at which steps ended."""
    return marks[-1] - marks[len(marks) * (PASSES - 1) // PASSES - 1]


def peer_arguments(kind: Any, work: str, batch_size: int, bf16: bool) -> Any:
    """Return a peer's training arguments: `PASSES` passes on CPU, everything else at its defaults.

    Args:
        kind: ``TrainingArguments`` of the peer.
        work: Folder for its output.
        batch_size: Rows per step.
        bf16: Whether it trains in bf16.
    """
    return kind(
        output_dir=work,
        per_device_train_batch_size=batch_size,
        num_train_epochs=PASSES,
        bf16=bf16,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def step_marks() -> tuple[list[float], Any]:
    """Return a list, and the Trainer callback that adds the time at which each step ended to it."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *rest: Any, **more: Any) -> None:
            marks.append(clock.seconds())

    return marks, Marks()
