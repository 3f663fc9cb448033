"""A life of the service as Prometheus, Alertmanager and Grafana see it: each alert rule fires for a fault, and ends with it.

The tests run in this order. What is not the fault itself: the limits of memory, processor and disk are lowered rather than the
machine filled, a step that lasts 20 s and an encoder that raises are injected into the API, and the card is a made-up NVML.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from monitored_bundle import (
    CHECKER,
    DEPLOY,
    MonitoredBundle,
    any_question,
    full_disk,
    monitored_bundle,
    picture_question,
    text_question,
)

from bench.servers import ROOT

RULES = [rule for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
QUIET = {"GlmWatchdog"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredBundle]:
    with monitored_bundle(tmp_path_factory.mktemp("monitored")) as started:
        yield started


def test_a_checker_that_never_ran_is_told(bundle):
    bundle.until_firing("GlmWatchdog", "GlmCheckerAbsent")
    for name in QUIET | {"GlmCheckerAbsent"}:
        bundle.until(lambda name=name: bundle.webhook.times("firing", alertname=name), f"Alertmanager delivers {name}")

    watched = {alert["labels"]["alertname"] for path, body in bundle.webhook.received if path == "/watchdog" for alert in body["alerts"]}
    assert watched == QUIET


def test_a_service_that_is_well_alerts_nobody(bundle):
    bundle.question, bundle.runs = any_question, True
    bundle.until(lambda: bundle.query("glm_service_healthy == 1"), "the checker finds it healthy")
    bundle.until(lambda: bundle.firing() == QUIET, "only the watchdog fires")

    scraped = {series["metric"]["job"]: series["value"][1] for series in bundle.query('up{job="glm-api"}')}
    assert scraped == {"glm-api": "1"}, "with its own key"


def test_a_full_queue_is_told(bundle):
    bundle.checker |= {"GLM_PROBE_TIMEOUT_S": "2"}
    bundle.fault("slow-step", 25)
    bundle.askers, bundle.pause_s, bundle.question = 8, 0.1, text_question

    bundle.until_firing("GlmRequestsRefused", "GlmBusyForLong")

    bundle.checker, bundle.askers, bundle.pause_s = dict(CHECKER), 2, 0.3
    (refused,) = (alert for alert in bundle.query('ALERTS{alertname="GlmRequestsRefused", alertstate="firing"}'))
    assert refused["metric"]["reason"] == "queue_full"


def test_failing_users_passed_limits_and_lost_messages_are_told(bundle):
    bundle.question = picture_question
    bundle.fault("blind")
    bundle.checker |= {
        "GLM_MEMORY_LIMIT_PERCENT": "0.1", "GLM_CPU_LIMIT_PERCENT": "0.1", "GLM_DISK_FREE_LIMIT_MIB": "1e9",
        "GLM_WEBHOOK_URL": "http://127.0.0.1:9/",
    }  # fmt: skip

    bundle.until_firing("GlmUsersFail", "GlmTargetDown", "GlmLimitPassed", "GlmAlertDeliveryFailing")

    passed = {series["metric"]["name"] for series in bundle.query('ALERTS{alertname="GlmLimitPassed"}')}
    assert {"memory_used_percent", "disk_free_mib"} <= passed


def test_a_dead_api_is_told_even_without_the_checker(bundle):
    bundle.checker = CHECKER | {"GLM_CURE": "restart", "GLM_RESTARTS_PER_HOUR": "0"}
    bundle.late_scrapes = bundle.webhook.times("firing", alertname="GlmApiNotScraped")
    os.kill(bundle.pid(), signal.SIGKILL)
    bundle.fault("")

    bundle.until_firing("GlmTargetDown", "GlmCircuitOpen", "GlmApiNotScraped")
    bundle.until(lambda: bundle.webhook.times("firing", alertname="GlmCircuitOpen", target="api"), "Alertmanager delivers it")
    assert bundle.webhook.times("firing", alertname="GlmTargetDown", target="api") == 1


def test_a_checker_that_stopped_and_a_full_disk_are_told(bundle):
    """On a full disk only what is sent to the Pushgateway still arrives, because health.prom cannot be written."""
    bundle.checker, bundle.runs = dict(CHECKER), False
    with full_disk(bundle) as logs:
        bundle.check("run", "--quiet", "--no-act", GLM_LOG_DIR=str(logs), GLM_PUSHGATEWAY_URL=bundle.pushgateway)

        bundle.until_firing("GlmStoreNotWritten", "GlmCheckerStale")
    assert "GlmApiNotScraped" in bundle.firing()
    assert bundle.webhook.times("firing", alertname="GlmApiNotScraped") == bundle.late_scrapes, "it follows from GlmTargetDown"


def test_what_is_mended_is_told_once_and_ends(bundle):
    bundle.question = any_question
    assert bundle.check("reset", "--reason", "mended").returncode == 0
    # The Pushgateway keeps what was sent on the full disk until more comes.
    bundle.checker |= {"GLM_CURE": "restart", "GLM_PUSHGATEWAY_URL": bundle.pushgateway}
    bundle.runs = True

    # Failed deliveries are counted over half an hour.
    bundle.until(lambda: bundle.firing() - {"GlmAlertDeliveryFailing"} == QUIET, "only the watchdog fires")
    bundle.until(lambda: bundle.webhook.times("resolved", alertname="GlmTargetDown", target="api"), "Alertmanager says so")

    time.sleep(6)  # two more intervals of the group
    for name in ("GlmTargetDown", "GlmCircuitOpen"):
        told = [bundle.webhook.times(status, alertname=name, target="api") for status in ("firing", "resolved")]
        assert told == [1, 1], name


def test_every_rule_was_evaluated_and_fired(bundle):
    evaluated = [rule for group in bundle.get("rules")["groups"] for rule in group["rules"]]
    fired = {series["metric"]["alertname"] for series in bundle.history('ALERTS{alertstate="firing"}')}

    assert {rule["name"]: rule["health"] for rule in evaluated} == {rule["alert"]: "ok" for rule in RULES}
    assert fired == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_of_a_dashboard_has_values(path: Path, bundle):
    """Those of the card too: of the readings that the checker writes where there is one."""
    panels = json.loads(path.read_text())["panels"]
    asked = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]

    empty = []
    for title, expression in asked:
        series = bundle.history(expression.replace("$__rate_interval", "30s"))
        if not any(math.isfinite(float(value)) for one in series for _, value in one["values"]):
            empty.append(f"{title}: {expression}")
    assert asked and not empty


def test_every_metric_that_is_named_is_exported(bundle):
    """Also behind `or` and in a matcher that lets everything pass, where an empty answer would not show it."""
    names = {name for name in bundle.get("label/__name__/values")}
    used = set(re.findall(r"\bglm_\w+", "\n".join(str(rule["expr"]) for rule in RULES)))
    for path in DASHBOARDS:
        used |= {name for panel in json.loads(path.read_text())["panels"] for target in panel["targets"] for name in re.findall(r"\bglm_\w+", target["expr"])}

    assert used and used <= names
    documented = (ROOT / "docs" / "monitoring.md").read_text()
    assert all(path.stem in documented for path in DASHBOARDS)
