"""Node, Chromium and an export with the page; each is skipped, with the reason, where it is missing."""

import shutil
from pathlib import Path

import pytest
import torch
from browser_tools import CHROMIUM_FLAGS, MODULE, run_node
from conftest import add_scope, randomize

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.export import add_page, export_onnx, web


@pytest.fixture(scope="session")
def page_export(folders, tmp_path_factory) -> Path:
    """A float32 export with apps of all kinds, one of which reads short windows."""
    root = tmp_path_factory.mktemp("browser")
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for name, kind, options in (
        ("moods", "text-classification", {"problem_type": "multi_label_classification"}),
        ("short", "token-classification", {"max_length": 20}),
    ):
        model.add_adapter(name, LoraSettings(r=2))
        randomize(model, 3, std=0.05, within=f".{name}.")
        torch.manual_seed(3)
        model.heads[name] = AdapterHead(kind, ["B-A", "I-A", "O"], model.config.hidden_size, **options)
        model.heads[name].weight.data.normal_(0, 1)
        model.save_adapter(root / name, name)
    model.load_adapter(folders / "intent")
    add_scope(model, "intent")
    model.save_adapter(root / "intent", "intent")
    apps = [folders / "entities", root / "intent", root / "moods", root / "short"]
    export_onnx(folders / "backbone", apps, root / "phone")
    return root / "phone"


@pytest.fixture(scope="session")
def page(page_export, node) -> Path:
    """The export with the page."""
    add_page(page_export)
    return page_export


@pytest.fixture(scope="session")
def node():
    """`run_node`, where Node and the npm packages are."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not web._installed(MODULE):
        pytest.skip("the npm packages are missing; run: npm ci --ignore-scripts --prefix demo/browser")
    return run_node


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium of the system."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed; run: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def native(node):
    """`run_node`, where onnxruntime-node is; it is optional, as not every system has it."""
    if not (MODULE / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed")
    return node
