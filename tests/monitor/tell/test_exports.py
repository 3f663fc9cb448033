"""The exports: ECS lines, the Prometheus textfile and its alert rules, checked by promtool."""

from __future__ import annotations

import http.server
import json
import random
import re
import shutil
import subprocess
import threading
from datetime import datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from monitor import check
from monitor.judge.verdict import WORDS
from monitor.tell import exports

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"


def promtool(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    assert tool, "promtool is needed: apt-get install prometheus (test.sh does)"
    return subprocess.run([tool, *words], input=text, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def settings(service, behaviour, make_settings):
    """Settings after one run in which the model answered wrongly."""
    behaviour.reply = lambda body: (200, {"choices": [{"message": {"content": "It is pink."}}]})
    found = make_settings(service, memory_limit_percent=0.1, limit_window_s=0)
    check.run(found, random.Random(1))
    return found


def samples(settings) -> dict[tuple[str, ...], float]:
    text = (settings.log_dir / exports.PROM).read_text()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_promtool_accepts_the_textfile(settings):
    done = promtool("check", "metrics", text=(settings.log_dir / exports.PROM).read_text())

    assert (done.returncode, done.stderr) == (0, "")


def test_the_textfile_agrees_with_the_report(settings):
    report = json.loads((settings.log_dir / "health.json").read_text())
    found = samples(settings)

    states = {word: found["glm_target_state", *sorted(("api", word))] for word in WORDS}
    assert states == {word: float(word == report["targets"]["api"]["word"]) for word in WORDS}
    assert found["glm_cpu_used_ratio",] == report["cpu_percent"] / 100
    assert found["glm_check_last_run_timestamp_seconds",] == datetime.fromisoformat(report["timestamp"]).timestamp()
    assert found["glm_warning", "memory_used_percent"] == 1
    assert found["glm_probe_duration_seconds", "picture"] > 0
    assert ("glm_gpu_load_ratio", "0") not in found, "an unknown value has no sample"


def test_each_run_is_one_line_in_ecs_fields(settings):
    check.run(settings, random.Random(2))

    lines = [json.loads(line) for line in (settings.log_dir / exports.JSONL).read_text().splitlines()]
    report = json.loads((settings.log_dir / "health.json").read_text())
    assert len(lines) == 2
    line = lines[-1]
    assert {"@timestamp", "ecs", "message", "log", "service", "host", "event", "glm"} == set(line)
    assert datetime.fromisoformat(line["@timestamp"]) == datetime.fromisoformat(report["timestamp"]).replace(
        microsecond=datetime.fromisoformat(line["@timestamp"]).microsecond
    )
    assert (line["event"]["outcome"], line["log"]["level"]) == ("failure", "error")
    assert line["event"]["duration"] == int(report["duration_s"] * 1e9), "nanoseconds"
    assert line["service"]["state"] == line["glm"]["targets"]["api"]["word"] == "broken"
    assert line["glm"]["gpu_load"] == report["gpu_load"] and "memory_used_percent" in line["glm"]["warnings"]


def test_the_lines_are_rotated_by_renaming(settings, monkeypatch):
    monkeypatch.setattr(exports, "ROTATE_BYTES", 100)
    path = settings.log_dir / exports.JSONL
    reader = path.open()
    first = path.read_text()

    check.run(settings, random.Random(2))
    check.run(settings, random.Random(3))

    assert reader.read() == first, "a shipper reads its file to the end"
    reader.close()
    assert [len(p.read_text().splitlines()) for p in (path, path.with_name("health.jsonl.1"), path.with_name("health.jsonl.2"))] == [1, 1, 1]


def test_promtool_accepts_the_rules():
    done = promtool("check", "rules", str(RULES))

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fire_as_specified():
    done = promtool("test", "rules", str(Path(__file__).with_name("rules_test.yml")))

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_channel_is_counted_before_its_first_message(settings):
    """A counter that begins at 1 has not increased for Prometheus."""
    sending = settings.model_copy(update={"slack_url": SecretStr("http://127.0.0.1:9/")})

    check.run(sending, random.Random(2))

    found = samples(sending)
    assert {found["glm_alert_delivery_total", *sorted(("slack", outcome))] for outcome in ("failed", "sent")} == {0}


def test_every_metric_of_the_checkers_rules_is_exported(settings):
    """A rule over a metric that does not exist never fires."""
    text = (settings.log_dir / exports.PROM).read_text()
    declared = {family.name for family in text_string_to_metric_families(text)}
    used = set(re.findall(r"\bglm_\w+", RULES.read_text().split("- name: glm-api")[0]))

    assert used and {name.removesuffix("_total") for name in used} <= declared


@pytest.fixture
def receiver(tmp_path):
    """A server in the place of Pushgateway: records requests and sends `answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_request(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            server.received.append((self.command, self.path, self.headers["Authorization"], sent.decode()))
            status, body = server.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_POST = handle_request

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.received, server.answer = [], (200, b"")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_pushgateway_gets_the_textfile(receiver, settings, capsys):
    sending = settings.model_copy(update={"pushgateway_url": SecretStr(f"http://127.0.0.1:{receiver.server_address[1]}")})
    check.run(sending, random.Random(2))

    (method, path, _, body), = receiver.received
    assert method == "PUT" and path.startswith("/metrics/job/glm_health/instance/")
    assert promtool("check", "metrics", text=body).returncode == 0 and "glm_target_state" in body

    receiver.answer = (503, b"full")
    check.run(sending, random.Random(3))
    assert "the Pushgateway did not accept the metrics: HTTP 503" in capsys.readouterr().err
