"""Learn from the results of the apps themselves, on any texts, without labels."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, logsigmoid

from ...data.app_data import Examples
from ...data.encoding import EncodedRows
from ...data.words import IGNORE
from ...errors import DataError
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import mean_pool
from ..tagged_texts import TaggedTexts
from ..tail_training import adapter_tail, tail_outputs, training_batches
from ..trunk_cache import TrunkCache
from .registry import BundleTail, Job, Validation
from .settings import BundleSettings

HELD_OUT, MOST_HELD_OUT = 0.1, 500
"""Share of the windows on which training is stopped early, and their number at most."""


class _Results:
    """What one app gives for rows: the labels' probabilities of words, or of the whole row."""

    def __init__(self, head: AdapterHead):
        self.of_words, self.several = head.kind == "token-classification", bool(head.problem_type)
        self.outside = [n for n, label in enumerate(head.labels) if label[:2] not in ("B-", "I-")]
        self.rows: dict[int, torch.Tensor] = {}

    def add(self, numbers: np.ndarray, logits: list[torch.Tensor]) -> None:
        for number, values in zip(numbers.tolist(), logits, strict=True):
            self.rows[number] = values.sigmoid() if self.several else values.softmax(-1)

    def found(self) -> bool:
        """Say whether the app finds something in any row; one that gives every text a label does."""
        if self.of_words:
            best = torch.cat([p.argmax(-1) for p in self.rows.values()])
            return bool((~torch.isin(best, torch.tensor(self.outside, device=best.device))).any())
        return not self.several or any(bool((p >= 0.5).any()) for p in self.rows.values())

    def divergence(self, numbers: np.ndarray, logits: list[torch.Tensor]) -> torch.Tensor:
        """Return the mean KL divergence of words, or of rows, from what the app gives."""
        targets, values = torch.cat([self.rows[n] for n in numbers.tolist()]), torch.cat(logits)
        if not self.several:
            return kl_div(values.log_softmax(-1), targets, reduction="batchmean")
        logs = targets.clamp(1e-7, 1 - 1e-7).logit()
        entropy = -(targets * logsigmoid(logs) + (1 - targets) * logsigmoid(-logs)).sum()
        return (binary_cross_entropy_with_logits(values, targets, reduction="sum") - entropy) / len(values)


class FromApps:
    """A step is one batch of texts, from which all parts learn: KL from each app's own tail to its part.

    Texts are read as `MtpfModel.predict` reads them, in windows; only words' first sub-words count for NER.

    Raises:
        DataError: There are no texts with words, or the apps find nothing in them.
    """

    def __init__(self, job: Job, depth: int):
        settings = job.settings
        inputs = (x for part in job.parts if part.data for x in part.data.train.inputs)
        given = job.texts or [text if isinstance(text, str) else " ".join(text) for text in inputs]
        texts = [text for text in dict.fromkeys(given) if text.strip()]
        if len(texts) < 2:
            there = "are none" if not texts else "is one"
            raise DataError(
                f"At least two texts are needed to learn the apps' results from, and there {there}; "
                "give some with --texts."
            )
        rows = TaggedTexts(job.tokenizer, Examples(texts, [[] for _ in texts]), ["O"], settings.max_length)
        self._words = [np.flatnonzero(target != IGNORE) for target in rows.targets]
        used = np.array([number for number, words in enumerate(self._words) if len(words)], dtype=np.int64)
        order = np.random.default_rng([settings.seed, 5]).permutation(used)
        held = min(max(1, round(HELD_OUT * len(order))), MOST_HELD_OUT)
        if len(order) < 2:
            raise DataError("Of the texts to learn the apps' results from fewer than two have a word.")
        self._numbers = np.sort(order[held:]), np.sort(order[:held])
        self._rows = [TrunkCache(job.model, _take(rows.encoded, n), depth, settings) for n in self._numbers]
        self._settings = settings
        self._results = {part.name: self._apply(job, str(part.app)) for part in job.parts}
        if not any(results.found() for results in self._results.values()):
            raise DataError(
                f"The apps find nothing in the {len(texts):,} texts, from which nothing can be learnt; "
                "give texts like those that the apps are for."
            )
        self.steps = settings.steps_for(len(self._numbers[0]))
        self.record = {"loss": "distil", "texts": {"texts": len(texts), "windows": len(order)}}

    def _apply(self, job: Job, app: str) -> _Results:
        """Return the results of an app for all rows."""
        head: Any = job.model.heads[app]
        results = _Results(head)
        with torch.no_grad():
            for which, numbers in enumerate(self._numbers):
                tail = adapter_tail(job.model, app, self._settings)
                for rows, hidden in tail_outputs(tail, self._rows[which], self._settings):
                    results.add(numbers[rows], self._logits(head, results, which, rows, hidden))
        return results

    def _logits(
        self, head: AdapterHead, results: _Results, which: int, rows: np.ndarray, hidden: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return for each row logits ``(words, labels)``, or ``(1, labels)`` of a text app."""
        if not results.of_words:
            mask = self._rows[which].encoded.inputs(rows, hidden.shape[1])["attention_mask"]
            return list(head(mean_pool(hidden, mask.to(hidden.device))).split(1))
        words = [self._words[number] for number in self._numbers[which][rows]]
        picked = torch.cat([states[torch.from_numpy(at)] for states, at in zip(hidden, words, strict=True)])
        return list(head(picked).split([len(at) for at in words]))

    def losses(
        self, tail: BundleTail, heads: dict[str, AdapterHead], settings: BundleSettings, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield the sum of the parts' divergences for each step after the first ``start`` ones."""
        for trunk, rows in training_batches(self._rows[0], settings, start=start):
            hidden = tail(trunk, None)
            divergences = [
                results.divergence(
                    self._numbers[0][rows], self._logits(heads[name], results, 0, rows, hidden)
                )
                for name, results in self._results.items()
            ]
            yield torch.stack(divergences).sum()

    @torch.no_grad()
    def validate(self, tail: BundleTail, heads: dict[str, AdapterHead]) -> dict[str, Validation]:
        """Score each part by its divergence from its app on held-out rows, negated."""
        sums, count = dict.fromkeys(self._results, 0.0), len(self._numbers[1])
        for rows, hidden in tail_outputs(partial(tail, part=None), self._rows[1], self._settings):
            for name, results in self._results.items():
                logits = self._logits(heads[name], results, 1, rows, hidden)
                sums[name] += float(results.divergence(self._numbers[1][rows], logits)) * len(rows)
        means = {name: total / count for name, total in sums.items()}
        return {name: Validation(-mean, {"divergence": mean}) for name, mean in means.items()}


def _take(encoded: EncodedRows, numbers: np.ndarray) -> EncodedRows:
    columns = {key: [values[number] for number in numbers] for key, values in encoded.columns.items()}
    return EncodedRows(columns, encoded.pad_token_id)
