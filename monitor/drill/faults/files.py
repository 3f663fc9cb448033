"""Faults of files: the store, the pid file, the settings, the logs, the page's script, the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import settings as settings_module
from monitor.drill.context import FaultContext
from monitor.drill.faults.processes import kill
from monitor.observe import processes
from monitor.store import store
from settings import ROOT

DISK = "3m"  # size of the disk that is filled
TYPO = b"GLM_API_PROT=8080\n"
CHATS = "chats.db"


@contextmanager
def break_script(context: FaultContext) -> Iterator[None]:
    """A page that raises, as after a bad edit. No restart repairs a file, so restarts must stop after one."""
    with _restored(ROOT / "web" / "app.py") as path:
        path.write_bytes(b"raise RuntimeError('broken by the drill')\n")
        yield


@contextmanager
def misspell_a_setting(context: FaultContext) -> Iterator[None]:
    """A typo in .env, and the API is killed."""
    with _restored(env_file()) as path:
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + b"\n" + TYPO)
        with kill(context):
            yield


def env_file() -> Path:
    return Path(settings_module.ENV_FILE)


@contextmanager
def _restored(path: Path) -> Iterator[Path]:
    """The file has its bytes and mode again afterwards, or is gone if there was none."""
    existed = path.exists()
    content, mode = (path.read_bytes(), path.stat().st_mode) if existed else (b"", 0)
    try:
        yield path
    finally:
        if existed:
            path.write_bytes(content)
            path.chmod(mode)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def damage_store(context: FaultContext) -> Iterator[None]:
    """Pages of the checker's store are overwritten, and the API is killed. The drill restores no damaged file."""
    damage_tables(context.settings.log_dir / store.FILE_NAME, ("state", "runs"))
    with kill(context):
        yield


@contextmanager
def damage_chats(context: FaultContext) -> Iterator[None]:
    """Pages of the page's chats are overwritten while it runs."""
    path = context.settings.log_dir / CHATS
    if not path.exists():
        raise RuntimeError(f"there is no {path}: open the page once")
    damage_tables(path)
    yield


def damage_tables(path: Path, names: tuple[str, ...] = ()) -> None:
    """Overwrites the first page of each of these tables (none named: of all) in a SQLite file, behind SQLite's back."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = database.execute("PRAGMA page_size").fetchone()
        rows = database.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'table' AND rootpage > 1").fetchall()
    pages = [page for name, page in rows if not names or name in names]
    with path.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * size)
            file.write(os.urandom(size))


@contextmanager
def damage_pid_file(context: FaultContext) -> Iterator[None]:
    """The record of the API is cut in half."""
    path = processes.record_path(context.settings.log_dir, "api")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        yield
    finally:
        if processes.read_record(context.settings.log_dir, "api") is None:
            path.write_bytes(whole)


@contextmanager
def delete_logs(context: FaultContext) -> Iterator[None]:
    """The whole folder is deleted while everything runs. Afterwards what is missing is put back, the baseline above all."""
    folder = context.settings.log_dir
    with tempfile.TemporaryDirectory(prefix="glm-drill-logs-") as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
        try:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a server may have written again
                folder.rmdir()
            yield
        finally:
            for source in sorted(Path(kept).rglob("*")):
                target = folder / source.relative_to(kept)
                if source.is_file() and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, target)


@contextmanager
def fill_disk(context: FaultContext) -> Iterator[None]:
    """The log folder on a full tmpfs, with a copy of the checker's state."""
    with _log_folder_elsewhere(context) as folder:
        with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        yield


@contextmanager
def write_protect(context: FaultContext) -> Iterator[None]:
    """The log folder on a file system that was remounted read-only, as after an error of the disk."""
    with _log_folder_elsewhere(context) as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield


@contextmanager
def _log_folder_elsewhere(context: FaultContext) -> Iterator[Path]:
    folder = context.settings.log_dir.parent / ".drill-disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        for name in (store.FILE_NAME, "api.pid.json", "web.pid.json", "api.heartbeat.json", "baseline.json", "last-good.env"):
            source = context.settings.log_dir / name
            if source.exists():
                (folder / name).write_bytes(source.read_bytes()[: 2 * 2**20])
        context.env["GLM_LOG_DIR"] = str(folder)
        yield folder
    finally:
        context.env.pop("GLM_LOG_DIR", None)
        store.discard_fallback(folder)
        subprocess.run(["umount", "-l", str(folder)], check=False)  # lazily: a run of the checker may have a file open
        folder.rmdir()


def servers_here(module: str) -> list[int]:
    """The processes that run this module in this folder, without their children."""
    found = []
    for entry in processes.PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            stat = processes.read_stat(int(entry.name))
            leads = stat is not None and stat.running and stat.session == stat.pid
            if leads and module.encode() in words and (entry / "cwd").resolve() == ROOT:
                found.append(int(entry.name))
    return found


def why_no_mount(context: FaultContext) -> str:
    return "" if os.geteuid() == 0 else "it takes root to mount a file system"
