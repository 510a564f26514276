"""Adaptation methods: one module each, which registers itself in `registry`."""
