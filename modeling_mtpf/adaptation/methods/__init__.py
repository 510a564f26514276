"""The ways to fit an app: one module each, listed in the registry."""
