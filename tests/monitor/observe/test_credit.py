"""When users' answers may replace a question: a stand-in that signs as the API does, and strangers that copy what it says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from signing import proof_of
from stand_in_model import completion

from monitor import check
from monitor.observe.observe import now
from monitor.observe.processes import ProcessRecord, boot_id, read_stat, write_record

TOKEN = "only-the-two-know-it"
FRESH = {"text": 5.0, "picture": 5.0}


def record_of(pid: int, port: int) -> ProcessRecord:
    stat = read_stat(pid)
    assert stat is not None
    return ProcessRecord(pid, stat.start_time, port, boot_id())


def said_by(record: ProcessRecord, **changes) -> dict:
    """What the API of that process says in /health."""
    identity = {"pid": record.pid, "start_time": record.start_time, "boot_id": record.boot_id, "version": "1.0"}
    outcomes = {"answered": {"text": 10, "picture": 3}, "failed": {}}
    return {"state": "idle", "steps": 7, "running": 0, "waiting": 0, "success_age_s": FRESH, "identity": identity, "outcomes": outcomes, **changes}


class Runs:
    """Consecutive runs of the checker, a minute apart."""

    def __init__(self, settings) -> None:
        self.settings = settings
        self.moment = now()

    def run(self, after_s: float = 60.0) -> dict:
        self.moment = replace(self.moment, wall=self.moment.wall + after_s, monotonic=self.moment.monotonic + after_s)
        return check.run(self.settings, random.Random(1), clock=lambda: self.moment).report


def outcomes_of(report: dict) -> list[str]:
    return [answer["outcome"] for answer in report["evidence"]["api"]["answers"]]


@pytest.fixture
def api(service, behaviour, describe, make_settings):
    """The stand-in as the recorded process, which knows the token and has answered users."""
    settings = make_settings(service, probe_token=TOKEN)
    record = record_of(os.getpid(), service)
    write_record(settings.log_dir, "api", record)
    behaviour.token = TOKEN
    behaviour.reply = lambda body: (200, completion(describe(body)))
    behaviour.health = lambda: (200, said_by(record))
    runs = Runs(settings)
    first = runs.run()
    assert outcomes_of(first) == ["right", "right"], "the first run asks"
    behaviour.record = record
    return runs


def test_answers_to_users_replace_the_question_for_a_limited_time(api, behaviour) -> None:
    second, third, fourth = api.run(), api.run(), api.run()

    assert outcomes_of(second) == outcomes_of(third) == ["credited", "credited"]
    assert second["verdict"] == "healthy" and "no question was needed" in second["targets"]["api"]["en"]
    assert outcomes_of(fourth) == ["right", "right"], "every three minutes it is asked for real"


UNTRUSTED = {
    "no proof": ({}, "", "gave no proof"),
    "the proof of another token": ({}, "another", "proof is wrong"),
    "an older version": ({"identity": None}, "", "of a version that proves nothing"),
    "another process": ({"identity": {"pid": 1, "start_time": 1, "boot_id": "b"}}, TOKEN, "process 1 answers"),
    "outcomes are not counted": ({"outcomes": None}, TOKEN, "not known"),
    "users fail": ({"outcomes": {"answered": {"text": 10, "picture": 3}, "failed": {"engine": 1}}}, TOKEN, "1 of 1 users' requests failed"),
    "ages below zero": ({"success_age_s": {"text": -5.0, "picture": -1}}, TOKEN, ""),
    "ages that are no numbers": ({"success_age_s": {"text": "1", "picture": float("nan")}}, TOKEN, ""),
}


@pytest.mark.parametrize("case", UNTRUSTED)
def test_without_trust_the_questions_are_asked(api, behaviour, case) -> None:
    changes, token, why = UNTRUSTED[case]
    behaviour.health = lambda: (200, said_by(behaviour.record, **changes))
    behaviour.token = token

    report = api.run()

    assert outcomes_of(report) == ["right", "right"]
    assert why in report["evidence"]["api"]["no_credit"]


def test_a_changed_probe_token_is_told_when_it_stays_and_restarts_nothing(api, behaviour) -> None:
    behaviour.token = "as it was at the start"

    first, second = api.run(), api.run()

    assert (first["verdict"], second["verdict"]) == ("healthy", "degraded")
    told = second["targets"]["api"]
    assert told["rule"] == "probe_token_differs" and told["decision"]["kind"] == "none" and "GLM_PROBE_TOKEN" in told["zh"]
    behaviour.token = TOKEN
    assert api.run()["verdict"] == "healthy"


def test_an_older_version_is_asked_each_time_and_nothing_is_wrong(api, behaviour) -> None:
    behaviour.health = lambda: (200, {"state": "idle", "steps": 7, "success_age_s": FRESH})

    reports = [api.run() for _ in range(3)]

    assert [outcomes_of(report) for report in reports] == [["right", "right"]] * 3
    assert {report["verdict"] for report in reports} == {"healthy"}
    assert "proves nothing" in reports[-1]["targets"]["api"]["facts"]["no_credit"]


def test_failing_users_are_told_at_once_and_cured_when_it_stays(api, behaviour) -> None:
    reports = []
    for failed in (2, 9, 18, 27):
        outcomes = {"answered": {"text": 40}, "failed": {"engine": failed, "memory": 1}}
        behaviour.health = lambda outcomes=outcomes: (200, said_by(behaviour.record, outcomes=outcomes))
        reports.append(api.run())

    words = [report["targets"]["api"]["word"] for report in reports]
    assert words == ["degraded", "degraded", "broken", "broken"]
    assert "3 of 30 users' requests failed" in reports[0]["reasons"][0] and "engine 2, memory 1" in reports[0]["reasons"][0]
    assert all(outcomes_of(report) == ["right", "right"] for report in reports), "no credit while users fail"
    assert reports[2]["targets"]["api"]["decision"]["kind"] == "shadow"


STRANGER = textwrap.dedent("""
    import http.server, json, sys
    copied = open(sys.argv[1], "rb").read()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(copied)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
""")


@pytest.fixture
def stranger(tmp_path):
    """Starts a process that answers everything with a copied /health, proof included."""
    started = []

    def start(copied: dict):
        (tmp_path / "copied.json").write_text(json.dumps(copied))
        command = [sys.executable, "-c", STRANGER, str(tmp_path / "copied.json")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("alive", [False, True], ids=["the api is dead", "the api lives elsewhere"])
def test_a_stranger_with_a_copied_health_is_never_credited(stranger, make_settings, alive) -> None:
    api = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        record = record_of(api.pid, 0)
        body = said_by(record)
        port = stranger({**body, "proof": proof_of(body, "00" * 16, TOKEN)})
        settings = make_settings(port, probe_token=TOKEN, web_port=1)
        write_record(settings.log_dir, "api", replace(record, port=port))
        if not alive:
            api.kill()
            api.wait()
        runs = Runs(settings)

        reports = [runs.run() for _ in range(3)]
    finally:
        api.kill()
        api.wait()

    assert [(r["verdict"], r["targets"]["api"]["rule"], r["service_healthy"]) for r in reports] == [("dead", "port_taken", False)] * 3
    assert not any("credited" in outcomes_of(report) for report in reports)
    assert f"{sys.executable}" in reports[0]["reasons"][0], "who holds the port is named"


def test_a_stranger_where_nothing_was_started_here_is_asked(stranger, make_settings) -> None:
    body = said_by(record_of(os.getpid(), 0))
    settings = make_settings(stranger({**body, "proof": proof_of(body, "00" * 16, TOKEN)}), probe_token=TOKEN, web_port=1)
    runs = Runs(settings)
    reports = [runs.run() for _ in range(3)]

    assert {report["targets"]["api"]["word"] for report in reports} == {"broken"}
    assert "proof is wrong" in reports[-1]["evidence"]["api"]["no_credit"]


def test_a_dead_process_is_dead_though_right_answers_come(api, behaviour) -> None:
    """As where another namespace holds the port, so that no owner of it is to be seen here."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    record = ProcessRecord(gone.pid, read_stat(gone.pid).start_time, 9, boot_id())
    gone.wait()
    write_record(api.settings.log_dir, "api", record)
    behaviour.health = lambda: (200, said_by(record))

    report = api.run()

    assert (report["verdict"], report["service_healthy"]) == ("dead", False)
    assert report["targets"]["api"]["rule"] == "process_gone"


def test_another_process_that_says_so_is_named(api, behaviour) -> None:
    other = said_by(replace(behaviour.record, pid=1))
    behaviour.health = lambda: (200, other)

    report = api.run()

    assert (report["verdict"], report["targets"]["api"]["rule"]) == ("broken", "other_process")
    assert report["targets"]["api"]["decision"]["kind"] == "none"


def test_a_run_that_asks_nothing_is_quick(api) -> None:
    began = time.monotonic()
    api.run()

    assert time.monotonic() - began < 3
