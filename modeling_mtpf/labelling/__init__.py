"""NER pseudo-labels: raw text → sentences → teacher vectors → clusters → labelled shards and a report."""

from ..errors import require_extra

require_extra("train", "accelerate", "datasets", "pyarrow", "sklearn", "syntok", "tqdm", "matplotlib")
