"""Time an export in Chromium next to the native runner, both with one thread, and how soon the page is ready.

    mtpf export my/backbone --adapter my/entities --adapter my/intent --output phone --web
    python eval/speed/browser.py phone --output browser.json

Runs alternate between the two, and the minimum is what the machine can do while others use it.
"""

import functools
import http.server
import json
import statistics
import sys
import threading
import time
from pathlib import Path

from modeling_mtpf.settings import ScriptParser

SCRIPT = """async () => {
  const { Runner, fromUrl } = await import("/runner.js");
  const ort = await import("/vendor/ort.wasm.min.mjs");
  const { Tokenizer } = await import("/vendor/tokenizers.min.mjs");
  ort.env.wasm.wasmPaths = "/vendor/";
  ort.env.wasm.numThreads = 1;
  globalThis.runner = await Runner.open(fromUrl(new URL("/", location.href)), { ort, Tokenizer });
}"""
TIMED = """async ([text, apps, runs]) => {
  const times = [];
  for (let run = 0; run < runs; run++) {
    const start = performance.now();
    await runner.predict([text], apps);
    times.push(performance.now() - start);
  }
  return times;
}"""


def main(argv: list[str] | None = None) -> None:
    """Measure and write a record."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--subwords", type=int, default=32, help="special tokens included")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(arguments.folder))
    from runner import Runner  # type: ignore[import-not-found]

    native = Runner(arguments.folder, threads=1)
    apps = list(native.apps)[:2]
    around = len(native.before) + len(native.after)
    text = "call " * (arguments.subwords - around)
    assert len(native.tokenizer.encode(text, add_special_tokens=False).ids) == arguments.subwords - around
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(arguments.folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    times: dict[str, list[float]] = {"native": [], "browser": [], "ready": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_context(bypass_csp=True).new_page()
        tab.goto(address)
        for _ in range(arguments.rounds):
            tab.reload()
            tab.wait_for_selector("html[data-ready=true]", state="attached")
            times["ready"].append(float(tab.inner_text("#status").split()[2]))
        tab = browser.new_context(bypass_csp=True).new_page()
        tab.goto(address + "style.css")
        tab.evaluate(SCRIPT)
        for _ in range(arguments.rounds):
            times["browser"] += tab.evaluate(TIMED, [text, apps, 10])
            for _ in range(10):
                start = time.perf_counter()
                native.predict([text], apps)
                times["native"].append(1000 * (time.perf_counter() - start))
        browser.close()
    server.shutdown()
    rows = {name: {"min_ms": min(t), "median_ms": statistics.median(t)} for name, t in times.items()}
    ratio = rows["browser"]["min_ms"] / rows["native"]["min_ms"]
    record = {
        "subwords": arguments.subwords,
        "apps": apps,
        "rows": rows,
        "ratio_of_minima": ratio,
        "times": times,
    }
    arguments.output.write_text(json.dumps(record) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "times"}, indent=2))


if __name__ == "__main__":
    main()
