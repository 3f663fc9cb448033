"""The running bundle with Prometheus, node_exporter, Pushgateway and Alertmanager around it, all of them the real programs.

The files of `deploy/` are used as they are, but for ports and for time: intervals, `for:` and short ranges are shorter.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from nvml_stand_in import NVML
from PIL import Image
from ports import free_port

from bench.project_copy import ProjectCopy, started_copy
from bench.servers import ROOT

DEPLOY = ROOT / "deploy"
METRICS_KEY = "key-of-prometheus-only"
WAIT_S = 300.0
STALE_S = 20  # in place of 180: a run of the checker takes some seconds on a machine that is busy with other tests
SETTINGS = {
    "GLM_METRICS_KEY": METRICS_KEY, "GLM_SLOTS": "2", "GLM_QUEUE_SIZE": "2", "GLM_TEST_FAULTS": "true", "GLM_DEVICE": "cpu",
}  # fmt: skip
# Of the checker while nothing is wrong. What the machine does besides must not pass a limit.
CHECKER = {
    "GLM_CURE": "off", "GLM_PROBE_CREDIT_S": "0", "GLM_CPU_LIMIT_PERCENT": "1000", "GLM_MEMORY_LIMIT_PERCENT": "1000",
    "GLM_DISK_FREE_LIMIT_MIB": "1", "GLM_LIMIT_WINDOW_S": "0",
}  # fmt: skip


def hurried_rules(text: str) -> str:
    """The rules with a 240th of each `for:`, but longer than one scrape, and of each range what still holds a few scrapes."""
    text = re.sub(r"for: (\d+)m$", lambda found: f"for: {max(3000, int(found[1]) * 250)}ms", text, flags=re.MULTILINE)
    text = re.sub(r"keep_firing_for: \d+ms", "keep_firing_for: 10s", text)
    return re.sub(r"\[[15]m\]", "[15s]", text).replace("> 180", f"> {STALE_S}")


class Webhook:
    """Receives what Alertmanager delivers: (path, body) of each request."""

    def __init__(self) -> None:
        received: list[tuple[str, dict[str, Any]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.received = received
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def times(self, status: str, **labels: str) -> int:
        """How often an alert with these labels was delivered with this status."""
        alerts = [alert for _, body in list(self.received) for alert in body["alerts"]]
        return sum(alert["status"] == status and labels.items() <= alert["labels"].items() for alert in alerts)


class MonitoredBundle:
    """`checker` are the variables of the next run of the checker; `runs` says whether one follows the other."""

    def __init__(self, copy: ProjectCopy, folder: Path, webhook: Webhook, prometheus: str, pushgateway: str) -> None:
        self.copy, self.folder, self.webhook, self.prometheus, self.pushgateway = copy, folder, webhook, prometheus, pushgateway
        self.checker = dict(CHECKER)
        self.runs = self.ends = False
        self.question: Callable[[], dict[str, Any]] = text_question
        self.pause_s = 0.3
        self.late_scrapes = 0  # that were told as an outage, on a machine too busy for its scrapes
        self.began = time.time()
        self.askers = 1  # of eight, how many ask
        self._threads = [threading.Thread(target=self._check, daemon=True)]
        self._threads += [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(8)]
        for thread in self._threads:
            thread.start()

    def check(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.copy.environment, "PYTHONPATH": str(self.folder), **self.checker, **variables}
        return subprocess.run(
            self.copy.command(*words), cwd=self.copy.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    def fault(self, name: str, seconds: float = 0.0) -> None:
        """Fault injection of the API, which GLM_TEST_FAULTS allows; an empty name ends it."""
        path = self.copy.log_dir / "api.fault"
        if name:
            path.write_text(json.dumps({"fault": name, "seconds": seconds}))
        else:
            path.unlink(missing_ok=True)

    def pid(self) -> int:
        return int(json.loads((self.copy.log_dir / "api.pid.json").read_text())["pid"])

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def history(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression since the test began."""
        return self.get("query_range", query=expression, start=self.began, end=time.time(), step=2)["result"]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def until_firing(self, *names: str) -> None:
        self.until(lambda: set(names) <= self.firing(), f"{names} fire")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}. Firing: {self.firing()}; last report: {self._report()}"
            time.sleep(0.3)

    def _report(self) -> str:
        with contextlib.suppress(OSError):
            return (self.copy.log_dir / "health.json").read_text()[:1500]
        return "none"

    def get(self, what: str, **parameters: Any) -> Any:
        found = httpx.get(f"{self.prometheus}/api/v1/{what}", params=parameters, timeout=30).json()
        assert found["status"] == "success", f"{parameters}: {found}"
        return found["data"]

    def _check(self) -> None:
        while not self.ends:
            if self.runs:
                self.check("run", "--quiet")
            time.sleep(0.3)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.copy.url, headers={"Authorization": f"Bearer {self.copy.key}"}, timeout=90) as client:
            while not self.ends:
                if number < self.askers:
                    with contextlib.suppress(httpx.HTTPError):
                        client.post("/v1/chat/completions", json=self.question())
                time.sleep(self.pause_s)


def text_question() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"What is {time.time_ns() % 90 + 10} plus 3?"}], "max_tokens": 12, "stream": True}


def picture_question() -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), (time.time_ns() // 1000 % 256, 40, 90)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What color is it?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8}


def any_question() -> dict[str, Any]:
    return picture_question() if time.time_ns() // 1000 % 2 else text_question()


@contextmanager
def monitored_bundle(folder: Path) -> Iterator[MonitoredBundle]:
    (folder / "pynvml.py").write_text(NVML)
    webhook = Webhook()
    with contextlib.ExitStack() as stack:
        stack.callback(webhook.server.shutdown)
        copy = stack.enter_context(started_copy(SETTINGS, "monitored"))
        ports = {name: free_port() for name in ("prometheus", "node_exporter", "pushgateway", "alertmanager")}
        address = {name: f"127.0.0.1:{port}" for name, port in ports.items()}

        def run(program: str, *words: str) -> None:
            command = shutil.which(program)
            assert command, f"{program} is needed: ./test.sh installs it"
            log = stack.enter_context((folder / f"{program}.log").open("w"))
            process = subprocess.Popen([command, *words], cwd=folder, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)

        run("prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile",
            f"--collector.textfile.directory={copy.log_dir}", f"--web.listen-address={address['node_exporter']}")  # fmt: skip
        run("prometheus-pushgateway", f"--web.listen-address={address['pushgateway']}")
        run("prometheus-alertmanager", f"--config.file={_alertmanager(folder, webhook.port)}", f"--storage.path={folder / 'am'}",
            f"--web.listen-address={address['alertmanager']}", "--cluster.listen-address=")  # fmt: skip
        run("prometheus", f"--config.file={_prometheus(folder, copy.api_port, ports)}", f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={address['prometheus']}", "--rules.alert.resend-delay=2s")  # fmt: skip
        url = f"http://{address['prometheus']}"
        _wait_for(f"{url}/-/ready")
        bundle = MonitoredBundle(copy, folder, webhook, url, f"http://{address['pushgateway']}")
        try:
            yield bundle
        finally:
            bundle.ends = True
            for thread in bundle._threads:
                thread.join()


def _prometheus(folder: Path, api_port: int, ports: dict[str, int]) -> Path:
    """prometheus.yml beside its rules, targets and key, as the documentation says."""
    source = DEPLOY / "prometheus"
    (folder / "prometheus.yml").write_text((source / "prometheus.yml").read_text().replace("scrape_interval: 15s", "scrape_interval: 2s").replace("15s", "1s"))
    (folder / "rules.yml").write_text(hurried_rules((source / "rules.yml").read_text()))
    (folder / "metrics.key").write_text(METRICS_KEY + "\n")
    targets = (source / "targets.yml").read_text()
    # Both ways of the checker's figures at once: the files name the other one in a comment.
    for port, new in (
        (8080, f"localhost:{api_port}"), (9100, f"localhost:{ports['node_exporter']}, localhost:{ports['pushgateway']}"),
        (9093, f"localhost:{ports['alertmanager']}"),
    ):  # fmt: skip
        assert f"localhost:{port}]" in targets
        targets = targets.replace(f"localhost:{port}]", f"{new}]")
    (folder / "targets.yml").write_text(targets)
    return folder / "prometheus.yml"


def _alertmanager(folder: Path, port: int) -> Path:
    text = (DEPLOY / "alertmanager" / "alertmanager.yml").read_text()
    assert text.count("localhost:9099") == 2
    text = text.replace("localhost:9099", f"127.0.0.1:{port}").replace("group_wait: 30s", "group_wait: 1s")
    (folder / "alertmanager.yml").write_text(text.replace("group_interval: 5m", "group_interval: 3s"))
    return folder / "alertmanager.yml"


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.2)


@contextmanager
def full_disk(bundle: MonitoredBundle) -> Iterator[Path]:
    """A log folder on a file system without a free byte, with what the checker knows."""
    folder = bundle.folder / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=True)
    try:
        for name in ("state.db", "api.pid.json", "web.pid.json", "baseline.json", "last-good.env"):
            source = bundle.copy.log_dir / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes()[: 2 * 2**20])
        with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
