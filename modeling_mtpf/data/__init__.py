"""Data: opening what a user names, the rows of apps, tag schemes, words and batches, the packaged encoder."""

from ..errors import require_extra

require_extra("train", "datasets", "pyarrow")
