"""A page next to an export that runs it in a browser, with everything that it needs."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..files import disk_errors, locked, write_bytes
from .export import ExportError, read_manifest

FOLDERS = (Path(__file__).with_name("page"), Path(__file__).parents[2] / "demo" / "browser")
"""Where the page's files are: in an installed package, in a checkout."""
PAGE_FILES = ("index.html", "style.css", "main.js", "worker.js", "runner.js", "tokens.js", "sw.js")
VENDOR_FILES = {
    "ort.wasm.min.mjs": "onnxruntime-web/dist/ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers.min.mjs": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "tokenizers.LICENSE": "@huggingface/tokenizers/LICENSE",
}
"""Files in ``vendor/``, and where npm puts them."""


def add_page(folder: str | os.PathLike) -> str:
    """Add a page to an export, or replace it; any static server can serve the folder then.

    The versions of the npm packages, and their hashes, are those of the page's ``package-lock.json``.

    Returns:
        A line that says how to open the page.

    Raises:
        ExportError: The folder is not an export, npm is missing, or it cannot fetch the packages.
        DataError: The folder cannot be written.
    """
    folder = Path(folder).resolve()
    with disk_errors(folder):
        read_manifest(folder)
        page = _page()
        with tempfile.TemporaryDirectory() as temporary, locked(folder):
            packages = _packages(page, Path(temporary))
            for name, source in VENDOR_FILES.items():
                write_bytes(folder / "vendor" / name, (packages / source).read_bytes())
            for name in PAGE_FILES:
                write_bytes(folder / name, (page / name).read_bytes())
    return f"  index.html                               open it with: python -m http.server -d {folder}"


def find_npm() -> str | None:
    """Return the path of npm, or ``None`` where a checkout has the packages already.

    Raises:
        ExportError: npm is not installed.
    """
    if _installed(_page()):
        return None
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            "--web needs npm, which fetches onnxruntime-web and @huggingface/tokenizers; install Node.js, or "
            "leave out --web."
        )
    return npm


def _page() -> Path:
    return next(folder for folder in FOLDERS if (folder / "package-lock.json").is_file())


def _installed(page: Path) -> bool:
    """Return True if a checkout's ``node_modules`` has the packages in the versions of the lock file."""
    locked_versions = json.loads((page / "package-lock.json").read_text("utf-8"))["packages"]
    for package in ("onnxruntime-web", "@huggingface/tokenizers"):
        manifest = page / "node_modules" / package / "package.json"
        version = locked_versions[f"node_modules/{package}"]["version"]
        if not manifest.is_file() or json.loads(manifest.read_text("utf-8"))["version"] != version:
            return False
    return True


def _packages(page: Path, temporary: Path) -> Path:
    """Return a ``node_modules``: the checkout's, or one that npm fills in a temporary folder."""
    npm = find_npm()
    if npm is None:
        return page / "node_modules"
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(page / name, temporary / name)
    command = [
        npm,
        "ci",
        "--omit=optional",
        "--omit=dev",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--prefer-offline",
    ]
    done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0][:200]
        raise ExportError(
            f"npm cannot fetch the page's packages ({reason}); check the network and npm's registry, then "
            "run the same command again."
        )
    return temporary / "node_modules"
