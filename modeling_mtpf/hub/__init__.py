"""Publish, fetch and inspect backbones and adapters on the Hub."""

from .client import HubError, PushConflictError
from .commit import PlannedFile, PushPlan, Release
from .download import pull
from .inspection import inspect
from .push import push_adapter, push_backbone

__all__ = [
    "HubError",
    "PlannedFile",
    "PushConflictError",
    "PushPlan",
    "Release",
    "inspect",
    "pull",
    "push_adapter",
    "push_backbone",
]
