"""Label a corpus: survey, one fit of the centroids, every shard, the report (arXiv 2510.07566).

Everything is written to ``<folder>.partial``, which becomes ``<folder>`` when it is complete. A stopped run
resumes after the last complete shard: shards depend on source and settings alone.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from safetensors.numpy import load_file, save
from tqdm.auto import tqdm

from ..data.sources import Source, TextStream
from ..data.words import IGNORE
from ..devices import release_free_memory
from ..errors import DataError
from ..files import disk_errors, write_bytes
from ..model.adapter_files_mtpf import backbone_sha256
from .clustering import ClusterFit, assign
from .corpus import CorpusPlan, shards, survey
from .quality import GoldSet
from .segmentation import split_sentences
from .settings import PseudoLabelSettings
from .shards import CENTROIDS_FILE, CLUSTERS_FILE, PLAN_FILE, shard_file, write_shard
from .stopwatch import Stopwatch
from .summary import describe
from .teacher import WordEncoder, load_teacher

logger = logging.getLogger(__name__)

LABEL_COLUMNS = {"words": "words", "clusters": "integers"}
"""Columns of a labelled shard and their kinds."""

_FILES_OF_A_RUN = re.compile(
    r"_plan\.json|report\.html|clusters\.json|centroids\.safetensors|shard-\d+\.parquet|\..*\.tmp"
)


def label_corpus(
    source: Source,
    settings: PseudoLabelSettings,
    folder: Path,
    gold: str | Sequence[Source] | None = None,
    state: PartialState | None = None,
    watch: Stopwatch | None = None,
) -> Path:
    """Label a source of raw text and write the shards, the centroids, ``clusters.json`` and ``report.html``.

    The folder appears only when it is complete. An existing one made from the same source with the same
    settings is used again; a stopped run with the same source and settings is resumed.

    Args:
        source: A file, a folder of files, a Hub id ``owner/name@revision``, or a table (see `tables`).
        settings: See `PseudoLabelSettings`.
        folder: New or empty folder for the result, with one folder ``k<K>`` for each K if there are several.
        gold: NER sources (``tokens``, ``ner_tags``) that the clusters are measured with.
        state: The processes that share the work; by default this one alone. All pass the same arguments.
        watch: Adds up the time of each stage.

    Raises:
        DataError: The source is empty or malformed, or the folder holds other labels.
    """
    gold = [gold] if isinstance(gold, str) else list(gold or ())
    job = _Job(source, settings, Path(folder), gold, state, watch or Stopwatch())
    if job.is_main:
        job.prepare()
    job.wait()
    if not job.complete():
        job.label_shards()
        job.wait()
        if job.is_main:
            job.finish(job.partial)
            job.publish()
        job.wait()
    return job.folder


class _Job:
    """One call of `label_corpus`."""

    def __init__(self, source, settings: PseudoLabelSettings, folder: Path, gold: list[str], state, watch):
        self.settings, self.folder, self.state = settings, folder, state
        self.partial = folder.with_name(folder.name + ".partial")
        self.is_main = state is None or state.is_main_process
        self.rank: int = 0 if state is None else state.process_index
        self.world: int = 1 if state is None else state.num_processes
        self.words_done, self.watch = 0, watch
        self.stream = TextStream(source, settings.column, settings.encoding)
        self.gold = [GoldSet(part) for part in gold] if self.is_main else []
        self.encoder: WordEncoder = load_teacher(settings, None if state is None else state.device)
        self.watch.lap("start")

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()
        self.watch.lap("waiting")

    def folders(self, root: Path) -> dict[int, Path]:
        numbers = self.settings.cluster_numbers
        return {number: root / f"k{number}" if len(numbers) > 1 else root for number in numbers}

    def complete(self) -> bool:
        return all((part / CLUSTERS_FILE).is_file() for part in self.folders(self.folder).values())

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Settings and data that the labels depend on; reads the whole source."""
        return {
            **asdict(self.settings),
            "bf16": self.encoder.bf16,
            "batch_tokens": self.encoder.batch_tokens,
            "source": self.stream.name,
            "fingerprint": self.stream.fingerprint(),
            "teacher_sha256": backbone_sha256(self.encoder.reader.model),
        }

    # The main process, before the others start

    def prepare(self) -> None:
        """Write the plan and the centroids to the partial folder, unless the result exists already."""
        if self.complete():
            self._use_again()
            return
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise DataError(f"{self.folder} is not an empty folder; choose another output folder.")
        if self._resumes():
            return
        with tqdm(desc="survey", unit=" texts", smoothing=0.05) as progress:
            plan, sample = survey(self.stream, self.settings, progress.update)
        self.watch.lap("survey")
        centroids = self._fit(sample, plan)
        try:
            for number, part in self.folders(self.partial).items():
                write_bytes(part / CENTROIDS_FILE, save({"centroids": centroids[number]}))
            content = {"made_from": self.made_from, "plan": asdict(plan)}
            write_bytes(self.partial / PLAN_FILE, json.dumps(content).encode())
        except DataError:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _use_again(self) -> None:
        reports = [_read_json(part / CLUSTERS_FILE) for part in self.folders(self.folder).values()]
        if any(report["made_from"] != self.made_from for report in reports):
            raise DataError(f"{self.folder} holds labels of other data or settings; choose another folder.")
        logger.info("Using the pseudo-labels in %s", self.folder)
        (self.folder / PLAN_FILE).unlink(missing_ok=True)
        wanted = [gold.name for gold in self.gold]
        if wanted and wanted != [entry["source"] for entry in reports[0]["gold"]]:
            self.finish(self.folder, reports[0]["corpus"])

    def _resumes(self) -> bool:
        """Return whether a stopped run can be resumed; delete one that had not begun to label."""
        if not self.partial.exists():
            return False
        files = (path.name for path in self.partial.rglob("*") if path.is_file())
        others = [name for name in files if not _FILES_OF_A_RUN.fullmatch(name)]
        if others or self.partial.is_file():
            other = [*others, self.partial.name][0]
            raise DataError(f"{self.partial} holds other files, e.g. {other}; choose another output folder.")
        if not (self.partial / PLAN_FILE).is_file():
            shutil.rmtree(self.partial)
            return False
        if _read_json(self.partial / PLAN_FILE)["made_from"] != self.made_from:
            raise DataError(
                f"{self.partial} holds an unfinished run with other data or settings; remove it or choose "
                "another output folder."
            )
        for unfinished in self.partial.rglob(".*.tmp"):  # of a process that was killed while writing
            unfinished.unlink()
        return True

    def _fit(self, sample: list[str], plan: CorpusPlan) -> dict[int, np.ndarray]:
        settings = self.settings
        fit = ClusterFit(settings.cluster_numbers, settings.seed, settings.spherical)
        total = min(plan.words, settings.sample_words)

        def parts() -> Iterator[np.ndarray]:
            self.watch.lap("clustering")
            with tqdm(total=total, desc="k-means", unit=" words", smoothing=0.05) as progress:
                for words in _portions(sample, settings.max_words, fit.step_words):
                    self.watch.lap("segmentation")
                    vectors, _ = self.encoder(words)
                    self.watch.lap("teacher")
                    yield vectors
                    self.watch.lap("clustering")
                    progress.update(len(vectors))

        centroids = fit.fit(parts())
        self.watch.lap("clustering")
        return centroids

    # Every process

    def label_shards(self) -> None:
        """Label this process's shards, except those that exist."""
        plan = CorpusPlan(**_read_json(self.partial / PLAN_FILE)["plan"])
        folders = self.folders(self.partial)
        centroids = {k: load_file(part / CENTROIDS_FILE)["centroids"] for k, part in folders.items()}
        mine = range(self.rank, len(plan.shard_texts), self.world)
        todo = {n for n in mine if not all(shard_file(part, n).is_file() for part in folders.values())}
        total = sum(plan.shard_characters[shard] for shard in mine)
        done = total - sum(plan.shard_characters[shard] for shard in todo)
        bar = "pseudo-labels: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(total=total, initial=done, bar_format=bar, disable=not self.is_main) as progress:
            for shard, rows in shards(self.stream, self.settings, plan, todo):
                self.watch.lap("reading")
                self._label_shard(shard, rows, centroids, progress, plan.shard_characters[shard])

    def _label_shard(self, shard: int, rows, centroids: dict[int, np.ndarray], progress, characters: int):
        sentences = [(row, s) for row, text in rows for s in split_sentences(text, self.settings.max_words)]
        words = [sentence.words for _, sentence in sentences]
        starts = np.cumsum([0, *map(len, words)]).astype(np.int32)
        labels = {k: np.full(starts[-1], IGNORE, dtype=np.int32) for k in centroids}
        self.watch.lap("segmentation")
        for slots, vectors in self.encoder.batches(words):
            self.watch.lap("teacher")
            for number, centres in centroids.items():
                labels[number][slots] = assign(vectors, centres)
            self.watch.lap("clustering")
            share = characters * len(slots) / int(starts[-1])
            progress.update(min(share, progress.total - progress.n))  # rounding must not pass the end
            self.words_done += len(slots)
            rate = self.words_done * self.world / max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{rate:,.0f} words/s", refresh=False)
        self.watch.lap("teacher")
        flat = pa.array([word for sentence in words for word in sentence], pa.string())
        offsets = None
        if self.settings.keep_offsets:
            word_starts = [start for _, sentence in sentences for start in sentence.starts]
            offsets = np.asarray([row for row, _ in sentences], np.int64), np.asarray(word_starts, np.int32)
        for number, part in self.folders(self.partial).items():
            write_shard(shard_file(part, shard), flat, starts, labels[number], offsets)
        release_free_memory()
        self.watch.lap("writing")

    # The main process, at the end

    def finish(self, root: Path, corpus: dict[str, int] | None = None) -> None:
        """Count, measure and describe the labels in a folder."""
        if corpus is None:
            plan = _read_json(root / PLAN_FILE)["plan"]
            corpus = {"texts": plan["texts"], "rows_left_out": plan["skipped"]}
        describe(root, self.folders(root), self.gold, self.encoder, self.made_from, corpus)
        self.watch.lap("report")

    def publish(self) -> None:
        """Rename the complete partial folder to its final name."""
        with disk_errors(self.folder):
            if self.folder.is_dir():
                self.folder.rmdir()  # it is empty; only POSIX would replace it
            self.partial.replace(self.folder)
            (self.folder / PLAN_FILE).unlink()


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


def _portions(texts: list[str], max_words: int, words: int) -> Iterator[list[list[str]]]:
    """Yield the sentences of texts in portions of at least ``words`` words, the last perhaps of fewer."""
    portion: list[list[str]] = []
    size = 0
    for text in texts:
        for sentence in split_sentences(text, max_words):
            portion.append(sentence.words)
            size += len(sentence.words)
        if size >= words:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
