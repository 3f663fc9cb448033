"""start.sh: what it starts, what it refuses to start, and what it prints."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from monitor.observe import processes


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
    [("GLM_API_PROT", "1", "Did you mean GLM_API_PORT"), ("GLM_QUEUE_SIZE", "-1", "GLM_QUEUE_SIZE")],
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
    assert "reports that it cannot serve: the engine thread ended. The last lines" in started.stderr


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


def test_a_download_is_shown_in_bytes(project):
    started = project.run("./start.sh api", STAND_IN_API="download", STAND_IN_LOAD_S="600", GLM_START_TIMEOUT_S="3")

    assert started.returncode == 0, started.stderr
    lines = [line for line in started.stdout.splitlines() if "downloads the model" in line]
    assert len(lines) == 1, "a line each few seconds, not one for each look"
    assert re.search(
        r"The API downloads the model: 0\.\d\d GB of 27\.12 GB from ModelScope \(modelscope\.cn\) \(\d %\), 45\.2 MB/s, 10 min left; "
        r"Hugging Face \(huggingface\.co\) cannot be reached",
        lines[0],
    )
    assert "is up and still loads the model (0." in started.stdout


class Terminal:
    """start.sh at a terminal of 80 columns, as a person sees it."""

    def __init__(self, project, **extra: str) -> None:
        self.seen = b""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(project.root)
            os.execvpe("bash", ["bash", "./start.sh", "api"], {**project.env, "TERM": "xterm", **extra})
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def until(self, text: str, limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while text.encode() not in self.seen:
            assert time.monotonic() < deadline, self.seen.decode()
            self._read()

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def exit_code(self) -> int:
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        try:
            received = os.read(self._terminal, 65536)
        except OSError:  # the other side is closed
            return False
        self.seen += received
        return bool(received)


def test_a_terminal_shows_a_long_download_until_the_model_answers(project, machine):
    terminal = Terminal(project, STAND_IN_API="download", STAND_IN_LOAD_S="8", GLM_START_TIMEOUT_S="2")

    assert terminal.exit_code() == 0
    seen = terminal.seen.decode()
    shown = [line for line in re.split(r"[\r\n]+", seen) if line.startswith("The API downloads the model")]
    assert len(shown) > 8, "it is written anew"
    assert all(len(line.removesuffix("\x1b[K")) < 80 for line in shown)
    assert seen.index("API:   http://") < seen.index("Ctrl-C ends this display") < seen.index("The API answers")


def test_ctrl_c_ends_the_display_and_not_the_download(project, machine):
    terminal = Terminal(project, STAND_IN_API="download", STAND_IN_LOAD_S="600", GLM_START_TIMEOUT_S="2")
    terminal.until("Ctrl-C ends this display")
    terminal.until("The API downloads the model: 0.2")

    waiting = project.run("flock -n logs/start.lock true")
    terminal.press(b"\x03")

    assert terminal.exit_code() == 0
    assert waiting.returncode == 0, "another start.sh need not wait for the download"
    assert machine.listens(project.ports["api"])
    assert "Traceback" not in terminal.seen.decode() and "Interrupted" not in terminal.seen.decode()


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
        assert project.run("./start.sh api").returncode == 0
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


def running(project) -> set[int]:
    """The pids of the project's servers."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"\0-m\0" in command and b".server\0" in command and os.readlink(process / "cwd") == str(project.root):
                found.add(int(process.name))
        except OSError:
            continue
    return found


def test_no_signal_parts_a_server_from_its_pid_file(project, machine):
    """At every moment of a start: afterwards nothing is left, or the start was complete."""
    project.run("./start.sh && ./stop.sh")  # writes the secrets
    for number, delay_s in enumerate([0.05, 0.7, 0.85, 1.0, 1.15]):
        starting = subprocess.Popen(
            ["./start.sh"], cwd=project.root, env=project.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: [signal.signal(kind, signal.SIG_DFL) for kind in (signal.SIGINT, signal.SIGHUP)],
        )  # fmt: skip
        time.sleep(delay_s)
        os.killpg(starting.pid, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3])
        try:
            shown = starting.communicate(timeout=30)[0]
        finally:
            starting.kill()

        pids = running(project)
        recorded = {json.loads(path.read_text())["pid"] for path in (project.root / "logs").glob("*.pid.json")}
        assert pids == recorded, f"{delay_s} s: {shown}"
        assert len(pids) == (2 if starting.returncode == 0 else 0), f"{delay_s} s: {shown}"
        assert "Traceback" not in shown
        if pids:
            project.run("./stop.sh")


def test_other_code_than_was_started_is_reported_and_restart_replaces_it(project):
    assert project.run("./start.sh").returncode == 0
    before = {part: project.pid(part) for part in ("api", "web")}
    with (project.root / "api" / "server.py").open("a") as file:
        file.write("# a newer version\n")

    seen = project.run("./start.sh")
    restarted = project.run("./start.sh --restart api")
    after = project.run("./start.sh")

    assert seen.returncode == 0
    assert seen.stdout.count("It runs an older version") == 1 and "./start.sh --restart api" in seen.stdout
    assert restarted.returncode == 0, restarted.stderr
    assert project.pid("api") not in (before["api"], None) and project.pid("web") == before["web"]
    assert "It runs" not in after.stdout


def test_settings_and_unknown_versions_are_reported(project):
    (project.root / "api" / "server.py").write_text((project.root / "api" / "server.py").read_text() + "# settings.max_images\n")
    project.run("./start.sh api")
    path = project.root / "logs" / "api.pid.json"
    record = json.loads(path.read_text())

    changed = project.run("./start.sh api", GLM_MAX_IMAGES="3", GLM_ALERTS_PER_HOUR="3")
    path.write_text(json.dumps({name: value for name, value in record.items() if name != "code"}))
    unknown = project.run("./start.sh api")

    assert "GLM_MAX_IMAGES changed since its start" in changed.stdout and "ALERTS" not in changed.stdout
    assert "an unknown version" in unknown.stdout


def test_restart_leaves_what_runs_if_the_code_cannot_be_imported(project, machine):
    project.run("./start.sh api")
    pid = project.pid("api")
    (project.root / "api" / "server.py").write_text("import no_such_module_at_all\n")

    restarted = project.run("./start.sh --restart")

    assert restarted.returncode == 2
    assert "No module named 'no_such_module_at_all'" in restarted.stderr and "Nothing was stopped" in restarted.stderr
    assert machine.runs(pid) and project.pid("api") == pid


def test_a_failed_restart_says_what_is_down(project, machine):
    project.run("./start.sh")

    restarted = project.run("./start.sh --restart", STAND_IN_API="die")

    assert restarted.returncode == 1
    assert "there is no such model" in restarted.stderr
    assert "The restart failed. Not running now: api web" in restarted.stderr
    assert not running(project)
    assert (project.root / "logs" / "api.pid.json").exists(), "the checker would not notice that it is gone"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GLM_API_KEYS", "bob", "must be name:key"),
        ("GLM_API_KEYS", "bob:sha256:zz", "64 hex digits"),
        ("GLM_MODEL", "/no/such/folder", "neither a folder nor a hub id"),
        ("GLM_API_HOST", "192.0.2.1", "cannot listen on 192.0.2.1"),
    ],
)
def test_a_restart_stops_nothing_for_a_value_that_can_be_judged_before(project, machine, name, value, message):
    project.run("./start.sh api")
    pid = project.pid("api")

    restarted = project.run("./start.sh --restart api", **{name: value})

    assert restarted.returncode in (2, 3)
    assert message in restarted.stderr and "Nothing was started" in restarted.stderr
    assert machine.runs(pid) and project.pid("api") == pid


def test_a_failed_restart_says_truly_what_has_changed(project):
    (project.root / "api" / "server.py").write_text((project.root / "api" / "server.py").read_text() + "# settings.max_images\n")
    project.run("./start.sh api")
    same = project.run("./start.sh --restart api", STAND_IN_API="die")
    project.run("./start.sh api")
    settings = project.run("./start.sh --restart api", STAND_IN_API="die", GLM_MAX_IMAGES="3")
    project.run("./start.sh api")
    with (project.root / "api" / "server.py").open("a") as file:
        file.write("# a newer version\n")
    code = project.run("./start.sh --restart api", STAND_IN_API="die")

    assert "was stopped; its code and its settings have not changed since its start." in same.stderr
    assert "earlier code" not in same.stderr
    assert "it had other settings: GLM_MAX_IMAGES changed" in settings.stderr
    assert "its code is no longer here" in code.stderr and "go back to the earlier code and settings" in code.stderr


def test_a_restart_is_marked_from_before_the_stop_until_the_new_pid_file(project):
    project.run("./start.sh")
    logs = project.root / "logs"
    old = {part: processes.read_record(logs, part, project.root) for part in ("api", "web")}

    restarting = subprocess.Popen(["./start.sh", "--restart"], cwd=project.root, env=project.env, stdout=subprocess.DEVNULL)
    unexplained, seen = [], set()
    while restarting.poll() is None:
        for part, record in old.items():
            marked = processes.is_restarting(logs, part)
            now = json.loads((logs / f"{part}.pid.json").read_text())["pid"]
            if now == record.pid and not processes.is_running(record):
                seen.add(part)
                if not marked:
                    unexplained.append(part)
        time.sleep(0.002)

    assert restarting.returncode == 0 and seen == {"api", "web"}
    assert not unexplained
    assert not list(logs.glob("*.restarting"))


def test_another_installation_in_the_folder_is_neither_adopted_nor_stopped(project, machine):
    (project.root / ".env").touch()
    project.run("./start.sh api")
    pid = project.pid("api")
    other = project.root.parent / "other"
    (other / "logs").mkdir(parents=True)
    shutil.copy(project.root / ".env", other / ".env")
    shutil.copy(project.root / "logs" / "api.pid.json", other / "logs")
    theirs = {"GLM_ENV_FILE": str(other / ".env"), "GLM_LOG_DIR": str(other / "logs")}

    refused = project.run("./start.sh api", **theirs)
    restarted = project.run("./start.sh --restart api", **theirs)
    stopped = project.run("./stop.sh api", **theirs)
    moved = project.run("./start.sh api", GLM_LOG_DIR=str(other / "new"))

    assert refused.returncode == restarted.returncode == 3
    assert f"taken by the installation that uses {project.root / 'logs'} (pid {pid})" in refused.stderr and "GLM_API_PORT" in refused.stderr
    assert "Already running" not in refused.stdout
    assert stopped.returncode == 3 and machine.runs(pid)
    assert moved.returncode == 0 and "Already running" in moved.stdout


def test_what_was_started_meanwhile_is_accepted(project):
    project.run("./start.sh api")
    pid = project.pid("api")

    again = project.run(f"{sys.executable} -m deploy.service launch {project.root / 'logs'} api {project.ports['api']}")

    assert again.returncode == 0 and "was started meanwhile" in again.stdout
    assert project.pid("api") == pid and running(project) == {pid}


def test_running_servers_are_known_without_their_logs(project, machine):
    project.run("./start.sh")
    pids = {part: project.pid(part) for part in ("api", "web")}
    shutil.rmtree(project.root / "logs")

    again = project.run("./start.sh")
    recovered = {part: project.pid(part) for part in ("api", "web")}
    (project.root / "logs" / "api.pid.json").write_text("{")
    shutil.rmtree(project.root / "logs")
    stopped = project.run("./stop.sh")

    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Already running") == 2 and "its file was deleted" in again.stdout
    assert recovered == pids
    assert stopped.returncode == 0, stopped.stderr
    assert not running(project)


@pytest.mark.parametrize("name", ["logs", "logs/api.log"])
def test_what_is_not_writable_is_one_sentence(project, name):
    path = project.root / name
    if name == "logs":
        path.write_text("a file in its place")
    else:
        path.mkdir(parents=True)

    started = project.run("./start.sh")

    assert started.returncode in (1, 2)
    assert name in started.stderr or "Is a directory" in started.stderr
    assert "Traceback" not in started.stderr and ": line " not in started.stderr
    if name == "logs":
        path.unlink()


def test_a_pipe_in_the_place_of_the_log_does_not_hold_the_start(project):
    """Opening it for writing would wait for a reader, and a reader that stops would stop the server."""
    logs = project.root / "logs"
    logs.mkdir(exist_ok=True)
    os.mkfifo(logs / "api.log")

    started = project.run("timeout 60 ./start.sh api")

    assert started.returncode == 0, started.stderr
    assert (logs / "api.log").is_file()


def test_of_a_log_of_gigabytes_only_the_end_is_read(project):
    logs = project.root / "logs"
    logs.mkdir(exist_ok=True)
    (project.root / "api" / "server.py").write_text(
        "import os, sys\nos.ftruncate(1, 40 << 30)\nos.lseek(1, 0, os.SEEK_END)\nprint('the last words', flush=True)\nsys.exit(1)\n"
    )

    started = project.run("ulimit -v 4000000; ./start.sh api")

    assert started.returncode == 1
    assert "the last words" in started.stderr
    (logs / "api.log").unlink()
