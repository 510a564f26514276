"""Data: the packaged encoder, the demo corpus, opening a user's source, words and labels."""

from ..errors import require_extra

require_extra("train", "datasets", "pyarrow")
