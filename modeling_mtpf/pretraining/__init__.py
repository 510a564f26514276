"""Joint pre-finetuning: families, pseudo-labels, contrastive loss, sampling, the joint step, diagnostics."""
