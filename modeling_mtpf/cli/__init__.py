"""The command ``mtpf``."""
