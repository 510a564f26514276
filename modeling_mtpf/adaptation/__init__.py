"""Adaptation: ways to fit one app to the frozen backbone."""

from ..errors import require_extra

require_extra("train", "sklearn", "datasets", "tqdm")

from .app import FittedApp, fit_app  # noqa: E402
from .settings import FitSettings  # noqa: E402
from .zero_shot import zero_shot_app  # noqa: E402

__all__ = ["FitSettings", "FittedApp", "fit_app", "zero_shot_app"]
