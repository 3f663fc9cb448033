"""The console of a service of several replicas: a row for each, their incidents, and an action for each."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from console_record import HEALTHY, WEDGED, incident_of

from monitor.store.store import Store
from web.console import checker_store
from web.console.api_metrics import parse
from web.console.log_tail import logs_of
from web.console.operator_actions import ACTIONS, actions_of
from web.console.page import target_name
from web.console.replicas_view import row
from web.i18n.strings import Texts

REPLICAS = [
    {"number": 0, "port": 8090, "card": "3", "since": 100.0, "restarts_last_day": 2, **WEDGED},
    {"number": 1, "port": 8091, "card": "", "since": None, "restarts_last_day": 0, **HEALTHY},
]


def test_each_replica_is_a_row_with_its_card_its_state_and_its_reason() -> None:
    texts, chinese = Texts("en"), Texts("zh")

    rows = [row(each, texts, str.upper, lambda at: f"at {at:g}") for each in REPLICAS]

    assert rows[0].startswith("| 0 | card 3, port 8090 | **WEDGED** | at 100 | 2 | The engine has made no step for 140 s")
    assert rows[1] == "| 1 | port 8091 | **HEALTHY** | – | 0 | It answered rightly. |"
    assert "显卡 3，端口 8090" in row(REPLICAS[0], chinese, str, str)


def test_the_incidents_of_the_replicas_are_read_from_their_stores_and_named(tmp_path: Path) -> None:
    now = time.time()
    report = {"duration_s": 1.0, "verdict": "degraded", "service_healthy": True, "replicas": REPLICAS}
    with closing(Store.open(tmp_path)) as store, store.transaction():
        store.add_run(now, report, {"api": HEALTHY}, {})
        store.put_incident({**incident_of(now, 600, 300), "id": "whole", "target": "front"})
    folder = tmp_path / "replicas" / "1"
    (folder / "incidents" / "one" / "1").mkdir(parents=True)
    (folder / "incidents" / "one" / "1" / "log.txt").write_text("a line")
    with closing(Store.open(folder)) as store, store.transaction():
        store.put_incident({**incident_of(now, 300, 100), "id": "one"})
        store.add_flip(now, "api", "healthy", "wedged", "stalled", "e", "z")

    history = checker_store.read(tmp_path, now)

    assert [(each["id"], each["target"]) for each in history.incidents] == [("one", "api/1"), ("whole", "front")]
    assert history.flips[0]["target"] == "api/1"
    assert [path.name for path in checker_store.evidence_files(tmp_path, "one")] == ["log.txt"]
    assert [target_name(target, Texts("en")) for target in ("api/1", "front", "api")] == ["Replica 1", "nginx", "Model server"]


def test_each_replica_and_nginx_can_be_restarted_by_itself() -> None:
    several = actions_of(2)

    assert actions_of(1) == ACTIONS
    assert [(each.target, each.name) for each in several if each.kind == "restart"] == [
        ("api", "restart_api"), ("api/0", "restart_replica"), ("api/1", "restart_replica"), ("front", "restart_front"), ("page", "restart_page"),
    ]  # fmt: skip
    assert all(each.typed for each in several if each.kind == "restart")
    assert Texts("en")("act.restart_replica", number=several[2].replica) == "Restart replica 0"
    assert Texts("zh")("act.restart_replica_what", number="1").startswith("副本 1")


def test_logs_and_metrics_are_of_all_replicas() -> None:
    assert logs_of(2) == ("replicas/0/api.log", "replicas/1/api.log", "front.log", "web.log", "health.jsonl")
    text = 'glm_kv_cache_usage_perc {}\nglm_prompt_tokens_cached_total{{traffic="user"}} {}\nglm_prompt_tokens_total{{traffic="user"}} {}\n'

    both = parse(text.format(0.2, 10, 100), text.format(0.6, 80, 100))

    assert (round(both.kv_used or 0, 3), both.reused) == (0.4, 0.45)
    assert parse("").kv_used is None
