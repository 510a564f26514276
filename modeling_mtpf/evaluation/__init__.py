"""Evaluation: metrics of the two families."""
