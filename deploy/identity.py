"""What a server is started from: a digest of the source files of each part, and one of each setting it may read.

    python -m deploy.identity      prints {"api": {"code": ..., "settings": {NAME: ...}}, "web": ...}

start.sh hands it to the servers in their environment, which only their user can read, and compares it later with what is
in the folder then. Takes 0.3 s, nearly all of it for the settings.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from settings import Settings, SettingsError, load

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("settings.py", "log_output.py", "cgroup.py", "requirements.txt")
SOURCES = {"api": ("api", "models"), "web": ("web", "models", "monitor/store"), "engine": ("deploy/engine.py",)}
PRINTED_BYTES = 2**20  # of larger files only this much is read: they are weights, and their size and head tell them apart


def identity(root: Path, part: str, settings: Settings) -> dict[str, Any]:
    """{`code`: digest of the files, `settings`: digests of those that are set and that the part's source names}."""
    digest, words = hashlib.sha256(), set[str]()
    for path in source_files(root, part):
        with path.open("rb") as file:
            content = file.read(PRINTED_BYTES)
        digest.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode() + content)
        if path.suffix == ".py" and path.name != "settings.py":
            words.update(re.findall(r"\.([a-z_]+)\b", content.decode("utf-8", "replace")))
    values = {name: _plain(value) for name, value in settings if name in words}
    changed = {name: text for name, text in values.items() if text != _plain(Settings.model_fields[name].default)}
    return {
        "code": digest.hexdigest()[:16],
        "settings": {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in changed.items()},
    }


def source_files(root: Path, part: str) -> Iterator[Path]:
    """The files of which a change matters to the part, in a fixed order."""
    for name in (*SOURCES[part], *SHARED):
        path = root / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            hidden = any(piece.startswith((".", "__pycache__")) for piece in file.relative_to(root).parts)
            if file.is_file() and not hidden and file.suffix not in (".md", ".pyc") and not file.name.endswith("~"):
                yield file


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def main() -> int:
    try:
        settings = load()
        print(json.dumps({part: identity(ROOT, part, settings) for part in SOURCES}))
    except (OSError, SettingsError) as error:
        print(f"Nothing was started: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
