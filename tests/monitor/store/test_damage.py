"""A damaged store: whatever happens to the file and whenever, the run judges, reports and keeps what can be read."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from monitor import check, doctor
from monitor.observe import observe
from monitor.store import steady_time
from monitor.store.salvage import KEEP, all_aside
from monitor.store.state import CheckerState
from monitor.store.store import KEEP_RUNS_S, Store
from monitor.tell import incident_history, report, status
from web.console import checker_store

ROOT = Path(__file__).resolve().parents[3]
RUNS = 80
NOW = 1_800_000_000.0
INCIDENT = {
    "id": "1-api-dead", "target": "api", "word": "dead", "rule": "process_gone", "en": "gone", "zh": "没了", "opened_at": NOW,
    "first_seen_at": NOW, "recovered_at": None, "restarts": 2, "symptoms": ["process_gone"],
}  # fmt: skip


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A folder without the cost of a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def a_report(number: int) -> dict:
    return report.build("healthy", True, ["a reason of some length"] * 8, {}, {}, {}, 1.0, NOW + 60 * number, targets={}, warnings=[])


def fill(folder: Path) -> None:
    """The store of a checker that ran for some time, with a journal that is not yet in the file."""
    store = Store.open_for_run(folder)
    for number in range(RUNS):
        with store.transaction():
            store.add_run(NOW + 60 * number, a_report(number), {"api": {"word": "healthy"}}, {"cpu_percent": 1.0})
            store.add_flip(NOW + 60 * number, "api", "healthy", "dead", "process_gone", "gone", "没了")
            store.add_action(NOW + 60 * number, "api", "restart", "checker", "done")
            store.put("last", {"runs": number})
    with store.transaction():
        store.put_incident(INCIDENT)
        store.put("limiter:api", {"restarts": [NOW, NOW + 60], "step": 2, "open_since": None, "open_reason": ""})
        store.put("hold", {"pause": {"from": 0.0, "until": None, "reason": "work"}})
    store.close()


def damage(folder: Path, chance: random.Random) -> str:
    """One of the ways in which a file is damaged; its name."""
    files = [path for path in (folder / "state.db", folder / "state.db-wal") if path.exists() and path.stat().st_size]
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    start = chance.randrange(0, len(data), 4096)
    way = chance.choice(("bit", "bits", "zeros", "page", "noise", "header", "end", "folder"))
    if way == "bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == "bits":
        for _ in range(200):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == "zeros":
        data[:] = bytes(len(data))
    elif way == "page":
        data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    elif way == "noise":
        data[start : start + 4096] = chance.randbytes(len(data[start : start + 4096]))
    elif way == "header":
        data[:100] = chance.randbytes(100)
    elif way == "end":
        del data[chance.randrange(len(data)) :]
    if way == "folder":
        path.unlink()
        path.mkdir()
    else:
        with path.open("r+b") as file:
            file.write(data)
            file.truncate(len(data))
    return way


def test_a_run_with_a_damaged_store_judges_and_reports(make_settings, memory_disk, monkeypatch):
    """60 ways and places, before a run or in the middle of it."""
    settings = make_settings(1, log_dir=memory_disk / "logs")
    observation = check.observe(settings, random.Random(1), check.ProbePlan(True, False, None), observe.now(), None)
    fill(memory_disk / "full")
    doing = {"in_the_middle": lambda: None}

    def observed(*_: object) -> object:
        doing["in_the_middle"]()
        return observation

    monkeypatch.setattr(check, "observe", observed)
    for seed in range(60):
        chance = random.Random(seed)
        shutil.rmtree(settings.log_dir, ignore_errors=True)
        shutil.copytree(memory_disk / "full", settings.log_dir)
        way = ""
        if seed % 2:
            way = damage(settings.log_dir, chance)
            doing["in_the_middle"] = lambda: None
        else:
            doing["in_the_middle"] = lambda chance=chance: damage(settings.log_dir, chance)

        outcome = check.run(settings, chance)

        assert outcome.report["verdict"] not in ("", "unknown"), (seed, way)
        assert json.loads((settings.log_dir / "health.json").read_text())["verdict"] == outcome.report["verdict"], (seed, way)
        assert outcome.report["check"]["hold"] == "paused by an operator: work", (seed, way)
        doing["in_the_middle"] = lambda: None
        after = check.run(settings, chance)
        assert after.report["check"]["store"] == "ok" or "damaged" in after.report["check"]["store"], (seed, way)
        history = checker_store.read(settings.log_dir, observation.moment.wall)
        assert "1-api-dead" in [row["id"] for row in history.incidents], (seed, way)
        assert history.runs, (seed, way)


def damaged_in_the_middle(folder: Path) -> None:
    """Three pages in the middle of the file, with everything in the file itself."""
    path = folder / "state.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(bytes(3 * 4096))


def test_rows_around_damaged_pages_are_salvaged_and_the_damage_is_told(tmp_path, make_settings):
    fill(tmp_path / "logs")
    damaged_in_the_middle(tmp_path / "logs")
    (tmp_path / "logs" / "state.copy.json").unlink()
    store = Store.open_for_run(tmp_path / "logs")

    with store.transaction():
        store.put("first", 1)
        for table in ("runs", "rollups", "flips", "actions"):  # one of them meets the damage
            store.rows(f"SELECT * FROM {table}")
        store.put("second", 2)

    assert store.damage and "was set aside as state.db.damaged-" in store.damage["en"] and "已损坏" in store.damage["zh"]
    assert (store.get("first"), store.get("second")) == (1, 2), "the transaction goes on in the new file"
    assert RUNS / 2 < len(store.runs(0)) <= RUNS and len(store.actions(0)) > RUNS / 2
    assert store.get("limiter:api")["step"] == 2 and store.incidents()[0]["restarts"] == 2
    store.close()
    with closing(Store.open_for_run(tmp_path / "logs")) as after:
        assert after.damage is None and after.lost == ""


def test_a_file_of_which_nothing_is_left_keeps_restarts_holds_and_incidents(tmp_path):
    fill(tmp_path)
    for path in tmp_path.glob("state.db*"):
        path.write_bytes(bytes(path.stat().st_size))

    store = Store.open_for_run(tmp_path)

    assert store.get("limiter:api")["restarts"] == [NOW, NOW + 60] and store.get("hold")["pause"]["reason"] == "work"
    assert store.get("last") == {"runs": RUNS - 1} and [row["id"] for row in store.incidents()] == ["1-api-dead"]


def test_a_file_of_another_version_is_replaced_and_its_rows_kept(tmp_path):
    fill(tmp_path)
    with closing(sqlite3.connect(tmp_path / "state.db")) as db:
        db.execute("ALTER TABLE actions DROP COLUMN duration_s")
        db.execute("ALTER TABLE runs ADD COLUMN later TEXT")
        db.commit()

    store = Store.open_for_run(tmp_path)

    assert "of another version" in store.damage["en"]
    assert len(store.runs(0)) == RUNS


def test_garbage_in_json_columns_is_empty_and_the_state_comes_from_the_copy(tmp_path, make_settings):
    settings = make_settings(1)
    fill(settings.log_dir)
    with closing(sqlite3.connect(settings.log_dir / "state.db")) as db:
        for table, column in (("runs", "targets"), ("rollups", "words"), ("incidents", "symptoms"), ("outbox", "message")):
            db.execute(f"UPDATE {table} SET {column} = '{{nonsense'")
        db.execute("UPDATE state SET value = '{' WHERE name LIKE 'h%'")
        db.execute("UPDATE state SET value = '{\"restarts\": 7, \"step\": \"x\"}' WHERE name = 'limiter:api'")
        db.execute("UPDATE runs SET report = CAST(X'FFFE' AS TEXT) WHERE id = (SELECT MAX(id) FROM runs)")
        db.commit()

    outcome = check.run(settings, random.Random(1))

    assert outcome.report["targets"]["api"]["restarts_last_day"] == 2
    assert outcome.report["check"]["hold"] == "paused by an operator: work"
    assert [w["name"] for w in outcome.report["warnings"]] == ["store"]
    assert incident_history.show(settings, 24 * 365 * 10, as_json=True) == 0


def test_values_that_no_code_expects_are_left_out_with_their_rows(make_settings, capsys):
    """SQLite finds the file in order; the run fails and is repeated with the rows that make sense."""
    settings = make_settings(1, webhook_url="http://127.0.0.1:1/")
    fill(settings.log_dir)
    with closing(sqlite3.connect(settings.log_dir / "state.db")) as db:
        db.execute("INSERT INTO requests (made_at, actor, kind, target, arguments) VALUES ('yesterday', 'ann', 'probe', '', '{}')")
        db.commit()

    outcome = check.run(settings, random.Random(1))

    assert outcome.verdicts["api"].word in ("dead", "unknown")
    assert outcome.report["warnings"][-1]["name"] == "store" and "TypeError" in outcome.report["warnings"][-1]["en"]
    assert "the run is repeated with a new store" in capsys.readouterr().err


def test_a_fault_of_the_checker_is_raised_and_sets_no_file_aside(make_settings, monkeypatch):
    settings = make_settings(1)
    monkeypatch.setattr(check, "judge", lambda *_: {}["api"])

    for _ in range(2):
        with pytest.raises(KeyError):
            check.run(settings, random.Random(1))

    assert not all_aside(settings.log_dir / "state.db")


def test_text_that_no_file_can_hold_is_stored_with_question_marks(tmp_path):
    with closing(Store.open(tmp_path)) as store:
        store.add_action(1.0, "api", "restart", "\udc80ann", "done", "why \ud800")
        store.put("last", {"runs": "\ud800"})

        assert (store.actions()[0]["actor"], store.actions()[0]["detail"]) == ("?ann", "why ?")
        assert store.get("last") == {"runs": "?"}


def test_a_locked_file_is_left_alone_and_the_run_goes_on(tmp_path):
    fill(tmp_path)
    code = (
        "import sqlite3, sys, time; db = sqlite3.connect(sys.argv[1]); db.execute('PRAGMA locking_mode = EXCLUSIVE')\n"
        "db.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "state.db")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    try:
        store = Store.open_for_run(tmp_path)
        assert "locked" in store.lost and store.get("limiter:api")["step"] == 2
        store.put("seen", 1)
        store.close()
    finally:
        holder.kill()
        holder.wait()

    with closing(Store.open_for_run(tmp_path)) as after:
        assert after.lost == "" and after.get("seen") == 1 and not all_aside(tmp_path / "state.db")


def test_only_a_few_files_set_aside_are_kept(tmp_path):
    for _ in range(KEEP + 2):
        (tmp_path / "state.db").write_bytes(b"no database" * 1000)
        Store.open_for_run(tmp_path).close()

    assert len(all_aside(tmp_path / "state.db")) == KEEP


@pytest.mark.parametrize("way", ["middle", "zeros", "folder", "noise"])
def test_every_command_says_something_about_a_damaged_store(make_settings, capsys, way):
    settings = make_settings(1)
    fill(settings.log_dir)
    path = settings.log_dir / "state.db"
    if way == "middle":
        damaged_in_the_middle(settings.log_dir)
    elif way == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif way == "noise":
        path.write_bytes(random.Random(1).randbytes(8192))
    else:
        path.unlink()
        path.mkdir()
    before = sorted((each.name, each.stat().st_size) for each in settings.log_dir.glob("state.db"))

    findings = list(doctor._store(settings))
    assert findings[0][0] == doctor.FAIL and len(findings[0][1].splitlines()) == 1
    assert incident_history.show(settings, 24 * 365 * 10, as_json=False) == 0
    assert "This is what can be read of it" in capsys.readouterr().err
    history = checker_store.read(settings.log_dir, NOW)
    assert [row["id"] for row in history.incidents] == ["1-api-dead"]
    assert status.show(settings, as_json=False) == 1
    assert sorted((each.name, each.stat().st_size) for each in settings.log_dir.glob("state.db")) == before, "left as it is"


def test_a_clock_that_jumps_deletes_nothing(tmp_path):
    store = Store.open_for_run(tmp_path)
    for hour in range(30):
        store.add_run(NOW + 3600 * hour, a_report(hour), {"api": {"word": "healthy"}}, {})
        store.prune(NOW + 3600 * hour, 3600.0 * hour)
    runs, minutes = len(store.runs(0)), len(store.rollups("minute", 0))

    for jump in (86400.0, 366 * 86400.0, -366 * 86400.0):
        for minute in range(20):
            at = 30 * 3600 + 60 * minute
            store.add_run(NOW + at + jump, a_report(1), {"api": {"word": "healthy"}}, {})
            store.prune(NOW + at + jump, at)

    assert len(store.runs(0)) == runs + 60
    assert len(store.rollups("minute", 0)) >= minutes - 1


def test_the_time_of_deletion_follows_a_steady_clock_and_no_other():
    record = steady_time.advance({}, 1000.0, 0.0, "boot")
    for minute in range(1, 11):
        record = steady_time.advance(record, 1000.0 + 60 * minute, 60.0 * minute, "boot")
    assert record["at"] == 1600.0
    assert steady_time.advance(record, 1e9, 660.0, "boot")["at"] == 1600 + 2 * 60, "a year ahead"
    assert steady_time.advance(record, 0.0, 660.0, "boot")["at"] == 1600, "a year back"
    assert steady_time.advance(record, 1e9, 5.0, "another boot")["at"] == 1600 + 3600
    assert steady_time.advance({"at": 5.0}, 1e9, 5.0, "boot")["at"] == 3605.0
    assert KEEP_RUNS_S == 86400


def test_a_store_of_many_gigabytes_of_nothing_is_replaced_at_once(tmp_path):
    for name in ("state.db", "state.copy.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10 * 2**30)
    started = time.monotonic()

    with closing(Store.open_for_run(tmp_path)) as store:
        assert store.damage is not None and not store.lost

    assert time.monotonic() - started < 10
    assert not list(tmp_path.glob(".salvage-*"))


def test_an_entry_that_was_emptied_is_not_taken_from_an_older_copy(tmp_path):
    """The checker was killed between the end of a hold and the copy of the new state."""
    fill(tmp_path)
    assert json.loads((tmp_path / "state.copy.json").read_text())["state"]["hold"] != "{}"
    with closing(sqlite3.connect(tmp_path / "state.db")) as db, db:
        db.execute("UPDATE state SET value = '{}' WHERE name = 'hold'")

    with closing(Store.open_for_run(tmp_path)) as store:
        state = CheckerState.load(store, "boot")

        assert state.holds == {} and store.damage is None
