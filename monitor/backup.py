"""Backup and restore of what cannot be made again: settings with their secrets, chats, the history and the model's baseline.

A backup is one zip file: `manifest.json`, then the files that it names with their sizes and SHA-256. It is made while all runs
and writes: the stores by SQLite's online backup, each as of one moment. It appears under its name only once it is whole and has
been read back. A restore unpacks and checks everything beside its goal before it touches anything there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import settings as settings_module
from monitor.act import interrupted_restart
from monitor.act.lock import Lock
from monitor.observe import process_search, processes
from monitor.store import store
from monitor.store.salvage import JOURNALS, refuse_pipes
from settings import Settings, SettingsError

FORMAT, VERSION = "glm-backup", 1
MANIFEST, ENV, STATE, CHATS, BASELINE = "manifest.json", ".env", "logs/state.db", "logs/chats.db", "logs/baseline.json"
STORES = {STATE: store.VERSION, CHATS: 1}  # and the newest schema that this version knows
NAMES = (ENV, STATE, CHATS, BASELINE)
# Beside the goals: they hold newer states of what is restored, and would be taken for it.
OUTDATED = (store.COPY_NAME, settings_module.LAST_GOOD)
PREFIX, SUFFIX, WORK_PREFIX, LOCK_NAME = "glm-backup-", ".zip", ".glm-backup-", ".glm-backup.lock"
NAME = re.compile(r"glm-backup-\d{8}T\d{6}Z(-\d+)?\.zip")
MANIFEST_LIMIT_BYTES = 2**16
FREE_BYTES = 256 * 2**20  # that must be left
BLOCK_BYTES = 2**20
LOCK_S = 600.0


class BackupError(Exception):
    """The backup cannot be made or used; the message says why."""


@dataclass(frozen=True)
class Saved:
    """`left_out`: what is not in the archive and could be expected there, in words."""

    path: Path
    bytes: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def save(settings: Settings, folder: Path, keep: int = 0) -> Saved:
    """Adds an archive to the folder, and deletes all but the newest `keep` of them (0: none). Raises BackupError."""
    with _as_backup_error(f"{folder}"), _alone_in(folder):
        for left in folder.glob(f"{WORK_PREFIX}*"):  # by a backup that was killed: there is no other one now
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        sources = _sources(settings)
        if not sources:
            raise BackupError(f"there is nothing to save: neither {settings_module.ENV_FILE} nor a store in {settings.log_dir}")
        _require_room(folder, 2 * sum(_size(path) for path in sources.values()))
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=folder) as work:  # 0700
            files, left_out = _collect(sources, Path(work))
            made = Path(work) / "archive"
            _pack(files, made)
            for path in files.values():
                path.unlink()
            unpacked = Path(work) / "read-back"
            unpacked.mkdir()
            unpack(made, unpacked)
            path = _free_name(folder)
            os.replace(made, path)
            _sync(folder)
        for old in sorted((each for each in folder.iterdir() if NAME.fullmatch(each.name)), key=lambda each: each.name)[: -keep or None] if keep else ():
            old.unlink()
        return Saved(path, path.stat().st_size, tuple(files), tuple(left_out))


def _sources(settings: Settings) -> dict[str, Path]:
    """What there is of NAMES. The store in shared memory is newer than that of a disk that cannot be written."""
    kept = store.fallback_path(settings.log_dir)
    found = {
        ENV: settings_module.ENV_FILE,
        STATE: kept if kept.exists() else settings.log_dir / store.FILE_NAME,
        CHATS: settings.log_dir / Path(CHATS).name,
        BASELINE: settings.log_dir / Path(BASELINE).name,
    }
    return {name: path for name, path in found.items() if path.exists()}


def _collect(sources: dict[str, Path], work: Path) -> tuple[dict[str, Path], list[str]]:
    """Copies of the sources in `work`, and what was left out."""
    files: dict[str, Path] = {}
    left_out = [f"{name} (there is none)" for name in NAMES if name not in sources]
    for name, source in sources.items():
        files[name] = work / name.replace("/", "-")
        if name in STORES:
            _copy_store(source, files[name])
        elif name == ENV:
            files[name].write_bytes(_env_bytes(left_out))
        else:
            shutil.copyfile(source, files[name])
    in_force = sorted(name for name in os.environ if name.startswith(settings_module.PREFIX) and name != settings_module.ENV_FILE_NAME)
    if in_force:
        left_out.append(f"settings of the environment: {', '.join(in_force)}")
    return files, left_out


def _env_bytes(left_out: list[str]) -> bytes:
    """`.env` as it is; with the contents of its secret files in their place, if it names any."""
    raw = settings_module.ENV_FILE.read_bytes()
    try:
        return settings_module.self_contained_env().encode() if b"_FILE" in raw else raw
    except SettingsError as error:
        left_out.append(f"secret files: {settings_module.ENV_FILE.name} is invalid ({str(error).splitlines()[0]})")
        return raw


def _copy_store(source: Path, copy: Path) -> None:
    """As of one moment. A reader in WAL mode keeps no writer waiting. Raises BackupError, sqlite3.Error."""
    refuse_pipes(source)
    with contextlib.closing(_reader(source)) as live, contextlib.closing(sqlite3.connect(copy)) as target:
        live.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")
        found = str(target.execute("PRAGMA quick_check(1)").fetchone()[0])
    if found != "ok":
        raise BackupError(f"{source} is damaged ({found}). The checker and the page salvage it when they next use it; then try again")


def _reader(source: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(source))}?mode=ro", uri=True, timeout=30)


def _pack(files: dict[str, Path], made: Path) -> None:
    entries = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()}
    manifest = {
        "format": FORMAT, "version": VERSION, "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": os.uname().nodename,
        "files": entries,
    }  # fmt: skip
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(_info(MANIFEST), json.dumps(manifest, indent=2))
            for name, path in files.items():
                with path.open("rb") as source, archive.open(_info(name), "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, time.gmtime()[:6])
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | 0o600) << 16
    return info


def unpack(archive: Path, into: Path) -> dict[str, Any]:
    """Unpacks into an empty folder of this program, checks all, and returns the manifest. Raises BackupError for anything that
    `save` does not make: other names, links, sizes, checksums, damaged stores, newer versions."""
    with _as_backup_error(f"{archive}"), zipfile.ZipFile(archive) as opened:
        infos = {info.filename: info for info in opened.infolist()}
        if len(infos) != len(opened.infolist()):
            raise BackupError("a name is in it twice")
        for name, info in infos.items():
            _refuse_foreign(name, info)
        manifest = _manifest_of(opened, infos)
        entries = manifest["files"]
        if set(entries) != set(infos) - {MANIFEST}:
            raise BackupError(f"its files are not those that {MANIFEST} names: {', '.join(sorted(set(entries) ^ (set(infos) - {MANIFEST})))}")
        _require_room(into, sum(int(entry["bytes"]) for entry in entries.values()))
        for name, entry in entries.items():
            if infos[name].file_size != entry["bytes"]:
                raise BackupError(f"{name} has {infos[name].file_size} bytes, and {MANIFEST} says {entry['bytes']}")
            target = into / name.replace("/", "-")
            with opened.open(infos[name]) as source:
                _copy_exactly(source, target, int(entry["bytes"]), name)
            if _digest(target) != entry["sha256"]:
                raise BackupError(f"{name} differs from its checksum: the archive is damaged")
        for name in set(entries) & set(STORES):
            _check_store(name, into / name.replace("/", "-"))
        return manifest


def _refuse_foreign(name: str, info: zipfile.ZipInfo) -> None:
    if name != MANIFEST and name not in NAMES:
        raise BackupError(f"it holds {name!r}, which no backup has")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise BackupError(f"{name} is not a plain file in it")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BackupError(f"{name} is encrypted or packed in an unknown way")


def _manifest_of(opened: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo]) -> dict[str, Any]:
    if MANIFEST not in infos or infos[MANIFEST].file_size > MANIFEST_LIMIT_BYTES:
        raise BackupError(f"it is not a backup of this project: there is no {MANIFEST} of at most {MANIFEST_LIMIT_BYTES} bytes")
    with opened.open(infos[MANIFEST]) as file:
        manifest = json.loads(file.read(MANIFEST_LIMIT_BYTES))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("version"), int):
        raise BackupError(f"it is not a backup of this project: {MANIFEST} does not say {FORMAT}")
    if manifest["version"] > VERSION:
        raise BackupError(f"it was made by a newer version (format {manifest['version']}; this one knows {VERSION}). Upgrade first")
    for entry in manifest["files"].values():
        if not isinstance(entry["bytes"], int) or entry["bytes"] < 0 or not isinstance(entry["sha256"], str):
            raise BackupError(f"{MANIFEST} makes no sense")
    return manifest


def _copy_exactly(source: Any, target: Path, size: int, name: str) -> None:
    """Never more than was announced, whatever the archive unpacks to."""
    left = size
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while block := source.read(min(BLOCK_BYTES, left + 1)):
            left -= len(block)
            if left < 0:
                break
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if left:
        raise BackupError(f"{name} does not have the {size} bytes that it should have")


def _check_store(name: str, path: Path) -> None:
    """Raises BackupError for a damaged store, one of a newer version, and one that would run something."""
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)) as db:
        db.execute("PRAGMA trusted_schema = OFF")
        odd = db.execute("SELECT type, name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE '%VIRTUAL%' LIMIT 1").fetchone()
        if odd:
            raise BackupError(f"{name} has a {odd[0]} {odd[1]!r}, which no store has")
        found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
        if found != "ok":
            raise BackupError(f"{name} is damaged: {found}")
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if name == STATE:
            row = db.execute("SELECT value FROM state WHERE name = 'version'").fetchone()
            version = max(version, int(json.loads(row[0]))) if row else version
    if version > STORES[name]:
        raise BackupError(f"{name} was written by a newer version (schema {version}; this one knows {STORES[name]}). Upgrade first")


def restore(settings: Settings, archive: Path, into: Path | None = None, replace: bool = False) -> tuple[Path, list[Path]]:
    """Puts the files where they belong, or below the folder `into`. Returns where `.env` is, and what was set aside.

    Raises BackupError before anything is touched. What is in the way is refused, or set aside with `replace`.
    """
    env = into / ENV if into else settings_module.ENV_FILE
    log_dir = into / "logs" if into else settings.log_dir
    if into is not None and into.exists() and not into.is_dir():
        raise BackupError(f"{into} is not a folder")
    _refuse_running(log_dir, settings)
    goals = {name: env if name == ENV else log_dir / Path(name).name for name in NAMES}
    with _as_backup_error(f"{archive}"):
        anchor = next(each for each in (log_dir, *log_dir.parents) if each.is_dir())
        with tempfile.TemporaryDirectory(prefix=".glm-restore-", dir=anchor) as work:
            unpacked = Path(work) / "files"
            unpacked.mkdir()
            entries = unpack(archive, unpacked)["files"]
            if STATE in entries:
                _make_past(unpacked / STATE.replace("/", "-"))
            in_the_way = [goal for name, goal in goals.items() if name in entries and os.path.lexists(goal)]
            if in_the_way and not replace:
                raise BackupError(f"{', '.join(map(str, in_the_way))} would be replaced. With --replace they are set aside")
            log_dir.mkdir(parents=True, exist_ok=True)
            lock = Lock(log_dir)
            holder = lock.acquire(LOCK_S, "restoring a backup")
            if holder:
                raise BackupError(f"the checker is at work ({holder}); try again when it has ended")
            try:
                outdated = [log_dir / name for name in OUTDATED]
                aside = _set_aside([*in_the_way, *(path for path in outdated if os.path.lexists(path))])
                store.discard_fallback(log_dir)  # newer than what is restored, and would replace it
                for name in entries:
                    _place(unpacked / name.replace("/", "-"), goals[name])
            finally:
                lock.release()
    return env, aside


def _refuse_running(log_dir: Path, settings: Settings) -> None:
    for part in ("api", "web"):
        ours = log_dir == settings.log_dir  # a server of this folder is found without its pid file too
        record = process_search.find_record(log_dir, part) if ours else processes.read_record(log_dir, part)
        if record is not None and processes.is_running(record):
            raise BackupError(f"{part} runs (pid {record.pid}) and uses {log_dir}. Stop it first: ./stop.sh")


def _make_past(path: Path) -> None:
    """What the store still had to do belongs to the time and the machine of the backup: nothing of it is done now."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM outbox WHERE sent_at IS NULL")
        db.execute("UPDATE requests SET state = 'refused', outcome = 'a backup was restored; ask again' WHERE state IN ('waiting', 'running')")
        row = db.execute("SELECT value FROM state WHERE name = 'last'").fetchone()
        last = json.loads(row[0]) if row else {}
        # Servers that are not here must not be started because they are missing.
        kept = {name: value for name, value in last.items() if name not in ("records", "draining", "machine")}
        db.execute("INSERT OR REPLACE INTO state VALUES ('last', ?)", (json.dumps(kept),))
        db.execute("DELETE FROM state WHERE name = ?", (interrupted_restart.NAME,))


def _set_aside(paths: list[Path]) -> list[Path]:
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    aside = []
    for path in paths:
        for end in ("", *JOURNALS):
            old = path.with_name(path.name + end)
            if os.path.lexists(old):
                aside.append(old.with_name(f"{old.name}.before-restore-{stamp}"))
                os.replace(old, aside[-1])
    return aside


def _place(source: Path, goal: Path) -> None:
    """By a rename, from a copy in the goal's own folder."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=goal.parent, prefix=f".{goal.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as target, source.open("rb") as opened:
            shutil.copyfileobj(opened, target, BLOCK_BYTES)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, goal)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(goal.parent)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BackupError("another backup is being made there") from None
        yield


@contextlib.contextmanager
def _as_backup_error(what: str) -> Iterator[None]:
    try:
        yield
    except BackupError as error:
        raise BackupError(f"{what}: {error}") from None
    except (OSError, sqlite3.Error, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{what}: {type(error).__name__}: {error}") from None


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + FREE_BYTES:
        raise BackupError(f"{(needed + FREE_BYTES) / 2**20:.0f} MiB of disk are needed there, and {free / 2**20:.0f} MiB are free")


def _free_name(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (f"{PREFIX}{stamp}{f'-{number}' if number > 1 else ''}{SUFFIX}" for number in range(1, 1000))
    return next(folder / name for name in names if not (folder / name).exists())


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, path.with_name(f"{path.name}-wal")) if each.exists())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """So that a rename survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The commands.


def save_command(settings: Settings, folder: Path, keep: int) -> int:
    try:
        saved = save(settings, folder, keep)
    except BackupError as error:
        print(f"No backup was made: {error}", file=sys.stderr)
        return 1
    print(f"{saved.path} ({saved.bytes / 2**20:.1f} MiB): {', '.join(saved.files)}")
    for what in saved.left_out:
        print(f"  not in it: {what}", file=sys.stderr)
    return 0


def restore_command(settings: Settings, archive: Path, into: Path | None, replace: bool, check_only: bool) -> int:
    try:
        if check_only:
            with tempfile.TemporaryDirectory(prefix=".glm-restore-", dir=archive.parent) as work:
                manifest = unpack(archive, Path(work))
            print(f"{archive} is whole: made {manifest['made_at']} on {manifest.get('machine')}, {', '.join(manifest['files'])}")
            return 0
        env, aside = restore(settings, archive, into, replace)
    except (BackupError, OSError) as error:
        print(f"Nothing was changed: {error}", file=sys.stderr)
        return 1
    for path in aside:
        print(f"Set aside: {path}")
    variables = f"GLM_ENV_FILE={env} GLM_LOG_DIR={into / 'logs'} " if into else ""
    print(f"Restored. Start it with: {variables}./start.sh")
    return 0
