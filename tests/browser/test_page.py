"""The page in a real browser: equal results, marks and bars, without network, by keyboard, and with a server."""

import http.server
import json
import shutil
import time
from pathlib import Path

import pytest
from browser_tools import MODULE, awkward_texts, serving, without_utf16
from conftest import assert_close

from modeling_mtpf.cli.main import main
from modeling_mtpf.errors import DataError
from modeling_mtpf.export import ExportError, add_page, runner, web

pytest_plugins = ["browser_fixtures"]

TEXT = "Ada Lovelace met Charles Babbage in London on Monday."
READY = "html[data-ready=true]"
APPS = ["entities", "intent", "moods", "short"]


@pytest.fixture
def open_page(chromium):
    """Open an address at the size of a phone; its requests are noted, and no error may occur."""
    contexts, errors = [], []

    def opened(address: str, **options):
        size = {"width": 320, "height": 640}
        context = chromium.new_context(
            viewport=size, bypass_csp=True, **options
        )  # waiting for conditions is eval
        contexts.append(context)
        tab = context.new_page()
        tab.requested = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on(
            "console",
            lambda message: (
                message.type == "error" and "422" not in message.text and errors.append(message.text)
            ),
        )
        context.on("request", lambda request: tab.requested.append(request.url))
        tab.goto(address)
        tab.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def shown(tab, text: str) -> None:
    """Type a text and wait until its results are shown."""
    tab.fill("#text", text)
    tab.wait_for_function(
        "text => [...document.querySelectorAll('.layer')].slice(1).every(l => l.textContent === text + '\\n')"
        " && document.querySelector('#results[aria-busy=false] h2')",
        arg=text,
    )


def test_results_in_a_browser_are_those_of_the_python_runner(page, chromium):
    texts = awkward_texts(200)
    with serving(http.server.SimpleHTTPRequestHandler, directory=str(page)) as (address, _):
        context = chromium.new_context(bypass_csp=True)
        tab = context.new_page()
        tab.goto(address)
        results = tab.evaluate(
            """async ([texts, apps]) => {
              const { Runner, fromUrl } = await import("/runner.js");
              const ort = await import("/vendor/ort.wasm.min.mjs");
              const { Tokenizer } = await import("/vendor/tokenizers.min.mjs");
              ort.env.wasm.wasmPaths = "/vendor/";
              ort.env.wasm.numThreads = 1;
              const runner = await Runner.open(fromUrl(new URL("/", location.href)), { ort, Tokenizer });
              return JSON.stringify(await runner.predict(JSON.parse(texts), apps));
            }""",
            [json.dumps(texts), APPS],
        )
        context.close()
    expected = runner.Runner(page, threads=1).predict(texts, APPS)
    assert sum(map(len, expected["entities"])) > 100
    assert_close(without_utf16(json.loads(results), texts), expected)


def test_the_page_marks_entities_also_without_network(page, open_page):
    with serving(http.server.SimpleHTTPRequestHandler, directory=str(page)) as (address, stop):
        tab = open_page(address)
        expected = runner.Runner(page, threads=1).predict([TEXT], APPS)
        assert expected["entities"][0]
        for offline in (False, True):
            if offline:
                stop()
                tab.reload()
                tab.wait_for_selector(READY, state="attached", timeout=120_000)
            shown(tab, TEXT)
            marks = tab.eval_on_selector_all(
                ".layer:nth-child(2) mark", "marks => marks.map(m => [m.textContent, m.dataset.label])"
            )
            assert marks == [[e["word"], e["entity_group"]] for e in expected["entities"][0]]
            assert "also without network" in tab.inner_text("#status")
            bars = tab.locator(".bars").first.locator("li")
            assert bars.count() == 5 and expected["intent"][0]["label"] in bars.first.inner_text()
            assert " ms, in this browser" in tab.inner_text("#time")
        assert all(url.startswith(address) for url in tab.requested)
        # The marks lie behind their words, at the width of a phone, whose page does not scroll sideways.
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        sizes = tab.evaluate(
            "[...document.querySelectorAll('.layer, #text')].map(e => [e.clientWidth, e.scrollHeight])"
        )
        assert len({tuple(size) for size in sizes}) == 1


def test_the_page_works_by_keyboard_and_screen_reader(page, open_page):
    with serving(http.server.SimpleHTTPRequestHandler, directory=str(page)) as (address, _):
        tab = open_page(address, reduced_motion="reduce", color_scheme="dark")
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.id") == "text"
        tab.keyboard.press("Control+A")
        tab.keyboard.type("Hi")
        tab.wait_for_function("document.querySelectorAll('.layer')[1]?.textContent === 'Hi\\n'")
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.name") == "entities"
        tab.keyboard.press("Space")
        tab.wait_for_function("document.querySelector('#results h2').textContent === 'intent'")
        assert tab.get_by_role("textbox", name="Text").count() == 1
        assert tab.get_by_role("group", name="Apps").get_by_role("checkbox").count() == len(APPS)
        tab.wait_for_function("document.querySelector('#summary').textContent.startsWith('intent: ')")
        assert tab.get_attribute("#summary", "aria-live") == "polite"
        assert tab.get_attribute("#layers", "aria-hidden") == "true"
        assert tab.evaluate("getComputedStyle(document.querySelector('.bar i')).transitionDuration") == "0s"
        assert tab.evaluate("document.documentElement.lang") == "en"
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            assert min(tab.evaluate(CONTRASTS)) >= 4.5


CONTRASTS = """() => {
  // Of text on each tint, and of errors and the page's text on the page, as WCAG defines contrast.
  const pen = document.createElement("canvas").getContext("2d");
  const light = (color) => {
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    const parts = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const probe = document.body.appendChild(document.createElement("span"));
  const style = getComputedStyle(probe);
  const found = [];
  probe.style.color = "CanvasText";
  for (let tint = 0; tint < 6; tint++) {
    probe.className = `t${tint}`;
    probe.style.background = "var(--tint)";
    found.push(contrast(style.color, style.backgroundColor));
  }
  probe.style.background = "Canvas";
  found.push(contrast(style.color, style.backgroundColor));
  probe.style.color = "";
  probe.className = "error";
  found.push(contrast(style.color, style.backgroundColor));
  probe.remove();
  return found;
}"""


@pytest.mark.parametrize("top_k", [True, False], ids=["torch", "onnx"])
def test_the_page_asks_a_server_instead(page, open_page, top_k):
    """The server answers as `mtpf serve` does; one of an export knows no top_k."""
    loaded = runner.Runner(page, threads=1)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def answer(self, value, status=200):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def do_GET(self):  # noqa: N802
            if self.path != "/api/apps":
                return super().do_GET()
            apps = [{"name": name, "kind": loaded.apps[name]["kind"]} for name in ("entities", "intent")]
            return self.answer({"apps": apps})

        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/api/predict" or ("top_k" in body and not top_k):
                return self.answer({"detail": "no"}, 422)
            return self.answer({"results": loaded.predict(body["texts"], body["apps"]), "revisions": {}})

    with serving(Handler, directory=str(page)) as (address, _):
        tab = open_page(f"{address}?server=/api")
        text = "\U0001f642 Ada Lovelace met Charles Babbage in London on Monday."
        shown(tab, text)
        marks = tab.eval_on_selector_all(".layer:nth-child(2) mark", "marks => marks.map(m => m.textContent)")
        assert (
            marks == [entity["word"] for entity in loaded.predict([text], ["entities"])["entities"][0]] != []
        )
        assert "on 127.0.0.1" in tab.inner_text("#time")
        assert not any(url.endswith((".onnx", ".wasm")) for url in tab.requested)


def test_the_page_says_in_one_sentence_why_it_cannot_run(page, chromium, tmp_path):
    folder = Path(shutil.copytree(page, tmp_path / "copy"))
    (folder / "tail.onnx").write_bytes(b"x")
    with serving(http.server.SimpleHTTPRequestHandler, directory=str(folder)) as (address, _):
        context = chromium.new_context()
        tab = context.new_page()
        for query, message in (
            ("", "tail.onnx is missing or not the file that was exported; export it again."),
            ("?server=/none", f"{address.split('/')[2]} answers with status 404."),
        ):
            tab.goto(address + query)
            tab.wait_for_selector("html[data-ready=failed]", state="attached", timeout=120_000)
            assert tab.inner_text("#status") == message
        context.close()


# ------------------------------------------------------------------------------------------------ the files


def test_the_page_is_small_and_names_no_foreign_host(page):
    files = [page / name for name in web.PAGE_FILES]
    vendor = [
        page / "vendor" / name
        for name in web.VENDOR_FILES
        if "wasm-simd" not in name and "LICENSE" not in name
    ]
    assert sum(file.stat().st_size for file in (*files, *vendor)) <= 150_000
    assert not any("://" in file.read_text("utf-8") for file in files)


def test_the_wheel_has_the_page():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((MODULE.parents[1] / "pyproject.toml").read_text("utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = {
        Path(file).name
        for file, target in included.items()
        if target.startswith("modeling_mtpf/export/page/")
    }
    assert names == {*web.PAGE_FILES, "package.json", "package-lock.json"}
    assert all((MODULE / name).is_file() for name in names)
    lock = (MODULE / "package-lock.json").read_text("utf-8")
    pinned = json.loads(lock)["packages"][""]["dependencies"]
    assert all(version[0].isdigit() for version in pinned.values()) and "://registry" not in lock


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's files as in an installed package, without npm packages."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name in (*web.PAGE_FILES, "package.json", "package-lock.json"):
        shutil.copy(MODULE / name, folder)
    monkeypatch.setattr(web, "FOLDERS", (folder,))
    return folder


def test_without_npm_the_command_refuses_before_it_begins(installed, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    start = time.perf_counter()
    assert main(["export", "nothing", "--output", str(tmp_path / "phone"), "--web"]) == 2
    assert time.perf_counter() - start < 30
    error = capsys.readouterr().err
    assert "--web needs npm" in error and len(error.splitlines()) == 1


def test_failures_of_npm_and_of_the_folder_are_one_sentence(installed, monkeypatch, tmp_path):
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'npm error code E404' >&2\necho more >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/bin:/usr/bin")
    monkeypatch.setattr(web, "read_manifest", lambda folder: {})
    (tmp_path / "phone").mkdir()
    with pytest.raises(ExportError, match=r"npm cannot fetch .*\(npm error code E404\); check"):
        add_page(tmp_path / "phone")
    monkeypatch.undo()
    with pytest.raises((ExportError, DataError), match="export.json"):
        add_page(tmp_path / "phone")


@pytest.mark.slow
def test_npm_brings_the_packages_of_an_installed_package(page, installed, node, tmp_path):
    folder = Path(shutil.copytree(page, tmp_path / "copy"))
    shutil.rmtree(folder / "vendor")
    assert "python -m http.server" in add_page(folder)
    for name in web.VENDOR_FILES:
        assert (folder / "vendor" / name).read_bytes() == (page / "vendor" / name).read_bytes()
