"""start.sh and stop.sh where systemd owns the servers. Its part is played by a `systemctl` that runs what the units say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Project, runs, until

from monitor import units
from settings import Settings

SYSTEMCTL = '''#!{python}
"""start, stop and is-active of units in {folder}, as the first process of a machine does them; every call is noted."""
import os, re, signal, shlex, subprocess, sys, time
words = [word for word in sys.argv[1:] if not word.startswith("--")]
open("{folder}/calls", "a").write(" ".join(words) + "\\n")
text = open("{folder}/" + words[1]).read()
value = lambda name: re.search(rf"^{{name}}=(.*)$", text, re.MULTILINE)[1]
pids = "{folder}/" + words[1] + ".pid"
pid = int(open(pids).read()) if os.path.exists(pids) else 0
def alive():
    try:
        return bool(pid) and open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
if words[0] != "is-active" and os.path.exists("{folder}/refuses"):
    sys.exit("Interactive authentication required.")
if words[0] == "start" and not alive() and subprocess.run(shlex.split(value("ExecCondition"))).returncode == 0:
    log = open(value("StandardOutput").removeprefix("append:"), "a")
    env = {{**os.environ, **dict(pair.split("=", 1) for pair in shlex.split(value("Environment")))}}
    started = subprocess.Popen(shlex.split(value("ExecStart")), cwd=value("WorkingDirectory"), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (1, 2, 15)])
    open(pids, "w").write(str(started.pid))
if words[0] == "stop" and alive():
    os.kill(pid, signal.SIGTERM)
    while alive():
        time.sleep(0.05)
    os.remove(pids)
if words[0] == "is-active":
    # A process that ended without being asked to is started again some seconds later.
    state = "failed" if os.path.exists("{folder}/failed") else "active" if alive() else "activating" if pid else "inactive"
    print(state)
    sys.exit(state != "active")
'''


@pytest.fixture
def owned(project: Project, stub: Callable[[str, str], None]) -> Path:
    """The folder of the units, which are those that `install --servers` writes."""
    folder = project.root.parent / "units"
    folder.mkdir()
    shutil.copy2(ROOT / "health_check.py", project.root)
    code = "import settings; from monitor import units; import json; print(json.dumps(units.server_units(settings.load())))"
    texts = subprocess.run([sys.executable, "-c", code], cwd=project.root, env=project.env, capture_output=True, text=True, check=True)
    for name, text in json.loads(texts.stdout).items():
        (folder / name).write_text(text)
    module = project.root / "monitor" / "observe" / "unit.py"
    replaced = module.read_text().replace('Path("/etc/systemd/system")', f'Path("{folder}")').replace('Path("/run/systemd/system")', f'Path("{folder}")')
    module.write_text(replaced)
    stub("systemctl", "")
    (project.root.parent / "stubs" / "systemctl").write_text(SYSTEMCTL.format(python=sys.executable, folder=folder))
    return folder


def test_start_and_stop_go_through_systemd(project: Project, owned: Path) -> None:
    started = project.run("./start.sh")
    assert started.returncode == 0, started.stdout + started.stderr
    pid = project.pid("api")

    assert (owned / "glm-api.service.pid").read_text() == str(pid), "the pid file names the process that systemd started"
    assert json.loads((project.root / "logs" / "api.pid.json").read_text())["code"]
    again = project.run("./start.sh api")
    assert "Already running: api" in again.stdout and "older version" not in again.stdout
    assert project.run("./start.sh --restart api").returncode == 0 and project.pid("api") != pid and not runs(pid)

    pid = project.pid("api")
    stopped = project.run("./stop.sh")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert not runs(pid) and (project.root / "logs" / "api.stopped").exists()
    subprocess.run(["systemctl", "start", "glm-api.service"], env=project.env, check=True)  # after a boot, or by hand
    assert subprocess.run(["systemctl", "is-active", "glm-api.service"], env=project.env, capture_output=True, text=True).stdout == "inactive\n"
    assert project.run("./start.sh api").returncode == 0, "it ends the stop"
    assert {line.split()[0] for line in (owned / "calls").read_text().splitlines()} == {"start", "stop", "is-active"}


def test_a_unit_has_the_time_for_the_delay_of_a_stop() -> None:
    def limit_s(**settings: float) -> float:
        text = units.server_units(Settings(**settings))["glm-api.service"]
        return float(re.search(r"^TimeoutStopSec=(.+)$", text, re.MULTILINE)[1])

    assert limit_s(drain_delay_s=15) == limit_s() + 15 == 45


def test_a_unit_that_systemd_has_given_up_on_is_said(project: Project, owned: Path) -> None:
    (owned / "failed").touch()
    (owned / "refuses").touch()

    started = project.run("./start.sh api")

    assert started.returncode == 1
    assert "systemctl reset-failed glm-api.service" in started.stderr


def test_a_user_who_may_not_ask_waits_for_systemd_to_start_it_again(project: Project, owned: Path) -> None:
    """After a cure has ended the process: systemd starts it by itself some seconds later."""
    assert project.run("./start.sh api").returncode == 0
    pid = project.pid("api")
    again = subprocess.Popen(
        ["bash", "-c", f"while kill -0 {pid} 2>/dev/null; do sleep 0.1; done; sleep 3; rm {owned}/refuses; systemctl start glm-api.service; touch {owned}/refuses"],
        env=project.env,
    )  # fmt: skip
    (owned / "refuses").write_text("")
    os.kill(pid, 9)
    until(lambda: not runs(pid), "it is gone")

    started = project.run("./start.sh api", START_SH_CURE="1")

    again.wait(30)
    (owned / "refuses").unlink(missing_ok=True)
    assert started.returncode == 0, started.stdout + started.stderr
    assert project.pid("api") != pid


def test_a_unit_does_not_start_in_the_middle_of_a_restore(project: Project) -> None:
    (project.root / ".env.restoring").write_text("{}")

    done = project.run(f"{sys.executable} -m deploy.service become api")

    assert done.returncode == 2 and "python health_check.py restore" in done.stderr


def test_an_invalid_setting_ends_the_unit_with_the_code_that_systemd_does_not_restart(project: Project) -> None:
    done = project.run(f"{sys.executable} -m deploy.service become api", GLM_API_PORT="none")

    assert done.returncode == 2 and "GLM_API_PORT" in done.stderr
