"""Backup and restore: made while others write, refused when anything is wrong, and never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import settings as settings_module
from monitor import backup
from monitor.backup import BackupError
from monitor.observe import processes
from monitor.store import store as checker_store
from monitor.store.store import Store
from settings import Settings
from web.history import chat_store
from web.history.chat_store import ChatStore
from web.history.conversation import Conversation

ROOT = Path(__file__).resolve().parents[2]
ENV_TEXT = "# Mine.\nGLM_API_KEY=sk-old-key\nGLM_WEB_TOKEN=page-token\n"


@pytest.fixture
def service(make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """Settings, chats, a history and a baseline, as a running service has them."""
    for name in [name for name in os.environ if name.startswith("GLM_")]:
        monkeypatch.delenv(name)
    env = tmp_path / "service.env"
    env.write_text(ENV_TEXT)
    monkeypatch.setattr(settings_module, "ENV_FILE", env)
    settings = make_settings(1)
    chats = ChatStore(settings.log_dir / "chats.db", 90)
    chats.save("visitor", _chat("a question"))
    with closing(Store.open(settings.log_dir)) as history:
        history.add_action(time.time(), "api", "restart", "a person", "done", "kept")
        history.add_request(time.time(), "a person", "restart", "api")
        history.put("last", {"runs": 7, "records": {"api": {"pid": 1}}})
        history.execute("INSERT INTO outbox (made_at, channel, kind, severity, message, next_at) VALUES (1, 'x', 'open', 'error', '{}', 1)")
    return settings


def _chat(question: str) -> Conversation:
    conversation = Conversation(question.replace(" ", "-"))
    conversation.ask(question, [])
    return conversation


def _questions(log_dir: Path) -> list[str]:
    with closing(sqlite3.connect(log_dir / "chats.db")) as db:
        return [json.loads(body)["question"] for (body,) in db.execute("SELECT body FROM turns ORDER BY chat, number")]


def test_what_is_saved_while_others_write_comes_back(service: Settings, tmp_path: Path) -> None:
    """Each chat is two rows of one transaction: a copy of the file would tear them."""
    stop = threading.Event()

    def write() -> None:
        chats, number = ChatStore(service.log_dir / "chats.db", 90), 0
        while not stop.is_set():
            chats.save("visitor", _chat(f"number {number}"))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.3)
    try:
        saved = backup.save(service, tmp_path / "backups")
    finally:
        stop.set()
        writer.join()

    assert stat.S_IMODE(saved.path.stat().st_mode) == 0o600 and not saved.left_out
    env, aside = backup.restore(service, saved.path, tmp_path / "elsewhere")

    assert (env.read_text(), stat.S_IMODE(env.stat().st_mode), aside) == (ENV_TEXT, 0o600, [])
    logs = tmp_path / "elsewhere" / "logs"
    found, now = _questions(logs), _questions(service.log_dir)
    assert "a question" in found and 2 <= len(found) <= len(now) and set(found) <= set(now)
    with closing(sqlite3.connect(logs / "chats.db")) as db:
        assert db.execute("SELECT COUNT(*) FROM chats").fetchone()[0] == len(found)
    assert ChatStore(logs / "chats.db", 90).load("visitor", "a-question") is not None
    with closing(Store.read_only(logs)) as history:
        assert [row["detail"] for row in history.actions()] == ["kept"]
        assert history.requests()[0]["state"] == "refused", "a restart that was asked for then is not made now"
        assert history.get("last") == {"runs": 7}, "servers of then are not missed now"
        assert history.rows("SELECT * FROM outbox") == []
    assert json.loads((logs / "baseline.json").read_text()) == json.loads((service.log_dir / "baseline.json").read_text())


def test_secret_files_are_part_of_it(service: Settings, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-in-a-file\n")
    settings_module.ENV_FILE.write_text(f"GLM_API_KEY_FILE={tmp_path / 'key'}\nGLM_WEB_TOKEN=t\n")

    env, _ = backup.restore(service, backup.save(service, tmp_path / "backups").path, tmp_path / "elsewhere")

    assert "GLM_API_KEY=sk-in-a-file" in env.read_text().replace("'", "").replace('"', "")
    assert "GLM_API_KEY_FILE" not in env.read_text()


def test_a_restore_over_what_is_there_is_asked_for_and_sets_it_aside(service: Settings, tmp_path: Path) -> None:
    archive = backup.save(service, tmp_path / "backups").path
    ChatStore(service.log_dir / "chats.db", 90).save("visitor", _chat("later"))
    settings_module.ENV_FILE.write_text("GLM_API_KEY=newer\n")
    before = _tree(service.log_dir)

    with pytest.raises(BackupError, match="--replace"):
        backup.restore(service, archive)
    assert _tree(service.log_dir) == before

    _, aside = backup.restore(service, archive, replace=True)

    assert settings_module.ENV_FILE.read_text() == ENV_TEXT and _questions(service.log_dir) == ["a question"]
    names = sorted(path.name.split(".before-restore-")[0] for path in aside)
    assert {"service.env", "chats.db", "state.db", "baseline.json"} <= set(names)
    newer = next(path for path in aside if path.name.startswith("service.env"))
    assert newer.read_text() == "GLM_API_KEY=newer\n"


def test_it_is_refused_while_a_server_runs(service: Settings, tmp_path: Path) -> None:
    archive = backup.save(service, tmp_path / "backups").path
    logs = tmp_path / "elsewhere" / "logs"
    logs.mkdir(parents=True)
    itself = processes.read_stat(os.getpid())
    assert itself is not None
    processes.write_record(logs, "api", processes.ProcessRecord(itself.pid, itself.start_time, 1, processes.boot_id()))

    with pytest.raises(BackupError, match="api runs"):
        backup.restore(service, archive, tmp_path / "elsewhere")
    assert [path.name for path in logs.iterdir()] == ["api.pid.json"]


def _rewrite(archive: Path, change: Callable[[dict[str, bytes], dict], None], add: Callable[[zipfile.ZipFile], None] | None = None) -> None:
    """The archive with other contents, and a manifest that fits them unless `change` sees to it."""
    with zipfile.ZipFile(archive) as old:
        files = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    change(files, manifest)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("manifest.json", json.dumps(manifest))
        for name, data in files.items():
            new.writestr(name, data)
        if add:
            add(new)


def _put(files: dict[str, bytes], manifest: dict, name: str, data: bytes) -> None:
    files[name] = data
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _store_with(tmp_path: Path, data: bytes, *statements: str) -> bytes:
    path = tmp_path / "made.db"
    path.write_bytes(data)
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
    return path.read_bytes()


def _link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("logs/baseline.json")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


HOSTILE: dict[str, tuple[str, Callable[..., None]]] = {
    "no archive": ("BadZipFile", lambda path, tmp: path.write_bytes(b"x" * 10_000)),
    "empty": ("BadZipFile", lambda path, tmp: path.write_bytes(b"")),
    "cut off": ("BadZipFile", lambda path, tmp: path.write_bytes(path.read_bytes()[:-200])),
    "a byte turned": ("chats.db|BadZipFile|error", lambda path, tmp: path.write_bytes(_turned(path.read_bytes()))),
    "path traversal": ("which no backup has", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "../../etc/cron.d/x", b"* * * * *"))),
    "absolute path": ("which no backup has", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "/root/.ssh/authorized_keys", b"key"))),
    "a link": ("not a plain file", lambda path, tmp: _rewrite(path, lambda f, m: (f.pop("logs/baseline.json"), None)[1], _link)),
    "not in the manifest": ("not those that", lambda path, tmp: _rewrite(path, lambda f, m: m["files"].pop(".env") and None)),
    "missing": ("not those that", lambda path, tmp: _rewrite(path, lambda f, m: f.pop(".env") and None)),
    "checksum": ("differs from its checksum", lambda path, tmp: _rewrite(path, lambda f, m: f.update({".env": f[".env"].replace(b"old", b"bad")}))),
    "size": ("bytes, and manifest.json says", lambda path, tmp: _rewrite(path, lambda f, m: m["files"][".env"].update(bytes=1))),
    "too large for the disk": ("MiB are free", lambda path, tmp: _rewrite(path, lambda f, m: m["files"][".env"].update(bytes=10**15))),
    "a newer format": ("Upgrade first", lambda path, tmp: _rewrite(path, lambda f, m: m.update(version=2))),
    "another format": ("not a backup of this project", lambda path, tmp: _rewrite(path, lambda f, m: m.update(format="tar"))),
    "newer chats": ("newer version .schema 2", lambda path, tmp: _rewrite(
        path, lambda f, m: _put(f, m, "logs/chats.db", _store_with(tmp, f["logs/chats.db"], "PRAGMA user_version = 2")))),
    "a newer history": ("newer version .schema 9", lambda path, tmp: _rewrite(
        path, lambda f, m: _put(f, m, "logs/state.db", _store_with(tmp, f["logs/state.db"], "UPDATE state SET value = '9' WHERE name = 'version'")))),
    "a trigger": ("has a trigger", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "logs/chats.db", _store_with(
        tmp, f["logs/chats.db"], "CREATE TRIGGER t AFTER INSERT ON turns BEGIN DELETE FROM chats; END")))),
    "no store": ("DatabaseError|damaged", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "logs/chats.db", b"no store" * 999))),
    "a damaged store": ("damaged|malformed", lambda path, tmp: _rewrite(
        path, lambda f, m: _put(f, m, "logs/chats.db", f["logs/chats.db"][:4096] + b"\xff" * (len(f["logs/chats.db"]) - 4096)))),
}  # fmt: skip


def _turned(data: bytes) -> bytes:
    middle = data.index(b"logs/chats.db") + 200
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_is_wrong_is_refused_before_anything_is_touched(name: str, service: Settings, tmp_path: Path) -> None:
    why, spoil = HOSTILE[name]
    archive = backup.save(service, tmp_path / "backups").path
    spoil(archive, tmp_path)
    outside, goal = _tree(tmp_path), tmp_path / "goal"

    for into in (goal, None):
        with pytest.raises(BackupError, match=why):
            backup.restore(service, archive, into, replace=True)

    assert _tree(tmp_path) == outside and not goal.exists()


def _tree(folder: Path) -> dict[str, bytes]:
    """-shm and -wal come and go with readers."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_too_little_disk_is_said_before_anything_is_written(service: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(backup.shutil, "disk_usage", lambda folder: usage._replace(free=100 * 2**20))

    with pytest.raises(BackupError, match="100 MiB are free"):
        backup.save(service, tmp_path / "backups")
    assert [path.name for path in (tmp_path / "backups").iterdir()] == [backup.LOCK_NAME]


def test_a_killed_backup_leaves_no_archive_and_the_next_one_tidies_up(service: Settings, tmp_path: Path) -> None:
    with closing(sqlite3.connect(service.log_dir / "chats.db")) as db, db:
        db.executemany("INSERT INTO picture_bytes VALUES (?, ?)", [(str(n), os.urandom(2**20)) for n in range(12)])
        db.executemany("INSERT INTO chat_pictures VALUES ('a-question', ?, '{}')", [(str(n),) for n in range(12)])
    folder = tmp_path / "backups"
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")}
    env |= {"GLM_LOG_DIR": str(service.log_dir), "GLM_ENV_FILE": str(settings_module.ENV_FILE)}
    process = subprocess.Popen([sys.executable, "health_check.py", "backup", "--to", str(folder)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (packing := list(folder.glob(f"{backup.WORK_PREFIX}*/archive"))) or packing[0].stat().st_size < 2**20:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(30)

    assert list(folder.glob("*.zip")) == [] and list(folder.glob(f"{backup.WORK_PREFIX}*"))
    saved = [backup.save(service, folder, keep=1).path for _ in range(2)]

    assert sorted(folder.glob("*.zip")) == saved[1:], "the newest one"
    assert list(folder.glob(f"{backup.WORK_PREFIX}*")) == []


def test_a_damaged_store_is_not_saved(service: Settings, tmp_path: Path) -> None:
    with closing(sqlite3.connect(service.log_dir / "chats.db")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = (service.log_dir / "chats.db").read_bytes()
    (service.log_dir / "chats.db").write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))

    with pytest.raises(BackupError, match=r"damaged|malformed"):
        backup.save(service, tmp_path / "backups")
    assert list((tmp_path / "backups").glob("*.zip")) == []


def test_the_versions_are_those_of_the_stores() -> None:
    assert {backup.STATE: checker_store.VERSION, backup.CHATS: chat_store.VERSION} == backup.STORES
