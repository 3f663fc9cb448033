"""Puts checked files in the place of others, so that a kill at any moment leaves something that can be finished.

All files lie ready in hidden folders beside their goals, and a journal beside `.env` says which goes where, before the first goal
is touched. Each goal is then replaced by one rename; what was there got a second name before. `.env` comes last: until then the
settings are those of before. `finish` does what the journal says, from wherever it was cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL_END = ".restoring"
WORK_PREFIX = ".glm-restore-"
ENDS = ("-wal", "-shm", "-journal")  # of what SQLite keeps beside a store
ASIDE = ".before-restore-"


class SwapError(Exception):
    """The journal cannot be followed; the message says why."""


@dataclass
class Staging:
    """A hidden folder, 0700. `needed`: a journal names it, so that it outlives this process."""

    path: Path
    needed: bool = False

    def move_into(self, folder: Path) -> None:
        """On the same file system."""
        if self.path.parent != folder:
            self.path = self.path.rename(folder / self.path.name)


def journal_of(env: Path) -> Path:
    """Beside `.env`, where the next start and the next restore look."""
    return env.with_name(env.name + JOURNAL_END)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Staging]:
    """Removes those of restores that were killed first. A lock on the folder itself says that somebody works in it."""
    remove_leftovers(folder)
    made = Staging(Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=folder)))
    descriptor = os.open(made.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield made
    finally:
        if not made.needed:
            shutil.rmtree(made.path, ignore_errors=True)
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Of restores that were killed before they began to replace anything."""
    for left in folder.glob(f"{WORK_PREFIX}*"):
        _remove_if_left(left)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody works in it, or it is no folder
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def remove_copies(goal: Path) -> None:
    """What an earlier version left beside a goal when it was killed: `.chats.db.` and eight letters of mkstemp."""
    name = re.compile(re.escape(f".{goal.name}.") + "[a-z0-9_]{8}")
    for left in goal.parent.glob(f".{goal.name}.*"):
        if name.fullmatch(left.name) and left.is_file() and not left.is_symlink():
            left.unlink()


def begin(journal: Path, stagings: list[Staging], moves: list[tuple[Path, Path]], outdated: list[Path], log_dirs: list[Path]) -> None:
    """Writes the journal. `moves`: which file goes where, in this order. `outdated`: what is set aside without a successor."""
    plan = {
        "begun_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stamp": time.strftime("%Y%m%dT%H%M%S", time.gmtime()),
        "moves": [[str(source), str(goal)] for source, goal in moves], "outdated": [str(path) for path in outdated],
        "folders": [str(each.path) for each in stagings], "log_dirs": [str(path) for path in log_dirs],
    }  # fmt: skip
    written = stagings[-1].path / "journal"
    with written.open("x", encoding="utf-8") as file:
        json.dump(plan, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for each in stagings:
        each.needed = True
    os.replace(written, journal)
    sync(journal.parent)


def read(journal: Path) -> dict[str, Any]:
    """Raises OSError, SwapError."""
    try:
        plan = json.loads(journal.read_bytes())
        kinds = {"begun_at": str, "stamp": str, "moves": list, "outdated": list, "folders": list, "log_dirs": list}
        if all(isinstance(plan[name], kind) for name, kind in kinds.items()):
            return dict(plan)
    except (ValueError, KeyError, TypeError):
        pass
    raise SwapError(f"{journal} is damaged. Delete it, look what was set aside (*{ASIDE}*), and restore again")


def finish(journal: Path) -> list[Path]:
    """Does what the journal says and is not done yet, and returns all that was set aside. Raises OSError, SwapError."""
    plan = read(journal)
    stamp, goals = plan["stamp"], []
    for name in plan["outdated"]:
        goals.append(Path(name))
        for end in ("", *ENDS):
            old = goals[-1].with_name(goals[-1].name + end)
            if os.path.lexists(old):
                os.replace(old, _aside_of(old, stamp))
    for name, goal_name in plan["moves"]:
        source, goal = Path(name), Path(goal_name)
        goals.append(goal)
        if os.path.lexists(source):
            _replace(source, goal, stamp)
        elif not os.path.lexists(goal):
            raise SwapError(f"{source} is gone, so that {goal} cannot be restored. Delete {journal} and restore again")
    journal.unlink()
    sync(journal.parent)
    for name in plan["folders"]:
        shutil.rmtree(name, ignore_errors=True)
    return sorted({each for goal in goals for each in goal.parent.glob(f"{goal.name}*{ASIDE}{stamp}*")})


def _replace(source: Path, goal: Path, stamp: str) -> None:
    """What SQLite kept beside the old store would be taken for that of the new one, so it goes first."""
    olds = [path for end in ("", *ENDS) if os.path.lexists(path := goal.with_name(goal.name + end))]
    asides = []
    for old in olds:
        asides.append(_aside_of(old, stamp))
        if not os.path.lexists(asides[-1]):
            _give_second_name(old, asides[-1])
    sync(goal.parent)
    for old in olds:
        if old != goal:
            old.unlink()
    os.replace(source, goal)
    sync(goal.parent)
    for aside in asides:  # as secret as what they were
        if aside.is_file() and not aside.is_symlink():
            os.chmod(aside, 0o600)


def _aside_of(old: Path, stamp: str) -> Path:
    """A free name; or the one that this very file got before a kill."""
    for number in range(1, 1000):
        aside = old.with_name(f"{old.name}{ASIDE}{stamp}{f'-{number}' if number > 1 else ''}")
        if not os.path.lexists(aside) or (not old.is_symlink() and old.exists() and aside.exists() and os.path.samefile(old, aside)):
            return aside
    raise SwapError(f"too many files {old.name}{ASIDE}*: delete old ones")


def _give_second_name(old: Path, aside: Path) -> None:
    try:
        os.link(old, aside, follow_symlinks=False)
    except OSError:  # a folder, or a file system without links
        os.replace(old, aside)


def sync(folder: Path) -> None:
    """So that a rename survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
