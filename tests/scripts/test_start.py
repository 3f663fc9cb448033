"""start.sh: what it starts, what it refuses to start, and what it prints."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


def test_both_answer_when_it_returns_and_a_second_call_changes_nothing(project, machine):
    first = project.run("./start.sh")
    pids = {part: project.pid(part) for part in ("api", "web")}

    second = project.run("./start.sh")

    assert first.returncode == 0, first.stderr
    assert all(machine.listens(port) for port in project.ports.values())
    assert f"http://127.0.0.1:{project.ports['api']}/v1" in first.stdout
    assert f"http://127.0.0.1:{project.ports['web']}/?token=" in first.stdout
    assert str(project.root / "logs") in first.stdout
    assert second.returncode == 0
    assert second.stdout.count("Already running") == 2
    assert {part: project.pid(part) for part in ("api", "web")} == pids


def test_one_part_alone(project, machine):
    started = project.run("./start.sh web")

    assert started.returncode == 0, started.stderr
    assert machine.listens(project.ports["web"]) and not machine.listens(project.ports["api"])
    assert not (project.root / "logs" / "api.pid.json").exists()


def test_a_port_in_use_is_reported_with_its_owner_and_nothing_is_started(project, unrelated, machine):
    port = project.ports["web"]
    other = unrelated(sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    machine.until(lambda: machine.listens(port), "the other process listens")

    started = project.run("./start.sh")

    assert started.returncode == 3
    assert f"port {port} is held by pid {other.pid}" in started.stderr
    assert "-m http.server" in started.stderr
    assert "Nothing was started" in started.stderr
    assert not machine.listens(project.ports["api"])
    assert not list((project.root / "logs").glob("*.pid.json"))
    assert other.poll() is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("GLM_API_PROT", "1", "Did you mean GLM_API_PORT"), ("GLM_QUEUE_SIZE", "0", "GLM_QUEUE_SIZE")],
)
def test_an_invalid_setting_is_reported_and_nothing_is_started(project, name, value, message):
    started = project.run("./start.sh", **{name: value})

    assert started.returncode == 2
    assert message in started.stderr
    assert "Nothing was started" in started.stderr
    assert not (project.root / ".env").exists()
    assert not list((project.root / "logs").glob("*.pid.json"))


def test_two_parts_on_one_port_are_rejected(project):
    started = project.run("./start.sh", GLM_WEB_PORT=project.env["GLM_API_PORT"])

    assert started.returncode == 2
    assert "they must differ" in started.stderr


def test_an_unknown_argument_is_rejected(project):
    started = project.run("./start.sh everything")

    assert started.returncode == 2
    assert "usage" in started.stderr


def test_an_api_that_exits_at_once_is_reported_with_its_log(project, machine):
    logs = project.root / "logs"
    logs.mkdir()
    (logs / "api.log").write_text("a line of yesterday\n")

    started = project.run("./start.sh", STAND_IN_API="die")

    assert started.returncode == 1
    assert "The API exited right after it was started" in started.stderr
    assert "there is no such model: nowhere/at-all" in started.stderr
    assert "a line of yesterday" not in started.stderr
    assert project.log("api").startswith("a line of yesterday\n")
    assert not any(machine.listens(port) for port in project.ports.values()), (
        "the page was started too and must be stopped"
    )
    assert not list(logs.glob("*.pid.json"))


def test_a_dead_engine_is_reported_with_its_reason(project):
    started = project.run("./start.sh", STAND_IN_API="dead")

    assert started.returncode == 1
    assert "the engine thread ended" in started.stderr


def test_an_api_that_never_answers_fails_the_start_at_its_time_limit(project, machine):
    started = project.run("./start.sh api", STAND_IN_API="deaf", GLM_START_TIMEOUT_S="3")

    assert started.returncode == 1
    assert "does not answer after 3 s" in started.stderr
    assert "stand-in API starts" in started.stderr
    assert not (project.root / "logs" / "api.pid.json").exists()


def test_a_long_load_is_not_a_failure(project, machine):
    started = project.run("./start.sh", STAND_IN_API="loading", GLM_START_TIMEOUT_S="3")

    assert started.returncode == 0, started.stderr
    assert "still loads the model (40 %)" in started.stdout
    assert machine.listens(project.ports["api"])


def test_two_starts_at_once_start_everything_once(project):
    both = project.run("./start.sh & first=$!; ./start.sh; second=$?; wait $first; exit $((second + $?))")

    assert both.returncode == 0, both.stderr
    assert project.log("api").count("stand-in API starts") == 1
    assert project.log("web").count("stand-in page starts") == 1


def test_servers_do_not_inherit_the_lock(project):
    project.run("./start.sh")

    taken = project.run("flock -n logs/start.lock true")

    assert taken.returncode == 0


def test_logs_are_appended_to(project):
    for _ in range(2):
        assert project.run("./start.sh").returncode == 0
        assert project.run("./stop.sh").returncode == 0

    assert project.log("api").count("stand-in API starts") == 2


def test_each_server_leads_a_session_of_its_own(project):
    project.run("./start.sh")

    for part in ("api", "web"):
        pid = project.pid(part)
        shown = subprocess.run(["ps", "-o", "sid=,pgid=", "-p", str(pid)], capture_output=True, text=True, check=True)
        assert shown.stdout.split() == [str(pid), str(pid)]


def test_low_disk_stops_the_start(project, stub):
    stub("df", "echo head; echo /dev/x 100 100 1024 99% /")

    started = project.run("./start.sh")

    assert started.returncode == 2
    assert "disk" in started.stderr
    assert not list((project.root / "logs").glob("*.pid.json"))


def test_a_changed_port_is_noticed_while_the_old_one_runs(project):
    project.run("./start.sh api")

    started = project.run("./start.sh api", GLM_API_PORT="1")

    assert started.returncode == 3
    assert f"is already running on port {project.ports['api']}" in started.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_stops_what_it_started(project, machine, number):
    env = {**project.env, "STAND_IN_API": "deaf"}
    log = project.root / "logs" / "api.log"
    starting = subprocess.Popen(
        ["./start.sh"], cwd=project.root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # Under a shell's background job SIGINT is ignored, which child processes inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    machine.until(lambda: log.exists() and "stand-in API starts" in log.read_text(), "the API runs")
    machine.until((project.root / "logs" / "api.pid.json").exists, "it is recorded")
    pid = project.pid("api")

    starting.send_signal(number)

    assert starting.wait(timeout=60) == 1
    assert not machine.runs(pid)
    assert not list((project.root / "logs").glob("*.pid.json"))
