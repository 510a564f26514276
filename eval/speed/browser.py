"""Time an export in Chromium next to the native runner, both with one thread, and how soon the page is ready.

    mtpf export my/backbone --adapter my/entities --adapter my/intent --output phone --web
    python eval/speed/browser.py phone --output browser.json

Runs alternate between the two. On a machine with other work the times say little: CPU times compare, of the
page's process with the native one's. Until the page is ready all threads of the browser count, and the
busiest one (``ready_thread``): where there are free cores the others, most of them compilers, run beside it.
"""

import contextlib
import functools
import http.server
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

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


def cpu_ms(*processes: psutil.Process) -> float:
    """Return the CPU time of processes so far; those that have ended count nothing."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return 1000 * total


def thread_ms(processes: list[psutil.Process]) -> dict[int, float]:
    """Return the CPU time so far of each thread, by its id."""
    rows: dict[int, float] = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            rows |= {
                thread.id: 1000 * (thread.user_time + thread.system_time) for thread in process.threads()
            }
    return rows


def of_browser() -> list[psutil.Process]:
    """Return the processes of the browser."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "chrom" in process.name()]


def measure_ready(browser: Any, address: str, rounds: int, times: dict[str, list[float]]) -> None:
    """Open the page again and again, with its files in the cache."""
    context = browser.new_context(bypass_csp=True)
    tab = context.new_page()
    tab.goto(address)
    for _ in range(rounds):
        tab.wait_for_selector("html[data-ready=true]", state="attached", timeout=120_000)
        before = thread_ms(of_browser())
        tab.reload()
        tab.wait_for_selector("html[data-ready=true]", state="attached", timeout=120_000)
        times["ready"].append(float(tab.inner_text("#status").split()[2]))
        spent = [ms - before.get(thread, 0) for thread, ms in thread_ms(of_browser()).items()]
        times["ready_cpu"].append(sum(spent))
        times["ready_thread"].append(max(spent))
    context.close()


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
    rows = ("native", "native_cpu", "browser", "browser_cpu", "ready", "ready_cpu", "ready_thread")
    times: dict[str, list[float]] = {row: [] for row in rows}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        measure_ready(browser, address, arguments.rounds, times)
        tab = browser.new_context(bypass_csp=True).new_page()
        tab.goto(address + "style.css")
        tab.evaluate(SCRIPT)
        before = {process: cpu_ms(process) for process in of_browser()}
        tab.evaluate(TIMED, [text, apps, 10])
        page = max(before, key=lambda process: cpu_ms(process) - before[process])
        for _ in range(arguments.rounds):
            cpu = cpu_ms(page)
            times["browser"] += tab.evaluate(TIMED, [text, apps, 10])
            times["browser_cpu"].append((cpu_ms(page) - cpu) / 10)
            cpu = time.process_time()
            for _ in range(10):
                start = time.perf_counter()
                native.predict([text], apps)
                times["native"].append(1000 * (time.perf_counter() - start))
            times["native_cpu"].append(100 * (time.process_time() - cpu))
        browser.close()
    server.shutdown()
    table = {name: {"min_ms": min(t), "median_ms": statistics.median(t)} for name, t in times.items()}
    record = {
        "subwords": arguments.subwords,
        "apps": apps,
        "rows": table,
        "cpu_ratio_of_minima": table["browser_cpu"]["min_ms"] / table["native_cpu"]["min_ms"],
        "cpu_ratio_of_medians": table["browser_cpu"]["median_ms"] / table["native_cpu"]["median_ms"],
        "ratio_of_minima": table["browser"]["min_ms"] / table["native"]["min_ms"],
        "times": times,
    }
    arguments.output.write_text(json.dumps(record) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "times"}, indent=2))


if __name__ == "__main__":
    main()
