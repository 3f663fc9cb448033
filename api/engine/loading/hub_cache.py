"""Downloaded models on disk, in the layout of huggingface_hub: blobs by content, snapshots that link to them, refs to commits.

What huggingface_hub or modelscope has downloaded before is found and used. `files/<commit>.json` is added: the size of each
file, by which a snapshot is known to be whole without asking a hub.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from api.engine.loading.hub import Hub, Listing, RemoteFile

WEIGHTS_INDEX = "model.safetensors.index.json"
POLL_S = 1.0


class HubCache:
    """One model of one hub. `peers`: the blobs of the same model from other hubs."""

    def __init__(self, hub: Hub, model: str, peers: tuple[Path, ...] = ()) -> None:
        self.folder = hub.folder(model)
        self.blobs = self.folder / "blobs"
        self._default_revision = hub.default_revision
        self._older = hub.older_folders(model)
        self._peers = peers

    def find(self, revision: str) -> Path | None:
        """The folder of a whole snapshot; `revision` is empty for the newest that was downloaded."""
        wanted = revision or self._default_revision
        ref = self.folder / "refs" / wanted
        try:
            commit = ref.read_text(encoding="utf-8").strip() or wanted
        except OSError:
            commit = wanted
        candidates = [self.folder / "snapshots" / commit, *([] if revision else self._older)]
        return next((folder for folder in candidates if self._is_whole(folder)), None)

    def blob(self, file: RemoteFile) -> Path:
        return self.blobs / file.key

    def part(self, file: RemoteFile) -> Path:
        """What has come of a file so far."""
        return self.blobs / f"{file.key}.part"

    def adopt(self, file: RemoteFile) -> None:
        """Take over what has come of the same content from another hub."""
        if file.algorithm != "sha256" or not file.digest or self.has(file):
            return
        for peer in self._peers:
            with contextlib.suppress(OSError):  # not there, or on another disk
                os.link(peer / file.key, self.blob(file))
                return
            with contextlib.suppress(OSError):
                if (peer / self.part(file).name).stat().st_size > self.bytes_of(file):
                    os.replace(peer / self.part(file).name, self.part(file))

    def has(self, file: RemoteFile) -> bool:
        with contextlib.suppress(OSError):
            return self.blob(file).stat().st_size == file.size
        return False

    def bytes_of(self, file: RemoteFile) -> int:
        """Bytes of a file that are here."""
        for path in (self.blob(file), self.part(file)):
            with contextlib.suppress(OSError):
                return path.stat().st_size
        return 0

    def publish(self, listing: Listing, revision: str) -> Path:
        """Link the blobs of a listing to a snapshot, and point the revision to it. Raises OSError."""
        folder = self.folder / "snapshots" / listing.commit
        folder.mkdir(parents=True, exist_ok=True)
        for file in listing.files:
            link = folder / file.name
            if link.is_symlink() or link.exists():
                link.unlink()
            try:
                link.symlink_to(os.path.relpath(self.blob(file), folder))
            except OSError:  # a file system without links
                os.replace(self.blob(file), link)
        _write(self._sizes(listing.commit), json.dumps({file.name: file.size for file in listing.files}))
        wanted = revision or self._default_revision
        if wanted != listing.commit:
            _write(self.folder / "refs" / wanted, listing.commit)
        return folder

    @contextlib.contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """One process downloads; another calls `waiting` each second until it has ended. A killed one holds no lock."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        with (self.folder / "download.lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting()
                except OSError:  # a file system without locks
                    break
            yield

    def _sizes(self, commit: str) -> Path:
        return self.folder / "files" / f"{commit}.json"

    def _is_whole(self, folder: Path) -> bool:
        try:
            sizes = json.loads(self._sizes(folder.name).read_text(encoding="utf-8"))
            return all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, AttributeError):
            return _seems_whole(folder)  # not downloaded by this program


def _seems_whole(folder: Path) -> bool:
    """It has the settings that every model needs, and the weights of its index to their last byte."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return False
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return False
    try:
        shards = set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        shards = {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all(_ends_where_its_header_says(folder / shard) for shard in shards)


def _ends_where_its_header_says(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= 2**27:
                return False
            tensors = json.loads(opened.read(length))
            size = os.fstat(opened.fileno()).st_size
        last = max((tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"), default=0)
        return size == 8 + length + last
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
