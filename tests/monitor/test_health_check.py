"""health_check.py as cron runs it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
from stand_in_model import completion

from monitor.store import store

ROOT = Path(__file__).resolve().parents[2]


def run(python: str | Path, script: Path, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), str(script)],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that the checker needs."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("health_check.py", "cgroup.py", "settings.py"):
        shutil.copy2(ROOT / name, root / name)
    shutil.copytree(ROOT / "monitor", root / "monitor")
    (root / "models" / "shapes").mkdir(parents=True)
    for name in ("__init__.py", "pictures.py"):
        shutil.copy2(ROOT / "models" / "shapes" / name, root / "models" / "shapes" / name)
    (root / ".env").write_text("GLM_API_PORT=1\nGLM_WEB_PORT=2\n")
    return root


def test_runs_with_an_empty_environment_from_another_folder(copy, tmp_path):
    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    printed = json.loads(done.stdout)
    assert done.returncode == 1
    assert printed["verdict"] == "dead"
    assert printed["evidence"]["api"]["url"] == "http://127.0.0.1:1", (
        "the settings must come from the project's own .env"
    )
    assert json.loads((copy / "logs" / "health.json").read_text()) == printed
    assert not list(copy.rglob("__pycache__"))


def test_healthy_service_exits_0(copy, tmp_path, service, behaviour, describe):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    (copy / ".env").write_text(f"GLM_API_PORT={service}\nGLM_WEB_PORT={service}\n")

    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["service_healthy"] is True


def test_python_without_the_packages_runs_the_projects_venv(copy, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (copy / ".venv" / "bin" / "python").chmod(0o755)

    done = run(tmp_path / "bare" / "bin" / "python", copy / "health_check.py", {}, tmp_path)

    assert json.loads(done.stdout)["verdict"] == "dead", done.stderr


def test_python_with_some_of_the_packages_runs_the_projects_venv(copy, tmp_path):
    (tmp_path / "partial" / "PIL").mkdir(parents=True)
    (tmp_path / "partial" / "PIL" / "__init__.py").write_text("raise ModuleNotFoundError('PIL')\n")
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} "$@"\n')
    (copy / ".venv" / "bin" / "python").chmod(0o755)

    done = run(sys.executable, copy / "health_check.py", {"PYTHONPATH": str(tmp_path / "partial")}, tmp_path)

    assert json.loads(done.stdout)["verdict"] == "dead", done.stderr


def test_python_without_the_packages_and_no_venv_suggests_start(copy, tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)

    done = run(tmp_path / "bare" / "bin" / "python", copy / "health_check.py", {}, tmp_path)

    assert done.returncode == 1
    assert "./start.sh" in done.stderr


def test_a_closed_pipe_causes_no_traceback(copy, tmp_path):
    done = subprocess.run(
        f"{sys.executable} {copy / 'health_check.py'} drill --list | true", shell=True, cwd=tmp_path, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip

    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_invalid_settings_give_an_unknown_verdict(copy, tmp_path):
    (copy / ".env").write_text("GLM_API_PROT=1\n")
    (copy / "logs" / "last-good.env").unlink(missing_ok=True)

    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    printed = json.loads(done.stdout)
    assert done.returncode == 1
    assert printed["verdict"] == "unknown" and printed["service_healthy"] is None
    assert "GLM_API_PORT" in printed["reasons"][0]


def test_unwritable_log_folder_does_not_hide_the_verdict(copy, tmp_path):
    (tmp_path / "file").touch()

    logs = tmp_path / "file" / "logs"
    fallback = Path("/dev/shm") / store.fallback_path(logs).parent.name

    done = run(sys.executable, copy / "health_check.py", {"GLM_LOG_DIR": str(logs)}, tmp_path)

    assert fallback.exists(), "the next run continues with it"
    shutil.rmtree(fallback)
    assert json.loads(done.stdout)["verdict"] == "dead"
    assert "could not be written" in done.stderr


def test_a_healthy_run_stays_below_60_mb_and_loads_nothing_large(copy, tmp_path, service, behaviour, describe):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    (copy / ".env").write_text(f"GLM_API_PORT={service}\nGLM_WEB_PORT={service}\n")
    code = (
        "import runpy, sys\n"
        "del sys.argv[0]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'streamlit'} & set(sys.modules)\n"
        # not getrusage: its peak counts what the parent held before the exec
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(peak.split()[1], file=sys.stderr)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(copy / "health_check.py")], env={"PATH": os.environ["PATH"]}, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stderr.split()[-1]) * 1024 < 60e6, "bytes of memory at the peak"


def test_loop_runs_the_checker_periodically(copy, tmp_path):
    done = subprocess.run(
        [sys.executable, str(copy / "health_check.py"), "loop", "--times", "2"], env={"GLM_CHECK_PERIOD_S": "1"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len((copy / "logs" / "health.jsonl").read_text().splitlines()) == 2


def test_a_run_past_its_budget_ends_itself(copy, tmp_path, hung):
    (copy / ".env").write_text(f"GLM_API_PORT={hung}\nGLM_WEB_PORT={hung}\nGLM_CHECK_BUDGET_S=5\nGLM_PROBE_TIMEOUT_S=60\n")
    started = time.monotonic()

    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    assert (done.returncode, done.stdout) == (1, "") and time.monotonic() - started < 20
    assert "ended: the run took longer than 5 s" in done.stderr
    with (copy / "logs" / "health_check.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("names", [("baseline.json", "health.jsonl", "health_check.lock", "state.db", "state.copy.json", "state.db-wal",
                                    "health.json", "health.prom", "last-good.env", "api.heartbeat.json", "api.log", "api.pid.json",
                                    "baseline.json.new", ".elasticsearch.pending"), ("state.db-wal", "state.db-shm", "health.jsonl.1")])  # fmt: skip
def test_pipes_in_place_of_its_files_hold_no_run(copy, tmp_path, names):
    if names[0] == "state.db-wal":  # next to a good store
        run(sys.executable, copy / "health_check.py", {}, tmp_path)
    for name in names:
        (copy / "logs").mkdir(exist_ok=True)
        (copy / "logs" / name).unlink(missing_ok=True)
        os.mkfifo(copy / "logs" / name)
    started = time.monotonic()

    for _ in range(2):
        done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

        assert json.loads(done.stdout)["verdict"] == "dead", done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - started < 40
    assert (copy / "logs" / "state.db").is_file() and json.loads((copy / "logs" / "health.json").read_text())
    assert (copy / "logs" / "health.jsonl").read_text().count("\n") >= 2


def test_a_run_whose_main_thread_is_held_by_the_kernel_ends_itself(copy, tmp_path):
    (copy / ".env").write_text("GLM_API_PORT=1\nGLM_WEB_PORT=2\nGLM_CHECK_BUDGET_S=5\n")
    os.mkfifo(tmp_path / "pipe")
    check = copy / "monitor" / "check.py"
    hold = f"    sqlite3.connect('file:{tmp_path / 'pipe'}?mode=ro', uri=True).execute('SELECT 1 FROM t')\n"
    check.write_text(check.read_text().replace("    started = time.monotonic()\n", hold, 1))

    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    assert done.returncode == 1 and "ended: the run took longer than 5 s" in done.stderr


@pytest.mark.parametrize("where", ["> /dev/full", "> /dev/full 2> /dev/full", "2>&1 | true", ">&- 2>&-"])
def test_the_exit_code_is_the_verdicts_where_nobody_can_read_it(copy, tmp_path, service, behaviour, describe, where):
    behaviour.reply = lambda body: (200, completion(describe(body)))
    (copy / ".env").write_text(f"GLM_API_PORT={service}\nGLM_WEB_PORT={service}\n")

    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {copy / 'health_check.py'} {where}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("could not be printed: No space left" in done.stderr) == (where == "> /dev/full")


@pytest.mark.parametrize(("limit", "verdict"), [("-n 6", "unknown"), ("-Sn 6", "dead")])
def test_too_few_open_files_are_named_without_a_traceback(copy, tmp_path, limit, verdict):
    command = ["bash", "-c", f"ulimit {limit}; exec {sys.executable} {copy / 'health_check.py'}"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    printed = json.loads(done.stdout)
    assert "Traceback" not in done.stderr and printed["verdict"] == verdict
    if verdict == "unknown":
        assert "the checker cannot judge" in printed["reasons"][0].lower() and "open" in printed["reasons"][0]


def test_without_the_demo_models_folder_it_still_judges(copy, tmp_path, service, behaviour):
    """Whoever serves another model may have deleted it."""
    shutil.rmtree(copy / "models")
    (copy / ".env").write_text(f"GLM_API_PORT={service}\nGLM_WEB_PORT={service}\n")

    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    found = json.loads(done.stdout)["targets"]["api"]
    assert (found["word"], found["rule"]) == ("degraded", "pictures_not_asked"), done.stdout
    assert "models" in found["en"]


def test_a_checker_that_cannot_even_begin_does_not_leave_the_last_report_in_force(copy, tmp_path):
    (copy / "logs").mkdir()
    (copy / "logs" / "health.json").write_text('{"verdict": "healthy", "service_healthy": true}')
    (copy / "monitor" / "check.py").write_text("def broken(:\n")
    (copy / ".env").write_text("GLM_API_PORT=1\n")

    done = run(sys.executable, copy / "health_check.py", {}, tmp_path)

    report = json.loads((copy / "logs" / "health.json").read_text())
    assert done.returncode == 1
    assert (report["verdict"], report["service_healthy"]) == ("unknown", None)
    assert "invalid syntax" in report["reasons"][0]
