"""Sets a damaged SQLite file aside and reads what is left of it, table by table and row by row, into a new one.

Damage never ends a program that keeps its data in such a file. What cannot be read stays in the file set aside. Standard
library only, so that the page may import it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from monitor.observe.small_file import is_no_file

JOURNALS = ("-wal", "-shm", "-journal")
KEEP = 3  # files set aside; older ones are deleted
COPY_PREFIX = ".salvage-"
LEFT_AFTER_S = 600.0
LIMIT_S = 15.0  # of one salvage: it happens within a run of the checker or a click on the page
PATIENT_STEPS = 200  # row numbers tried one by one behind an unreadable row, before the steps double
COPY_LIMIT_BYTES = 512 * 2**20  # a larger file is not copied: that would take a run's time, and disk space
PAGE_BYTES = 4096  # SQLite's default, with which every file here was made
OTHER_SCHEMA = ("no such table", "no such column", "has no column", "datatype mismatch")
TYPES: dict[str, tuple[type, ...]] = {"INTEGER": (int,), "REAL": (float, int), "TEXT": (str,), "BLOB": (bytes,)}


def is_damage(error: BaseException, path: Path) -> bool:
    """Whether the file itself is at fault: damaged, of another schema, or no file at all. Not a full disk or a lock."""
    if isinstance(error, sqlite3.OperationalError):
        truncated = getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_SHORT_READ"
        return truncated or _in_place_of_a_file(path) or any(part in str(error) for part in OTHER_SCHEMA)
    # SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own.
    return type(error) is sqlite3.DatabaseError or (isinstance(error, OSError) and _in_place_of_a_file(path))


def _in_place_of_a_file(path: Path) -> bool:
    """Whether a folder, a pipe or the like is where the file or its journal should be."""
    return any(is_no_file(path.with_name(path.name + end)) for end in ("", *JOURNALS))


def refuse_pipes(path: Path) -> None:
    """Raises OperationalError for what is no file, before SQLite opens it: a pipe would hold the program for ever."""
    if _in_place_of_a_file(path):
        raise sqlite3.OperationalError(f"{path.name} or its journal is not a file")


def set_aside(path: Path, now: float) -> Path:
    """Renames the file with its journal to NAME.damaged-TIME, and returns the new path. Raises OSError."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%S")
    numbers = [_age_key(entry)[1] for entry in all_aside(path) if _age_key(entry)[0] == stamp]
    # Above the highest, not the first free one: that of a file deleted within the same second would sort as the oldest.
    aside = path.with_name(f"{path.name}.damaged-{stamp}" + (f".{max(numbers) + 1}" if numbers else ""))
    path.rename(aside)
    for journal in JOURNALS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + journal).rename(aside.with_name(aside.name + journal))
    _delete_older(path)
    return aside


def all_aside(path: Path) -> list[Path]:
    """The files set aside earlier, oldest first."""
    found = [entry for entry in path.parent.glob(f"{path.name}.damaged-*") if not entry.name.endswith(JOURNALS)]
    return sorted(found, key=_age_key)


def _age_key(aside: Path) -> tuple[str, int]:
    """Time and number of a file set aside."""
    stamp, _, number = aside.name.rpartition(".damaged-")[2].partition(".")
    return stamp, int(number) if number.isdecimal() else 1


def _delete_older(path: Path) -> None:
    for left in path.parent.glob(f"{COPY_PREFIX}*"):  # by a salvage that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                shutil.rmtree(left, ignore_errors=True)
    for old in all_aside(path)[:-KEEP]:
        for end in ("", *JOURNALS):
            with contextlib.suppress(OSError):  # a folder that was in the file's place is nobody's to delete
                old.with_name(old.name + end).unlink()


def salvage(source: Path, target: sqlite3.Connection, limit_s: float = LIMIT_S) -> dict[str, int]:
    """Copies every readable row of the file into the tables of `target`, which has the present schema. Rows per table.

    Leaves the file as it is. Rows that `target` has already are kept. Values of a wrong type are left out with their row.
    """
    ends_at = time.monotonic() + limit_s
    if not source.is_file():
        return _counts(target)
    with contextlib.ExitStack() as stack:
        sources = [f"file:{source}?mode=ro", f"file:{source}?immutable=1"]  # with the journal; as if there were none
        if _in_place_of_a_file(source):
            del sources[0]
        for uri in sources:
            _copy_tables(uri, target, ends_at)
        if not any(_counts(target).values()) and source.stat().st_size <= COPY_LIMIT_BYTES:
            with contextlib.suppress(OSError, sqlite3.Error):
                _copy_tables(f"file:{stack.enter_context(_with_new_first_page(source, target))}?immutable=1", target, ends_at)
    return _counts(target)


def _counts(target: sqlite3.Connection) -> dict[str, int]:
    return {table: target.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in _tables(target)}


def _tables(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")]


def _copy_tables(uri: str, target: sqlite3.Connection, ends_at: float) -> None:
    try:
        db = sqlite3.connect(uri, uri=True, timeout=1)
    except sqlite3.Error:
        return
    with contextlib.closing(db):
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        # Small tables first: they hold the open incidents, restart counts and holds.
        for table in reversed(_tables(target)):
            with contextlib.suppress(sqlite3.Error):
                _copy_table(db, target, table, ends_at)


def _copy_table(db: sqlite3.Connection, target: sqlite3.Connection, table: str, ends_at: float) -> None:
    declared = {row[1]: row[2] for row in target.execute(f"PRAGMA table_info({table})")}
    present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    columns = [name for name in declared if name in present]
    if not columns:
        return
    allowed = [TYPES.get(declared[name].split(" ")[0], (object,)) for name in columns]
    marks = ", ".join("?" * len(columns))
    for values in _readable_rows(db, table, columns, ends_at):
        if all(value is None or isinstance(value, types) for value, types in zip(values, allowed, strict=True)):
            target.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({marks})", values)


def _readable_rows(db: sqlite3.Connection, table: str, columns: Sequence[str], ends_at: float) -> Iterator[tuple[object, ...]]:
    """Every row that can be read, past unreadable ones, in order of the row number; the newest part first if it is short of time."""
    names = ", ".join(columns)
    upward = f"SELECT rowid, {names} FROM {table} WHERE rowid > ? AND rowid < ? ORDER BY rowid"
    last, end = -(2**62), 2**62
    try:
        for row in db.execute(upward, (last, end)):
            last = row[0]
            yield tuple(row[1:])
        return
    except sqlite3.Error:
        pass
    try:
        for row in db.execute(f"SELECT rowid, {names} FROM {table} WHERE rowid > ? ORDER BY rowid DESC", (last,)):
            end = row[0]
            yield tuple(row[1:])
    except sqlite3.Error:
        pass
    if end == 2**62:
        return  # nothing above `last` can be read
    last, steps = max(last, 0), 0
    while last < end and time.monotonic() < ends_at:
        before = last
        try:
            for row in db.execute(upward, (last, end)):
                last = row[0]
                yield tuple(row[1:])
            return
        except sqlite3.Error:
            pass
        steps = 0 if last > before else steps + 1
        partial = _partial_row(db, table, columns, last)
        if partial is not None and partial[0] < end:
            last, steps = partial[0], 0
            yield partial[1]
        else:
            last += 1 if steps < PATIENT_STEPS else 2 ** (steps - PATIENT_STEPS)


def _partial_row(db: sqlite3.Connection, table: str, columns: Sequence[str], after: int) -> tuple[int, tuple[object, ...]] | None:
    """The next row, with None for each value that cannot be read; a long value is on pages of its own."""
    try:
        row = db.execute(f"SELECT rowid FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT 1", (after,)).fetchone()
    except sqlite3.Error:
        return None
    if row is None:
        return None
    values: list[object] = []
    for name in columns:
        try:
            found = db.execute(f"SELECT {name} FROM {table} WHERE rowid = ?", (row[0],)).fetchone()
            values.append(found[0] if found else None)
        except sqlite3.Error:
            values.append(None)
    return (row[0], tuple(values)) if any(value is not None for value in values) else None


@contextlib.contextmanager
def _with_new_first_page(source: Path, target: sqlite3.Connection) -> Iterator[Path]:
    """A copy of the file whose first page, which says where each table begins, is that of a new file of the same schema.

    The tables begin at the same pages, because they are always made in the same order.
    """
    statements = [row[0] for row in target.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")]
    with tempfile.TemporaryDirectory(dir=source.parent, prefix=COPY_PREFIX) as folder:
        new, copy = Path(folder) / "new.db", Path(folder) / "copy.db"
        with contextlib.closing(sqlite3.connect(new)) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()
        pages = new.read_bytes()
        page = bytearray(pages[:PAGE_BYTES])
        size = source.stat().st_size // PAGE_BYTES
        page[28:32] = size.to_bytes(4, "big")
        with source.open("rb") as old, copy.open("wb") as made:
            made.write(page)
            old.seek(PAGE_BYTES)
            while block := old.read(2**20):
                made.write(block)
            made.truncate(size * PAGE_BYTES)
            made.flush()
            os.fsync(made.fileno())
        yield copy
