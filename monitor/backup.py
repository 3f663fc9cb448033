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
import shlex
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

from dotenv import dotenv_values

import settings as settings_module
from monitor import swap
from monitor.act import interrupted_restart
from monitor.act.lock import Lock
from monitor.observe import ports, process_search, processes
from monitor.store import store
from monitor.store.salvage import refuse_pipes
from settings import Settings, SettingsError

FORMAT, VERSION = "glm-backup", 1
MANIFEST, ENV, STATE, CHATS, BASELINE = "manifest.json", ".env", "logs/state.db", "logs/chats.db", "logs/baseline.json"
STORES = {STATE: store.VERSION, CHATS: 1}  # and the newest schema that this version knows
NAMES = (ENV, STATE, CHATS, BASELINE)
TABLES = {STATE: ("runs", "state", "outbox", "requests"), CHATS: ("chats", "turns")}  # first the one whose rows are what is worth saving
LOG_DIR = f"{settings_module.PREFIX}LOG_DIR"
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


class UnfinishedError(BackupError):
    """A restore was cut off in the middle; the next one finishes it."""


@dataclass(frozen=True)
class Saved:
    """`left_out`: what is not in the archive and could be expected there, in words; `lost`: what an earlier archive has of it."""

    path: Path
    bytes: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Restored:
    """`settings`: those that are in force now; `notes`: where the stores are, if not where they would be looked for."""

    env: Path
    log_dir: Path
    settings: Settings
    files: tuple[Path, ...]
    aside: tuple[Path, ...]
    notes: tuple[str, ...]


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
            files, left_out = _collect(settings, sources, Path(work))
            if not files:
                raise BackupError(f"there is nothing to save: {'; '.join(left_out)}")
            empty = {name for name in set(files) & set(STORES) if not _has_rows(name, files[name])}
            made = Path(work) / "archive"
            _pack(files, empty, made)
            for path in files.values():
                path.unlink()
            unpacked = Path(work) / "read-back"
            unpacked.mkdir()
            _unpack(made, unpacked)
            path = _free_name(folder)
            os.replace(made, path)
            swap.sync(folder)
        older = sorted((each for each in folder.iterdir() if NAME.fullmatch(each.name) and each != path), key=_age, reverse=True)
        holders = _holders({ENV, STATE, CHATS} - (set(files) - empty), older)
        for old in older[keep - 1 :] if keep else ():
            if old not in holders.values():
                old.unlink()
        lost = tuple(f"{name}: the newest backup with contents of it is {holder.name}" for name, holder in holders.items())
        return Saved(path, path.stat().st_size, tuple(files), tuple(left_out), lost)


def _age(archive: Path) -> tuple[str, int]:
    """By the time in its name, and the number of those of one second."""
    stamp, _, number = archive.name.removeprefix(PREFIX).removesuffix(SUFFIX).partition("-")
    return stamp, int(number or 1)


def _holders(names: set[str], archives: list[Path]) -> dict[str, Path]:
    """Of each name the first archive that has contents of it."""
    found: dict[str, Path] = {}
    for archive in archives:
        for name in sorted(names - set(found)):
            if name in _contents_of(archive):
                found[name] = archive
    return found


def _contents_of(archive: Path) -> set[str]:
    """By its manifest; nothing if it is no backup."""
    try:
        with _as_backup_error(""), zipfile.ZipFile(archive) as opened:
            files = _manifest_of(opened, {info.filename: info for info in opened.infolist()})["files"]
    except BackupError:
        return set()
    return {name for name, entry in files.items() if entry["bytes"] and not entry.get("empty")}


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


def _collect(settings: Settings, sources: dict[str, Path], work: Path) -> tuple[dict[str, Path], list[str]]:
    """Copies of the sources in `work`, and what was left out."""
    files: dict[str, Path] = {}
    left_out = [f"{name} (there is none)" for name in NAMES if name not in sources]
    for name, source in sources.items():
        files[name] = work / _flat(name)
        if name in STORES:
            _copy_store(source, files[name])
            with contextlib.closing(_reader(files[name])) as db:
                problem = "" if _tables(db) else "it is empty"
        elif name == ENV:
            files[name].write_bytes(_env_bytes(settings, left_out))
            problem = ""
        else:
            shutil.copyfile(source, files[name])
            problem = "" if _is_object(files[name]) else "it is not a JSON object"
        if problem:
            left_out.append(f"{source} ({problem})")
            files.pop(name).unlink()
    in_force = sorted(name for name in os.environ if name.startswith(settings_module.PREFIX) and name != settings_module.ENV_FILE_NAME)
    if in_force:
        left_out.append(f"settings of the environment: {', '.join(in_force)}")
    return files, left_out


def _env_bytes(settings: Settings, left_out: list[str]) -> bytes:
    """`.env` as it is; with the contents of its secret files in their place, if it names any. Instead of an invalid one, which
    no restore would take, the copy of the last valid one."""
    raw = settings_module.ENV_FILE.read_bytes()
    try:
        settings_module.load()
        return settings_module.self_contained_env().encode() if b"_FILE" in raw else raw
    except SettingsError as error:
        kept = settings.log_dir / settings_module.LAST_GOOD
        instead = "the last valid one is in it instead" if kept.is_file() else "restore the rest of this backup with --without-env"
        left_out.append(f"a valid {settings_module.ENV_FILE.name} ({str(error).splitlines()[0]}): {instead}")
        return kept.read_bytes() if kept.is_file() else raw


def _has_rows(name: str, path: Path) -> bool:
    """Whether there is anything in it that somebody would miss."""
    with contextlib.closing(_reader(path)) as db:
        table = TABLES[name][0]
        return table in _tables(db) and db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None


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


def _pack(files: dict[str, Path], empty: set[str], made: Path) -> None:
    entries: dict[str, dict[str, Any]] = {name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()}
    for name in empty:
        entries[name]["empty"] = True  # for the choice of what is kept
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
    with _as_backup_error(f"{archive}"):
        return _unpack(archive, into)


def _unpack(archive: Path, into: Path) -> dict[str, Any]:
    with zipfile.ZipFile(archive) as opened:
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
            target = into / _flat(name)
            with opened.open(infos[name]) as source:
                _copy_exactly(source, target, int(entry["bytes"]), name)
            if _digest(target) != entry["sha256"]:
                raise BackupError(f"{name} differs from its checksum: the archive is damaged")
        for name in set(entries) & set(STORES):
            _check_store(name, into / _flat(name))
        if BASELINE in entries and not _is_object(into / _flat(BASELINE)):
            raise BackupError(f"{BASELINE} is no baseline: it is not a JSON object")
        return manifest


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


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
    try:
        with opened.open(infos[MANIFEST]) as file:
            manifest = json.loads(file.read(MANIFEST_LIMIT_BYTES))
    except (ValueError, RecursionError):
        raise BackupError(f"it is not a backup of this project: {MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or type(manifest.get("version")) is not int:
        raise BackupError(f"it is not a backup of this project: {MANIFEST} does not say {FORMAT} and a version")
    if manifest["version"] > VERSION:
        raise BackupError(f"it was made by a newer version (format {manifest['version']}; this one knows {VERSION}). Upgrade first")
    if manifest["version"] < 1 or not all(isinstance(manifest.get(name), str) for name in ("made_at", "machine")):
        raise BackupError(f"{MANIFEST} makes no sense: its version, `made_at` or `machine` is wrong")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise BackupError(f"{MANIFEST} makes no sense: `files` does not say the size and the checksum of each")
    if not files:
        raise BackupError("it holds no files, so that there is nothing to restore")
    return manifest


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and entry["bytes"] >= 0 and isinstance(entry.get("sha256"), str)


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
        missing = sorted(set(TABLES[name]) - _tables(db))
        if missing:
            raise BackupError(f"{name} is not that store: it has no table {', '.join(missing)}")
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if name == STATE:
            row = db.execute("SELECT value FROM state WHERE name = 'version'").fetchone()
            try:
                version = max(version, int(json.loads(row[0]))) if row else version
            except (ValueError, TypeError):
                raise BackupError(f"{name} is damaged: its version is {str(row[0])[:40]!r}") from None
    if version > STORES[name]:
        raise BackupError(f"{name} was written by a newer version (schema {version}; this one knows {STORES[name]}). Upgrade first")


def restore(settings: Settings, archive: Path, into: Path | None = None, replace: bool = False, with_env: bool = True) -> Restored:
    """Puts the files where they belong, or below the folder `into`. The stores go where the settings that are in force afterwards
    look for them. Without `with_env`, `.env` stays as it is.

    Raises BackupError before anything is touched, and UnfinishedError later. What is in the way is refused, or set aside with `replace`.
    """
    env = into / ENV if into else settings_module.ENV_FILE
    if into is not None and into.exists() and not into.is_dir():
        raise BackupError(f"{into} is not a folder")
    with _as_backup_error(f"{archive}"), contextlib.ExitStack() as stack:
        first = into / "logs" if into else settings.log_dir
        work = stack.enter_context(swap.staging(_anchor(first)))
        unpacked = work.path / "files"
        unpacked.mkdir()
        entries = dict(_unpack(archive, unpacked)["files"])
        if not with_env:
            entries.pop(ENV, None)
        if not entries:
            raise BackupError("it holds nothing else than .env")
        after = _checked_settings(unpacked / ENV) if ENV in entries else settings
        log_dir = into / "logs" if into else after.log_dir
        for folder in {log_dir, first}:
            _refuse_running(folder, settings)
        goals = {name: env if name == ENV else log_dir / Path(name).name for name in NAMES}
        if STATE in entries:
            _make_past(unpacked / _flat(STATE))
        in_the_way = [goal for name, goal in goals.items() if name in entries and os.path.lexists(goal)]
        if in_the_way and not replace:
            raise BackupError(f"{', '.join(map(str, in_the_way))} would be replaced. With --replace they are set aside")
        notes = _notes(env, log_dir, unpacked / ENV if ENV in entries else env, settings, into)
        if log_dir != first:  # perhaps another file system
            _require_room(_anchor(log_dir), sum(int(entry["bytes"]) for entry in entries.values()))
        log_dir.mkdir(parents=True, exist_ok=True)
        log_dirs = [log_dir, *([first] if first != log_dir and first.is_dir() else [])]
        for folder in log_dirs:
            stack.enter_context(_no_checker(folder))
        for goal in goals.values():
            swap.remove_copies(goal)
        stores = work if log_dir == first else stack.enter_context(swap.staging(log_dir))
        stores.move_into(log_dir)
        beside_env = stack.enter_context(swap.staging(env.parent)) if env.parent != log_dir else stores
        moves = []
        for name in sorted(entries, key=lambda name: name == ENV):
            staging = beside_env if name == ENV else stores
            staged = work.path / "files" / _flat(name)
            if staging is not work:
                staged = staging.path / _flat(name)
                _copy_whole(work.path / "files" / _flat(name), staged)
            moves.append((staged, goals[name]))
        journal = swap.journal_of(env)
        stagings = [stores, beside_env] if beside_env is not stores else [stores]
        swap.begin(journal, stagings, moves, [log_dir / name for name in OUTDATED], log_dirs)
        aside = _finished(journal)
    return Restored(env, log_dir, after, tuple(goals[name] for name in entries), tuple(aside), tuple(notes))


def finish(settings: Settings, env: Path) -> list[Path]:
    """Finishes a restore that was cut off, and returns what it set aside. Raises BackupError."""
    journal = swap.journal_of(env)
    with _as_backup_error(f"{journal}"), contextlib.ExitStack() as stack:
        for folder in map(Path, swap.read(journal)["log_dirs"]):
            _refuse_running(folder, settings)
            stack.enter_context(_no_checker(folder))
        return _finished(journal)


def _finished(journal: Path) -> list[Path]:
    try:
        store.discard_fallback(Path(swap.read(journal)["log_dirs"][0]))  # newer than what is restored, and would replace it
        return swap.finish(journal)
    except (OSError, swap.SwapError) as error:
        raise UnfinishedError(f"{_plain(error)}. Once that is mended: health_check.py restore") from None


@contextlib.contextmanager
def _no_checker(log_dir: Path) -> Iterator[None]:
    lock = Lock(log_dir)
    holder = lock.acquire(LOCK_S, "restoring a backup")
    if holder:
        raise BackupError(f"the checker or another restore is at work in {log_dir} ({holder}); try again when it has ended")
    try:
        yield
    finally:
        lock.release()


def _anchor(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _checked_settings(path: Path) -> Settings:
    """What the `.env` of an archive means in this environment. Raises BackupError."""
    try:
        return settings_module.load_file(path)
    except SettingsError as error:
        lines = [line for line in str(error).replace(str(path), ENV).splitlines() if not line.startswith(settings_module.ALL_SETTINGS)]
        raise BackupError(f"its settings would not start the service: {'; '.join(lines)}. To restore the rest only: --without-env") from None


def _notes(env: Path, log_dir: Path, text: Path, settings: Settings, into: Path | None) -> list[str]:
    """What somebody who looks for the stores must know. `text`: the `.env` that will be there."""
    values = dotenv_values(text) if text.is_file() else {}
    named = settings_module.ROOT / (values.get(LOG_DIR) or Settings.model_fields["log_dir"].default)
    if into is not None:
        return [f"The {LOG_DIR}={values[LOG_DIR]} in {env} is not used as long as the start has the variable below"] if values.get(LOG_DIR) else []
    if os.environ.get(LOG_DIR) and named != log_dir:
        return [f"The stores are in {log_dir}, because {LOG_DIR} of this environment says so; without it, as under cron, {env} means {named}"]
    if log_dir != settings.log_dir:
        return [f"The stores are in {log_dir}, where the restored {env} looks ({LOG_DIR}); {settings.log_dir} is no longer used, and stays as it is"]
    return []


def _refuse_running(log_dir: Path, settings: Settings) -> None:
    for part in ("api", "web"):
        ours = log_dir == settings.log_dir  # a server of this folder is found without its pid file too
        record = process_search.find_record(log_dir, part) if ours else processes.read_record(log_dir, part)
        if record is not None and processes.is_running(record):
            raise BackupError(f"{part} runs (pid {record.pid}) and uses {log_dir}. Stop it first: ./stop.sh")
    for record_file in sorted(log_dir.glob(f"{settings_module.REPLICAS}/*/api.pid.json")):
        record = processes.read_record(record_file.parent, "api")
        if record is not None and processes.is_running(record):
            raise BackupError(f"replica {record_file.parent.name} runs (pid {record.pid}) and uses {log_dir}. Stop it first: ./stop.sh")


def _tables(db: sqlite3.Connection) -> set[str]:
    return {str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _make_past(path: Path) -> None:
    """What the store still had to do belongs to the time and the machine of the backup: nothing of it is done now."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM outbox WHERE sent_at IS NULL")
        db.execute("UPDATE requests SET state = 'refused', outcome = 'a backup was restored; ask again' WHERE state IN ('waiting', 'running')")
        row = db.execute("SELECT value FROM state WHERE name = 'last'").fetchone()
        try:
            found = json.loads(row[0]) if row else {}
        except (ValueError, TypeError):
            found = {}
        last = found if isinstance(found, dict) else {}
        # Servers that are not here must not be started because they are missing.
        kept = {name: value for name, value in last.items() if name not in ("records", "draining", "machine")}
        db.execute("INSERT OR REPLACE INTO state VALUES ('last', ?)", (json.dumps(kept),))
        db.execute("DELETE FROM state WHERE name = ?", (interrupted_restart.NAME,))


def _copy_whole(source: Path, target: Path) -> None:
    with source.open("rb") as opened, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        shutil.copyfileobj(opened, file, BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _flat(name: str) -> str:
    return name.replace("/", "-")


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
        raise type(error)(f"{what}: {error}") from None
    except (OSError, sqlite3.Error, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, swap.SwapError) as error:
        raise BackupError(f"{what}: {_plain(error)}".removesuffix(f" ({what})")) from None


def _plain(error: Exception) -> str:
    """In words for somebody who does not know this code."""
    if isinstance(error, swap.SwapError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, (zipfile.BadZipFile, zlib.error, EOFError)):
        return f"it is no zip archive, or damaged or cut off ({error or 'it ends too early'})"
    if isinstance(error, sqlite3.Error):
        return f"a store is damaged or cannot be read ({error})"
    return f"it is not as a backup should be ({type(error).__name__}: {error})"


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
    for what in saved.lost:
        print(f"  MISSING OR EMPTY, and was not before: {what}, which is kept. If this is right, delete that one", file=sys.stderr)
    return 1 if saved.lost else 0


def restore_command(
    settings: Settings, archive: Path | None, into: Path | None, replace: bool = False, check_only: bool = False, with_env: bool = True
) -> int:
    """Without an archive it only finishes a restore that was cut off."""
    env = into / ENV if into else settings_module.ENV_FILE
    journal = swap.journal_of(env)
    unfinished = os.path.lexists(journal)
    try:
        if check_only and archive is not None:
            _check(archive, with_env)
            if unfinished:
                print(f"A restore was cut off: {journal}. To finish it: health_check.py restore{f' --into {into}' if into else ''}", file=sys.stderr)
            return 1 if unfinished else 0
        if unfinished:
            aside = finish(settings, env)
            print("\n".join([f"The restore that was cut off is finished ({journal}).", *(f"Set aside: {path}" for path in aside)]))
            settings = settings_module.load_or_last_good()[0]
        elif archive is None:
            for folder in {env.parent, into / "logs" if into else settings.log_dir}:
                swap.remove_leftovers(folder)
            print(f"No restore was cut off: there is no {journal}. Which backup shall be restored?", file=sys.stderr)
            return 2
        if archive is None:
            return 0
        restored = restore(settings, archive, into, replace, with_env)
    except UnfinishedError as error:
        print(f"The restore was cut off in the middle: {error}", file=sys.stderr)
        return 1
    except (BackupError, SettingsError, OSError) as error:
        print(f"Nothing was changed: {error}", file=sys.stderr)
        return 1
    for path in restored.aside:
        print(f"Set aside: {path}")
    for path in restored.files:
        print(f"Restored: {path}")
    for note in restored.notes:
        print(note)
    variables = f"GLM_ENV_FILE={shlex.quote(str(env))} {LOG_DIR}={shlex.quote(str(restored.log_dir))} {_other_ports(restored.settings)}" if into else ""
    print(f"Restored. Start it with: {variables}./start.sh")
    return 0


def _check(archive: Path, with_env: bool) -> None:
    beside = archive.parent if os.access(archive.parent, os.W_OK) else Path(tempfile.gettempdir())
    with _as_backup_error(f"{archive}"), archive.open("rb"), swap.staging(beside) as work:
        manifest = _unpack(archive, work.path)
        if ENV in manifest["files"] and with_env:
            _checked_settings(work.path / ENV)
    print(f"{archive} is whole: made {manifest['made_at']} on {manifest['machine']}, {', '.join(manifest['files'])}")


def _other_ports(settings: Settings) -> str:
    """Variables with free ports, if a service, such as the one that was saved, holds those of the settings."""
    wanted = {"API": (settings.api_host, settings.api_port), "WEB": (settings.web_host, settings.web_port)}
    if not any(ports.why_taken(host, port) for host, port in wanted.values()):
        return ""
    taken = {port for _, port in wanted.values()}
    variables = ""
    for part, (host, port) in wanted.items():
        free = next((n for n in range(port + 10, min(port + 1000, 65536)) if n not in taken and not ports.why_taken(host, n)), 0)
        if free:
            taken.add(free)
            variables += f"GLM_{part}_PORT={free} "
    return variables
