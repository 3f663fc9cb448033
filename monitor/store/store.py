"""`logs/state.db`: every run, roll-ups, flips, incidents, actions, the outbox and operators' requests. SQLite in WAL mode.

Standard library only, so that the page may import it. Readers use `Store.read_only(log_dir)` and never block the writer.
What is committed survives a kill at any moment. On a full or read-only disk the writer continues with a copy in shared
memory (`store.lost` has the reason), which later runs share, so that alerts are not repeated every run. The file on disk is
unchanged until it is writable again; then the copy replaces it.

Tables (times are wall-clock seconds, JSON columns hold objects):

    runs       id, at, duration_s, word, serving, targets JSON {target: {word, rule, en, zh, ...}}, readings JSON, report JSON
    rollups    span (minute|hour|day), start, runs, words JSON {target: {word: runs}}, sums JSON {reading: [sum, count, max]}
    flips      id, at, target, before, after, rule, en, zh
    incidents  id, target, word, rule, en, zh, opened_at, first_seen_at, recovered_at, closed_at, restarts, symptoms JSON, body JSON
    actions    id, at, target, kind, actor, outcome, detail, incident, duration_s       (the audit log)
    outbox     id, made_at, channel, kind, incident, severity, message JSON, tries, next_at, sent_at, error
    requests   id, made_at, actor, kind, target, arguments JSON, state, taken_at, ended_at, outcome
    state      name, value JSON        (histories, limiters, holds, thresholds)

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "state.db"
SHARED_MEMORY = Path("/dev/shm")
COPIED = "copied_from_disk"  # key in `state`: this copy began with the contents of the disk
REQUEST_KINDS = ("restart", "drain", "probe", "pause", "resume", "silence", "maintenance", "reset")
SPANS = {"minute": (60, 86400), "hour": (3600, 30 * 86400), "day": (86400, 365 * 86400)}  # width and retention in seconds
KEEP_RUNS_S = 86400
KEEP_EVENTS_S = 365 * 86400
KEEP_REPORTS = 60  # whole reports; older runs keep their verdicts and readings
VERSION = 1

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


class Store:
    """One connection, for the thread that opened it. Writes that belong together go inside `with store.transaction():`.

    `lost` is empty, or says why the disk is not written and where the data goes instead.
    """

    def __init__(self, connection: sqlite3.Connection, lost: str = "") -> None:
        self._connection = connection
        self.lost = lost
        connection.row_factory = sqlite3.Row

    @classmethod
    def open(cls, log_dir: Path) -> Store:
        """For writers other than the checker. Does not raise for an unusable disk or a damaged file: writes are lost then."""
        try:
            return cls(_writer(log_dir))
        except (sqlite3.Error, OSError) as error:
            return cls._without_disk(log_dir, f"{log_dir / FILE_NAME} is not writable ({error})")

    @classmethod
    def open_for_run(cls, log_dir: Path) -> Store:
        """For the checker, under its lock. Moves a copy in shared memory back to the disk if that is writable again."""
        try:
            store = cls(_writer(log_dir))
            if fallback_path(log_dir).exists():
                store._restore_to_disk(log_dir)
            return store
        except (sqlite3.Error, OSError) as error:
            return cls.fallback(log_dir, f"{log_dir / FILE_NAME} is not writable ({error})")

    @classmethod
    def fallback(cls, log_dir: Path, why: str) -> Store:
        """For the checker: the copy in shared memory, or one of this run only if shared memory is unusable."""
        folder = fallback_path(log_dir).parent
        if not _is_private(folder):
            return cls._without_disk(log_dir, why)
        try:
            connection = sqlite3.connect(fallback_path(log_dir), timeout=5, isolation_level=None)
            return cls(_with_disk_copy(connection, log_dir), f"{why}; the store is kept in memory until then")
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
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        return self._connection.execute(sql, values)

    def rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        return [_decoded(row) for row in self._connection.execute(sql, values)]

    # State between runs.

    def get(self, name: str, default: Any = None) -> Any:
        row = self.execute("SELECT value FROM state WHERE name = ?", name).fetchone()
        return default if row is None else json.loads(row["value"])

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
        return json.loads(row["report"]) if row else None

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

    def prune(self, now: float) -> None:
        """Deletes rows past their retention, and the report column of all but the last runs."""
        self.execute("DELETE FROM runs WHERE at < ?", now - KEEP_RUNS_S)
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
    connection = sqlite3.connect(log_dir / FILE_NAME, timeout=5, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(SCHEMA)
        # Fail here if the file is not writable, not in the middle of a run.
        connection.execute("INSERT OR REPLACE INTO state VALUES ('version', ?)", (json.dumps(VERSION),))
        return connection
    except sqlite3.Error:
        connection.close()
        raise


def fallback_path(log_dir: Path) -> Path:
    """The store in shared memory while the disk is not writable: one folder per user and log folder."""
    name = hashlib.sha256(str(log_dir.resolve()).encode()).hexdigest()[:16]
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
        for mode in ("mode=ro", "immutable=1"):
            try:
                with contextlib.closing(_reader(log_dir / FILE_NAME, mode)) as disk:
                    disk.backup(memory)
                    memory.execute("INSERT OR REPLACE INTO state VALUES (?, 'true')", (COPIED,))
                break
            except (sqlite3.Error, OSError):
                continue
    memory.executescript(SCHEMA)
    return memory


def _reader(path: Path, mode: str = "mode=ro") -> sqlite3.Connection:
    # A WAL reader needs the -shm file: the folder must be writable, or the file must exist.
    return sqlite3.connect(f"file:{path}?{mode}", uri=True, timeout=5, isolation_level=None)


JSON_COLUMNS = frozenset({"targets", "readings", "report", "words", "sums", "symptoms", "body", "message", "arguments"})


def _decoded(row: sqlite3.Row) -> dict[str, Any]:
    found = dict(row)
    for name in JSON_COLUMNS & set(found):
        found[name] = json.loads(found[name]) if found[name] else None
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=list)
