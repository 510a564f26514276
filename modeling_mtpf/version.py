"""The version, without importing torch, and the versions of what decides a number."""

import platform
from importlib import metadata

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of this package and of the installed ones among `packages`.

    Example:
        >>> sorted(versions("torch", "not-installed"))
        ['mtpf', 'python', 'torch']
    """
    installed = {"python": platform.python_version(), "mtpf": __version__}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed
