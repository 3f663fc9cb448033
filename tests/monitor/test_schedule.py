"""install and uninstall, and a real cron daemon that runs the installed crontab."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monitor import schedule

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def crontab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `crontab` command that stores its table in a file."""
    table = tmp_path / "table"
    tool = tmp_path / "bin" / "crontab"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\ncase "$1" in\n-l) cat {table} 2>/dev/null || {{ echo "no crontab for x" >&2; exit 1; }};;\n'
        f"-r) rm -f {table};;\n-) cat > {table};;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return table


def test_installing_twice_adds_one_block_and_keeps_other_lines(crontab, make_settings):
    crontab.write_text("# mine\n5 4 * * * backup\n")

    schedule.install(make_settings(1), "cron")
    schedule.install(make_settings(1), "cron")

    text = crontab.read_text()
    assert text.startswith("# mine\n5 4 * * * backup\n")
    assert text.count(schedule.BEGIN) == text.count(schedule.END) == text.count("health_check.py run") == 1
    assert schedule.installed("cron")


def test_uninstall_removes_exactly_the_block(crontab, make_settings):
    crontab.write_text("# mine\n5 4 * * * backup\n")
    schedule.install(make_settings(1), "cron")

    assert schedule.uninstall(make_settings(1), "cron") == 0

    assert crontab.read_text() == "# mine\n5 4 * * * backup\n"
    assert not schedule.installed("cron")
    assert schedule.uninstall(make_settings(1), "cron") == 0, "uninstalling twice succeeds"


def test_the_blocks_of_other_folders_are_left_alone(crontab, make_settings):
    other = "# >>> glm health_check /opt/other >>>\n* * * * * other\n# <<< glm health_check /opt/other <<<\n"
    crontab.write_text(other)
    schedule.install(make_settings(1), "cron")

    assert crontab.read_text().startswith(other) and schedule.installed("cron")
    schedule.uninstall(make_settings(1), "cron")

    assert crontab.read_text() == other
    assert not schedule.installed("cron")


def test_the_block_of_an_earlier_version_is_replaced_if_it_is_of_this_folder(crontab, make_settings):
    begin, end = schedule.UNNAMED
    foreign = f"{begin}\n* * * * * python /opt/other/health_check.py run\n{end}\n"
    crontab.write_text(f"{foreign}{begin}\n* * * * * python {ROOT / 'health_check.py'} run --quiet\n{end}\n")

    schedule.install(make_settings(1), "cron")

    text = crontab.read_text()
    assert text.startswith(foreign) and text.count(str(ROOT / "health_check.py")) == 1 and schedule.BEGIN in text


def test_variables_are_part_of_the_command_that_cron_runs(crontab, make_settings):
    schedule.put_cron_block(make_settings(1), {"GLM_LOG_DIR": "/tmp/with space"})

    assert f"GLM_LOG_DIR='/tmp/with space' {sys.executable}" in crontab.read_text()


def test_many_folders_that_install_at_once_lose_no_block(crontab, tmp_path):
    """Each is a process of its own with another folder."""
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as S\n"
        "from monitor import schedule\n"
        "schedule.BEGIN, schedule.END = (m + sys.argv[1] for m in (schedule.BEGIN, schedule.END))\n"
        "sys.exit(schedule.put_cron_block(S(check_period_s=60, log_dir=Path('/tmp'))))\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=ROOT) for n in range(6)]

    assert [process.wait(60) for process in started] == [0] * 6
    assert crontab.read_text().count("health_check.py run") == 6


def test_an_empty_crontab_is_removed(crontab, make_settings):
    schedule.install(make_settings(1), "cron")
    schedule.uninstall(make_settings(1), "cron")

    assert not crontab.exists()


def test_without_a_scheduler_the_background_command_is_shown(make_settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(schedule, "systemd_runs", lambda: False)
    settings = make_settings(1)

    assert [schedule.install(settings, how) for how in ("auto", "cron", "systemd")] == [1, 1, 1]
    assert [schedule.uninstall(settings, how) for how in ("auto", "cron", "systemd")] == [0, 1, 0]

    printed = capsys.readouterr().err
    assert f"nohup {sys.executable} {ROOT / 'health_check.py'} loop" in printed
    assert "apt-get install cron" in printed and "systemd is not running on this machine" in printed


def test_a_block_without_its_end_is_left_alone():
    text = f"a\n{schedule.BEGIN}\nb\n"

    assert schedule.without_block(text) == text


def test_a_percent_sign_is_escaped_for_cron(make_settings, monkeypatch):
    monkeypatch.setattr(schedule, "command", lambda variables: "/opt/100%/python health_check.py run")

    assert r"/opt/100\%/python" in schedule.cron_block(make_settings(1))


def test_the_units_are_what_systemd_accepts(make_settings, tmp_path):
    for name, text in schedule.units(make_settings(1)).items():
        (tmp_path / name).write_text(text)

    assert "OnUnitActiveSec=60\n" in (tmp_path / "glm-health-check.timer").read_text()
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True, check=False
    )
    assert "Unknown" not in done.stderr and "Failed to parse" not in done.stderr, done.stderr


# `systemd-analyze security`: from 0 (closed) to 10. What is left is mostly the network, root and, for the API, the card.
EXPOSURE = {"glm-api.service": 2.4, "glm-web.service": 1.9}


def test_the_units_of_the_servers_are_valid_and_closed(make_settings, tmp_path):
    for name, text in schedule.units(make_settings(1), servers=True).items():
        (tmp_path / name).write_text(text)
    api = (tmp_path / "glm-api.service").read_text()
    assert "\nType=notify\n" in api and "\nWatchdogSec=120\n" in api and "\nTimeoutStartSec=300\n" in api

    units = [str(path) for path in tmp_path.glob("glm-*")]
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)

    assert (verified.returncode, verified.stderr) == (0, "")
    for name, most in EXPOSURE.items():
        words = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(tmp_path / name)]
        rated = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", rated)[1]) <= most, rated


def test_units_whose_folder_the_servers_would_not_see_are_refused(make_settings, monkeypatch, capsys):
    monkeypatch.setattr(schedule.server_units, "ROOT", Path("/tmp/project"))

    assert schedule.install(make_settings(1), "auto", servers=True) == 1
    assert "Move /tmp/project elsewhere" in capsys.readouterr().err


def test_cron_runs_it_twice(cron_project):
    """The block that install writes, run twice by the real cron."""
    lines = cron_project / "logs" / "health.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and (not lines.exists() or len(lines.read_text().splitlines()) < 2):
        time.sleep(1)

    assert len(lines.read_text().splitlines()) >= 2, (cron_project / "logs" / "health_check.log").read_text()
    assert (cron_project / "logs" / "health.json").exists()
    assert not list(cron_project.rglob("__pycache__"))
