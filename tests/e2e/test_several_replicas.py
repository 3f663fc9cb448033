"""Two replicas behind nginx: one of them killed, stopped and wedged under load, nginx killed, both killed, stopped and started again.

Everything is real: start.sh, both APIs with the demo model, nginx, the page, the checker's runs. The tests run in this order: one life
of one service.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
import pytest

from bench.project_copy import ProjectCopy, started_copy
from bench.replicas import measure
from monitor.observe import processes

WAIT_S = 300.0
SETTINGS = {
    "GLM_DEVICE": "cpu", "GLM_SLOTS": "4", "GLM_TEST_FAULTS": "true", "GLM_CHECK_PERIOD_S": "1", "GLM_CONFIRM_RUNS": "2", "GLM_STALL_S": "3",
    "GLM_BEAT_LIMIT_S": "3", "GLM_PROBE_CREDIT_S": "0", "GLM_CHECK_BUDGET_S": "150", "GLM_PROBE_TIMEOUT_S": "10", "GLM_RESTARTS_PER_HOUR": "50",
    "GLM_RESTARTS_PER_DAY": "90", "GLM_DRAIN_S": "1",
}  # fmt: skip
TARGETS = ("api/0", "api/1", "front", "web")
# Longer than any pause of a service that goes on, on a machine that is busy with other tests; shorter than any cure here by chance.
PAUSE_S = 20.0


@pytest.fixture(scope="module")
def copy() -> Iterator[ProjectCopy]:
    with started_copy(SETTINGS, "several", replicas=2) as copy:
        yield copy


def record(copy: ProjectCopy, part: str) -> processes.ProcessRecord | None:
    kind, _, number = part.partition("/")
    folder = copy.log_dir / "replicas" / number if number else copy.log_dir
    return processes.read_record(folder, kind, copy.folder)


def pids(copy: ProjectCopy) -> dict[str, int]:
    """Of those that run."""
    found = {part: record(copy, part) for part in TARGETS}
    return {part: one.pid for part, one in found.items() if one is not None and processes.is_running(one)}


def check(copy: ProjectCopy) -> dict:
    """The report of a run of the checker."""
    done = copy.run(*copy.command("run"))
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)


def words(report: dict) -> list[str]:
    return [replica["word"] for replica in report["replicas"]]


def forget_restarts(copy: ProjectCopy) -> None:
    """The back-off of an earlier test must not delay this one. In force with the next run, for the whole and each replica."""
    assert copy.run(*copy.command("reset", "--reason", "the next test")).returncode == 0


def check_until_healthy(copy: ProjectCopy) -> list[dict]:
    """The reports of the runs until all is well."""
    reports: list[dict] = []
    deadline = time.monotonic() + WAIT_S
    while not reports or reports[-1]["verdict"] != "healthy":
        assert time.monotonic() < deadline, [each["reasons"] for each in reports]
        reports.append(check(copy))
    return reports


def restarts(copy: ProjectCopy, number: int) -> int:
    with sqlite3.connect(f"file:{copy.log_dir}/replicas/{number}/state.db?mode=ro", uri=True) as store:
        return store.execute("SELECT COUNT(*) FROM actions WHERE kind = 'restart' AND outcome = 'done'").fetchone()[0]


@dataclass
class Load:
    """What six users saw: each asks one question after another, every second one streamed. `lost`: ended, but neither in an answer
    nor in an error."""

    answered: list[float] = field(default_factory=list)  # when, on the monotonic clock
    errors: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def longest_pause_s(self, since: float) -> float:
        times = [since, *sorted(at for at in self.answered if at > since)]
        return max(later - earlier for earlier, later in pairwise(times))


@contextmanager
def load(copy: ProjectCopy) -> Iterator[Load]:
    """Leaves once every question that was begun has ended."""
    seen, stop = Load(), threading.Event()
    threads = [threading.Thread(target=_ask_on, args=(copy, number, seen, stop)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + WAIT_S
        while len(seen.answered) < 12:
            assert time.monotonic() < deadline and not seen.errors, seen
            time.sleep(0.05)
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads), "a question never ended"


def _ask_on(copy: ProjectCopy, number: int, seen: Load, stop: threading.Event) -> None:
    body = {"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 16, "ignore_eos": True, "stream": number % 2 == 0}
    headers = {"Authorization": f"Bearer {copy.key}", "x-session-id": f"user-{number}"}
    while not stop.is_set():
        try:
            with httpx.Client(headers=headers, timeout=WAIT_S) as client, client.stream("POST", f"{copy.url}/v1/chat/completions", json=body) as reply:
                text = reply.read().decode()
        except httpx.HTTPError as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            continue
        finally:
            stop.wait(0.1)  # two cores are all there is, and the checker works too
        if reply.status_code != 200 or '"error"' in text:
            seen.errors.append(f"HTTP {reply.status_code}: {text[-200:]}")
        elif ("data: [DONE]" in text) if body["stream"] else ('"finish_reason"' in text):
            seen.answered.append(time.monotonic())
        else:
            seen.lost.append(text[-200:])


def test_start_sh_starts_an_api_for_each_replica_and_nginx_before_them(copy: ProjectCopy) -> None:
    assert set(pids(copy)) == set(TARGETS)
    assert "GLM_REPLICAS=2" in (copy.folder / ".env").read_text().splitlines()
    assert not (copy.log_dir / "api.pid.json").exists()

    again = copy.run("bash", "start.sh")

    assert again.returncode == 0 and again.stdout.count("Already running") == 4, again.stdout + again.stderr
    assert "earlier" not in again.stdout and "older" not in again.stdout


def test_nginx_hands_out_readings_by_replica_and_refuses_what_would_be_one_of_them_by_chance(copy: ProjectCopy) -> None:
    with httpx.Client(base_url=copy.url, headers={"Authorization": f"Bearer {copy.key}"}, timeout=WAIT_S) as client:
        whole, control = client.get("/metrics"), client.post("/control", json={"action": "drop-caches"})
        each = [client.get(f"/replicas/{number}/health").json()["identity"]["pid"] for number in (0, 1)]

        assert whole.status_code == 404 and "/replicas/{0..1}/metrics" in whole.json()["error"]["message"]
        assert control.status_code == 404
        assert each == [pids(copy)["api/0"], pids(copy)["api/1"]]
        assert "glm_" in client.get("/replicas/1/metrics").text
        assert client.get("/replicas/2/health").status_code == 404
        assert client.get("/health").status_code == client.get("/info").status_code == 200


def test_the_checker_judges_each_replica_nginx_the_page_and_the_whole(copy: ProjectCopy) -> None:
    report = check_until_healthy(copy)[-1]

    assert report["service_healthy"] is True
    assert {name: target["word"] for name, target in report["targets"].items()} == {"api": "healthy", "front": "healthy", "page": "healthy"}
    assert [(each["number"], each["word"], each["port"]) for each in report["replicas"]] == [
        (0, "healthy", copy.api_port + 10), (1, "healthy", copy.api_port + 11),
    ]  # fmt: skip
    metrics = (copy.log_dir / "health.prom").read_text()
    assert 'glm_replica_state{replica="1",state="healthy"} 1.0' in metrics
    assert json.loads((copy.log_dir / "replicas" / "1" / "health.json").read_text())["targets"]["api"]["word"] == "healthy"
    status, doctor = copy.run(*copy.command("status")), copy.run(*copy.command("doctor"))
    assert re.search(rf"replica 1 \(port {copy.api_port + 11}\) healthy", status.stdout), status.stdout
    assert "[ ok ] replica 1: healthy" in doctor.stdout and "[ ok ] front: process" in doctor.stdout, doctor.stdout


def test_follow_up_questions_of_a_named_chat_find_their_picture(copy: ProjectCopy) -> None:
    found = measure(copy.url, copy.key, chats=6, turns=4)

    named, nameless = found["with"], found["without"]
    assert named.full == named.asked == 18
    assert nameless.full < 18
    assert named.share > nameless.share


def kill(copy: ProjectCopy, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(copy: ProjectCopy, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def wedge(copy: ProjectCopy, pid: int) -> None:
    """Its next step never ends."""
    fault = {"fault": "hang-step", "seconds": 600, "pid": pid}
    (copy.log_dir / "replicas" / "0" / "api.fault").write_text(json.dumps(fault))


@pytest.mark.parametrize("harm", [kill, stop, wedge])
def test_one_replica_fails_under_load_and_the_other_serves_until_it_is_cured(copy: ProjectCopy, harm) -> None:
    forget_restarts(copy)
    before, restarted, other = pids(copy), restarts(copy, 0), restarts(copy, 1)
    with load(copy) as seen:
        began = time.monotonic()
        harm(copy, before["api/0"])
        if harm is wedge:
            time.sleep(4)  # GLM_STALL_S
        reports = [check(copy)]
        while pids(copy).get("api/0", before["api/0"]) == before["api/0"] or reports[-1]["verdict"] != "healthy":
            assert time.monotonic() < began + WAIT_S, [each["reasons"] for each in reports]
            reports.append(check(copy))
        after, cured = pids(copy), time.monotonic()
        while not any(at > cured for at in seen.answered):
            time.sleep(0.05)
        pause_s = seen.longest_pause_s(began)

    assert after["api/0"] != before["api/0"]
    assert {part: after[part] for part in TARGETS[1:]} == {part: before[part] for part in TARGETS[1:]}, "only that one was restarted"
    assert (restarts(copy, 0), restarts(copy, 1)) == (restarted + 1, other)
    assert all(report["service_healthy"] is not False for report in reports), [each["reasons"] for each in reports]
    assert seen.lost == []
    assert pause_s < PAUSE_S, f"nobody was answered for {pause_s:.1f} s"
    # An answer whose first byte had been sent is cut, visibly; each of the three streams met that at most once.
    assert len(seen.errors) <= 3, seen.errors


def test_a_replica_that_does_not_serve_gets_no_requests_until_it_does(copy: ProjectCopy) -> None:
    conf = copy.log_dir / "front.nginx.conf"
    forget_restarts(copy)
    paused = copy.run(*copy.command("pause", "--reason", "test"))
    os.kill(pids(copy)["api/1"], signal.SIGKILL)

    down = check(copy)

    assert paused.returncode == 0
    assert words(down) == ["healthy", "dead"] and down["verdict"] == "degraded"
    assert down["replicas"][1]["decision"] == "hold", "the pause is the replicas' too"
    assert f":{copy.api_port + 11} max_fails=0 down;" in conf.read_text()
    copy.run(*copy.command("resume"))
    assert words(check_until_healthy(copy)[-1]) == ["healthy", "healthy"]
    assert " down;" not in conf.read_text()


def test_nginx_that_was_killed_is_started_again_and_the_replicas_are_left_alone(copy: ProjectCopy) -> None:
    before = pids(copy)
    found = record(copy, "front")
    assert found is not None
    for pid in processes.members(found):
        os.kill(pid, signal.SIGKILL)

    reports = check_until_healthy(copy)

    assert httpx.get(f"{copy.url}/health", timeout=WAIT_S).status_code == 200
    after = pids(copy)
    assert after["front"] != before["front"]
    assert {part: after[part] for part in ("api/0", "api/1", "web")} == {part: before[part] for part in ("api/0", "api/1", "web")}
    assert reports[-1]["targets"]["front"]["incident"]


def test_an_operator_restarts_one_replica_by_its_number(copy: ProjectCopy) -> None:
    before = pids(copy)

    done = copy.run(*copy.command("restart", "api/1"))

    after = pids(copy)
    assert after["api/1"] != before["api/1"], done.stdout + done.stderr
    assert after["api/0"] == before["api/0"]
    with sqlite3.connect(f"file:{copy.log_dir}/state.db?mode=ro", uri=True) as store:
        state, outcome = store.execute("SELECT state, outcome FROM requests ORDER BY id DESC LIMIT 1").fetchone()
    assert (state, outcome) == ("done", "replica 1: restarted")


def test_two_dead_replicas_are_both_started_in_one_run(copy: ProjectCopy) -> None:
    forget_restarts(copy)
    before = pids(copy)
    for part in ("api/0", "api/1"):
        os.kill(before[part], signal.SIGKILL)

    report = check(copy)

    after = pids(copy)
    assert set(after) == set(TARGETS) and not {after["api/0"], after["api/1"]} & {before["api/0"], before["api/1"]}, report["reasons"]
    check_until_healthy(copy)


def test_another_set_is_refused_while_this_one_runs(copy: ProjectCopy) -> None:
    settings = (copy.folder / ".env").read_text()

    alone, more = copy.run("bash", "start.sh", "--replicas", "1"), copy.run("bash", "start.sh", "--replicas", "x")

    assert (alone.returncode, more.returncode) == (2, 2)
    assert "The API runs as several replicas, and the settings say one. Stop them first: ./stop.sh api" in alone.stderr
    assert "GLM_REPLICAS" in more.stderr and "Given: 'x'" in more.stderr
    assert (copy.folder / ".env").read_text() == settings


def test_stop_sh_stops_all_and_start_sh_starts_the_same_set(copy: ProjectCopy) -> None:
    found = {part: record(copy, part) for part in TARGETS}

    stopped = copy.run("bash", "stop.sh")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert not any(processes.members(one) for one in found.values() if one is not None)
    report = check(copy)
    assert report["service_healthy"] is False and pids(copy) == {}, "what was stopped on purpose is not started"

    started = copy.run("bash", "start.sh")

    assert started.returncode == 0, started.stdout + started.stderr
    assert set(pids(copy)) == set(TARGETS)
    assert f"API:   http://127.0.0.1:{copy.api_port}/v1" in started.stdout
    assert httpx.get(f"{copy.url}/health", timeout=WAIT_S).status_code == 200
