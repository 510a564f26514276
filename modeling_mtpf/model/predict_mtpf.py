"""Prediction with several apps at once: one trunk pass per batch of windows, one short tail per LoRA.

Texts are taken in portions of bounded size, cut into windows, sorted by length and run in batches of bounded
size; results come back in the order of the texts. Nothing in the model is changed, and a call keeps using an
app that is deleted or replaced meanwhile.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .adapters_mtpf import find_heads, heads_of, part_name, standalone_apps
from .bound_calls_mtpf import execution_device
from .configuration_mtpf import max_tokens
from .errors_mtpf import AdapterError, MtpfError
from .forks_mtpf import held_at_fork
from .results_mtpf import TagScheme, entities, text_labels
from .texts_mtpf import MAX_CHARACTERS, TextTokenizer, Tokens, Window, in_portions, read_texts
from .tokenizer_gate_mtpf import open_tokenizer
from .trunk_mtpf import run_layers, run_trunk
from .views_mtpf import CHANGES, InferenceViews, inference_views

PORTION = 1024
"""Texts that are read ahead, so that a batch has texts of one length."""
PORTION_CHARACTERS = 2_000_000
CPU_TOKENS, DEVICE_TOKENS = 1024, 16384
"""Tokens of a batch. On a CPU more gain nothing: a layer's intermediate values leave the cache."""
MAX_PADDING = 0.04
"""Share of padding at which a batch of sufficient size is closed."""

_LOADING = held_at_fork()

_Wanted = int | dict[str, int]
"""What a name means: the index of an app, or of each part of a bundle."""


@dataclass
class _App:
    """A head on its LoRA as they were when a call began; usable when the model deletes or replaces them.

    Parts of a bundle have the same ``layers`` and ``limit``.
    """

    name: str
    head: Any
    layers: list
    limit: int
    scheme: TagScheme | None = None  # of a token app
    own: "Predictor | None" = None  # of a standalone app


@dataclass
class _Portion:
    """Texts that are processed together, with the indices of the apps that each wants.

    ``scores`` has for each (text, token app) the log-probabilities ``(sub-words, labels)``, ``sums`` for each
    (text, text app) the weighted sum of probabilities (and logits, for the scope), and the weight.
    """

    texts: list[str]
    tokens: list[Tokens]
    wanted: list[list[int]]
    scores: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    sums: dict[tuple[int, int], list] = field(default_factory=dict)
    words: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)


class Predictor:
    """Applies the apps of an `MtpfModel` to texts.

    Args:
        model: With apps loaded.
        tokenizer: As in `MtpfModel.predict`.
        token: Likewise.
        batch_tokens: Tokens of a batch, padding included; by default 1,024 on a CPU and 16,384 elsewhere.
        batch_size: Windows of a batch at most.
        portion: Texts that are read ahead.
        max_characters: A longer text is refused.
        top_k: Number of labels of a TC app, the most probable first: 1 gives the best as a dict; more, or
            ``None`` for all, give a list of dicts.
        threshold: Leaves out entities and labels with a lower score. Where ``top_k`` is 1 and the best label
            is left out, the result is ``{"label": None, "score": …}`` with its score. By default all scores
            are accepted, but those of a multi-label app from 0.5 on; it gives a list also for a ``top_k`` of
            1, which does not limit it.
        in_scope: A TC app's result also says, as ``in_scope``, whether the text is about anything that the
            app was fitted on; ``top_k`` is then 1. The results of NER apps are as without it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        token: str | None = None,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        portion: int = PORTION,
        max_characters: int = MAX_CHARACTERS,
        top_k: int | None = 1,
        threshold: float | None = None,
        in_scope: bool = False,
    ):
        sizes = {"batch_tokens": batch_tokens, "batch_size": batch_size, "portion": portion, "top_k": top_k}
        for name, value in sizes.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if threshold is not None and not (number and 0 <= threshold <= 1):
            raise ValueError(f"threshold is {threshold!r}; it must be a number from 0 to 1.")
        if in_scope and top_k != 1:
            raise ValueError(f"in_scope belongs to a text's best label; leave top_k, which is {top_k}, at 1.")
        self.threshold, self.in_scope = threshold, in_scope
        self.model = model
        self.tokenizer = text_tokenizer(model, tokenizer, token)
        self.device = execution_device(model)
        self.batch_tokens = batch_tokens or (CPU_TOKENS if self.device.type == "cpu" else DEVICE_TOKENS)
        self.batch_size = batch_size or self.batch_tokens
        self.portion, self.max_characters, self.top_k = portion, max_characters, top_k

    def stream(
        self,
        texts: Any,
        adapters: list[str] | None = None,
        adapter_names: Iterable[str] | None = None,
        column: str | None = None,
    ) -> Iterator[Any]:
        """Return an iterator over the result of each text in order; see `MtpfModel.predict_stream`."""
        check_choice(adapters, adapter_names)
        rows = read_texts(texts, column, self.max_characters)
        if adapters is None:
            return self._stream_mixed(_paired(rows, adapter_names))
        apps: list[_App] = []
        return self._stream_all(rows, {name: self._find(name, apps) for name in adapters}, apps)

    def _stream_all(
        self, texts: Iterator[str], wanted: dict[str, _Wanted], apps: list[_App]
    ) -> Iterator[dict[str, Any]]:
        pairs = ((text, range(len(apps))) for text in texts)
        for portion in in_portions(pairs, self.portion, PORTION_CHARACTERS):
            for row in self._run(portion, apps):
                yield {name: _pick(row, which) for name, which in wanted.items()}

    def _stream_mixed(self, pairs: Iterator[tuple[str, str]]) -> Iterator[Any]:
        apps: list[_App] = []
        known: dict[Any, _Wanted] = {}
        for portion in in_portions(pairs, self.portion, PORTION_CHARACTERS):
            for _, name in portion:
                if name not in known:
                    known[name] = self._find(name, apps)
            wanted = [known[name] for _, name in portion]
            indices = ([which] if isinstance(which, int) else list(which.values()) for which in wanted)
            rows = self._run([(text, i) for (text, _), i in zip(portion, indices, strict=True)], apps)
            yield from map(_pick, rows, wanted)

    def _find(self, name: Any, apps: list[_App]) -> _Wanted:
        """Add the heads that a name means to ``apps``, unless they are there; return their indices."""
        encoder, heads = self.model.backbone, self.model.heads
        if isinstance(name, str) and (model := standalone_apps(encoder).get(name)) is not None:
            own = copy.copy(self)
            own.model = model.to(self.device, self.model.dtype)
            if "_mtpf_tokenizer" in model.__dict__:
                own.tokenizer = text_tokenizer(model)
            (app,) = own._apps(name)
            apps.append(replace(app, own=own))
            return len(apps) - 1
        with CHANGES:
            adapter, named = find_heads(encoder, heads, name)
            for key, head in named.items():
                check_tokenizer(key, head, self.tokenizer)
                if self.in_scope:
                    check_has_scope(key, head)
            layers = inference_views(encoder).tail(encoder, adapter)
            limits = [head.max_length for head in heads_of(heads, adapter).values()]
        limit = min(*limits, max_tokens(self.model.config.encoder_config))
        indices = {}
        for key, head in named.items():
            indices[key] = next((i for i, app in enumerate(apps) if app.head is head), len(apps))
            if indices[key] == len(apps):
                scheme = TagScheme(head.labels) if head.kind == "token-classification" else None
                apps.append(_App(key, head, layers, limit, scheme))
        if adapter in named or adapter != name:
            (index,) = indices.values()
            return index
        return {part_name(key): index for key, index in indices.items()}

    def _apps(self, name: str) -> list[_App]:
        apps: list[_App] = []
        self._find(name, apps)
        return apps

    def _run(self, pairs: list, apps: list[_App]) -> list[dict[int, Any]]:
        """Return for each text of a portion the results of its apps; a standalone one has its own pass."""
        alone = [index for index, app in enumerate(apps) if app.own is not None]
        if not alone:
            return self._run_shared(pairs, apps)
        shared = [(text, [index for index in wanted if index not in alone]) for text, wanted in pairs]
        rows = self._run_shared(shared, apps) if len(alone) < len(apps) else [{} for _ in pairs]
        for index in alone:
            numbers = [number for number, (_, wanted) in enumerate(pairs) if index in wanted]
            own: Any = apps[index].own
            results = own._run_shared([(pairs[number][0], [index]) for number in numbers], apps)
            for number, result in zip(numbers, results, strict=True):
                rows[number].update(result)
        return [dict(sorted(row.items())) for row in rows]

    @torch.inference_mode()
    def _run_shared(self, pairs: list, apps: list[_App]) -> list[dict[int, Any]]:
        """Return for each text of a portion the results of its apps on this model's trunk."""
        texts = [text for text, _ in pairs]
        portion = _Portion(texts, self.tokenizer(texts), [list(wanted) for _, wanted in pairs])
        with CHANGES:
            views = inference_views(self.model.backbone)
        windows = self._windows(portion, apps)
        for batch in self._batches(windows):
            self._run_batch(views, portion, batch, apps)
        return [
            {index: self._result(portion, text, index, apps[index]) for index in wanted}
            for text, wanted in enumerate(portion.wanted)
        ]

    def _windows(self, portion: _Portion, apps: list[_App]) -> list[Window]:
        """Cut the texts into windows; a text that fits several apps' limits is one window for all of them."""
        windows: list[Window] = []
        for text, (tokens, wanted) in enumerate(zip(portion.tokens, portion.wanted, strict=True)):
            size = len(tokens.ids)
            by_limit: dict[int | None, list[int]] = {}
            for index in wanted:
                fits = size + self.tokenizer.special <= apps[index].limit
                by_limit.setdefault(None if fits else apps[index].limit, []).append(index)
                if apps[index].scheme is not None:
                    shape = size, len(apps[index].head.labels)
                    portion.scores[text, index] = np.zeros(shape, dtype=np.float32)
                else:
                    portion.sums[text, index] = [0.0, 0]
            for limit, indices in by_limit.items():
                for window in self.tokenizer.windows(text, size, limit):
                    window.apps = indices
                    windows.append(window)
        return windows

    def _batches(self, windows: list[Window]) -> Iterator[list[Window]]:
        """Sort by length and cut into batches of at most ``batch_tokens`` with little padding."""
        order = sorted(windows, key=lambda window: (window.stop - window.start, window.apps))
        batch: list[Window] = []
        real = 0
        for window in order:
            length = max(1, window.stop - window.start + self.tokenizer.special)
            padded = (len(batch) + 1) * length
            full = padded > self.batch_tokens or len(batch) >= self.batch_size
            wasteful = padded - real - length > MAX_PADDING * padded and real >= self.batch_tokens // 4
            if batch and (full or wasteful):
                yield batch
                batch, real = [], 0
            batch.append(window)
            real += length
        if batch:
            yield batch

    def _inputs(self, portion: _Portion, batch: list[Window]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Return the encoder's inputs, without a mask where all rows have one length, and the lengths."""
        prefix, suffix = self.tokenizer.prefix, self.tokenizer.suffix
        lengths = np.array([max(1, w.stop - w.start + self.tokenizer.special) for w in batch])
        ids = np.full((len(batch), int(lengths.max())), self.tokenizer.pad_id, dtype=np.int64)
        ids[:, : len(prefix)] = prefix
        for row, window in zip(ids, batch, strict=True):
            size = len(prefix) + window.stop - window.start
            row[len(prefix) : size] = portion.tokens[window.text].ids[window.start : window.stop]
            row[size : size + len(suffix)] = suffix
        inputs = {"input_ids": torch.from_numpy(ids).to(self.device)}
        if lengths.min() < lengths.max():
            mask = np.arange(ids.shape[1]) < lengths[:, None]
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(self.device)
        return inputs, lengths

    def _run_batch(
        self, views: InferenceViews, portion: _Portion, batch: list[Window], apps: list[_App]
    ) -> None:
        inputs, lengths = self._inputs(portion, batch)
        rows_of: dict[int, list[int]] = {}
        for row, window in enumerate(batch):
            for index in window.apps:
                rows_of.setdefault(index, []).append(row)
        if not rows_of:
            return
        depth = max(len(apps[index].layers) for index in rows_of)
        whole = run_trunk(views.bare, depth, **inputs)
        tails: dict[int, list[int]] = {}
        for index in rows_of:
            tails.setdefault(id(apps[index].layers), []).append(index)
        for indices in tails.values():
            rows, trunk = sorted({row for index in indices for row in rows_of[index]}), whole
            if len(rows) < len(batch):
                trunk = whole.pick(torch.tensor(rows, device=self.device))
            states = run_layers(views.bare, trunk, views.on_top(depth, apps[indices[0]].layers))
            for index in indices:
                part, of_part = rows_of[index], states
                if len(part) < len(rows):
                    of_part = states[torch.tensor(np.searchsorted(rows, part), device=self.device)]
                self._read(portion, index, apps[index], [batch[row] for row in part], of_part, lengths[part])

    def _read(
        self,
        portion: _Portion,
        index: int,
        app: _App,
        batch: list[Window],
        states: torch.Tensor,
        lengths: np.ndarray,
    ) -> None:
        """Turn hidden states ``(rows, tokens, hidden)`` into scores of the portion."""
        states = states.to(app.head.weight.dtype)
        if app.scheme is None:
            if lengths.min() < states.shape[1]:
                keep = torch.arange(states.shape[1]) < torch.from_numpy(lengths)[:, None]
                states = states * keep.unsqueeze(-1).to(states.device, states.dtype)
            mean = states.sum(1) / torch.from_numpy(lengths).to(states.device, states.dtype)[:, None]
            logits = app.head(mean).float()
            scores = logits.sigmoid() if app.head.problem_type else logits.softmax(-1)
            if self.in_scope:
                scores = torch.cat([scores, logits], -1)
            rows = scores.cpu().numpy()
            for window, length, row in zip(batch, lengths.tolist(), rows, strict=True):
                entry = portion.sums[window.text, index]
                entry[0], entry[1] = entry[0] + row * length, entry[1] + length
            return
        scores = app.head(states).float().log_softmax(-1).cpu().numpy()
        for row, window in enumerate(batch):
            positions = window.positions(len(self.tokenizer.prefix))
            portion.scores[window.text, index][window.labelled] = scores[row, positions]

    def _result(self, portion: _Portion, text: int, index: int, app: _App) -> Any:
        if app.scheme is None:
            total, weight = portion.sums[text, index]
            _check_numbers(app, total)
            total, logits = np.split(total, [len(app.head.labels)]) if self.in_scope else (total, None)
            top_k, threshold = self.top_k, self.threshold
            if app.head.problem_type:
                top_k, threshold = top_k if top_k != 1 else None, 0.5 if threshold is None else threshold
            result = text_labels(total / weight, app.head.labels, top_k, threshold or 0.0)
            scope = {} if logits is None else {"in_scope": app.head.scope.contains(logits / weight)}
            return {**result, **scope} if scope else result
        scores = portion.scores[text, index]
        _check_numbers(app, scores)
        if not (app.scheme.group_of[scores.argmax(-1)] >= 0).any():
            return []
        if text not in portion.words:
            portion.words[text] = portion.tokens[text].words(portion.texts[text])
        spans = entities(portion.texts[text], portion.words[text], scores, app.scheme)
        return [span for span in spans if span["score"] >= self.threshold] if self.threshold else spans


def _pick(row: dict[int, Any], wanted: _Wanted) -> Any:
    """Return one result, or that of each part of a bundle."""
    return row[wanted] if isinstance(wanted, int) else {part: row[index] for part, index in wanted.items()}


def _check_numbers(app: _App, scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise MtpfError(
            f"App {app.name!r} gives scores that are not numbers: its weights or the backbone's are damaged "
            "or too large; fetch them again, or predict in float32."
        )


def check_choice(adapters: Any, names: Any) -> None:
    """Raise `TypeError` for a call that names no apps, or names them in both ways."""
    if (adapters is None) == (names is None):
        raise TypeError(
            "Give either adapters=[...], for all texts, or adapter_names=[...], one for each text."
        )
    for what, value in (("adapters", adapters), ("adapter_names", names)):
        if isinstance(value, (str, bytes)):
            raise TypeError(f"{what} is {value!r}; give a list of names, e.g. {what}=[{value!r}].")


def _paired(texts: Iterator[str], names: Any) -> Iterator[tuple[str, str]]:
    """Yield each text with its app's name; raise `ValueError` where their numbers differ."""
    end = object()
    rest = iter(names)
    count = 0
    for text in texts:
        name = next(rest, end)
        if name is end:
            raise ValueError(f"adapter_names has {count} names, but there are more texts; give one for each.")
        yield text, name  # type: ignore[misc]
        count += 1
    if next(rest, end) is not end:
        raise ValueError(f"adapter_names has more names than the {count} texts; give one for each.")


def text_tokenizer(model: Any, tokenizer: Any = None, token: str | None = None) -> TextTokenizer:
    """Return the copy of a tokenizer that predictions use; it is made once and cached in the model."""
    source = tokenizer or load_tokenizer(model, token)
    with _LOADING:
        cached = model.__dict__.get("_mtpf_text_tokenizer")
        if cached is None or cached[0] is not source or cached[1] != len(source):
            cached = model.__dict__["_mtpf_text_tokenizer"] = (source, len(source), TextTokenizer(source))
        return cached[2]


def check_tokenizer(name: str, head: Any, tokenizer: TextTokenizer) -> None:
    """Raise `AdapterError` for an app that was trained with another tokenizer."""
    if head.tokenizer_sha256 is not None and head.tokenizer_sha256 != tokenizer.sha256:
        raise AdapterError(
            f"App {name!r} was trained with another tokenizer (sha256 {head.tokenizer_sha256[:12]}…, here "
            f"{tokenizer.sha256[:12]}…); use the one of its backbone, or load it with check_backbone=False."
        )


def check_has_scope(name: str, head: Any) -> None:
    """Raise `AdapterError` for a text app that cannot tell which texts are out of scope."""
    if head.kind == "text-classification" and head.scope is None:
        why = (
            "may give several labels or none" if head.problem_type else "has no record of its training texts"
        )
        raise AdapterError(
            f"App {name!r} cannot say what is out of scope: it {why}; leave out in_scope, or fit it as a "
            "plain app of one label a text (parts of bundles, standalone and older apps cannot)."
        )


def load_tokenizer(model: Any, token: str | None = None) -> Any:
    """Load the tokenizer from where the backbone came from, at the same revision and without remote code.

    It is cached in the model; the token is not.

    Raises:
        MtpfError: The model was not loaded from a folder or repo, or the tokenizer there cannot be used.
    """
    with _LOADING:
        if "_mtpf_tokenizer" not in model.__dict__:
            source = model.config.name_or_path
            if not source:
                raise MtpfError(
                    "The model was not loaded from a folder or repo; pass tokenizer=... to predict."
                )
            revision = getattr(model.config, "source_revision", None) or "main"
            rows = model.get_input_embeddings().weight.shape[0]
            try:
                model.__dict__["_mtpf_tokenizer"] = open_tokenizer(source, revision, token, rows)
            except MtpfError as error:
                raise MtpfError(
                    f"{error} To predict, pass tokenizer=..., or for a private repo token=...."
                ) from error
        return model.__dict__["_mtpf_tokenizer"]
