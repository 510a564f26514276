"""A scikit-learn classifier of texts: a frozen backbone and one app.

Needs the extra ``train``. Pickles and clones hold the app alone; the backbone is opened where it is needed.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from .adaptation import FitSettings, fit_app
from .data.backbones import load_backbone
from .data.columns import values_of

_NAME = "app"


class MtpfClassifier(ClassifierMixin, BaseEstimator):
    """A text app as a scikit-learn estimator: ``fit(texts, labels)``, then ``predict`` or ``predict_proba``.

    Args:
        backbone: ``packaged``, a folder or a Hub id.
        adapter: Folder or Hub id of the family's LoRA to start from.
        method: ``probe``, ``lora``, or ``auto`` for the better one by validation.
        max_length: Longest text in tokens; of a longer one the beginning is fitted.
        random_state: Seed.

    Attributes:
        classes_: Labels, sorted.
        metrics_: Scores on held-out texts.

    Example:
        >>> MtpfClassifier().fit(texts, labels).predict(["Lunch at 1?"])  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = "packaged",
        adapter: str | None = None,
        method: str = "probe",
        max_length: int = 128,
        random_state: int = 0,
    ):
        self.backbone = backbone
        self.adapter = adapter
        self.method = method
        self.max_length = max_length
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        return tags

    def fit(self, X: Iterable[str], y: Iterable[Any]) -> "MtpfClassifier":
        """Fit an app on texts and their labels; a tenth is held out, and fitted on in the end."""
        texts, targets = _texts(X), _targets(y)
        # The position is the app's label: names of any type, in one order.
        self.classes_, numbers = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has {self.classes_.tolist()} alone; at least two labels are needed.")
        labels = [str(number) for number in numbers]
        settings = FitSettings(seed=self.random_state, max_length=self.max_length)
        with tempfile.TemporaryDirectory() as folder:
            options = {"backbone": self.backbone, "adapter": self.adapter, "method": self.method}
            app = fit_app(
                (texts, labels),
                "tc",
                output_dir=Path(folder) / _NAME,
                settings=settings,
                **options,  # type: ignore[arg-type]
            )
            self.files_ = {file.name: file.read_bytes() for file in (Path(folder) / _NAME).iterdir()}
        self.metrics_, self._model = app.metrics, app.model
        return self

    def predict_proba(self, X: Iterable[str]) -> np.ndarray:
        """Return the calibrated probability of each label ``(texts, labels)``."""
        check_is_fitted(self, "files_")
        texts = _texts(X)
        probabilities = np.zeros((len(texts), len(self.classes_)))
        results = self._loaded().predict(texts, adapters=[_NAME], top_k=None)[_NAME]
        for row, result in zip(probabilities, results, strict=True):
            for entry in result:
                row[int(entry["label"])] = entry["score"]
        return probabilities

    def predict(self, X: Iterable[str]) -> np.ndarray:
        """Return the best label of each text."""
        check_is_fitted(self, "files_")
        return self.classes_[self.predict_proba(X).argmax(1)]

    def _loaded(self) -> Any:
        if getattr(self, "_model", None) is None:
            model = load_backbone(self.backbone).eval()
            with tempfile.TemporaryDirectory() as folder:
                for name, content in self.files_.items():
                    (Path(folder) / name).write_bytes(content)
                model.load_adapter(folder, adapter_name=_NAME)
            self._model = model
        return self._model

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_model"}


def _texts(X: Any) -> list[str]:
    """Return texts as a list; raise `ValueError` for anything else."""
    texts = values_of(X, "X")
    if any(not isinstance(text, str) for text in texts):
        raise ValueError("X must be a list, array or Series of strings.")
    return [str(text) for text in texts]


def _targets(y: Any) -> np.ndarray:
    """Return one label for each text as an array; raise `ValueError` for anything else."""
    labels = values_of(y, "y")
    for row, label in enumerate(labels):
        if type(label).__name__ in ("NoneType", "NAType", "NaTType") or label != label:
            raise ValueError(f"y holds {label} at position {row}; every text needs a label.")
        if isinstance(label, list):
            raise ValueError(f"y holds {label} at position {row}; give one label a text, or use fit_app.")
    targets = np.asarray(labels)
    check_classification_targets(targets)
    return targets
