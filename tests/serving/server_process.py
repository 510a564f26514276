"""The real server in its own process, and plain HTTP clients."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time

TOKEN = "0123456789abcdef"


class ServerProcess:
    """``mtpf serve`` on a free port; a context manager. ``log`` has the lines of its log as dicts."""

    def __init__(self, *arguments: str, token: str | None = TOKEN):
        command = [sys.executable, "-m", "modeling_mtpf.cli", "serve", "--port", "0", *map(str, arguments)]
        environment = {key: value for key, value in os.environ.items() if key != "MTPF_ADMIN_TOKEN"}
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment | ({"MTPF_ADMIN_TOKEN": token} if token else {}),
        )
        self.log: list[dict] = []
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.log.append({"message": line})
            if self.log[-1].get("message") == "Listening":
                self.port = int(self.log[-1]["address"].rpartition(":")[2])

    def __enter__(self):
        for _ in range(1200):
            if self.process.poll() is not None:
                self._reader.join()
                raise AssertionError(self.log)
            try:
                if self.port and self.get("/ready")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.stop()
        raise AssertionError(f"The server did not become ready: {self.log}")

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._reader.join()
        return status

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def call(self, method: str, path: str, body=None, **headers: str):
        """Return status, JSON (else text) and headers of an answer."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = self.connection()
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Content-Type": "application/json"} | names)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        is_json = answer.getheader("content-type") == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode(), answer.headers

    def get(self, path: str):
        return self.call("GET", path)

    def predict(self, texts, apps, **options):
        """Return the answer to a prediction that succeeds."""
        status, answer, _ = self.call("POST", "/predict", {"texts": texts, "apps": apps, **options})
        assert status == 200, answer
        return answer

    def put(self, name: str, **source):
        return self.call("PUT", f"/apps/{name}", source, Authorization=f"Bearer {TOKEN}")

    def delete(self, name: str):
        return self.call("DELETE", f"/apps/{name}", Authorization=f"Bearer {TOKEN}")

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = [
            line for line in self.get("/metrics")[1].splitlines() if line.startswith((name + " ", name + "{"))
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)
