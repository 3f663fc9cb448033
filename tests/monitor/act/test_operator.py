"""The commands of operators: status, watch, doctor, history, report."""

from __future__ import annotations

import json
import os
import random

import pytest

from monitor import check, doctor, schedule
from monitor.observe.processes import ProcessRecord, boot_id, write_record
from monitor.tell import incident_history, status


@pytest.fixture
def dead(make_settings):
    """Settings of a service whose API was started and is gone, after one run that saw it."""
    settings = make_settings(1)
    write_record(settings.log_dir, "api", ProcessRecord(4_000_000, 1, 1, boot_id()))
    check.run(settings, random.Random(1))
    return settings


def test_status_shows_what_is_wrong_and_fails(dead, capsys):
    assert status.show(dead, as_json=False) == 1

    text = capsys.readouterr().out
    assert "DEAD" in text and "The API process (pid 4000000) is gone." in text
    assert "action: shadow (dead: process_gone)" in text


def test_status_of_an_old_report_is_stale_even_if_healthy(service, make_settings, capsys):
    settings = make_settings(service)
    check.run(settings, random.Random(1))
    path = settings.log_dir / "health.json"
    report = {**json.loads(path.read_text()), "service_healthy": True}
    path.write_text(json.dumps({**report, "timestamp": "2026-01-01T00:00:00+00:00"}))

    assert status.show(settings, as_json=False) == 1
    assert "STALE" in capsys.readouterr().out
    assert status.show(settings, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["stale"] is True


def test_status_without_a_report_suggests_what_to_run(make_settings, capsys):
    assert status.show(make_settings(1), as_json=False) == 1
    assert "health_check.py" in capsys.readouterr().err


def test_watch_refreshes_and_ends(dead, capsys):
    assert status.watch(dead, 0.01, times=2) == 1
    assert capsys.readouterr().out.count("DEAD") == 2


def test_history_reports_availability_and_incidents(dead, capsys):
    assert incident_history.show(dead, 24, as_json=True) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["availability"]["api"]["share"] == 0 and found["availability"]["api"]["looks"] == 1
    assert found["incidents"][0]["rule"] == "process_gone"


def test_report_describes_an_incident_in_both_languages(dead, capsys):
    assert incident_history.show_incident(dead, None) == 0

    text = capsys.readouterr().out
    assert "The API process (pid 4000000) is gone." in text and "已不存在" in text
    assert incident_history.show_incident(dead, "no such") == 1


@pytest.fixture
def examine_setup(monkeypatch, capsys, tmp_path):
    """Runs the doctor without a schedule; returns (exit code, lines)."""
    monkeypatch.setattr(schedule, "installed", lambda way: False)
    monkeypatch.setattr(doctor, "ENV_FILE", tmp_path / ".env")
    for name in [name for name in os.environ if name.startswith("GLM_")]:
        monkeypatch.delenv(name)

    def examine(settings) -> tuple[int, list[str]]:
        code = doctor.examine(settings)
        return code, capsys.readouterr().out.splitlines()

    return examine


def test_the_doctor_names_each_problem_and_its_fix(dead, examine_setup):
    code, lines = examine_setup(dead)

    text = "\n".join(lines)
    assert code == 0, text
    assert "[warn] nothing runs the checker automatically\n       health_check.py install" in text
    assert "[warn] api: the recorded process 4000000 is gone" in text
    assert "[warn] no alert channel is configured: nobody will be alerted" in text
    assert "[ ok ] the lock is free" in text


def test_the_doctor_sends_a_message_and_reports_a_channel_that_rejects_it(service, behaviour, make_settings, examine_setup):
    code, lines = examine_setup(make_settings(service, webhook_url=f"http://127.0.0.1:{service}/hook"))

    assert code == 1
    assert any(line.startswith("[FAIL] webhook") for line in lines), "the stand-in is not a webhook and rejects it"


def test_the_doctor_finds_a_readable_env_a_damaged_store_and_an_old_report(dead, examine_setup, tmp_path):
    (tmp_path / ".env").write_text("GLM_API_KEY=x\n")
    (tmp_path / ".env").chmod(0o644)
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (dead.log_dir / name).unlink(missing_ok=True)
    (dead.log_dir / "state.db").write_bytes(b"not a database" * 500)
    report = json.loads((dead.log_dir / "health.json").read_text())
    (dead.log_dir / "health.json").write_text(json.dumps({**report, "timestamp": "2026-01-01T00:00:00+00:00"}))

    code, lines = examine_setup(dead)

    text = "\n".join(lines)
    assert code == 1
    assert "holds secrets and is readable by other users" in text and "chmod 600" in text
    assert "state.db cannot be read" in text or "state.db:" in text
    assert "[FAIL] the last report is" in text
