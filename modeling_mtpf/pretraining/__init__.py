"""Joint pre-finetuning: families and their objectives, pseudo-labels, sampling, the joint step, diagnostics."""
