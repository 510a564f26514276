"""Load on ``mtpf serve``, next to ``predict`` in one process on the same texts in the same run.

    python eval/load.py --backbone packaged --app apps/entities --app apps/intent --output load.json
    python eval/load.py --backbone packaged --app apps/intent --other apps/intent2 --output load.json

The clients are locust's (extra ``load``), see ``load_clients.py``; every answer is checked. With ``--other``,
another version of the last app, an operator replaces that app, adds one and removes one each second. The
machine is shared with the clients and perhaps with others: CPU times compare better than wall times.
``--many 1000`` loads an app that often instead, and measures memory and times.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_mtpf.cli.serve import ServeSettings, open_engine
from modeling_mtpf.settings import ScriptParser

TOKEN = "load-script-token-0"


def texts_of(path: str | None) -> list[str]:
    """Return the lines of a file, or short made-up messages."""
    if path:
        return [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    names, hours = (
        ("Ada", "Noor", "Charles Babbage", "Mia", "Grace Hopper"),
        ("5pm", "noon", "9:30", "Monday"),
    )
    forms = (
        "Call {} at {}",
        "Lunch with {} on {} in Lisbon?",
        "remind me to send {} the report by {}, please",
    )
    return [form.format(name, hour) for form in forms for name in names for hour in hours]


def in_process(engine: Any, texts: list[str], apps: list[str], seconds: float) -> dict[str, float]:
    """Measure ``predict`` on all texts, again and again."""
    begun, cpu, rounds = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        engine.predict(texts, apps, False, 1, None)
        rounds += 1
    count = rounds * len(texts)
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {"texts_per_second": count / wall, "cpu_ms_per_text": 1000 * cpu / count}


def expected_results(engine: Any, texts: list[str]) -> dict[str, dict[str, list]]:
    """Return app → revision → results."""
    return {
        name: {app["revision"]: engine.predict(texts, [name], False, 1, None)[name]}
        for name, app in engine.apps.items()
    }


def start_server(arguments: list[str]) -> tuple[subprocess.Popen, str]:
    """Start the server and return it with its address when it is ready; its log is thrown away then."""
    command = [sys.executable, "-m", "modeling_mtpf.cli", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "MTPF_ADMIN_TOKEN": TOKEN}
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        server = subprocess.Popen(command, stderr=log, env=environment)
        while True:
            lines = Path(log.name).read_text("utf-8").splitlines()
            for line in lines:
                if '"Listening"' in line:
                    return server, json.loads(line)["address"]
            if server.poll() is not None:
                raise SystemExit("\n".join(lines))
            time.sleep(0.1)


def load(address: str, plan: dict[str, Any], clients: int) -> dict[str, Any]:
    """Run the clients and return what they counted."""
    with tempfile.TemporaryDirectory() as folder:
        plan = {**plan, "clients": clients, "output": f"{folder}/counts.json"}
        Path(folder, "plan.json").write_text(json.dumps(plan), "utf-8")
        users = clients + bool(plan.get("token"))
        command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("load_clients.py"))]
        command += ["--headless", "--host", address, "--users", str(users), "--spawn-rate", str(users)]
        command += ["--only-summary", "--loglevel", "ERROR", "--exit-code-on-error", "0"]
        environment = {**os.environ, "MTPF_LOAD": f"{folder}/plan.json"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(plan["output"]).read_text("utf-8"))


@contextlib.contextmanager
def watched(server: subprocess.Popen) -> Iterator[list[tuple[float, float]]]:
    """Yield a list that gets the seconds since the beginning and the MB of a process, every ten seconds."""
    rows: list[tuple[float, float]] = []
    over, begun = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not over.wait(0 if not rows else 10):
            rows.append((round(time.perf_counter() - begun, 1), round(usage(server)[1], 1)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield rows
    finally:
        over.set()
        thread.join()


def usage(server: subprocess.Popen) -> tuple[float, float]:
    """Return the CPU seconds and the MB of a process."""
    process = psutil.Process(server.pid)
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss / 1e6


def batches(address: str) -> tuple[float, float]:
    """Return how many batches the server has computed, and the seconds they took."""
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("mtpf_batch_seconds_"))
    return float(values["mtpf_batch_seconds_count"]), float(values["mtpf_batch_seconds_sum"])


def measure_load(options: Any, settings: ServeSettings) -> dict[str, Any]:
    """Measure in-process predictions and the server in turn."""
    texts = texts_of(options.texts)
    engine = open_engine(settings)
    expected = expected_results(engine, texts)
    plan: dict[str, Any] = {"texts": texts, "expected": expected, "requests": options.requests}
    plan["apps"] = list(engine.apps)
    arguments = [
        "--backbone",
        options.backbone,
        "--engine",
        options.engine,
        "--threads",
        str(options.threads),
    ]
    arguments += [part for app in options.app for part in ("--adapter", app)]
    if options.other:
        arguments += with_operator(options, engine, plan)
    alone = [in_process(engine, texts, plan["apps"], options.seconds)]
    server, address = start_server(arguments)
    try:
        # Memory comes to rest after the first few thousand requests, with batches and changes of all kinds.
        load(address, {**plan, "requests": max(2 * options.clients, options.requests // 20)}, options.clients)
        (cpu, megabytes), (count, seconds) = usage(server), batches(address)
        with watched(server) as memory:
            counts = load(address, plan, options.clients)
        (cpu_after, megabytes_after), (count_after, seconds_after) = usage(server), batches(address)
    finally:
        server.terminate()
        status = server.wait(60)
    alone.append(in_process(engine, texts, plan["apps"], options.seconds))
    mean = {key: statistics.mean(row[key] for row in alone) for key in alone[0]}
    rate, cpu_ms = counts["requests"] / counts["seconds"], 1000 * (cpu_after - cpu) / counts["requests"]
    batch_ms = 1000 * (seconds_after - seconds) / (count_after - count)
    return {
        "in_process": alone,
        "server": {**counts, "texts_per_second": rate, "cpu_ms_per_text": cpu_ms, "exit_status": status},
        "megabytes": [megabytes, megabytes_after],
        "throughput_ratio": rate / mean["texts_per_second"],
        "cpu_ratio": mean["cpu_ms_per_text"] / cpu_ms,
        "mean_batch_ms": batch_ms,
        "texts_per_batch": counts["requests"] / (count_after - count),
        "p99_by_batch": counts["p99_ms"] / batch_ms,
        "growth": megabytes_after / megabytes - 1,
        "memory": memory,
    }


def with_operator(options: Any, engine: Any, plan: dict[str, Any]) -> list[str]:
    """Let the last app be replaced by its other version; return the server's arguments for that."""
    from modeling_mtpf.serving.apps import read_app

    paths = [Path(options.app[-1].rpartition("=")[2]).resolve(), Path(options.other).resolve()]
    root = Path(os.path.commonpath(paths))
    versions = [str(path.relative_to(root)) for path in paths]
    engine.add("moving", read_app(str(paths[1])))
    plan["expected"]["moving"] = expected_results(engine, plan["texts"])["moving"]
    plan["expected"]["moving"] |= plan["expected"][plan["apps"][-1]]
    plan["apps"] = [*plan["apps"], "moving"]
    plan |= {"token": TOKEN, "versions": versions}
    return ["--apps_root", str(root), "--adapter", f"moving={paths[0]}"]


def measure_many(options: Any, settings: ServeSettings) -> dict[str, Any]:
    """Add one app many times in this process: memory, and time to add and of the first predictions."""
    from modeling_mtpf.serving.apps import read_app

    engine = open_engine(settings)
    app, texts = read_app(options.app[-1].rpartition("=")[2]), texts_of(options.texts)[:1]
    before = psutil.Process().memory_info().rss
    times: dict[str, list[float]] = {row: [] for row in ("add", "first_prediction", "later", "remove")}

    def timed(row: str, action: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.thread_time()
        result = action(*arguments)
        times[row].append(1000 * (time.thread_time() - begun))
        return result

    for number in range(options.many):
        timed("add", engine.add, f"many-{number}", app)
    memory = (psutil.Process().memory_info().rss - before) / options.many / 1e6
    results = []
    for number in range(0, options.many, max(1, options.many // 50)):
        for row in ("first_prediction", "later"):
            answer = timed(row, engine.predict, texts, [f"many-{number}"], False, 1, None)
            results.append(answer[f"many-{number}"])
    for number in range(50):  # the next ones
        timed("add", engine.add, f"next-{number}", app)
        timed("remove", engine.remove, f"next-{number}")
    times = {"first_adds": times["add"][:50], "next_adds": times["add"][-50:], **times}
    medians = {f"{row}_ms": statistics.median(values) for row, values in times.items()}
    ratio = medians["first_prediction_ms"] / medians["later_ms"]
    same = all(result == results[0] for result in results)
    return {"mb_per_app": memory, **medians, "first_to_later": ratio, "results_equal": same}


def main() -> None:
    """Measure and write the record."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--app", action="append", required=True, help="[NAME=]FOLDER; several for several")
    parser.add_argument("--other", help="folder of another version of the last app")
    parser.add_argument("--texts", help="file with one text a line")
    parser.add_argument("--engine", default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=10, help="of each in-process measurement")
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    settings = ServeSettings(
        backbone=options.backbone, adapter=options.app, engine=options.engine, threads=options.threads
    )
    measure = measure_many if options.many else measure_load
    record = {"options": vars(options), **measure(options, settings)}
    Path(options.output).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(json.dumps({k: v for k, v in record.items() if k not in ("options", "memory")}, indent=2))


if __name__ == "__main__":
    main()
