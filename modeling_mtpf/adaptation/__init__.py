"""Adaptation: ways to fit one app to the frozen backbone."""
