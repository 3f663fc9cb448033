"""The files for Kubernetes: of the fields that are published, agreeing with the code, and a door to the metrics that opens to the picker only.

No cluster is at hand. The fields are those of the CRDs of InferencePool v1.6.0 and HTTPRoute (Gateway API v1.6.1), and of llm-d router
v0.10.0, whose files docs/fleet.md names.
"""

from __future__ import annotations

import string
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
import yaml
from nginx_process import AROUND
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from started_api import ROOT, StartedApi

from api.http.auth import METRICS_PATH, OPEN_PATHS
from bench import fleet_sums
from settings import Settings

FOLDER = ROOT / "deploy" / "kubernetes"
OBJECTS: list[dict[str, Any]] = [each for name in ("replicas.yaml", "pool.yaml") for each in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))]
METRICS_KEY = "sk-metrics-0123456789"
# What the picker reads: llm-d router, docs/plugin-metric-protocol.md, and the protocol of model servers (proposal 003).
READ = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:cache_config_info")


def found(kind: str, name: str = "glm") -> dict[str, Any]:
    (only,) = [each for each in OBJECTS if each["kind"] == kind and each["metadata"]["name"] == name]
    return only


def container(deployment: str, name: str) -> dict[str, Any]:
    (only,) = [each for each in pod(deployment)["containers"] if each["name"] == name]
    return only


def pod(deployment: str) -> dict[str, Any]:
    spec: dict[str, Any] = found("Deployment", deployment)["spec"]["template"]["spec"]
    return spec


def picker() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(found("ConfigMap", "glm-picker")["data"]["picker.yaml"])
    return config


def parameters(plugin: str) -> dict[str, Any]:
    (only,) = [each for each in picker()["plugins"] if each["type"] == plugin]
    return dict(only.get("parameters", {}))


def paths(value: Any, name: str = "") -> Iterator[str]:
    """Each field of nested objects, as a.b.c; the items of a list have no number."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            for key, below in item.items():
                yield f"{name}.{key}".lstrip(".")
                yield from paths(below, f"{name}.{key}")
        elif isinstance(item, list):
            yield from paths(item, name)


def test_the_pool_and_the_route_have_published_fields_only() -> None:
    pool, route = found("InferencePool"), found("HTTPRoute")

    assert (pool["apiVersion"], route["apiVersion"]) == ("inference.networking.k8s.io/v1", "gateway.networking.k8s.io/v1")
    assert set(paths(pool["spec"])) == {
        "selector", "selector.matchLabels", "selector.matchLabels.app", "targetPorts", "targetPorts.number",
        "endpointPickerRef", "endpointPickerRef.name", "endpointPickerRef.port", "endpointPickerRef.port.number", "endpointPickerRef.failureMode",
    }  # fmt: skip
    assert pool["spec"]["endpointPickerRef"]["failureMode"] in ("FailOpen", "FailClose")
    assert set(paths(route["spec"])) == {
        "parentRefs", "parentRefs.name", "rules", "rules.matches", "rules.matches.path", "rules.matches.path.type", "rules.matches.path.value",
        "rules.backendRefs", "rules.backendRefs.group", "rules.backendRefs.kind", "rules.backendRefs.name", "rules.timeouts", "rules.timeouts.request",
    }  # fmt: skip
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (f"{backend['group']}/v1", backend["kind"], backend["name"]) == (pool["apiVersion"], "InferencePool", pool["metadata"]["name"])


def test_the_picker_has_published_fields_only() -> None:
    assert (picker()["apiVersion"], picker()["kind"]) == ("llm-d.ai/v1alpha1", "EndpointPickerConfig")
    assert set(picker()) == {"apiVersion", "kind", "plugins", "requestHandler", "schedulingProfiles"}
    assert set(parameters("metrics-data-source")) <= {"scheme", "path", "port", "insecureSkipVerify", "caCertPath", "clientCertPath", "clientKeyPath", "interval"}
    assert set(paths(parameters("session-affinity-scorer"))) == {
        "strategy", "sessionIdConfig", "sessionIdConfig.sources", "sessionIdConfig.sources.header", "sessionIdConfig.evictionTtlSeconds",
    }  # fmt: skip
    declared = {plugin["type"] for plugin in picker()["plugins"]}
    named = [plugin["pluginRef"] for plugin in (*picker()["schedulingProfiles"][0]["plugins"], *picker()["requestHandler"]["parsers"])]
    assert set(named) <= declared
    flags = {argument.split("=")[0] for argument in container("glm-picker", "picker")["args"]}
    assert flags == {
        "--pool-name", "--pool-group", "--config-file", "--allow-experimental-plugins", "--metrics-staleness-threshold", "--grpc-health-port",
    }  # fmt: skip


def test_ports_paths_and_settings_agree_with_the_code() -> None:
    api = container("glm", "api")
    settings = Settings(**{entry["name"].removeprefix("GLM_").lower(): entry["value"] for entry in api["env"]})
    ready, alive = (api[name] for name in ("readinessProbe", "livenessProbe"))

    assert settings.metrics_names == "vllm"
    assert pod("glm")["terminationGracePeriodSeconds"] >= settings.stop_s + 10
    assert settings.drain_delay_s >= 2 * ready["periodSeconds"] * ready["failureThreshold"]
    assert [probe["httpGet"] for probe in (ready, alive)] == [{"path": path, "port": "api"} for path in ("/readyz", "/livez")]
    assert {"/readyz", "/livez"} <= OPEN_PATHS
    assert api["ports"] == [{"name": "api", "containerPort": settings.api_port}]
    assert found("InferencePool")["spec"]["targetPorts"] == [{"number": settings.api_port}]
    assert api["args"][1:] == ["-m", "api.server"]
    (rule,) = found("HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"]["request"] == f"{settings.request_timeout_s:.0f}s"
    session = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"`{parameters('session-affinity-scorer')['sessionIdConfig']['sources'][0]['header']}`" in session


def test_the_files_agree_with_each_other_and_with_the_sums() -> None:
    door, scrape = container("glm", "metrics"), parameters("metrics-data-source")
    (port,) = [each["containerPort"] for each in door["ports"]]
    reached = {rule["ports"][0]["port"]: rule.get("from") for rule in found("NetworkPolicy", "glm-metrics")["spec"]["ingress"]}
    reference, service = found("InferencePool")["spec"]["endpointPickerRef"], found("Service", "glm-picker")
    labels = found("Deployment")["spec"]["template"]["metadata"]["labels"]

    assert scrape["port"] == port and f"listen {port};" in template()
    assert reached[8080] is None and [each["podSelector"]["matchLabels"]["app"] for each in reached[port]] == ["glm-picker", "prometheus"]
    assert scrape.get("path", "/metrics") == METRICS_PATH
    assert float(scrape["interval"].removesuffix("s")) == fleet_sums.PICKER_SCRAPE_S < 3
    assert (reference["name"], reference["port"]["number"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert labels.items() >= found("InferencePool")["spec"]["selector"]["matchLabels"].items()
    assert labels["llm-d.ai/engine-type"] == "vllm"
    assert f"--pool-name={found('InferencePool')['metadata']['name']}" in container("glm-picker", "picker")["args"]
    assert pod("glm")["terminationGracePeriodSeconds"] == fleet_sums.DRAIN_S
    assert found("Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": f"{fleet_sums.WAVE:.0%}"}
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert prometheus["global"]["scrape_interval"] == f"{fleet_sums.SCRAPE_S}s"


def template() -> str:
    text: str = found("ConfigMap", "glm-metrics")["data"]["default.conf.template"]
    return text


@pytest.fixture
def door(tmp_path: Path) -> Iterator[str]:
    """The second container of the pod in front of a real replica: its URL."""
    with StartedApi(tmp_path, GLM_METRICS_KEY=METRICS_KEY, GLM_METRICS_NAMES="vllm") as api:
        port = free_port()
        # nginx's image puts the variables of its environment in with envsubst, and leaves $ alone elsewhere.
        text = string.Template(template()).safe_substitute(GLM_METRICS_KEY=METRICS_KEY)
        assert METRICS_KEY in text
        text = text.replace("listen 9090;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8080", f"127.0.0.1:{api.port}")
        (tmp_path / "glm.conf").write_text(f"access_log off;\n{text}")
        (tmp_path / "nginx.conf").write_text(AROUND.format(folder=tmp_path))
        process = subprocess.Popen(
            [which("nginx") or "/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", "daemon off;"]
        )
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, (tmp_path / "around.log").read_text()
                time.sleep(0.05)
        yield url
        process.terminate()
        process.wait(60)


def test_the_door_lets_the_picker_read_its_metrics_without_a_key_and_nothing_else(door: str) -> None:
    scraped = httpx.get(f"{door}/metrics", timeout=60)

    families = {sample.name: sample for family in text_string_to_metric_families(scraped.text) for sample in family.samples}
    assert scraped.status_code == 200
    assert set(READ) <= families.keys()
    assert set(families["vllm:cache_config_info"].labels) >= {"block_size", "num_gpu_blocks"}
    assert httpx.post(f"{door}/metrics", timeout=60).status_code == 403
    assert [httpx.get(f"{door}{path}", timeout=60).status_code for path in ("/health", "/v1/models", "/metrics/", "/")] == [404] * 4
    assert METRICS_KEY not in scraped.text
