"""The server as its users meet it: a process of its own, answered over HTTP."""

import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, add_scope, assert_close
from safetensors.numpy import load_file, save_file
from server_process import ServerProcess

from modeling_mtpf import MtpfModel
from modeling_mtpf.cli.serve import ServeSettings, open_engine
from modeling_mtpf.serving import engines
from modeling_mtpf.serving.apps import read_app
from modeling_mtpf.serving.engines import TorchEngine

pytest.importorskip("fastapi", reason="the extra serve is not installed")

APPS = ["entities", "intent"]


@pytest.fixture(scope="session")
def apps_root(folders, tmp_path_factory) -> Path:
    """A root with two versions of an app, one with a scope, ``broken``, and a link that leads out."""
    root = tmp_path_factory.mktemp("apps")
    for name in ("first", "second", "broken"):
        shutil.copytree(folders / "intent", root / name)
    head = load_file(root / "second" / "head.safetensors")
    metadata = {"labels": json.dumps([f"intent {number}" for number in range(5)])}
    save_file({k: -v for k, v in head.items()}, root / "second" / "head.safetensors", metadata)
    lora = root / "broken" / "adapter_model.safetensors"  # finite and accepted, but attention overflows
    save_file(
        {k: np.copysign(np.float32(1e9), v) for k, v in load_file(lora).items()}, lora, {"format": "pt"}
    )
    (root / "link").symlink_to(folders / "intent")
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    add_scope(model, model.load_adapter(folders / "intent", "scoped"))
    model.save_adapter(root / "scoped", "scoped")
    return root


@pytest.fixture(scope="session")
def server(folders, apps_root):
    adapters = [part for name in APPS for part in ("--adapter", folders / name)]
    options = ("--apps_root", apps_root, "--allow_repo", "ada/*", "--receive_seconds", "2", "--threads", "1")
    with ServerProcess("--backbone", folders / "backbone", *adapters, *options) as process:
        yield process


@pytest.fixture(scope="session")
def model(folders, apps_root) -> MtpfModel:
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for name in APPS:
        model.load_adapter(folders / name, name)
    for name in ("first", "second"):
        model.load_adapter(apps_root / name, name)
    return model


# ----------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("apps", [APPS, ["entities"], ["intent"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 0, "threshold": 0.3}], ids=str)
def test_the_answer_is_that_of_predict(server, model, apps, options):
    answer = server.predict(SENTENCES, apps, **options)
    top_k = options.get("top_k", 1) or None
    assert_close(answer["results"], model.predict(SENTENCES, apps, **{**options, "top_k": top_k}))
    shown = {app["name"]: app["revision"] for app in server.get("/apps")[1]["apps"]}
    assert answer["revisions"] == {name: shown[name] for name in apps}


def test_texts_in_scope_are_those_of_predict(server, model, apps_root):
    """Also where requests that ask for it meet others in a batch."""
    model.load_adapter(apps_root / "scoped", "scoped", replace=True)
    assert server.put("scoped", folder="scoped")[0] == 200
    apps = ["scoped", "entities"]
    results = model.predict(SENTENCES, apps, in_scope=True)
    assert {row["in_scope"] for row in results["scoped"]} == {True, False}
    assert_close(server.predict(SENTENCES, apps, in_scope=True)["results"], results)

    def client(number):
        return server.predict(SENTENCES, ["scoped"], in_scope=number % 2 == 0)["results"]["scoped"]

    with ThreadPoolExecutor(8) as clients:
        for number, rows in enumerate(clients.map(client, range(16))):
            expected = [
                {k: v for k, v in row.items() if k != "in_scope" or number % 2 == 0}
                for row in results["scoped"]
            ]
            assert_close(rows, expected)
    for body in ({"apps": ["intent"]}, {"apps": ["scoped"], "top_k": 2}):
        status, answer, _ = server.call("POST", "/predict", {"texts": ["Hi"], "in_scope": True, **body})
        assert status == 422 and "scope" in answer["detail"]
    assert server.delete("scoped")[0] == 200


def test_requests_of_many_clients_meet_in_batches(server, model):
    before = server.metric("mtpf_batch_seconds_count")
    expected = {
        apps: model.predict(SENTENCES, list(apps)) for apps in (("entities",), ("intent",), tuple(APPS))
    }

    def client(number):
        apps = list(expected)[number % 3]
        answer = server.predict([SENTENCES[number % 5]], list(apps))["results"]
        return answer, {name: [expected[apps][name][number % 5]] for name in apps}

    with ThreadPoolExecutor(16) as clients:
        for answer, right in clients.map(client, range(96)):
            assert_close(answer, right)
    assert server.metric("mtpf_batch_seconds_count") - before < 90


HOSTILE = [
    "",
    "\0\x01\x7f",
    "\ud800 alone \udfff",
    "\u202eright to left\u202c",
    "e" + "\u0301" * 300,
    "👩🏽‍🚀" * 200,
    "x" * 40_000,
    "]]></script><!-- {{7*7}} %s %n ${jndi:ldap://x} '; DROP TABLE apps; --",
    "\ufeff\uffff\U0010ffff",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_texts(server, text):
    status, answer, _ = server.call("POST", "/predict", {"texts": [text, "Hi"], "apps": APPS})
    assert status == 200 or (status == 422 and len(answer["detail"]) < 300), (status, answer)


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "NaN": b'{"texts": ["a"], "apps": ["intent"], "threshold": NaN}',
    "huge number": b'{"texts": ["a"], "apps": ["intent"], "top_k": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"texts": ["\xff"], "apps": ["intent"]}',
    "other keys": b'{"texts": ["a"], "apps": ["intent"], "adapters": []}',
    "a string": b'{"texts": "a", "apps": ["intent"]}',
    "number": b'{"texts": [1], "apps": ["intent"]}',
    "no apps": b'{"texts": ["a"], "apps": []}',
    "path": b'{"texts": ["a"], "apps": ["../intent"]}',
    "unknown app": b'{"texts": ["a"], "apps": ["weather"]}',
    "unknown part": b'{"texts": ["a"], "apps": ["weather/part"]}',
    "part of no bundle": b'{"texts": ["a"], "apps": ["intent/part"]}',
    "many texts": json.dumps({"texts": ["a"] * 129, "apps": ["intent"]}).encode(),
    "long text": json.dumps({"texts": ["a" * 60_000], "apps": ["intent"]}).encode(),
    "large": json.dumps({"texts": ["a" * 1_100_000], "apps": ["intent"]}).encode(),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_invalid_request_is_refused_in_one_sentence(server, body):
    status, answer, headers = server.call("POST", "/predict", body)
    assert status in (400, 404, 413, 422), (status, answer)
    detail = answer["detail"] if isinstance(answer, dict) else answer
    assert detail and "\n" not in detail and len(detail) < 400 and headers["x-request-id"]


def test_an_app_that_fails_does_not_fail_its_batch(server, model):
    status, answer, _ = server.put("broken", folder="broken")
    assert status == 200, answer
    right = model.predict(["Hi"], ["intent"])["intent"]

    def client(number):
        return server.call(
            "POST", "/predict", {"texts": ["Hi"], "apps": ["broken" if number % 4 == 0 else "intent"]}
        )

    with ThreadPoolExecutor(16) as clients:
        for number, (status, answer, _) in enumerate(clients.map(client, range(48))):
            if number % 4 == 0:
                assert status == 422 and "broken" in answer["detail"]
            else:
                assert_close(answer["results"]["intent"], right)
    assert server.delete("broken")[0] == 200


# ------------------------------------------------------------------------------------------------- apps


def test_apps_are_added_replaced_and_removed_under_load(server, model):
    server.put("moving", folder="first")
    revisions = {}
    for version in ("first", "second"):
        revisions[server.put("moving", folder=version)[1]["revision"]] = version
    expected = {name: model.predict(SENTENCES, [name])[name] for name in ("first", "second", "intent")}
    assert len(revisions) == 2 and expected["first"] != expected["second"]
    stopped, seen, faults = threading.Event(), set(), []

    def client(number):
        while not stopped.is_set():
            at = number % len(SENTENCES)
            answer = server.predict([SENTENCES[at]], ["moving", "intent"])
            version = revisions[answer["revisions"]["moving"]]
            seen.add(version)
            try:
                assert_close(answer["results"]["moving"], [expected[version][at]])
                assert_close(answer["results"]["intent"], [expected["intent"][at]])
            except AssertionError as error:
                faults.append(error)

    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(client, number) for number in range(4)]
        for round in range(8):
            assert server.put("moving", folder=("first", "second")[round % 2])[0] == 200
            assert server.put("passing", folder="second")[0] == 200
            server.predict(["Hi"], ["passing"])
            assert server.delete("passing")[0] == 200
            assert server.call("POST", "/predict", {"texts": ["Hi"], "apps": ["passing"]})[0] == 404
        stopped.set()
        for each in running:
            each.result()
    assert not faults and seen == {"first", "second"}
    assert server.delete("moving")[0] == 200


SOURCES = {
    "up": {"folder": "../first"},
    "up inside": {"folder": "first/../../first"},
    "absolute": {"folder": "/etc"},
    "root": {"folder": "."},
    "empty": {"folder": ""},
    "link": {"folder": "link"},
    "file": {"folder": "first/task.json"},
    "missing": {"folder": "third"},
    "NUL": {"folder": "first\0"},
    "long": {"folder": "a" * 1000},
    "surrogate": {"folder": "\ud800"},
    "home": {"folder": "~"},
    "repo": {"repo": "eve/app"},
    "no repo": {"repo": "ada/../../x"},
    "URL": {"repo": "http://127.0.0.1/x"},
    "both": {"folder": "first", "repo": "ada/app"},
    "neither": {},
    "revision of a folder": {"folder": "first", "revision": "main"},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_only_allowed_sources_are_loaded(server, apps_root, source):
    before = server.get("/apps")[1]
    status, answer, _ = server.put("other", **source)
    assert status == 422 and "\n" not in answer["detail"] and str(apps_root) not in answer["detail"], answer
    assert server.get("/apps")[1] == before


@pytest.mark.parametrize("name", ["A", "a", "..%2Fx", "weight", "layer", "x" * 65, "%00", "%C3%A9"])
def test_invalid_names_are_refused(server, name):
    status, answer, _ = server.put(name, folder="first")
    assert status in (404, 422) and (status == 404 or "\n" not in answer["detail"])


@pytest.mark.parametrize(
    "shown", ["", "Bearer", "Bearer x", "Bearer 0123456789abcdeF", "Basic 0123456789abcdef"]
)
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_apps_are_changed_with_the_token_only(server, method, shown):
    status, _, headers = server.call(method, "/apps/intent", {"folder": "first"}, Authorization=shown)
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert server.predict(["Hi"], ["intent"])


# ---------------------------------------------------------------------------------------------- clients


def raw(server, data: bytes, wait: float = 10) -> bytes:
    """Send bytes and return what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as client:
        answer = b""
        try:
            client.sendall(data)
            while part := client.recv(65536):
                answer += part
        except (ConnectionError, TimeoutError):
            pass
        return answer


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BROKEN = {
    "half a body": (HEAD + b'Content-Length: 100\r\n\r\n{"texts": [', b""),
    "slow head": (b"GET /health HTTP/1.1\r\nHost: x\r\nX-", b""),
    "nothing": (b"", b""),
    "100 MB": (HEAD + b"Content-Length: 100000000\r\n\r\n" + b"a" * 3_000_000, b"413"),
    "chunks without end": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 40,
        b"413",
    ),
    "10,000 headers": (HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)) + b"\r\n", b"400"),
    "one long header": (HEAD + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n", b"400"),
    "long URL": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 100, b"400"),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
    "upgrade": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"200",
    ),
}


def slowly(server, data: bytes) -> bytes:
    """Send bytes one after the other, as slowloris does; return what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        try:
            for at in range(len(data)):
                client.sendall(data[at : at + 1])
                time.sleep(0.1)
            return client.recv(100) or b"closed late"
        except ConnectionError:
            return b""


def deaf(server) -> None:
    """Send many requests and read no answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=1) as client:
        try:
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000)
        except OSError:  # the server reads no further
            pass
        time.sleep(2)


SLOW = (
    HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(20)),
    HEAD + b"Content-Length: 100\r\n\r\n" + b" " * 90,
)


def test_slow_and_broken_clients_leave_others_unharmed(server):
    with ThreadPoolExecutor(3 * len(BROKEN)) as clients:
        started = time.monotonic()
        answers = {name: clients.submit(raw, server, data) for name, (data, _) in BROKEN.items()}
        crowd = [clients.submit(raw, server, BROKEN["slow head"][0]) for _ in range(len(BROKEN))]
        slow = [clients.submit(slowly, server, data) for data in SLOW]
        crowd += [clients.submit(deaf, server) for _ in range(4)]
        while not all(answer.done() for answer in (*answers.values(), *crowd, *slow)):
            server.predict(["Hi"], APPS)
    assert time.monotonic() - started < 9  # all connections were closed by the server
    assert [each.result() for each in slow] == [b"", b""]
    assert [each.result() for each in crowd][-4:] == [None] * 4
    for name, (_, status) in BROKEN.items():
        assert answers[name].result()[9:12] == status, (name, answers[name].result()[:200])


def test_logs_have_ids_and_no_texts(server):
    secret = "Zanzibar 5521"
    _, _, headers = server.call("POST", "/predict", {"texts": [secret], "apps": APPS}, X_Request_ID="mine-1")
    assert headers["x-request-id"] == "mine-1"
    server.call("POST", "/predict", {"texts": [secret, 5], "apps": [secret]}, X_Request_ID="bad id\t!")
    server.call("GET", f"/{secret.replace(' ', '')}")
    deadline = time.monotonic() + 10
    while not any(line.get("path") == "other" for line in server.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    line = next(line for line in server.log if line.get("request_id") == "mine-1")
    assert (line["status"], line["texts"], line["apps"]) == (200, 1, APPS)
    assert "Zanzibar" not in json.dumps(server.log) and "traceback" not in json.dumps(server.log)


def test_probes_metrics_and_pages(server):
    from prometheus_client.parser import text_string_to_metric_families

    assert server.get("/health")[1]["status"] == server.get("/ready")[1]["status"] == "ok"
    names = {family.name for family in text_string_to_metric_families(server.get("/metrics")[1])}
    assert {
        "mtpf_requests",
        "mtpf_request_seconds",
        "mtpf_batch_texts",
        "mtpf_queue_texts",
        "mtpf_apps",
    } <= names
    assert "mtpf" in server.get("/docs")[1]
    status, _, headers = server.call("GET", "/health", Origin="https://example.org")
    assert status == 200 and "access-control-allow-origin" not in headers


@pytest.mark.slow
def test_no_request_of_the_schema_makes_the_server_fail(server):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    options = {"deadline": None, "max_examples": 12, "database": None, "derandomize": True}
    options |= {"phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(**options)
        @given(case=operation.as_strategy())
        def try_it(case):
            answer = case.call()
            assert answer.status_code < 500, (case, answer.text)
            assert answer.status_code != 200 or case.validate_response(answer) is None

        try_it()


# --------------------------------------------------------------------------------------------- engines


def test_bf16_is_that_of_a_model_with_such_weights(model, folders):
    engine = open_engine(ServeSettings(backbone=str(folders / "backbone"), engine="bf16"))
    half = MtpfModel.from_pretrained(folders / "backbone", dtype=torch.bfloat16).eval()
    half.load_adapter(folders / "intent")
    engine.add("intent", read_app(str(folders / "intent")))
    expected = half.predict(SENTENCES, ["intent"])
    assert (
        engine.predict(SENTENCES, ["intent"], False, 1, None)
        == expected
        != model.predict(SENTENCES, ["intent"])
    )


@pytest.mark.slow
def test_an_int8_export_is_served_as_it_is(folders, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    from modeling_mtpf.export import export_onnx
    from modeling_mtpf.export.runner import Runner

    export_onnx(folders / "backbone", [str(folders / name) for name in APPS], tmp_path / "phone", int8=True)
    with ServerProcess("--backbone", tmp_path / "phone", "--engine", "int8") as server:
        assert_close(
            server.predict(SENTENCES, APPS)["results"], Runner(tmp_path / "phone").predict(SENTENCES, APPS)
        )
        body = {"texts": ["Hi"], "apps": ["intent"], "in_scope": True}
        assert server.call("POST", "/predict", body)[0] == 422  # it has none
        apps = server.call("GET", "/apps")[1]["apps"]
        assert [(app["name"], "parts" in app) for app in apps] == [(name, False) for name in APPS]
        for unknown in ("nope", "goal", "nope/goal"):
            assert server.call("POST", "/predict", {"texts": ["Hi"], "apps": [unknown]})[0] == 404
        status, answer, _ = server.call("POST", "/predict", {"texts": ["Hi"], "apps": ["intent"], "top_k": 2})
        assert status == 422 and "top_k" in answer["detail"]
        assert server.put("other", repo="ada/app")[0] == server.delete("intent")[0] == 422


# ------------------------------------------------------------------------------------------- full, stop


def test_full_queue_then_sigterm_under_load(folders, model):
    """A server without token and with a short queue says 429; at SIGTERM it answers what was begun."""
    options = ("--queue_texts", "100", "--max_texts", "100", "--threads", "1")
    adapters = [part for name in APPS for part in ("--adapter", folders / name)]
    texts = [f"{SENTENCES[n % 5]} {SENTENCES[(n + 1) % 5]} {n}" for n in range(100)]
    expected = model.predict(texts, APPS)
    with ServerProcess("--backbone", folders / "backbone", *adapters, *options, token=None) as server:
        assert server.call("PUT", "/apps/x1", {"folder": "x"}, Authorization="Bearer x")[0] == 403
        barrier, answers, begun = threading.Barrier(24), [], threading.Semaphore(0)

        def client():
            connection = server.connection()
            connection.connect()
            barrier.wait(30)
            body = json.dumps({"texts": texts, "apps": APPS})
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            begun.release()
            answer = connection.getresponse()
            answers.append((answer.status, answer.getheader("retry-after"), answer.read()))
            connection.close()

        clients = [threading.Thread(target=client) for _ in range(24)]
        for each in clients:
            each.start()
        for _ in clients:
            begun.acquire()
        deadline = time.monotonic() + 20
        while not answers and time.monotonic() < deadline:
            time.sleep(0.005)
        assert server.stop() == 0
        for each in clients:
            each.join(60)
        assert len(answers) == 24
        good = [json.loads(content) for status, _, content in answers if status == 200]
        assert good
        for answer in good:
            assert_close(answer["results"], expected)
        assert {status for status, *_ in answers} == {200, 429}
        assert all(1 <= int(after) <= 60 for status, after, _ in answers if status == 429)
        with pytest.raises(OSError):
            server.get("/health")


def test_memory_of_apps_that_are_gone_is_given_back(folders, monkeypatch):
    engine = TorchEngine(MtpfModel.from_pretrained(folders / "backbone"))
    apps_then: list[set[str]] = []
    monkeypatch.setattr(engines, "release_free_memory", lambda: apps_then.append(set(engine.apps)))
    engine.add("one", read_app(str(folders / "intent")))
    engine.add("one", read_app(str(folders / "entities")))
    engine.remove("one")
    assert apps_then == [{"one"}, {"one"}, set()]
