"""Backup and restore: made while others write, refused when anything is wrong, and never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
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
from monitor import backup, cli, swap
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
    load_file, default = settings_module.load_file, Settings.model_fields["log_dir"].default

    def load_file_here(file: Path) -> Settings:
        """The default folder of logs is that of the test, not of the project."""
        loaded = load_file(file)
        return loaded if loaded.log_dir != default else loaded.model_copy(update={"log_dir": settings.log_dir})

    monkeypatch.setattr(settings_module, "load_file", load_file_here)
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
    restored = backup.restore(service, saved.path, tmp_path / "elsewhere")
    env, aside = restored.env, restored.aside

    assert (env.read_text(), stat.S_IMODE(env.stat().st_mode), aside) == (ENV_TEXT, 0o600, ())
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

    env = backup.restore(service, backup.save(service, tmp_path / "backups").path, tmp_path / "elsewhere").env

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

    settings_module.ENV_FILE.chmod(0o644)
    aside = backup.restore(service, archive, replace=True).aside

    assert settings_module.ENV_FILE.read_text() == ENV_TEXT and _questions(service.log_dir) == ["a question"]
    names = sorted(path.name.split(".before-restore-")[0] for path in aside)
    assert {"service.env", "chats.db", "state.db", "baseline.json"} <= set(names)
    newer = next(path for path in aside if path.name.startswith("service.env"))
    assert newer.read_text() == "GLM_API_KEY=newer\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in aside} == {0o600}
    assert _hidden(tmp_path) == []


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
    "no archive": ("no zip archive, or damaged or cut off", lambda path, tmp: path.write_bytes(b"x" * 10_000)),
    "empty": ("no zip archive, or damaged or cut off", lambda path, tmp: path.write_bytes(b"")),
    "cut off": ("no zip archive, or damaged or cut off", lambda path, tmp: path.write_bytes(path.read_bytes()[:-200])),
    "a byte turned": ("chats.db|no zip archive", lambda path, tmp: path.write_bytes(_turned(path.read_bytes()))),
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
    "no store": ("damaged", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "logs/chats.db", b"no store" * 999))),
    "a damaged store": ("damaged|malformed", lambda path, tmp: _rewrite(
        path, lambda f, m: _put(f, m, "logs/chats.db", f["logs/chats.db"][:4096] + b"\xff" * (len(f["logs/chats.db"]) - 4096)))),
    "no files": ("nothing to restore", lambda path, tmp: _rewrite(path, lambda f, m: (f.clear(), m.update(files={})))),
    "no object of files": ("makes no sense", lambda path, tmp: _rewrite(path, lambda f, m: (f.clear(), m.update(files=None)))),
    "an entry that is none": ("makes no sense", lambda path, tmp: _rewrite(path, lambda f, m: m["files"].update({".env": 7}))),
    "a manifest that is no JSON": ("is not JSON", lambda path, tmp: _with_manifest(path, b"{")),
    "a version that is no number": ("does not say", lambda path, tmp: _rewrite(path, lambda f, m: m.update(version=True))),
    "a time that is none": ("makes no sense", lambda path, tmp: _rewrite(path, lambda f, m: m.update(made_at=123))),
    "an unknown setting": (r"GLM_NEW: no such setting.*--without-env$", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, ".env", b"GLM_NEW=1\n"))),
    "binary settings": (r"\.env, line 1: not UTF-8", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, ".env", b"\xff\x80" * 99))),
    "a baseline that is none": ("no baseline", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "logs/baseline.json", b"{"))),
    "another database": ("has no table outbox", lambda path, tmp: _rewrite(path, lambda f, m: _put(f, m, "logs/state.db", _store_with(tmp, b"", "CREATE TABLE t (a)")))),
    "a version of the history that is none": ("its version is 'x'", lambda path, tmp: _rewrite(
        path, lambda f, m: _put(f, m, "logs/state.db", _store_with(tmp, f["logs/state.db"], "UPDATE state SET value = 'x' WHERE name = 'version'")))),
}  # fmt: skip


def _with_manifest(archive: Path, data: bytes) -> None:
    with zipfile.ZipFile(archive, "w") as new:
        new.writestr("manifest.json", data)


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
        with pytest.raises(BackupError, match=why) as refused:
            backup.restore(service, archive, into, replace=True)
        assert str(refused.value).count(str(archive)) == 1 and not re.search(r"\wError\b", str(refused.value))
        assert backup.restore_command(service, archive, into, check_only=True) == 1

    assert _tree(tmp_path) == outside and not goal.exists()


def _tree(folder: Path) -> dict[str, bytes]:
    """-shm and -wal come and go with readers."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _hidden(folder: Path) -> list[str]:
    """What a restore must not leave behind."""
    return [path.name for path in folder.rglob("*") if path.name.startswith((".glm-restore-", "..", ".chats", ".state")) or path.name.endswith(".restoring")]


def test_the_stores_go_where_the_restored_settings_look(service: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "data" / "glm"
    settings_module.ENV_FILE.write_text(f"{ENV_TEXT}GLM_LOG_DIR={other}\n")
    archive = backup.save(service, tmp_path / "backups").path
    settings_module.ENV_FILE.write_text(ENV_TEXT)
    before = _tree(service.log_dir)

    assert backup.restore_command(service, archive, None, replace=True) == 0

    assert _questions(other) == ["a question"] and _tree(service.log_dir).keys() - before.keys() <= {"health_check.lock"}
    said = capsys.readouterr().out
    assert f"Restored: {other / 'chats.db'}" in said and f"{service.log_dir} is no longer used" in said
    assert settings_module.load().log_dir == other and _hidden(tmp_path) == []

    ours = tmp_path / "ours"
    monkeypatch.setenv("GLM_LOG_DIR", str(ours))
    assert backup.restore_command(settings_module.load(), archive, None, replace=True) == 0
    assert _questions(ours) == ["a question"]
    assert f"without it, as under cron, {settings_module.ENV_FILE} means {other}" in capsys.readouterr().out


def test_settings_of_another_version_can_be_left_out(service: Settings, tmp_path: Path) -> None:
    archive = backup.save(service, tmp_path / "backups").path
    _rewrite(archive, lambda f, m: _put(f, m, ".env", b"GLM_NEW=1\n"))
    settings_module.ENV_FILE.write_text("GLM_API_KEY=mine\n")

    restored = backup.restore(service, archive, replace=True, with_env=False)

    assert settings_module.ENV_FILE.read_text() == "GLM_API_KEY=mine\n" and settings_module.ENV_FILE not in restored.files
    assert _questions(service.log_dir) == ["a question"]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", range(24))
def test_a_restore_that_was_killed_is_finished_by_the_next(service: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """After each change that it makes to a folder. `.env` is never missing, nor is a store."""
    archive = backup.save(service, tmp_path / "backups").path
    ChatStore(service.log_dir / "chats.db", 90).save("visitor", _chat("later"))
    (service.log_dir / "last-good.env").write_text("# newer\n")
    settings_module.ENV_FILE.write_text("GLM_API_KEY=newer\n")
    done = 0

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def until_killed(*arguments: object, **more: object) -> object:
            nonlocal done
            if done == steps:
                raise _Killed
            done += 1
            return call(*arguments, **more)

        return until_killed

    with monkeypatch.context() as patch:
        for name in ("link", "replace", "chmod"):
            patch.setattr(swap.os, name, counted(getattr(os, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(swap.shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
        try:
            backup.restore(service, archive, replace=True)
            killed = False
        except _Killed:
            killed = True
        assert killed == (steps < 21)
    begun = swap.journal_of(settings_module.ENV_FILE).exists()
    assert settings_module.ENV_FILE.exists() and all((service.log_dir / name).exists() for name in ("chats.db", "state.db", "baseline.json"))

    assert backup.restore_command(service, None, None) == (0 if begun else 2)
    assert not killed or _hidden(tmp_path) == []
    if not begun and killed:
        assert settings_module.ENV_FILE.read_text() == "GLM_API_KEY=newer\n"
        backup.restore(service, archive, replace=True)

    assert settings_module.ENV_FILE.read_text() == ENV_TEXT and _questions(service.log_dir) == ["a question"]
    assert "GLM_API_KEY=newer\n" in [path.read_text() for path in tmp_path.glob("service.env.before-restore-*")]
    backup.restore(service, archive, replace=True)  # removes what lies about
    assert _hidden(tmp_path) == []
    (kept,) = (path for path in service.log_dir.glob("chats.db.before-restore-*") if "later" in _questions_in(path))
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def _questions_in(aside: Path) -> list[str]:
    """Of a store that was set aside, with its journal."""
    folder = aside.parent / f"look-{aside.name}"
    folder.mkdir(exist_ok=True)
    stamp = aside.name.partition(".before-restore-")[2]
    for end in ("", "-wal"):
        if (source := aside.with_name(f"chats.db{end}.before-restore-{stamp}")).exists():
            shutil.copy(source, folder / f"chats.db{end}")
    return _questions(folder)


def test_copies_of_a_restore_that_was_killed_are_removed(service: Settings, tmp_path: Path) -> None:
    archive = backup.save(service, tmp_path / "backups").path
    for left in (service.log_dir / ".chats.db.abcd_123", tmp_path / ".service.env.abcd1234"):
        left.write_text("keys")
    (service.log_dir / ".glm-restore-abcd" / "files").mkdir(parents=True)
    mine = tmp_path / ".service.env.swp"
    mine.write_text("an editor's")

    backup.restore(service, archive, replace=True)

    assert _hidden(tmp_path) == [] and mine.exists() and not (tmp_path / ".service.env.abcd1234").exists()


def test_a_start_refuses_what_is_half_restored(tmp_path: Path) -> None:
    (tmp_path / ".env.restoring").write_text("{}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM_")} | {"GLM_ENV_FILE": str(tmp_path / ".env")}

    done = subprocess.run(["./start.sh"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    assert done.returncode == 2 and "health_check.py restore" in done.stderr


def test_git_and_images_leave_out_what_a_restore_leaves() -> None:
    names = [".env.before-restore-20260101T000000", "..env.abcd1234", ".env.restoring", ".glm-restore-abcd/.env", "data/chats.db.before-restore-1"]
    done = subprocess.run(["git", "check-ignore", "--no-index", *names, ".env.example"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == names
    assert {".env.*", "..env.*", "**/*.before-restore-*", "**/*.restoring", "**/.glm-restore-*"} <= set((ROOT / ".dockerignore").read_text().splitlines())


@pytest.mark.parametrize("loss", ["missing", "0 bytes", "made anew"])
def test_a_backup_without_the_chats_pushes_out_none_that_has_them(loss: str, service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "backups"
    old, good = (backup.save(service, folder).path for _ in range(2))
    for path in service.log_dir.glob("chats.db*"):
        path.unlink()
    if loss == "0 bytes":
        (service.log_dir / "chats.db").touch()
    elif loss == "made anew":
        ChatStore(service.log_dir / "chats.db", 90)

    for _ in range(3):
        assert backup.save_command(service, folder, 1) == 1
        assert f"logs/chats.db: the newest backup with contents of it is {good.name}" in capsys.readouterr().err
    assert good.exists() and not old.exists() and len(list(folder.glob("*.zip"))) == 2

    ChatStore(service.log_dir / "chats.db", 90).save("visitor", _chat("again"))
    assert backup.save_command(service, folder, 1) == 0
    assert len(list(folder.glob("*.zip"))) == 1


def test_an_invalid_env_is_not_what_is_saved(service: Settings, tmp_path: Path) -> None:
    settings_module.keep_last_good()
    (service.log_dir / "last-good.env").write_text(ENV_TEXT)
    settings_module.ENV_FILE.write_text("GLM_NEW=1\n")

    saved = backup.save(service, tmp_path / "backups")

    assert "the last valid one is in it instead" in " ".join(saved.left_out)
    assert backup.restore(service, saved.path, tmp_path / "elsewhere").env.read_text() == ENV_TEXT


def test_none_cannot_be_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backup", "--keep", "0"]) == cli.WRONG_USE
    assert "--keep must be >= 1" in capsys.readouterr().err


def test_the_start_beside_a_service_that_runs_names_other_ports(service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        settings_module.ENV_FILE.write_text(f"GLM_API_HOST=127.0.0.1\nGLM_WEB_HOST=127.0.0.1\nGLM_API_PORT={port}\n")
        archive = backup.save(service, tmp_path / "backups").path
        assert backup.restore_command(service, archive, tmp_path / "a folder") == 0
    said = capsys.readouterr().out
    found = re.search(r"GLM_ENV_FILE='(.*)/a folder/.env' GLM_LOG_DIR='.*/a folder/logs' GLM_API_PORT=(\d+) GLM_WEB_PORT=(\d+) ./start.sh", said)
    assert found and port not in map(int, found.groups()[1:]) and found[2] != found[3]


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
