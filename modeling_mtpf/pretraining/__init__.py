"""Joint pre-finetuning: families, pseudo-labels, contrastive loss, sampling, the joint step, diagnostics."""

from ..errors import require_extra

require_extra("train", "accelerate", "datasets", "sklearn", "yaml", "tqdm")
