"""The report for other systems: health.jsonl (ECS), health.prom (textfile collector), Pushgateway, Elasticsearch.

Everything that is sent over the network has a deadline.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import push_to_gateway, write_to_textfile

from monitor.judge.verdict import WORDS
from monitor.observe import processes
from monitor.observe.http_exchange import exchange
from monitor.observe.small_file import is_no_file, open_file
from monitor.store.store import Store
from monitor.tell import channels, elasticsearch
from settings import Settings

ECS_VERSION = "8.17.0"
JSONL = "health.jsonl"
PROM = "health.prom"
ROTATE_BYTES = 10 * 2**20
ROTATE_KEEP = 5
RAW_LOGS = ("api.log", "web.log", "health_check.log")
FRONT_LOGS = ("front.log", "front.access.log")
RAW_LIMIT_BYTES = 100 * 2**20  # of a raw log, and of the one before it
SEND_LIMIT_S = 4.0
OUTCOMES = {True: "success", False: "failure", None: "unknown"}


def write(report: Mapping[str, Any], settings: Settings, store: Store) -> None:
    """Writes the files. Raises OSError."""
    _append(settings.log_dir / JSONL, json.dumps(to_ecs(report), ensure_ascii=False, allow_nan=False) + "\n")
    for name in RAW_LOGS:
        _cap(settings.log_dir / name)
    if [name for name in FRONT_LOGS if _cap(settings.log_dir / name)]:
        front = processes.read_record(settings.log_dir, "front")
        if front is not None and processes.is_running(front):
            os.kill(front.pid, signal.SIGUSR1)  # nginx opens its logs anew
    write_to_textfile(str(settings.log_dir / PROM), to_metrics(report, store, settings))


def send(report: Mapping[str, Any], settings: Settings, store: Store) -> list[str]:
    """Sends to what is configured. Returns the failures, without URLs, because URLs hold passwords."""
    problems = []
    if settings.pushgateway_url is not None:
        problems.append(_push(settings.pushgateway_url.get_secret_value(), to_metrics(report, store, settings)))
    if settings.elasticsearch_url is not None:
        problems.append(elasticsearch.push(settings.elasticsearch_url.get_secret_value(), to_ecs(report), settings.log_dir))
    return [problem for problem in problems if problem]


def to_ecs(report: Mapping[str, Any]) -> dict[str, Any]:
    """One document per run. Fields outside ECS are under `glm`; it holds no text of users' questions or answers."""
    healthy = report["service_healthy"]
    when = datetime.fromisoformat(report["timestamp"]).astimezone(UTC)
    return {
        "@timestamp": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "ecs": {"version": ECS_VERSION},
        "message": "; ".join(report["reasons"]) or f"service is {report['verdict']}",
        "log": {"level": "info" if healthy else "error" if healthy is False else "warn", "logger": "health_check"},
        "service": {"name": "glm-4.6v-flash-web", "state": report["verdict"]},
        "host": {"name": platform.node()},
        "event": {
            "kind": "metric",
            "category": ["process"],
            "type": ["info"],
            "action": "health_check",
            "dataset": "glm.health",
            "outcome": OUTCOMES[healthy],
            "duration": int(report["duration_s"] * 1e9),
        },
        "glm": {
            **{name: report[name] for name in ("gpu_load", "gpu_memory_used", "cpu_percent", "memory_used_percent")},
            "service_healthy": healthy,
            "schema_version": report["schema_version"],
            "targets": {
                name: {key: target.get(key) for key in ("word", "rule", "incident", "seen", "restarts_last_day")}
                for name, target in report.get("targets", {}).items()
            },
            "warnings": [warning["name"] for warning in report.get("warnings", ())],
            **_replicas(report),
        },
    }


def _replicas(report: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing where there is one API."""
    if "replicas" not in report:
        return {}
    kept = ("number", "word", "rule", "incident", "restarts_last_day")
    return {"replicas": [{name: replica[name] for name in kept} for replica in report["replicas"]]}


def to_metrics(report: Mapping[str, Any], store: Store, settings: Settings) -> CollectorRegistry:
    registry = CollectorRegistry()

    def gauge(name: str, what: str, value: Any) -> None:
        if isinstance(value, int | float):  # an unknown value has no sample
            Gauge(name, what, registry=registry).set(value)

    machine, gpu = report["evidence"]["machine"], report["evidence"]["gpu"]
    state = Gauge("glm_target_state", "1 for the verdict in force.", ["target", "state"], registry=registry)
    circuit = Gauge("glm_circuit_open", "1 if restarts were given up.", ["target"], registry=registry)
    open_now = Gauge("glm_incident_open", "1 while an incident is open.", ["target"], registry=registry)
    for name, target in report.get("targets", {}).items():
        for word in WORDS:
            state.labels(name, word).set(word == target["word"])
        circuit.labels(name).set(bool(target["circuit_open"]))
        open_now.labels(name).set(bool(target["incident"]))
    if report.get("replicas"):
        replica_state = Gauge("glm_replica_state", "1 for the verdict in force.", ["replica", "state"], registry=registry)
        replica_circuit = Gauge("glm_replica_circuit_open", "1 if restarts were given up.", ["replica"], registry=registry)
        replica_open = Gauge("glm_replica_incident_open", "1 while an incident is open.", ["replica"], registry=registry)
        replica_restarts = Gauge("glm_replica_restarts_last_day", "Restarts in the last day.", ["replica"], registry=registry)
        for replica in report["replicas"]:
            name = str(replica["number"])
            for word in WORDS:
                replica_state.labels(name, word).set(word == replica["word"])
            replica_circuit.labels(name).set(bool(replica["circuit_open"]))
            replica_open.labels(name).set(bool(replica["incident"]))
            replica_restarts.labels(name).set(replica["restarts_last_day"])
    gauge("glm_service_healthy", "1 if people are served.", _as_number(report["service_healthy"]))
    gauge("glm_check_last_run_timestamp_seconds", "When health_check.py last ran.",
          datetime.fromisoformat(report["timestamp"]).timestamp())  # fmt: skip
    gauge("glm_check_duration_seconds", "How long that run took.", report["duration_s"])
    gauge("glm_check_store_ok", "0 if the store could not be written.", float(report.get("check", {}).get("store") == "ok"))
    gauge("glm_cpu_used_ratio", "Share of the processors that may be used.", _ratio(machine.get("cpu_percent")))
    gauge("glm_memory_used_bytes", "Memory used, within the tightest limit.", machine.get("memory_used_bytes"))
    gauge("glm_memory_limit_bytes", "That limit.", machine.get("memory_limit_bytes"))
    gauge("glm_oom_kills", "Kills for memory in this control group.", machine.get("oom_kills"))
    _cards(registry, gpu.get("gpus") or ())
    seconds = Gauge("glm_probe_duration_seconds", "How long the question took.", ["probe"], registry=registry)
    for answer in report["evidence"]["api"]["answers"] if report["evidence"].get("api") else ():
        if answer["outcome"] not in ("credited", "skipped"):
            seconds.labels(answer["kind"]).set(answer["seconds"])
    warning = Gauge("glm_warning", "1 while a limit is passed.", ["name"], registry=registry)
    for item in report.get("warnings", ()):
        warning.labels(item["name"]).set(1)
    restarts = Counter("glm_restarts", "Restarts by the checker and operators.", ["target", "outcome"], registry=registry)
    for row in store.rows("SELECT target, outcome, COUNT(*) AS n FROM actions WHERE kind = 'restart' GROUP BY target, outcome"):
        restarts.labels(row["target"], row["outcome"]).inc(row["n"])
    alerts = Counter("glm_alert_delivery", "Messages by channel.", ["channel", "outcome"], registry=registry)
    for channel in channels.configured(settings):  # from 0: a counter that begins at 1 has not increased for Prometheus
        for outcome in ("sent", "failed"):
            alerts.labels(channel.name, outcome)
    for row in store.rows("SELECT channel, COUNT(sent_at) AS sent, SUM(tries) AS tries FROM outbox GROUP BY channel"):
        alerts.labels(row["channel"], "sent").inc(row["sent"])
        alerts.labels(row["channel"], "failed").inc(max(0, (row["tries"] or 0) - row["sent"]))
    return registry


def _cards(registry: CollectorRegistry, cards: Any) -> None:
    names = {
        "load_percent": ("glm_gpu_load_ratio", "Share of time with a kernel on the card.", 0.01),
        "memory_used_mib": ("glm_gpu_memory_used_bytes", "Memory in use on the card.", 2**20),
        "memory_total_mib": ("glm_gpu_memory_total_bytes", "Memory of the card.", 2**20),
        "temperature_c": ("glm_gpu_temperature_celsius", "Temperature.", 1),
        "power_w": ("glm_gpu_power_watts", "Power drawn.", 1),
    }
    for key, (name, what, factor) in names.items():
        gauge = Gauge(name, what, ["gpu"], registry=registry)
        for card in cards:
            if card.get(key) is not None:
                gauge.labels(str(card["index"])).set(card[key] * factor)


def _append(path: Path, line: str) -> None:
    """Rotates by renaming, so that a log shipper can read the open file to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > ROTATE_BYTES:
        for number in range(ROTATE_KEEP - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            if older.exists():
                older.replace(path.with_name(f"{path.name}.{number + 1}"))
        path.replace(path.with_name(f"{path.name}.1"))
    if is_no_file(path):
        path.replace(path.with_name(f"{path.name}.1"))
    descriptor = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with open(descriptor, "a", encoding="utf-8", errors="replace") as file:
        file.write(line)


def _cap(path: Path) -> bool:
    """For machines without logrotate: sets a large log aside by renaming it. The servers go on in a new file, see
    `log_output.py`. `.old`, because `.1` is logrotate's. Of a far larger one the end is kept, in the same file, because
    whatever has written so much may not follow. Returns whether it was renamed."""
    old = path.with_name(f"{path.name}.old")
    large = path.is_file() and path.stat().st_size > RAW_LIMIT_BYTES
    if large:
        path.replace(old)
    if not old.is_file() or old.stat().st_size <= 2 * RAW_LIMIT_BYTES:
        return large
    with open(open_file(old, os.O_RDWR), "r+b") as file:
        file.seek(-RAW_LIMIT_BYTES // 4, os.SEEK_END)
        end = file.read(RAW_LIMIT_BYTES // 4)
        file.truncate(0)
        file.seek(0)
        file.write(end)
    return large


def _push(url: str, registry: CollectorRegistry) -> str:
    """Replaces this machine's group at the Pushgateway. Empty if it was accepted, otherwise why not."""

    def put(url: str, method: str, timeout: float, headers: list[tuple[str, str]], data: bytes) -> Callable[[], None]:
        def send() -> None:
            reply = exchange(url, timeout, method, data, dict(headers))
            if reply.status not in (200, 202):
                raise OSError(reply.detail or f"HTTP {reply.status}")

        return send

    try:
        push_to_gateway(url, "glm_health", registry, {"instance": platform.node() or "unknown"}, SEND_LIMIT_S, put)
    except OSError as error:
        return f"the Pushgateway did not accept the metrics: {error}"
    return ""


def _as_number(value: bool | None) -> float | None:
    return None if value is None else float(value)


def _ratio(percent: Any) -> float | None:
    return percent / 100 if isinstance(percent, int | float) else None
