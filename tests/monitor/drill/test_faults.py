"""Each fault is what it says, and is undone whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import settings as settings_module
from monitor.drill.catalogue import FAULTS, NOT_HERE, UNAFFECTED, really_asked, why_no_baseline
from monitor.drill.context import FaultContext
from monitor.drill.faults import clocks, files, load, ports, readings
from monitor.drill.faults import processes as faults
from monitor.judge.accuracy import Accuracy, KindRecord
from monitor.observe import processes
from monitor.store import baseline
from monitor.store.store import Store

ROOT = Path(__file__).resolve().parents[3]
BUSY = "import time\nwhile True: pass\n"


@pytest.fixture
def context(make_settings):
    context = FaultContext(make_settings(1))
    context.settings.log_dir.mkdir(parents=True, exist_ok=True)
    return context


@pytest.fixture
def recorded(context):
    """Starts a process in the place of the API."""
    started = []

    def start(code: str = "import time; time.sleep(600)", port: int = 1) -> int:
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        started.append(process)
        stat = processes.read_stat(process.pid)
        processes.write_record(context.settings.log_dir, "api", processes.ProcessRecord(process.pid, stat.start_time, port))
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.wait()


@contextlib.contextmanager
def interrupted(fault, context):
    """Ctrl-C while the fault is in force."""
    with pytest.raises(KeyboardInterrupt), fault(context):
        yield
        raise KeyboardInterrupt


def state(pid: int) -> str:
    """T once it is stopped: a signal takes a moment."""
    time.sleep(0.1)
    return processes.read_stat(pid).state


def test_the_catalogue_is_consistent():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) and not set(names) & set(NOT_HERE)
    for fault in FAULTS:
        if "must NOT restart" in fault.description or "never restarted" in fault.description:
            assert fault.restarts == (0,) and not fault.cured, fault.name
        if set(fault.verdicts) <= set(UNAFFECTED):
            assert fault.restarts == (0,), fault.name
        assert set(fault.in_order) <= {*fault.verdicts, "starting"}, fault.name


def test_what_the_drill_cannot_make_is_tested_where_it_says():
    for name, why in NOT_HERE.items():
        assert (ROOT / why.rpartition(": ")[2]).exists(), name


@pytest.mark.parametrize(("outcome", "asked"), [("right", True), ("unjudged", True), ("credited", False), ("silent", False)])
def test_a_question_counts_as_asked_under_load_if_it_was_answered(context, outcome, asked):
    report = {"evidence": {"api": {"answers": [{"outcome": "credited"}, {"outcome": outcome}]}}}

    assert really_asked(report, Store.open(context.log_dir)) is asked


def test_a_stopped_process_continues_after_an_interrupt(context, recorded):
    pid = recorded()

    with interrupted(faults.freeze, context):
        assert state(pid) == "T"

    assert state(pid) != "T"


def test_the_cap_of_memory_is_lifted_after_an_interrupt(context, recorded):
    pid = recorded()
    context.traffic = SimpleNamespace(failed={"failed: HTTP 500": 1})

    with interrupted(faults.cap_memory, context):
        assert resource.prlimit(pid, resource.RLIMIT_AS)[0] < faults.address_space(pid) + 2**30

    assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("means", ["any", "signals"])
def test_a_slow_process_gets_a_small_share_of_the_processor_and_all_of_it_again(context, recorded, monkeypatch, means):
    pid = recorded(BUSY)
    if means == "signals":
        monkeypatch.setattr(faults, "_new_cgroup", lambda pid: None)

    with interrupted(faults.slow_down, context):
        time.sleep(0.3)
        assert share_of_processor(pid) < 0.12
        assert context.means

    assert state(pid) in "RS" and share_of_processor(pid) > 0.12
    assert not list(faults.CGROUPS.glob(f"**/glm-drill-{pid}"))


def share_of_processor(pid: int, seconds: float = 1.0) -> float:
    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def test_a_typo_in_the_settings_stops_a_start_and_is_undone(context, recorded, monkeypatch, tmp_path):
    path = tmp_path / ".env"
    path.write_text("GLM_API_PORT=8123")
    path.chmod(0o600)
    monkeypatch.setattr(settings_module, "ENV_FILE", path)
    pid = recorded()

    with interrupted(files.misspell_a_setting, context):
        with pytest.raises(settings_module.SettingsError, match="GLM_API_PROT"):
            settings_module.load()
        record = processes.read_record(context.settings.log_dir, "api")
        faults.wait_for(lambda: not processes.is_running(record), f"process {pid} still runs", 10)  # the kernel ends it soon

    assert path.read_text() == "GLM_API_PORT=8123" and path.stat().st_mode & 0o777 == 0o600


def test_a_settings_file_that_was_not_there_is_gone_again(context, recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(settings_module, "ENV_FILE", tmp_path / "none.env")
    recorded()

    with interrupted(files.misspell_a_setting, context):
        assert (tmp_path / "none.env").exists()

    assert not (tmp_path / "none.env").exists()


def test_a_damaged_store_cannot_be_read(context):
    store = Store.open(context.settings.log_dir)
    store.put("histories", {"api": "x" * 9000})
    store._connection.close()

    files.damage_tables(context.settings.log_dir / "state.db", ("state",))

    with contextlib.closing(sqlite3.connect(context.settings.log_dir / "state.db")) as damaged, pytest.raises(sqlite3.DatabaseError):
        damaged.execute("SELECT * FROM state").fetchall()


def test_half_a_pid_file_is_no_record_and_is_whole_again(context, recorded):
    pid = recorded()

    with interrupted(files.damage_pid_file, context):
        assert processes.read_record(context.settings.log_dir, "api") is None

    assert processes.read_record(context.settings.log_dir, "api").pid == pid


def test_deleted_logs_are_put_back_and_newer_ones_are_kept(context, recorded):
    folder = context.settings.log_dir
    pid = recorded()
    (folder / "drill").mkdir()
    (folder / "drill" / "old.json").write_text("old")
    (folder / "health.json").write_text("old")

    with interrupted(files.delete_logs, context):
        assert not folder.exists()
        folder.mkdir()
        (folder / "health.json").write_text("new")

    assert (folder / "health.json").read_text() == "new" and (folder / "drill" / "old.json").read_text() == "old"
    assert processes.read_record(folder, "api").pid == pid


@pytest.mark.parametrize("fault", [files.fill_disk, files.write_protect])
def test_a_full_or_read_only_disk_takes_nothing_and_is_unmounted(context, fault):
    with interrupted(fault, context), pytest.raises(OSError):
        folder = context.log_dir
        (folder / "more").write_bytes(b"x" * 8192)

    assert not folder.exists() and context.env == {}


def test_a_heartbeat_lies_in_the_future_while_the_process_stands(context, recorded):
    pid = recorded()
    path = context.settings.log_dir / "api.heartbeat.json"
    path.write_text(json.dumps({"pid": pid, "beat_at": 5.0, "written_at": 6.0}))

    with interrupted(clocks.beat_in_the_future, context):
        assert json.loads(path.read_text())["beat_at"] > time.monotonic() and state(pid) == "T"

    assert state(pid) != "T"


@pytest.mark.parametrize("fault", [
    clocks.jump_an_hour, clocks.jump_a_day, readings.configured(GLM_WEB_TOKEN="x"), readings.full_gpu_load, readings.exceed_memory_limit,
    ports.block_alert_channel,
])  # fmt: skip
def test_nothing_of_the_environment_is_left_behind(context, recorded, fault):
    recorded()
    Store.open(context.settings.log_dir)._connection.close()

    with interrupted(fault, context):
        assert context.env

    assert context.env == {} and not (context.settings.log_dir / "drill-bin").exists()


def test_a_queue_with_room_is_not_accepted_as_full(context):
    context.checked_until = time.monotonic()
    assert "no question was rejected" in load.why_queue_not_full(context)

    context.queue_full_at.append(time.monotonic())
    assert load.why_queue_not_full(context) == ""
    assert "no question was rejected" in load.why_queue_not_full(context), "earlier rejections do not count"


def test_a_stranger_replays_health_with_fresh_successes(context, recorded):
    """On the port of the process that was killed, by a process of another folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    code = (
        "import http.server, json\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        data = json.dumps({'state': 'idle', 'steps': 7, 'success_age_s': {'text': 99.0}}).encode()\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(data)\n"
        "    def log_message(self, *_): pass\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), H).serve_forever()\n"
    )
    recorded(code, port)
    context.settings = context.settings.model_copy(update={"api_port": port})
    deadline = time.monotonic() + 20
    while not answer(port) and time.monotonic() < deadline:
        time.sleep(0.1)

    with interrupted(ports.replay, context):
        assert answer(port) == {"state": "idle", "steps": 7, "success_age_s": {"text": 0.4, "picture": 0.4}}
        assert not processes.is_running(processes.read_record(context.settings.log_dir, "api"))

    assert answer(port) is None


def answer(port: int) -> dict | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return json.loads(response.read())
    except OSError:
        return None


def test_a_stand_in_ends_with_whoever_started_it():
    """Even with SIGKILL, which leaves nothing time to undo."""
    code = (
        "import time\nfrom monitor.drill.faults.ports import stand_in\n"
        "with stand_in('right') as server: print(server._process.pid, flush=True); time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()

    deadline = time.monotonic() + 10
    while (found := processes.read_stat(pid)) is not None and found.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found is None or not found.running


def test_colors_are_exchanged_only_once_their_baseline_is_taken(context) -> None:
    for asked in (0, 19, 20):
        baseline.write(Accuracy({"model": "m"}, {"color": KindRecord(asked, asked)} if asked else {}), context.settings.log_dir)
        assert bool(why_no_baseline(context)) == (asked < 20)
