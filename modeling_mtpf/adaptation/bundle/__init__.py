"""Bundles: several apps on one LoRA, trained together or composed of apps that exist."""

from .fit import FittedBundle, fit_bundle
from .settings import BundleSettings, Part

__all__ = ["BundleSettings", "FittedBundle", "Part", "fit_bundle"]
