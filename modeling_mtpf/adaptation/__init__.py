"""Adaptation: ways to fit one app to the frozen backbone."""

from ..errors import require_extra

require_extra("train", "sklearn")
