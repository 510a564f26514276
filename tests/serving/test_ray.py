"""A real Ray cluster of two nodes on this machine."""

import json
import os
from functools import partial

import pytest
from conftest import SENTENCES, assert_close
from server_process import TOKEN, ServerProcess

from modeling_mtpf import MtpfModel
from modeling_mtpf.cli.predict import run as predict
from modeling_mtpf.cli.serve import ServeSettings, application, open_engine
from modeling_mtpf.errors import DataError

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    # By default Ray's workers give way to everything else on the machine.
    variables = {"MTPF_ADMIN_TOKEN": TOKEN, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= variables
    node = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    node.pop("include_dashboard")
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    for name in variables:
        del os.environ[name]


def test_files_are_predicted_once(cluster, folders, tmp_path):
    texts = tmp_path / "texts"
    (texts / "deep").mkdir(parents=True)
    (texts / "one.txt").write_text("\n".join(SENTENCES), "utf-8")
    (texts / "deep" / "two.jsonl").write_text(json.dumps({"text": "Hi"}), "utf-8")
    (texts / "three.jsonl").write_text('{"text": 5}', "utf-8")
    output = tmp_path / "results"
    arguments = ["--engine", "ray", "--backbone", str(folders / "backbone"), "--output_dir", str(output)]
    arguments += ["--adapter", str(folders / "intent"), "--workers", "2", str(texts)]
    with pytest.raises(DataError, match="1 of 3 files"):
        predict(arguments, "mtpf predict")
    rows = [json.loads(line) for line in (output / "one.txt.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == SENTENCES
    model = MtpfModel.from_pretrained(folders / "backbone")
    model.load_adapter(folders / "intent")
    assert_close([row["results"]["intent"] for row in rows], model.predict(SENTENCES, ["intent"])["intent"])
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.*")) == [
        "deep/two.jsonl.jsonl",
        "one.txt.jsonl",
    ]
    (output / "one.txt.jsonl").write_text("kept")
    (texts / "three.jsonl").write_text('{"text": "five"}', "utf-8")
    assert predict(arguments, "mtpf predict").startswith("1 files predicted, 2 had results")
    assert (output / "one.txt.jsonl").read_text() == "kept"


class Proxy(ServerProcess):
    """Ray Serve's proxy, with the helpers of a client."""

    def __init__(self, port: int):
        self.port = port

    def patient(self, *arguments):
        """Predict, trying again as clients do when a replica dies."""
        for _ in range(100):
            try:
                status, answer, _ = self.call("POST", "/predict", *arguments)
            except OSError:
                continue
            if status == 200:
                return answer
        raise AssertionError((status, answer))


def test_apps_reach_all_replicas_and_new_ones(cluster, folders, tmp_path):
    from ray import serve

    from modeling_mtpf.serving.ray import deployment

    settings = ServeSettings(
        backbone=str(folders / "backbone"),
        adapter=[str(folders / "intent")],
        apps_root=str(folders),
        threads=1,
    )
    options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 1}
    serve.start(http_options={"host": "127.0.0.1", "port": 18472})
    app = deployment(partial(open_engine, settings), partial(application, settings), **options)
    serve.run(app, name="mtpf", route_prefix="/")
    proxy = Proxy(18472)
    model = MtpfModel.from_pretrained(folders / "backbone")
    for name in ("intent", "entities"):
        model.load_adapter(folders / name)
    expected = model.predict(SENTENCES, ["intent", "entities"])
    assert_close(proxy.predict(SENTENCES, ["intent"])["results"]["intent"], expected["intent"])

    status, added, _ = proxy.put("added", folder="entities")
    assert status == 200
    body = {"texts": SENTENCES, "apps": ["added"]}
    answers = [proxy.call("POST", "/predict", body) for _ in range(12)]  # of both replicas
    for status, answer, _ in answers:
        assert status == 200 and answer["revisions"] == {"added": added["revision"]}
        assert_close(answer["results"]["added"], expected["entities"])

    victim = next(actor for actor in ray.util.list_named_actors(True) if "MtpfServer" in actor["name"])
    ray.kill(ray.get_actor(**victim), no_restart=True)
    for _ in range(30):
        assert_close(proxy.patient(body)["results"]["added"], expected["entities"])

    assert proxy.delete("added")[0] == 200
    assert [proxy.call("POST", "/predict", body)[0] for _ in range(6)] == [404] * 6
    serve.shutdown()
