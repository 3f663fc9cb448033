"""The files for Prometheus, Alertmanager and Grafana: accepted by their own programs, and agreeing with each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
ALERTMANAGER = DEPLOY / "alertmanager" / "alertmanager.yml"
PROVISIONING = DEPLOY / "grafana" / "provisioning"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
FILES = [path for folder in ("prometheus", "alertmanager", "grafana") for path in sorted((DEPLOY / folder).rglob("*")) if path.is_file()]
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]


def accepted(*command: str) -> str:
    tool = shutil.which(command[0])
    assert tool, f"{command[0]} is needed: ./test.sh installs it"
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_configuration(tmp_path: Path):
    for name in ("prometheus.yml", "rules.yml", "targets.yml"):
        shutil.copy(PROMETHEUS / name, tmp_path)
    check = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    without_key = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert without_key.returncode and "error checking authorization credentials" in without_key.stdout + without_key.stderr, "as docs/monitoring.md says"
    (tmp_path / "metrics.key").write_text("key\n")

    assert "12 rules found" in accepted("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    parts = [group["labels"]["__part"] for group in yaml.safe_load((tmp_path / "targets.yml").read_text())]
    assert sorted(parts) == sorted(re.findall(r"regex: (\w+)", (PROMETHEUS / "prometheus.yml").read_text()))


def test_the_key_is_installed_as_it_is_in_the_settings_by_any_shell(tmp_path: Path):
    page = (ROOT / "docs" / "monitoring.md").read_text()
    (make,) = re.findall(r'^(echo "GLM_METRICS_KEY=.* >> .env) && ', page, re.MULTILINE)
    (install,) = re.findall(r"^(sed .*) \| install .* /etc/prometheus/metrics.key$", page, re.MULTILINE)
    for command in (make, make, f"{install} > metrics.key"):  # the last of two counts; a shell of its own for each
        subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, timeout=60)
    lines = (tmp_path / ".env").read_text().splitlines()
    assert (tmp_path / "metrics.key").read_text() == lines[-1].removeprefix("GLM_METRICS_KEY=") + "\n" != "\n"


def test_amtool_accepts_the_configuration_and_routes_by_severity():
    accepted("amtool", "check-config", str(ALERTMANAGER))

    def receiver(**labels: str) -> str:
        words = [f"{name}={value}" for name, value in labels.items()]
        return accepted("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *words).strip()

    found = {rule["alert"]: receiver(alertname=rule["alert"], **rule["labels"]) for rule in RULES}
    assert {name for name, who in found.items() if who == "watchdog"} == {"GlmWatchdog"}
    assert set(found.values()) == {"people", "watchdog"}


def test_alertmanager_names_only_rules_that_exist():
    names = set(re.findall(r"Glm\w+", ALERTMANAGER.read_text()))

    assert len(names) >= 8 and names <= {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_rule_names_its_entry_of_the_runbook(rule: dict[str, Any]):
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    entries = re.split(r"^### ", (ROOT / page).read_text(), flags=re.MULTILINE)[1:]
    texts = {heading.strip().lower(): text for heading, _, text in (entry.partition("\n") for entry in entries)}

    assert anchor == rule["alert"].lower()
    assert len(texts[anchor].split()) > 20, "an entry says what to do"


def test_the_runbook_has_no_entry_without_a_rule_and_no_broken_link():
    text = (ROOT / "docs" / "runbook.md").read_text()
    anchors = {
        page: {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)}
        for page in ("runbook.md", "operations.md", "monitoring.md", "api.md")
    }

    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == {rule["alert"] for rule in RULES}
    for page in ("runbook.md", "monitoring.md"):
        for target, anchor in re.findall(r"\]\((\w+\.md)?#([\w-]+)\)", (ROOT / "docs" / page).read_text()):
            assert anchor in anchors[target or page], f"docs/{page}: {target}#{anchor}"


def lost(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """What Grafana's own types do not know of a dashboard, or read otherwise."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key in given:
            yield from lost(given[key], read.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != read:
        yield f"{path}: {given!r}"


def read_as_grafana_does(dashboard: dict[str, Any]) -> dict[str, Any]:
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_each_dashboard_is_what_grafanas_types_say(path: Path):
    dashboard = json.loads(path.read_text())

    assert list(lost(dashboard, read_as_grafana_does(dashboard))) == []
    dashboard["panels"][0] |= {"titel": "x"}
    dashboard["panels"][1]["targets"][0]["query"] = "up"
    assert len(list(lost(dashboard, read_as_grafana_does(dashboard)))) == 2, "a mistake would be seen"


def test_the_dashboards_fit_together():
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    dashboards = {path.stem: json.loads(path.read_text()) for path in DASHBOARDS}

    assert list(dashboards) == ["card", "engine", "health", "service"]
    for name, dashboard in dashboards.items():
        panels = dashboard["panels"]
        assert dashboard["uid"] == f"glm-{name}" and "id" not in dashboard
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
        for panel in panels:
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(one == {"type": source["type"], "uid": source["uid"]} for one in sources)
        cells = [
            (column, row)
            for place in (panel["gridPos"] for panel in panels)
            for column in range(place["x"], place["x"] + place["w"])
            for row in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells)) and max(column for column, _ in cells) == 23, f"{name}: panels overlap or leave a gap"


def test_no_file_holds_a_key_or_the_host_of_anyone():
    for path in FILES:
        text = path.read_text()
        assert set(re.findall(r"([\w.-]+):\d{4,5}\b", text)) <= {"localhost"}, path
        assert not re.search(r"credentials:|password|bearer_token|api_key", text, re.IGNORECASE), path
