"""The clients of ``eval/load.py``, for locust: each checks every answer against the app's revision in it.

``MTPF_LOAD`` names a JSON file: ``texts``, ``apps`` that every request names, ``expected`` (app → revision →
results of the texts), ``requests`` after which to stop, and with ``token`` also an operator, who adds,
replaces and removes apps once a second.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, constant, constant_pacing, events, task
from locust.exception import StopUser

LOAD = json.loads(Path(os.environ["MTPF_LOAD"]).read_text("utf-8"))
BODIES = [json.dumps({"texts": [text], "apps": LOAD["apps"]}) for text in LOAD["texts"]]
NUMBERS = itertools.count()


def same(result: Any, expected: Any) -> bool:
    """Compare results; scores may differ as other batches round them."""
    if isinstance(expected, list):
        return len(result) == len(expected) and all(map(same, result, expected))
    return {**result, "score": 0} == {**expected, "score": 0} and abs(
        result["score"] - expected["score"]
    ) < 1e-3


class Client(FastHttpUser):
    """Sends one request after the other."""

    wait_time = constant(0)

    @task
    def predict(self) -> None:
        """Send one text."""
        number = next(NUMBERS)
        if number >= LOAD["requests"]:
            if number == LOAD["requests"] + LOAD["clients"] - 1:  # all others have their last answer
                gevent.spawn_later(0, self.environment.runner.quit)
            raise StopUser()
        number %= len(BODIES)
        headers = {"Content-Type": "application/json"}
        with self.client.post("/predict", BODIES[number], headers=headers, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            content = answer.json()
            for app, (result,) in content["results"].items():
                if not same(result, LOAD["expected"][app][content["revisions"][app]][number]):
                    answer.failure(f"wrong result of {app}")


if LOAD.get("token"):

    class Operator(FastHttpUser):
        """Replaces ``moving``, adds and removes ``passing``, once a second."""

        wait_time = constant_pacing(1)
        fixed_count = 1
        versions = itertools.cycle(LOAD["versions"])

        @task
        def change(self) -> None:
            """Make the three changes."""
            headers = {"Authorization": f"Bearer {LOAD['token']}", "Content-Type": "application/json"}
            for method, name in (("PUT", "moving"), ("PUT", "passing"), ("DELETE", "passing")):
                body = json.dumps({"folder": next(self.versions)}) if method == "PUT" else None
                self.client.request(method, f"/apps/{name}", data=body, headers=headers, name=method)


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    """Write what was counted."""
    total = environment.stats.entries.get(("/predict", "POST"))
    rows = {
        "requests": total.num_requests,
        "failures": sum(entry.num_failures for entry in environment.stats.entries.values()),
        "errors": [error.to_dict() for error in environment.stats.errors.values()],
        "seconds": total.last_request_timestamp - total.start_time,
        "median_ms": total.median_response_time,
        "p99_ms": total.get_response_time_percentile(0.99),
    }
    for name in ("PUT", "DELETE"):
        if entry := environment.stats.entries.get((name, name)):
            rows[name] = {"requests": entry.num_requests, "median_ms": entry.median_response_time}
    Path(LOAD["output"]).write_text(json.dumps(rows), "utf-8")
