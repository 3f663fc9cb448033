"""Which weights were loaded: the hub's commit, or a digest of what a folder's files say of themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAMES = ("config.json", "model.safetensors.index.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json")


def revision_of(folder: Path) -> str:
    """The commit of a hub snapshot; otherwise a digest of the settings' contents and of the weights' names, sizes and times.

    The weights themselves are not read, which would take minutes for a large model.
    """
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.blake2b(digest_size=8)
    for name in NAMES:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"-")
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
