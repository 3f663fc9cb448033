"""The store: what is committed survives, whatever happens to the process or the disk."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from monitor.store.store import KEEP_REPORTS, Store
from monitor.tell import report

NOW = 1_800_000_000.0
ROOT = Path(__file__).resolve().parents[3]


def a_report(word: str = "healthy") -> dict:
    return report.build(word, word == "healthy", [], {"cpu_percent": 5.0}, {}, {}, 1.0, NOW, targets={}, warnings=[])


def incident(name: str = "1-api-dead") -> dict:
    return {
        "id": name, "target": "api", "word": "dead", "rule": "process_gone", "en": "gone", "zh": "没了", "opened_at": NOW,
        "first_seen_at": NOW, "recovered_at": None, "restarts": 0, "symptoms": ["process_gone"],
    }  # fmt: skip


def add(store: Store, at: float, word: str = "healthy", **readings: float) -> None:
    store.add_run(at, a_report(word), {"api": {"word": word}}, readings)


def test_roll_ups_count_words_and_sum_readings(tmp_path):
    store = Store.open(tmp_path)
    for second, word, load in ((0, "healthy", 10.0), (20, "busy", 30.0), (40, "healthy", 20.0)):
        add(store, NOW + second, word, cpu_percent=load)
    add(store, NOW + 3600, "dead")

    minutes, hours = store.rollups("minute", 0), store.rollups("hour", 0)
    assert [row["words"] for row in minutes] == [{"api": {"healthy": 2, "busy": 1}}, {"api": {"dead": 1}}]
    assert minutes[0]["sums"] == {"cpu_percent": [60.0, 3, 30.0]}
    assert len(hours) == 2 and len(store.rollups("day", 0)) in (1, 2)


def test_the_size_is_bounded(tmp_path):
    store = Store.open(tmp_path)
    with store.transaction():
        for number in range(3000):
            add(store, NOW + 60 * number)
        store.put_incident(incident(), closed_at=NOW - 366 * 86400)
        store.put_incident(incident("2-api-dead"))
        store.prune(NOW + 60 * 3000)

    counts = {t: store.execute(f"SELECT COUNT(*) FROM {t}").fetchone()[0] for t in ("runs", "rollups", "incidents")}
    assert counts["runs"] == 1440
    assert store.execute("SELECT COUNT(*) FROM runs WHERE report IS NOT NULL").fetchone()[0] == KEEP_REPORTS
    assert store.execute("SELECT COUNT(*) FROM rollups WHERE span = 'minute'").fetchone()[0] == 1440
    assert counts["incidents"] == 1, "an open incident is never pruned"


@pytest.mark.parametrize("transactions", [1, 20, 200])
def test_a_kill_at_any_moment_loses_nothing_that_was_committed(tmp_path, transactions):
    code = (
        "import sys; from pathlib import Path; from monitor.store.store import Store\n"
        "s = Store.open(Path(sys.argv[1]))\n"
        "n = 0\n"
        "while True:\n"
        "    with s.transaction():\n"
        "        s.put('a', n); s.add_action(n, 'api', 'x', 'me', 'done'); s.put('b', n)\n"
        "    print(n, flush=True); n += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(transactions):
        assert writer.stdout.readline(), "the writer has ended"
    os.kill(writer.pid, signal.SIGKILL)
    committed = [int(line) for line in writer.stdout.read().split()]
    writer.wait()

    store = Store.open(tmp_path)
    assert store.lost == ""
    assert store.get("a") == store.get("b") >= max(committed, default=transactions - 1)
    assert store.execute("SELECT COUNT(*) FROM actions").fetchone()[0] == store.get("a") + 1
    assert store.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_full_disk_is_reported_and_its_contents_stay(tmp_path):
    """RLIMIT_FSIZE makes writes fail as a full disk does."""
    store = Store.open(tmp_path)
    with store.transaction():
        store.put_incident(incident())
        store.put("limiter:api", {"restarts": [NOW]})
    store.close()
    code = (
        "import resource, sys; from pathlib import Path; from monitor.store.store import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "s = Store.open(Path(sys.argv[1]))\n"
        "print(s.lost); print(s.get('limiter:api')); print(s.incidents()[0]['id'])\n"
        "with s.transaction(): s.put('new', 1)\n"
        "print(s.get('new'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)

    lines = done.stdout.splitlines()
    assert "state.db is not writable" in lines[0] and "what is written now is lost" in lines[0], done.stderr
    assert lines[1:] == [f"{{'restarts': [{NOW}]}}", "1-api-dead", "1"]
    after = Store.open(tmp_path)
    assert after.lost == "" and after.incidents()[0]["id"] == "1-api-dead" and after.get("new") is None


@pytest.fixture
def small_disk(tmp_path):
    """A log folder with one incident on a disk of one megabyte."""
    folder = tmp_path / "logs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    store = Store.open(folder)
    with store.transaction():
        store.put_incident(incident())
        add(store, NOW)
    store.close()
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)


def test_runs_on_a_full_disk_share_a_copy_that_is_restored_to_the_disk(small_disk, shared_memory):
    fill(small_disk)
    for number in range(2):
        store = Store.open_for_run(small_disk)
        assert "kept in memory" in store.lost
        with store.transaction():
            store.put("seen", store.get("seen", 0) + 1)
            store.add_action(number, "api", "restart", "checker", "done")
        store.close()
    with contextlib.closing(Store.read_only(small_disk)) as reader:
        assert len(reader.actions()) == 2, "readers see the copy too"

    (small_disk / "filling").unlink()
    page = Store.open(small_disk)
    page.add_request(NOW, "ann", "pause")
    page.close()
    after = Store.open_for_run(small_disk)

    assert after.lost == "" and after.get("seen") == 2 and len(after.actions()) == 2
    assert after.incidents()[0]["id"] == "1-api-dead", "the disk's contents are unchanged"
    assert [row["kind"] for row in after.requests()] == ["pause"], "inserted on the disk after it was writable again"
    assert after.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert not list(shared_memory.iterdir())
    after.close()


def test_only_the_checker_keeps_a_copy(small_disk, shared_memory):
    """A copy by the page, restored later, would undo the runs in between."""
    fill(small_disk)

    page = Store.open(small_disk)

    assert "what is written now is lost" in page.lost and page.incidents()[0]["id"] == "1-api-dead"
    assert not list(shared_memory.iterdir())


def test_a_copy_that_began_empty_never_replaces_the_disk(tmp_path, shared_memory):
    store = Store.open(tmp_path)
    with store.transaction():
        store.put_incident(incident())
        add(store, NOW)
    store.close()
    path, away = tmp_path / "state.db", tmp_path / "away"
    path.rename(away)
    path.symlink_to(tmp_path / "missing" / "state.db")
    (tmp_path / "state.copy.json").unlink(missing_ok=True)
    blind = Store.open_for_run(tmp_path)
    with blind.transaction():
        blind.put("seen", 1)
    blind.close()
    path.unlink()
    away.rename(path)

    after = Store.open_for_run(tmp_path)

    assert after.incidents()[0]["id"] == "1-api-dead" and after.get("seen") is None
    assert not list(shared_memory.iterdir())


def test_a_folder_of_another_user_in_shared_memory_is_not_used(tmp_path, shared_memory):
    Store.fallback(tmp_path, "full").close()
    (folder,) = shared_memory.iterdir()
    folder.chmod(0o777)

    store = Store.fallback(tmp_path, "full")

    assert "what is written now is lost" in store.lost
    with store.transaction():
        store.put("seen", 1)
    assert store.get("seen") == 1


def test_a_damaged_file_is_reported_and_does_not_stop_the_checker(tmp_path):
    (tmp_path / "state.db").write_bytes(b"this is not a database" * 100)

    store = Store.open(tmp_path)

    assert "is not writable" in store.lost
    add(store, NOW)
    assert store.last_report()["verdict"] == "healthy"


def test_the_page_reads_while_the_checker_writes_and_cannot_write(tmp_path):
    writer = Store.open(tmp_path)
    add(writer, NOW)
    with writer.transaction():
        add(writer, NOW + 60)
        reader = Store.read_only(tmp_path)
        assert len(reader.runs(0)) == 1, "not yet committed"
        with pytest.raises(sqlite3.OperationalError):
            reader.put("x", 1)
    assert len(reader.runs(0)) == 2


def test_a_reader_without_a_store_gets_an_error(tmp_path):
    with pytest.raises(sqlite3.Error):
        Store.read_only(tmp_path)


def test_a_request_is_taken_once(tmp_path):
    page, checker = Store.open(tmp_path), Store.open(tmp_path)
    number = page.add_request(NOW, "ann", "restart", "api", {"why": "slow"})

    first, second = checker.take_request(NOW + 1), page.take_request(NOW + 1)

    assert first["id"] == number and first["arguments"] == {"why": "slow"} and second is None
    checker.end_request(number, NOW + 2, "done", "restarted")
    assert page.requests()[0]["state"] == "done"
    with pytest.raises(ValueError, match="`kind` must be one of"):
        page.add_request(NOW, "ann", "explode")


def test_a_folder_of_logs_that_links_to_itself_is_no_end_of_watching(tmp_path):
    (tmp_path / "logs").symlink_to("logs")

    opened = Store.open_for_run(tmp_path / "logs")

    assert opened.lost
    opened.close()
