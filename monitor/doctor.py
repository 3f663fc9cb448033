"""The command `doctor`: checks everything that has kept a checker from working, and says how to fix it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from monitor import schedule
from monitor.act.lock import Lock
from monitor.observe import gpu, ports, processes
from monitor.observe.observe import now
from monitor.store.store import FILE_NAME as STORE_NAME
from monitor.store.store import Store
from monitor.tell import alerts, channels, status
from settings import ENV_FILE, ROOT, Settings

GOOD, BAD = 0, 1
FINE, WARN, FAIL, NOTE = " ok ", "warn", "FAIL", "note"
Finding = tuple[str, str, str]


def examine(settings: Settings) -> int:
    """Prints one line for each check; exit code 1 if something keeps the checker from working."""
    worst = GOOD
    for check in (
        _scheduled, _recent, _empty_environment, _log_folder, _store, _lock, _clock, _env_file, _parts, _gpu, _channels,
        _outward_ping, _faults_off,
    ):  # fmt: skip
        for level, what, remedy in check(settings):
            print(f"[{level}] {what}" + (f"\n       {remedy}" if remedy else ""))
            if level == FAIL:
                worst = BAD
    return worst


def _scheduled(settings: Settings) -> Iterator[Finding]:
    ways = [way for way in ("systemd", "cron") if schedule.installed(way)]
    if not ways:
        yield WARN, "nothing runs the checker automatically", f"health_check.py install, or instead: {schedule.in_background()}"
    if "cron" in ways:
        block = schedule.read_crontab() or ""
        if str(ROOT / "health_check.py") not in block:
            yield FAIL, "the cron block names another folder", "health_check.py install"
        elif not schedule.cron_runs():
            yield FAIL, "it is in the crontab, but no cron daemon runs", f"service cron start, or instead: {schedule.in_background()}"
        else:
            yield FINE, "cron runs it", ""
    if "systemd" in ways:
        done = subprocess.run(["systemctl", "is-active", f"{schedule.UNIT}.timer"], capture_output=True, text=True, check=False)
        active = done.stdout.strip() == "active"
        yield (FINE, "the systemd timer is active", "") if active else (FAIL, f"the systemd timer is {done.stdout.strip() or 'unknown'}", "health_check.py install")
    if len(ways) == 2:
        yield WARN, "both systemd and cron run it", "health_check.py uninstall --with cron"


def _recent(settings: Settings) -> Iterator[Finding]:
    found, age_s = status.read(settings)
    if found is None:
        yield WARN, "there is no report yet", "health_check.py"
    elif age_s > settings.check_silent_s:
        yield FAIL, f"the last report is {age_s / 60:.0f} minutes old", f"see {settings.log_dir / 'health_check.log'}"
    else:
        yield FINE, f"the last report is {age_s:.0f} s old and took {found['duration_s']} s", ""


def _empty_environment(settings: Settings) -> Iterator[Finding]:
    """cron has almost no environment: does the checker read the same settings there?"""
    code = "import settings; s = settings.load(); print(s.api_port, s.web_port, s.log_dir, bool(s.api_key))"
    runs = [
        subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        for env in ({"PATH": "/usr/bin:/bin"}, dict(os.environ))
    ]
    if runs[0].returncode:
        yield FAIL, "with an empty environment, as cron has it, the settings cannot be read", runs[0].stderr.strip().rpartition("\n")[2]
    elif runs[0].stdout != runs[1].stdout:
        yield FAIL, "cron would read other settings than this shell", f"put the GLM_ variables of this shell into {ENV_FILE}"
    else:
        yield FINE, "the settings are the same with an empty environment", ""


def _log_folder(settings: Settings) -> Iterator[Finding]:
    folder = settings.log_dir
    probe = folder / ".doctor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x" * 4096)
        probe.unlink()
    except OSError as error:
        yield FAIL, f"{folder} cannot be written: {error.strerror}", ""
        return
    free_mib = shutil.disk_usage(folder).free / 2**20
    level = FINE if free_mib > settings.disk_free_limit_mib else WARN
    yield level, f"{folder} can be written, {free_mib:.0f} MiB free", ""


def _store(settings: Settings) -> Iterator[Finding]:
    path = settings.log_dir / STORE_NAME
    if not path.exists():
        yield NOTE, "there is no store yet", ""
        return
    try:
        store = Store.read_only(settings.log_dir)
        result = store.execute("PRAGMA quick_check").fetchone()[0]
        store.close()
    except sqlite3.Error as error:
        yield FAIL, f"{path} cannot be read: {error}", f"move it away; the next run makes a new one: mv {path} {path}.broken"
        return
    yield (FINE, f"{path} is intact ({path.stat().st_size / 2**20:.1f} MiB)", "") if result == "ok" else (FAIL, f"{path}: {result}", "")


def _lock(settings: Settings) -> Iterator[Finding]:
    lock = Lock(settings.log_dir)
    taken = lock.take(5, "doctor")
    lock.release()
    yield (NOTE, taken, "") if taken else (FINE, "the lock is free", "")


def _clock(settings: Settings) -> Iterator[Finding]:
    year = datetime.now(UTC).year
    if year < 2024:
        yield FAIL, f"the clock says {year}", "set the clock: signatures of DingTalk and Feishu are refused"
    offset = time.strftime("%z")
    yield FINE, f"the clock says {datetime.now().astimezone().isoformat(timespec='seconds')} (offset {offset})", ""


def _env_file(settings: Settings) -> Iterator[Finding]:
    if not ENV_FILE.exists():
        yield NOTE, f"there is no {ENV_FILE}; start.sh makes one", ""
    elif ENV_FILE.stat().st_mode & 0o077:
        yield WARN, f"{ENV_FILE} can be read by others and holds secrets", f"chmod 600 {ENV_FILE}"
    else:
        yield FINE, f"{ENV_FILE} is readable by its owner alone", ""
    if settings.api_key is None and not settings.engine_url:
        yield WARN, "GLM_API_KEY is not set: the API refuses the checker's questions without it", "./start.sh makes one"


def _parts(settings: Settings) -> Iterator[Finding]:
    moment = now()
    for part in ("api", "web"):
        record = processes.read_record(settings.log_dir, part)
        if record is None:
            yield NOTE, f"{part}: nothing was started here", "./start.sh"
            continue
        if not processes.is_running(record):
            yield WARN, f"{part}: the recorded process {record.pid} is gone", "the next run starts it again"
            continue
        mine = {owner.pid for owner in ports.listeners(record.port)} & set(processes.members(record))
        yield (FINE, f"{part}: process {record.pid} holds port {record.port}", "") if mine else (WARN, f"{part}: process {record.pid} runs but does not hold port {record.port}", "")
        beat = settings.log_dir / "api.heartbeat.json"
        if part == "api" and not beat.exists():
            yield WARN, f"api: it writes no {beat.name}; without it a blocked server is detected later", ""
    if not moment.boot_id:
        yield WARN, "the boot id cannot be read; a pid file of an earlier boot may name another process", ""


def _gpu(settings: Settings) -> Iterator[Finding]:
    reading = gpu.read()
    if reading["hung"]:
        yield FAIL, f"the GPU driver does not answer: {reading['reason']}", "reset the GPU or replace the instance"
    elif reading["gpus"]:
        yield FINE, f"{len(reading['gpus'])} GPU(s) by {reading['source']}", reading["reason"] or ""
    else:
        yield NOTE, f"no GPU: {reading['reason']}", ""


def _channels(settings: Settings) -> Iterator[Finding]:
    found = channels.configured(settings)
    if not found:
        yield WARN, "no alert channel is set: nobody will be alerted", "GLM_DINGTALK_URL, GLM_FEISHU_URL, GLM_WECOM_URL, GLM_WEBHOOK_URL, GLM_SLACK_URL or GLM_SMTP_URL"
    for channel in found:
        error = channel.send("health_check.py doctor: this channel works. 此告警渠道可用。", "info", [])
        yield (FAIL, f"{channel.name}: {error}", "") if error else (FINE, f"{channel.name} accepted a test message", "")


def _outward_ping(settings: Settings) -> Iterator[Finding]:
    found, age_s = status.read(settings)
    if settings.ping_url is None:
        yield NOTE, "no outward ping (GLM_PING_URL): when this whole machine dies, nobody outside notices", ""
    elif found is None or age_s > settings.check_silent_s:
        yield NOTE, "the outward ping is not tried: there is no recent report to send", "health_check.py"
    else:
        problem = alerts.ping(settings, found)
        yield (FAIL, problem, "see GLM_PING_URL in .env") if problem else (FINE, "the outward ping was accepted", "")


def _faults_off(settings: Settings) -> Iterator[Finding]:
    if settings.test_faults:
        yield WARN, "GLM_TEST_FAULTS is on: the server injects faults on request", "remove it from .env in production"

