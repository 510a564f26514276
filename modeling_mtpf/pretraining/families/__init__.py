"""The families of tasks: one module each, listed in the registry of `base`."""
