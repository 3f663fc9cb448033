"""`logs/state.db`: every run, roll-ups, flips, incidents, actions, the outbox and operators' requests. SQLite in WAL mode.

Standard library only, so that the page may import it. Readers use `Store.read_only(log_dir)` and never block the writer.
What is committed survives a kill at any moment. On a full or read-only disk the writer continues with a copy in shared
memory (`store.lost` has the reason), which later runs share, so that alerts are not repeated every run. The file on disk is
unchanged until it is writable again; then the copy replaces it.

The checker's store repairs itself (`open_for_run`): whatever call finds the file damaged sets it aside, salvages its rows
into a new one, and goes on, within a transaction as well (`store.damage` says so). `state.copy.json` holds a second copy
of what matters most, the table `state` and the open incidents, for a file of which nothing is left.

Tables (times are wall-clock seconds, JSON columns hold objects):

    runs       id, at, duration_s, word, serving, targets JSON {target: {word, rule, en, zh, ...}}, readings JSON, report JSON
    rollups    span (minute|hour|day), start, runs, words JSON {target: {word: runs}}, sums JSON {reading: [sum, count, max]}
    flips      id, at, target, before, after, rule, en, zh
    incidents  id, target, word, rule, en, zh, opened_at, first_seen_at, recovered_at, closed_at, restarts, symptoms JSON, body JSON
    actions    id, at, target, kind, actor, outcome, detail, incident, duration_s       (the audit log)
    outbox     id, made_at, channel, kind, incident, severity, message JSON, tries, next_at, sent_at, error
    requests   id, made_at, actor, kind, target, arguments JSON, state, taken_at, ended_at, outcome
    state      name, value JSON        (histories, limiters, holds, thresholds, version)

**Versions.** Columns and tables that are only added keep VERSION, and an older program leaves them alone. A change that an
older program must not meet raises it: that program goes on in shared memory, with what it can read, and the file stays as it is.

**Operators' requests.** The page only inserts a row with `add_request(...)`; the next run of the checker carries it out
and records the outcome. `kind` and its parameters:

    restart      target api|page        evidence, drain, stop, start, verify; not limited, but counted by the limiter
    drain        target api             SIGTERM with the drain time; stays stopped until a restart is requested
    probe                               ask the questions in the next run, even if users were answered recently
    pause        arguments {until}      no restarts until that time (null: until resume); runs and alerts continue
    resume                              ends pause, maintenance and silence
    silence      arguments {until}      no alerts until that time
    maintenance  arguments {from, until}  no restarts and no alerts in that window
    reset        target api|page|all    closes the circuit; arguments {reason}

`state` goes waiting -> running -> done | refused | failed; `outcome` is text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monitor.store import steady_time
from monitor.store.salvage import OTHER_SCHEMA, is_damage, refuse_pipes, salvage, set_aside

FILE_NAME = "state.db"
COPY_NAME = "state.copy.json"
COPY_LIMIT_BYTES = 8 * 2**20
SHARED_MEMORY = Path("/dev/shm")
COPIED = "copied_from_disk"  # key in `state`: this copy began with the contents of the disk
REQUEST_KINDS = ("restart", "drain", "probe", "pause", "resume", "silence", "maintenance", "reset")
SPANS = {"minute": (60, 86400), "hour": (3600, 30 * 86400), "day": (86400, 365 * 86400)}  # width and retention in seconds
KEEP_RUNS_S = 86400
KEEP_EVENTS_S = 365 * 86400
KEEP_NEWEST_RUNS = 1440
KEEP_REPORTS = 60  # whole reports; older runs keep their verdicts and readings
VERSION = 1
REPAIRS = 3  # of one store; whatever fails after them is raised
INSPECT_EVERY_RUNS = 60  # the whole file is read, as damage in old rows is not met otherwise
REBUILD_AGAIN_S = 3600.0
LATEST_TIME = 1e11  # a later time in a salvaged row is a damaged number

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, at REAL, duration_s REAL, word TEXT, serving INTEGER,
    targets TEXT, readings TEXT, report TEXT);
CREATE INDEX IF NOT EXISTS runs_at ON runs (at);
CREATE TABLE IF NOT EXISTS rollups (span TEXT, start REAL, runs INTEGER, words TEXT, sums TEXT, PRIMARY KEY (span, start));
CREATE TABLE IF NOT EXISTS flips (id INTEGER PRIMARY KEY, at REAL, target TEXT, before TEXT, after TEXT, rule TEXT,
    en TEXT, zh TEXT);
CREATE TABLE IF NOT EXISTS incidents (id TEXT PRIMARY KEY, target TEXT, word TEXT, rule TEXT, en TEXT, zh TEXT,
    opened_at REAL, first_seen_at REAL, recovered_at REAL, closed_at REAL, restarts INTEGER, symptoms TEXT, body TEXT);
CREATE TABLE IF NOT EXISTS actions (id INTEGER PRIMARY KEY, at REAL, target TEXT, kind TEXT, actor TEXT, outcome TEXT,
    detail TEXT, incident TEXT, duration_s REAL);
CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY, made_at REAL, channel TEXT, kind TEXT, incident TEXT,
    severity TEXT, message TEXT, tries INTEGER DEFAULT 0, next_at REAL, sent_at REAL, error TEXT);
CREATE TABLE IF NOT EXISTS requests (id INTEGER PRIMARY KEY, made_at REAL, actor TEXT, kind TEXT, target TEXT,
    arguments TEXT, state TEXT DEFAULT 'waiting', taken_at REAL, ended_at REAL, outcome TEXT);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT);
"""


class NewerStore(sqlite3.OperationalError):
    """The file is of a schema that this program does not know. It is neither damaged nor ours to change."""


class Store:
    """One connection, for the thread that opened it. Writes that belong together go inside `with store.transaction():`.

    `lost` is empty, or says why the disk is not written and where the data goes instead. `damage` is None, or
    {"at", "en", "zh", "file"}: the store was replaced in this run.
    """

    def __init__(self, connection: sqlite3.Connection, lost: str = "", repairs_in: Path | None = None) -> None:
        """`repairs_in`: the log folder, for a store that repairs itself."""
        self.lost = lost
        self.damage: dict[str, Any] | None = None
        self._repairs_in = repairs_in
        self._repairs = 0
        self._written: list[tuple[str, tuple[object, ...]]] | None = None  # by the transaction in progress
        self._use(connection)

    def _use(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.row_factory = sqlite3.Row
        connection.text_factory = lambda data: data.decode("utf-8", "replace")

    @classmethod
    def open(cls, log_dir: Path) -> Store:
        """For writers other than the checker. Does not raise for an unusable disk or a damaged file: writes are lost then."""
        try:
            return cls(_writer(log_dir))
        except (sqlite3.Error, OSError) as error:
            return cls._without_disk(log_dir, f"{log_dir / FILE_NAME} is not writable ({error})")

    @classmethod
    def open_for_run(cls, log_dir: Path) -> Store:
        """For the checker, under its lock. Never raises, and repairs itself then and later.

        Moves a copy in shared memory back to the disk if that is writable again.
        """
        try:
            store = cls(_writer(log_dir), repairs_in=log_dir)
            store._inspect()
            if fallback_path(log_dir).exists():
                store._restore_to_disk(log_dir)
            return store
        except (sqlite3.Error, OSError) as error:
            store = cls(sqlite3.connect(":memory:", isolation_level=None), repairs_in=log_dir)
            store._repair(error)
            return store

    @classmethod
    def salvaged(cls, log_dir: Path) -> Store:
        """For readers of a damaged file: what can be read of it, in memory. The file stays as it is."""
        connection = sqlite3.connect(":memory:", isolation_level=None)
        _fill(connection, log_dir, log_dir / FILE_NAME)
        return cls(connection, f"{log_dir / FILE_NAME} cannot be read as it is; the next run of health_check.py replaces it if it is damaged")

    @classmethod
    def fallback(cls, log_dir: Path, why: str) -> Store:
        """For the checker: the copy in shared memory, or one of this run only if shared memory is unusable."""
        folder = fallback_path(log_dir).parent
        if not _is_private(folder):
            return cls._without_disk(log_dir, why)
        try:
            connection = sqlite3.connect(fallback_path(log_dir), timeout=5, isolation_level=None)
            store = cls(_with_disk_copy(connection, log_dir), f"{why}; the store is kept in memory until then")
            store.put("version", VERSION)  # fails here if shared memory is full or damaged too
            return store
        except sqlite3.Error:
            shutil.rmtree(folder, ignore_errors=True)  # damaged too, or shared memory is full
            return cls._without_disk(log_dir, why)

    @classmethod
    def _without_disk(cls, log_dir: Path, why: str) -> Store:
        return cls(_with_disk_copy(sqlite3.connect(":memory:", isolation_level=None), log_dir), f"{why}; what is written now is lost")

    @classmethod
    def read_only(cls, log_dir: Path) -> Store:
        """For readers. Raises sqlite3.Error if there is no store yet."""
        kept = fallback_path(log_dir)
        return cls(_reader(kept if kept.exists() else log_dir / FILE_NAME))

    def _restore_to_disk(self, log_dir: Path) -> None:
        query = "SELECT made_at, actor, kind, target, arguments FROM requests"
        with contextlib.closing(sqlite3.connect(fallback_path(log_dir), timeout=5)) as memory:
            copied = memory.execute("SELECT 1 FROM state WHERE name = ?", (COPIED,)).fetchone()
            if copied or not self.execute("SELECT 1 FROM runs").fetchone():
                # The page writes to the disk, so requests since the disk became writable are not in memory.
                waiting = self.execute(f"{query} WHERE state = 'waiting'").fetchall()
                memory.backup(self._connection)
                in_memory = {tuple(row) for row in self.execute(query)}
                for row in waiting:
                    if tuple(row) not in in_memory:
                        self.execute("INSERT INTO requests (made_at, actor, kind, target, arguments) VALUES (?, ?, ?, ?, ?)", *row)
        # A copy that began empty, because the disk was not readable either, never replaces the file.
        discard_fallback(log_dir)

    def close(self) -> None:
        if self._repairs_in is not None:
            with contextlib.suppress(OSError, sqlite3.Error):  # nothing depends on the copy while the file is intact
                self._write_copy(self._repairs_in)
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing."""
        self._statement("BEGIN IMMEDIATE")
        self._written = []
        try:
            yield
            self._statement("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        finally:
            self._written = None

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        values = tuple(_storable(value) if isinstance(value, str) else value for value in values)
        cursor = self._statement(sql, *values)
        if self._written is not None and not sql.startswith("SELECT"):
            self._written.append((sql, values))
        return cursor

    def rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        while True:
            try:
                return [_decoded(row) for row in self._connection.execute(sql, values)]
            except sqlite3.Error as error:
                self._repair(error)

    def _statement(self, sql: str, *values: object) -> sqlite3.Cursor:
        while True:
            try:
                return self._connection.execute(sql, values)
            except sqlite3.Error as error:
                self._repair(error)

    # Repairs.

    def _repair(self, error: sqlite3.Error | OSError) -> None:
        """Replaces the connection by one that works, and repeats in it what the transaction has written.

        Raises `error` if this store does not repair itself, or if the statement is at fault.
        """
        log_dir = self._repairs_in
        if log_dir is None or self._repairs == REPAIRS or isinstance(error, sqlite3.IntegrityError | sqlite3.InterfaceError):
            raise error
        if isinstance(error, sqlite3.ProgrammingError) or self._misreads(error):
            raise error
        self._repairs += 1
        self._connection.close()
        path = log_dir / FILE_NAME
        if isinstance(error, NewerStore):
            self._fall_back(log_dir, str(error))
        elif is_damage(error, path):
            self._replace(log_dir, error)
        else:
            self._fall_back(log_dir, f"{path} is not writable ({error}{_owner(path)})")
        if self._written is not None:
            self._connection.execute("BEGIN IMMEDIATE")
            for sql, values in self._written:
                self._connection.execute(sql, values)

    def _misreads(self, error: Exception) -> bool:
        """Whether the statement is at fault, not the file: it names what no version of the schema has."""
        if not isinstance(error, sqlite3.OperationalError):
            return False
        if "syntax error" in str(error):
            return True
        if not any(part in str(error) for part in OTHER_SCHEMA):
            return False
        try:
            _check_schema(self._connection)
        except sqlite3.Error:
            return False
        return bool(self._connection.execute("SELECT 1 FROM sqlite_master").fetchone())

    @property
    def state(self) -> str:
        """For the report: ok, or what became of the file in this run."""
        return self.lost or (self.damage["en"] if self.damage else "ok")

    def rebuild(self, why: str) -> bool:
        """Replaces a file with values that no run can use. False if it has none, or if that was tried within REBUILD_AGAIN_S."""
        log_dir = self._repairs_in
        with contextlib.suppress(sqlite3.Error):
            if not any(self._connection.execute(f"SELECT 1 FROM {table} WHERE {_senseless(table)} LIMIT 1").fetchone() for table in REQUIRED):
                return False  # the fault is the checker's, and a new file would have the same rows
            before = self.get("rebuilt_at", 0)
            if log_dir is None or self.lost or (isinstance(before, int | float) and 0 <= time.time() - before < REBUILD_AGAIN_S):
                return False
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._replace(log_dir, sqlite3.DatabaseError(why))
            self.put("rebuilt_at", time.time())
            return True
        return False

    def _replace(self, log_dir: Path, error: Exception) -> None:
        """Sets the damaged file aside and goes on with a new one; with memory if even that fails."""
        now, path = time.time(), log_dir / FILE_NAME
        if self.lost:  # the copy in shared memory is damaged, not the disk's file
            discard_fallback(log_dir)
            return self._fall_back(log_dir, self.lost)
        try:
            aside = set_aside(path, now)
            connection = _writer(log_dir)
            rows = _fill(connection, log_dir, aside)
        except (OSError, sqlite3.Error) as problem:
            return self._fall_back(log_dir, f"{path} is damaged ({error}) and cannot be replaced ({problem})")
        self._use(connection)
        kept = ", ".join(f"{table} {count}" for table, count in rows.items() if count) or "none"
        self.damage = {
            "at": now, "file": aside.name,
            "en": f"The store {FILE_NAME} was damaged ({error}). It was set aside as {aside.name}, and a new one goes on with what could be read (rows: {kept}).",
            "zh": f"存储 {FILE_NAME} 已损坏（{error}）。已另存为 {aside.name}，并以可读出的内容继续（行数：{kept}）。",
        }  # fmt: skip
        self.put("damage", self.damage)
        return None

    def _fall_back(self, log_dir: Path, why: str) -> None:
        memory = Store.fallback(log_dir, why)
        self._use(memory._connection)
        self.lost = memory.lost

    def _inspect(self) -> None:
        """Now and then, raises DatabaseError for damage in rows that nothing reads."""
        last = self.get("last", {})
        if isinstance(last, dict) and isinstance(last.get("runs"), int) and last["runs"] % INSPECT_EVERY_RUNS == INSPECT_EVERY_RUNS - 1:
            self.check_pages()

    def check_pages(self) -> None:
        """Raises DatabaseError if the file is damaged anywhere. Reads all of it, but for the contents of indexes."""
        _check_schema(self._connection)
        found = str(self._connection.execute("PRAGMA quick_check(1)").fetchone()[0])
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    def _write_copy(self, log_dir: Path) -> None:
        state = {row["name"]: row["value"] for row in self.execute("SELECT name, value FROM state")}
        open_now = self.execute("SELECT * FROM incidents WHERE closed_at IS NULL ORDER BY opened_at DESC LIMIT 20")
        text = json.dumps({"state": state, "incidents": [dict(row) for row in open_now]}, ensure_ascii=False)
        descriptor, temporary = tempfile.mkstemp(dir=log_dir, prefix=f".{COPY_NAME}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            os.replace(temporary, log_dir / COPY_NAME)
        except BaseException:
            os.unlink(temporary)
            raise

    # State between runs.

    def get(self, name: str, default: Any = None) -> Any:
        """The value; `default` if there is none, or if it is not JSON."""
        row = self.execute("SELECT value FROM state WHERE name = ?", name).fetchone()
        return default if row is None else _parsed(row["value"], default)

    def get_copy(self, name: str) -> Any:
        """The value in `state.copy.json`; an empty object if there is none."""
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
            if self._repairs_in is not None:
                return _parsed(json.loads(_copy_text(self._repairs_in / COPY_NAME))["state"].get(name), {})
        return {}

    def note_unreadable(self, name: str) -> None:
        """An entry of the table `state` made no sense: it was taken from the second copy, or begins anew."""
        self.damage = {
            "at": time.time(), "file": "",
            "en": f"The entry {name} of the store {FILE_NAME} is damaged. It was taken from {COPY_NAME}, or begins anew.",
            "zh": f"存储 {FILE_NAME} 中的条目 {name} 已损坏，已取自 {COPY_NAME} 或重新开始。",
        }  # fmt: skip
        self.put("damage", self.damage)

    def put(self, name: str, value: Any) -> None:
        self.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", name, _json(value))

    # Runs and their roll-ups.

    def add_run(self, at: float, report: Mapping[str, Any], targets: Mapping[str, Any], readings: Mapping[str, Any]) -> int:
        cursor = self.execute(
            "INSERT INTO runs (at, duration_s, word, serving, targets, readings, report) VALUES (?, ?, ?, ?, ?, ?, ?)",
            at, report["duration_s"], report["verdict"], report["service_healthy"], _json(targets), _json(readings),
            _json(report),
        )  # fmt: skip
        words = {target: verdict["word"] for target, verdict in targets.items()}
        for span, (width_s, _) in SPANS.items():
            self._roll_up(span, at // width_s * width_s, words, readings)
        return int(cursor.lastrowid or 0)

    def _roll_up(self, span: str, start: float, words: Mapping[str, str], readings: Mapping[str, Any]) -> None:
        row = self.execute("SELECT * FROM rollups WHERE span = ? AND start = ?", span, start).fetchone()
        old: dict[str, Any] = _decoded(row) if row else {"runs": 0, "words": {}, "sums": {}}
        for target, word in words.items():
            counts = old["words"].setdefault(target, {})
            counts[word] = counts.get(word, 0) + 1
        for name, value in readings.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                total, count, most = old["sums"].get(name, [0.0, 0, value])
                old["sums"][name] = [round(total + value, 3), count + 1, max(most, value)]
        self.execute(
            "INSERT OR REPLACE INTO rollups VALUES (?, ?, ?, ?, ?)", span, start, old["runs"] + 1, _json(old["words"]),
            _json(old["sums"]),
        )  # fmt: skip

    def runs(self, since: float, limit: int = 2000) -> list[dict[str, Any]]:
        """Newest first, without the whole report."""
        return self.rows(
            "SELECT id, at, duration_s, word, serving, targets, readings FROM runs WHERE at >= ? ORDER BY at DESC LIMIT ?",
            since, limit,
        )  # fmt: skip

    def last_report(self) -> dict[str, Any] | None:
        row = self.execute("SELECT report FROM runs WHERE report IS NOT NULL ORDER BY id DESC LIMIT 1").fetchone()
        report = _parsed(row["report"], None) if row else None
        return report if isinstance(report, dict) else None

    def rollups(self, span: str, since: float) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM rollups WHERE span = ? AND start >= ? ORDER BY start", span, since)

    # Events.

    def add_flip(self, at: float, target: str, before: str, after: str, rule: str, en: str, zh: str) -> None:
        self.execute(
            "INSERT INTO flips (at, target, before, after, rule, en, zh) VALUES (?, ?, ?, ?, ?, ?, ?)",
            at, target, before, after, rule, en, zh,
        )  # fmt: skip

    def flips(self, since: float, limit: int = 500) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM flips WHERE at >= ? ORDER BY id DESC LIMIT ?", since, limit)

    def put_incident(self, incident: Mapping[str, Any], closed_at: float | None = None) -> None:
        self.execute(
            "INSERT OR REPLACE INTO incidents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(incident[name] for name in ("id", "target", "word", "rule", "en", "zh", "opened_at", "first_seen_at")),
            incident["recovered_at"], closed_at, incident["restarts"], _json(incident["symptoms"]), _json(incident),
        )  # fmt: skip

    def incidents(self, since: float = 0, limit: int = 100) -> list[dict[str, Any]]:
        """Newest first; `closed_at` is None while an incident is open."""
        return self.rows("SELECT * FROM incidents WHERE opened_at >= ? ORDER BY opened_at DESC LIMIT ?", since, limit)

    def add_action(
        self, at: float, target: str, kind: str, actor: str, outcome: str, detail: str = "", incident: str = "",
        duration_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.execute(
            "INSERT INTO actions (at, target, kind, actor, outcome, detail, incident, duration_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)", at, target, kind, actor, outcome, detail[:2000], incident, duration_s,
        )  # fmt: skip

    def actions(self, since: float = 0, limit: int = 200) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM actions WHERE at >= ? ORDER BY id DESC LIMIT ?", since, limit)

    # Operators' requests.

    def add_request(self, at: float, actor: str, kind: str, target: str = "", arguments: Mapping[str, Any] | None = None) -> int:
        """Returns the id of the new request. Raises ValueError for an unknown kind."""
        if kind not in REQUEST_KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(REQUEST_KINDS)}. Given: {kind}")
        cursor = self.execute(
            "INSERT INTO requests (made_at, actor, kind, target, arguments) VALUES (?, ?, ?, ?, ?)",
            at, actor, kind, target, _json(arguments or {}),
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def take_request(self, at: float) -> dict[str, Any] | None:
        """The oldest waiting request, marked as running so that no other run gets it; None if none waits."""
        row = self.execute("SELECT * FROM requests WHERE state = 'waiting' ORDER BY id LIMIT 1").fetchone()
        if row is None:
            return None
        taken = self.execute(
            "UPDATE requests SET state = 'running', taken_at = ? WHERE id = ? AND state = 'waiting'", at, row["id"]
        )
        return _decoded(row) if taken.rowcount == 1 else None

    def end_request(self, number: int, at: float, state: str, outcome: str) -> None:
        self.execute("UPDATE requests SET state = ?, ended_at = ?, outcome = ? WHERE id = ?", state, at, outcome, number)

    def requests(self, limit: int = 50) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM requests ORDER BY id DESC LIMIT ?", limit)

    # Size.

    def prune(self, wall: float, monotonic: float | None = None) -> None:
        """Deletes rows past their retention, and the report column of all but the last runs.

        `wall`: wall-clock seconds, which alone delete nothing: see `steady_time`.
        """
        newest = self.execute("SELECT at FROM runs ORDER BY id DESC LIMIT 1 OFFSET 1").fetchone()
        record = self.get("steady_time") or ({"at": newest["at"]} if newest else {})
        steady = steady_time.advance(record, wall, monotonic)
        self.put("steady_time", steady)
        now = steady["at"]
        self.execute("DELETE FROM runs WHERE at < ? AND id <= (SELECT MAX(id) FROM runs) - ?", now - KEEP_RUNS_S, KEEP_NEWEST_RUNS)
        self.execute(
            "UPDATE runs SET report = NULL WHERE report IS NOT NULL AND id <= (SELECT MAX(id) FROM runs) - ?", KEEP_REPORTS
        )
        for span, (_, keep_s) in SPANS.items():
            self.execute("DELETE FROM rollups WHERE span = ? AND start < ?", span, now - keep_s)
        for table, column in (("flips", "at"), ("actions", "at"), ("requests", "made_at"), ("outbox", "made_at")):
            self.execute(f"DELETE FROM {table} WHERE {column} < ?", now - KEEP_EVENTS_S)
        self.execute("DELETE FROM incidents WHERE closed_at IS NOT NULL AND closed_at < ?", now - KEEP_EVENTS_S)
        self.execute("DELETE FROM flips WHERE id <= (SELECT MAX(id) FROM flips) - 50000")


def _writer(log_dir: Path) -> sqlite3.Connection:
    log_dir.mkdir(parents=True, exist_ok=True)
    refuse_pipes(log_dir / FILE_NAME)
    connection = sqlite3.connect(log_dir / FILE_NAME, timeout=5, isolation_level=None)
    try:
        _refuse_newer(connection, log_dir / FILE_NAME)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(SCHEMA)
        _check_schema(connection)
        # Fail here if the file is not writable, not in the middle of a run.
        connection.execute("INSERT OR REPLACE INTO state VALUES ('version', ?)", (json.dumps(VERSION),))
        return connection
    except sqlite3.Error:
        connection.close()
        raise


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> None:
    """Raises NewerStore."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'state'").fetchone():
        return
    row = connection.execute("SELECT value FROM state WHERE name = 'version'").fetchone()
    version = _parsed(row[0], VERSION) if row else VERSION
    if isinstance(version, int) and version > VERSION:
        raise NewerStore(f"{path} was written by a newer version (schema {version}; this one knows {VERSION}) and is left as it is: upgrade again, or move it away")


def _is_newer(path: Path) -> bool:
    try:
        with contextlib.closing(_reader(path)) as disk:
            _refuse_newer(disk, path)
    except NewerStore:
        return True
    except (sqlite3.Error, OSError):
        pass
    return False


def fallback_path(log_dir: Path) -> Path:
    """The store in shared memory while the disk is not writable: one folder per user and log folder."""
    name = hashlib.sha256(os.path.realpath(log_dir).encode()).hexdigest()[:16]
    return SHARED_MEMORY / f"glm-{os.geteuid()}-{name}" / FILE_NAME


def discard_fallback(log_dir: Path) -> None:
    shutil.rmtree(fallback_path(log_dir).parent, ignore_errors=True)


def _is_private(folder: Path) -> bool:
    """Creates the folder. False if another user owns it or may enter it: shared memory is writable for everyone."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _with_disk_copy(memory: sqlite3.Connection, log_dir: Path) -> sqlite3.Connection:
    """Copies the disk into `memory`, unless an earlier run has done so."""
    if not memory.execute("SELECT 1 FROM sqlite_master WHERE name = 'state'").fetchone():
        # Reading in WAL mode creates a -shm file, which fails on a full disk. `immutable` does not, but misses what the
        # last run left in the WAL.
        newer = _is_newer(log_dir / FILE_NAME)  # its rows are of use now, but must not replace the file later
        if newer or not any(_copy_intact(log_dir / FILE_NAME, mode, memory) for mode in ("mode=ro", "immutable=1")):
            copied = any(_fill(memory, log_dir, log_dir / FILE_NAME).values()) and not newer
        else:
            copied = True
        if copied:
            memory.execute("INSERT OR REPLACE INTO state VALUES (?, 'true')", (COPIED,))
    memory.executescript(SCHEMA)
    return memory


def _copy_intact(path: Path, mode: str, memory: sqlite3.Connection) -> bool:
    """Copies the file, unless it is damaged or unreadable: a copy would be damaged too."""
    try:
        with contextlib.closing(_reader(path, mode)) as disk, contextlib.closing(sqlite3.connect(":memory:")) as first:
            disk.execute("SELECT 1 FROM sqlite_master").fetchone()  # raises while the file is locked; a backup waits for ever
            disk.backup(first)
            _check_schema(first)
            if first.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                return False
            first.backup(memory)
            if mode == "immutable=1":
                _add_copy(memory, path.with_name(COPY_NAME))
            return True
    except (sqlite3.Error, OSError):
        return False


def _reader(path: Path, mode: str = "mode=ro") -> sqlite3.Connection:
    refuse_pipes(path)
    # A WAL reader needs the -shm file: the folder must be writable, or the file must exist.
    return sqlite3.connect(f"file:{path}?{mode}", uri=True, timeout=5, isolation_level=None)


TIMES = {
    "runs": ("at",), "rollups": ("start",), "flips": ("at",), "actions": ("at",), "outbox": ("made_at", "next_at", "sent_at"),
    "requests": ("made_at", "taken_at", "ended_at"),
    "incidents": ("opened_at", "first_seen_at", "recovered_at", "closed_at"),
}  # fmt: skip
REQUIRED = {
    "runs": ("at", "word"), "rollups": ("span", "start", "runs"), "flips": ("at", "target", "before", "after", "en", "zh"),
    "actions": ("at", "target", "kind", "actor", "outcome", "detail", "duration_s"),
    "outbox": ("made_at", "channel", "kind", "severity", "message", "tries", "next_at"),
    "requests": ("made_at", "actor", "kind", "state"),
    "incidents": ("id", "target", "word", "rule", "en", "zh", "opened_at", "first_seen_at", "restarts"),
}  # fmt: skip
JSON_COLUMNS = frozenset({"targets", "readings", "report", "words", "sums", "symptoms", "body", "message", "arguments"})


def _decoded(row: sqlite3.Row) -> dict[str, Any]:
    """Garbage in a JSON column is an empty object, or an empty list."""
    found = dict(row)
    for name in JSON_COLUMNS & set(found):
        if found[name] is not None:
            empty: Any = [] if name == "symptoms" else {}
            value = _parsed(found[name], empty)
            found[name] = value if type(value) is type(empty) else empty
    return found


def _parsed(text: object, default: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else default
    except (ValueError, RecursionError):
        return default


def _check_schema(connection: sqlite3.Connection) -> None:
    """Raises OperationalError for a file of another version, whose tables lack columns."""
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(SCHEMA)
        for (table,) in model.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            expected, found = ({row[1] for row in db.execute(f"PRAGMA table_info({table})")} for db in (model, connection))
            if expected - found:
                raise sqlite3.OperationalError(f"no such column: {table}.{min(expected - found)}, the file is of another version")


def _fill(connection: sqlite3.Connection, log_dir: Path, source: Path) -> dict[str, int]:
    """Salvages `source` and the copy of the state into an empty store. The rows of each table."""
    connection.executescript(SCHEMA)
    connection.execute("BEGIN")
    connection.execute("DELETE FROM state")
    rows = salvage(source, connection)
    for table in REQUIRED:
        connection.execute(f"DELETE FROM {table} WHERE {_senseless(table)}")
    _add_copy(connection, log_dir / COPY_NAME)
    # An older state of a row may have been read: a restart that was made must not be made again.
    connection.execute("UPDATE requests SET state = 'refused', outcome = 'the store was damaged; ask again' WHERE state IN ('waiting', 'running')")
    connection.execute("INSERT OR REPLACE INTO state VALUES ('version', ?)", (json.dumps(VERSION),))
    connection.execute("COMMIT")
    return rows


def _senseless(table: str) -> str:
    """The SQL condition for a row that the schema allows and no code expects. SQLite keeps text in a column of numbers."""
    lacking = [f"{name} IS NULL" for name in REQUIRED[table]]
    times = [f"typeof({name}) NOT IN ('real', 'integer', 'null') OR {name} NOT BETWEEN 0 AND {LATEST_TIME}" for name in TIMES[table]]
    return " OR ".join(f"({part})" for part in lacking + times)


def _add_copy(connection: sqlite3.Connection, path: Path) -> None:
    """Adds what only `state.copy.json` still has. All of its state, if the file's is older or not there."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError, sqlite3.Error):
        copy = json.loads(_copy_text(path))
        row = connection.execute("SELECT value FROM state WHERE name = 'last'").fetchone()
        in_file, in_copy = (_parsed(text, None) for text in (row[0] if row else None, copy["state"].get("last")))
        counts = [last.get("runs", -1) if isinstance(last, dict) else -1 for last in (in_file, in_copy)]
        verb = "REPLACE" if counts[1] > counts[0] else "IGNORE"
        connection.executemany(f"INSERT OR {verb} INTO state VALUES (?, ?)", copy["state"].items())
        for incident in copy["incidents"]:
            names = [name for name in incident if name.isidentifier()]
            marks = ", ".join("?" * len(names))
            connection.execute(f"INSERT OR IGNORE INTO incidents ({', '.join(names)}) VALUES ({marks})", [incident[name] for name in names])


def _copy_text(path: Path) -> str:
    """Raises OSError, ValueError."""
    if not path.is_file() or path.stat().st_size > COPY_LIMIT_BYTES:
        raise OSError(f"{path} is not a file of the checker")
    return path.read_text(encoding="utf-8")


def _owner(path: Path) -> str:
    """What to run for a file of another user; empty if that is not the problem."""
    with contextlib.suppress(OSError, KeyError):
        import pwd

        found, me = path.stat(), os.geteuid()
        if me and found.st_uid != me:
            names = [pwd.getpwuid(number).pw_name for number in (found.st_uid, me)]
            return f"; it belongs to {names[0]}: run chown {names[1]} {path.parent}/*"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"; run chmod u+rw {path}"
    return ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=list)


def _storable(text: str) -> str:
    """Without lone surrogates, which SQLite refuses: names of files may hold them."""
    return text.encode("utf-8", "replace").decode("utf-8")
