"""The command `doctor`: checks the setup of the checker and suggests a fix for each problem."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import settings as settings_module
from deploy import replicas
from monitor import schedule
from monitor.act.lock import Lock
from monitor.judge.verdict import SERVING
from monitor.observe import gpu, ports, processes
from monitor.observe.observe import now
from monitor.store.salvage import all_aside, refuse_pipes
from monitor.store.store import FILE_NAME as STORE_NAME
from monitor.store.store import fallback_path
from monitor.tell import alerts, channels, status
from settings import ENV_FILE, ROOT, Settings, SettingsError

GOOD, BAD = 0, 1
FINE, WARN, FAIL, NOTE = " ok ", "warn", "FAIL", "note"
Finding = tuple[str, str, str]


def examine(settings: Settings) -> int:
    """Prints one line per check. Returns 1 if the checker cannot work."""
    worst = GOOD
    for check in (
        _scheduled, _last_report, _empty_environment, _log_folder, _store, _lock, _clock, _env_file, _servers, _replicas, _gpu, _channels,
        _ping, _fault_injection,
    ):  # fmt: skip
        for level, what, fix in check(settings):
            print(f"[{level}] {what}" + (f"\n       {fix}" if fix else ""))
            if level == FAIL:
                worst = BAD
    return worst


def _scheduled(settings: Settings) -> Iterator[Finding]:
    ways = [way for way in ("systemd", "cron") if schedule.installed(way)]
    loop = _loop()
    if loop is not None:
        yield FINE, f"a loop runs the checker (pid {loop})", ""
    elif not ways:
        yield WARN, "nothing runs the checker automatically", f"health_check.py install, or instead: {schedule.in_background()}"
    if "cron" in ways:
        block = schedule.read_crontab() or ""
        if str(ROOT / "health_check.py") not in block:
            yield FAIL, "the crontab entry names another folder", "health_check.py install"
        elif not schedule.cron_runs():
            yield FAIL, "the crontab has an entry, but no cron daemon is running", f"service cron start, or instead: {schedule.in_background()}"
        else:
            yield FINE, "cron runs the checker", ""
    if "systemd" in ways:
        done = subprocess.run(["systemctl", "is-active", f"{schedule.UNIT}.timer"], capture_output=True, text=True, check=False)
        active = done.stdout.strip() == "active"
        yield (FINE, "the systemd timer is active", "") if active else (FAIL, f"the systemd timer is {done.stdout.strip() or 'unknown'}", "health_check.py install")
    if len(ways) == 2:
        yield WARN, "both systemd and cron run the checker", "health_check.py uninstall --with cron"
    elif ways and loop is not None:
        yield WARN, f"both a loop and {ways[0]} run the checker", "health_check.py uninstall"


def _loop() -> int | None:
    """The process of `health_check.py loop` of this folder, which a container keeps running."""
    for stat in processes.all_stats():
        words = processes.command_of(stat.pid).split()
        if stat.running and "loop" in words and any(word.endswith("health_check.py") for word in words) and processes.works_in(stat.pid, ROOT):
            return stat.pid
    return None


def _last_report(settings: Settings) -> Iterator[Finding]:
    found, age_s = status.read(settings)
    if found is None:
        yield WARN, "no report yet", "health_check.py"
    elif age_s > settings.check_silent_s:
        yield FAIL, f"the last report is {age_s / 60:.0f} minutes old", f"see {settings.log_dir / 'health_check.log'}"
    else:
        yield FINE, f"the last report is {age_s:.0f} s old and took {found['duration_s']} s", ""


def _empty_environment(settings: Settings) -> Iterator[Finding]:
    """cron passes almost no environment; the settings must be the same there. A loop keeps that of its start."""
    if _loop() is not None and not any(map(schedule.installed, ("systemd", "cron"))):
        return
    code = "import settings; s = settings.load(); print(s.api_port, s.web_port, s.log_dir, bool(s.api_key))"
    runs = [
        subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        for env in ({"PATH": "/usr/bin:/bin"}, dict(os.environ))
    ]
    if runs[0].returncode:
        yield FAIL, "the settings cannot be read with an empty environment, as under cron", runs[0].stderr.strip().rpartition("\n")[2]
    elif runs[0].stdout != runs[1].stdout:
        yield FAIL, "the settings under cron differ from those of this shell", f"move the GLM_ variables of this shell to {ENV_FILE}"
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
        yield FAIL, f"{folder} is not writable: {error.strerror}", ""
        return
    free_mib = shutil.disk_usage(folder).free / 2**20
    level = FINE if free_mib > settings.disk_free_limit_mib else WARN
    yield level, f"{folder} is writable, {free_mib:.0f} MiB free", ""


def _store(settings: Settings) -> Iterator[Finding]:
    path = settings.log_dir / STORE_NAME
    if not path.exists():
        yield NOTE, "no store yet", ""
        return
    problem = problem_of_file(path)
    if problem:
        yield FAIL, f"{path}: {problem}", "nothing to do if it is damaged: the next run sets it aside and salvages its rows"
    else:
        yield FINE, f"{path} is intact ({path.stat().st_size / 2**20:.1f} MiB)", ""
    if fallback_path(settings.log_dir).exists():
        yield WARN, f"the runs write to {fallback_path(settings.log_dir)}, because {path} was not writable", "the next run that can write it moves them back"
    aside = all_aside(path)
    if aside:
        yield NOTE, f"damaged files were set aside: {', '.join(each.name for each in aside)}", "delete them when nobody needs them"
    if not os.access(path, os.W_OK) or not os.access(settings.log_dir, os.W_OK):
        yield FAIL, f"{path} is not writable by {getpass.getuser()}", f"chown {getpass.getuser()} {settings.log_dir}/*, or run the checker as the owner"


def problem_of_file(path: Path) -> str:
    """What SQLite finds wrong with the file on the disk, which stays as it is; empty if nothing."""
    if path.is_dir():
        return "is a folder"
    try:
        refuse_pipes(path)
    except sqlite3.OperationalError as error:
        return str(error)
    try:
        # Read-only, also without the journal where none can be opened, such as on a read-only disk.
        for mode in ("mode=ro", "immutable=1"):
            try:
                with contextlib.closing(sqlite3.connect(f"file:{path}?{mode}", uri=True, timeout=5)) as db:
                    found = str(db.execute("PRAGMA integrity_check(3)").fetchone()[0])
                    return "" if found == "ok" else found.replace("\n", "; ")
            except sqlite3.OperationalError as error:
                problem = str(error)
    except sqlite3.Error as error:
        problem = str(error)
    return problem


def _lock(settings: Settings) -> Iterator[Finding]:
    lock = Lock(settings.log_dir)
    holder = lock.acquire(5, "doctor")
    lock.release()
    yield (NOTE, holder, "") if holder else (FINE, "the lock is free", "")


def _clock(settings: Settings) -> Iterator[Finding]:
    year = datetime.now(UTC).year
    if year < 2024:
        yield FAIL, f"the clock is wrong: year {year}", "set the clock: DingTalk and Feishu reject signatures with a wrong time"
    offset = time.strftime("%z")
    yield FINE, f"the clock shows {datetime.now().astimezone().isoformat(timespec='seconds')} (offset {offset})", ""


def _env_file(settings: Settings) -> Iterator[Finding]:
    try:
        problem = settings_module.load_or_last_good()[1]
    except SettingsError as error:
        problem = str(error)
    if problem:
        yield FAIL, "the settings are invalid, and the last valid ones are in force", problem
    if not ENV_FILE.exists():
        yield NOTE, f"{ENV_FILE} does not exist; start.sh creates it", ""
    elif ENV_FILE.stat().st_mode & 0o077:
        yield WARN, f"{ENV_FILE} holds secrets and is readable by other users", f"chmod 600 {ENV_FILE}"
    else:
        yield FINE, f"{ENV_FILE} is readable by its owner only", ""
    if settings.api_key is None and not settings.engine_url:
        yield WARN, "GLM_API_KEY is not set, so the API rejects the checker's questions", "./start.sh creates one"


def _servers(settings: Settings) -> Iterator[Finding]:
    moment = now()
    for part, folder, kind in _parts(settings):
        record = processes.read_record(folder, kind)
        if record is None:
            yield NOTE, f"{part}: not started here", "./start.sh"
            continue
        if not processes.is_running(record):
            yield WARN, f"{part}: the recorded process {record.pid} is gone", "the next run restarts it"
            continue
        mine = {owner.pid for owner in ports.listeners(record.port)} & set(processes.members(record))
        yield (FINE, f"{part}: process {record.pid} holds port {record.port}", "") if mine else (WARN, f"{part}: process {record.pid} runs but does not hold port {record.port}", "")
        beat = folder / "api.heartbeat.json"
        if kind == "api" and not beat.exists():
            yield WARN, f"{part}: no {beat.name}, so a blocked event loop is detected later", ""
    if not moment.boot_id:
        yield WARN, "the boot id cannot be read, so a pid file of an earlier boot may match another process", ""


def _parts(settings: Settings) -> list[tuple[str, Path, str]]:
    """(its name on start.sh's command line, folder of its records, what it is) of each part that start.sh starts."""
    if settings.replica_count == 1:
        return [("api", settings.log_dir, "api"), ("web", settings.log_dir, "web")]
    replicas = [(f"api/{number}", settings.for_replica(number).log_dir, "api") for number in range(settings.replica_count)]
    return [*replicas, ("front", settings.log_dir, "front"), ("web", settings.log_dir, "web")]


def _replicas(settings: Settings) -> Iterator[Finding]:
    """Only where there are several."""
    if settings.replica_count == 1:
        return
    found, _ = status.read(settings)
    words = {replica["number"]: replica["word"] for replica in (found or {}).get("replicas", ())}
    for number in range(settings.replica_count):
        word = words.get(number)
        level = NOTE if word is None else FINE if word in SERVING else WARN
        yield level, f"replica {number}: {word or 'not checked yet'}", ""
    if not replicas.nginx():
        yield FAIL, "nginx is not installed, so that it cannot be started again", "apt-get install nginx"
    if settings.device != "cuda" and not settings.gpus and not settings.threads:
        each = max(1, (os.cpu_count() or 1) // settings.replica_count)
        yield NOTE, f"{settings.replica_count} replicas on the CPU share its {os.cpu_count()} cores", f"GLM_THREADS={each} gives each its own, for any but a tiny model"


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
        yield WARN, "no alert channel is configured: nobody will be alerted", "GLM_DINGTALK_URL, GLM_FEISHU_URL, GLM_WECOM_URL, GLM_WEBHOOK_URL, GLM_SLACK_URL or GLM_SMTP_URL"
    for channel in found:
        error = channel.send("health_check.py doctor: this channel works. 此告警渠道可用。", "info", [])
        yield (FAIL, f"{channel.name}: {error}", "") if error else (FINE, f"{channel.name} accepted a test message", "")


def _ping(settings: Settings) -> Iterator[Finding]:
    found, age_s = status.read(settings)
    if settings.ping_url is None:
        yield NOTE, "no outbound ping (GLM_PING_URL): nobody is alerted if the whole machine fails", ""
    elif found is None or age_s > settings.check_silent_s:
        yield NOTE, "the outbound ping was not tested: there is no recent report to send", "health_check.py"
    else:
        problem = alerts.ping(settings, found)
        yield (FAIL, problem, "see GLM_PING_URL in .env") if problem else (FINE, "the outbound ping was accepted", "")


def _fault_injection(settings: Settings) -> Iterator[Finding]:
    if settings.test_faults:
        yield WARN, "GLM_TEST_FAULTS is on: the server injects faults on request", "remove it from .env in production"

