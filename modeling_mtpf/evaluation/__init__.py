"""Evaluation: metrics of the two families, protocols, the task list, records and reports."""

from ..errors import require_extra

require_extra("eval", "evaluate", "seqeval", "sklearn", "scipy")
