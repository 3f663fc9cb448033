"""One file from a hub to the cache: resumed where it was cut, checked against the hub's checksum, renamed when it is whole."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

import requests
from urllib3.exceptions import HTTPError

from api.engine.loaded_model import LoadError
from api.engine.loading.hub import Damaged, Hub, RemoteFile, Unavailable, open_file, reason_of
from api.engine.loading.hub_cache import HubCache
from api.engine.loading.progress import DownloadMeter

logger = logging.getLogger(__name__)

PIECE_BYTES = 2**20  # at most; what has arrived is written at once
ATTEMPTS = 5  # in a row without a byte
DAMAGED_ATTEMPTS = 2
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0


class Stopped(Exception):
    """Another file has failed for good."""


class Transfer:
    """Files of one model. `stop` ends what runs; each thread may call `fetch`."""

    def __init__(self, hub: Hub, model: str, cache: HubCache, meter: DownloadMeter, stop: threading.Event) -> None:
        self._hub, self._model, self._cache, self._meter, self._stop = hub, model, cache, meter, stop

    def fetch(self, file: RemoteFile) -> None:
        """Raises HubError, or LoadError for a disk that cannot be written."""
        failures = damages = 0
        while True:
            before = self._cache.bytes_of(file)
            try:
                return self._attempt(file)
            except Damaged as error:
                damages += 1
                if damages == DAMAGED_ATTEMPTS:
                    raise
                logger.warning("event=download_damaged file=%s again=yes reason=%s", file.name, error)
            except Unavailable as error:
                failures = 1 if self._cache.bytes_of(file) > before else failures + 1
                if failures == ATTEMPTS:
                    raise
                wait_s = error.wait_s or min(FIRST_WAIT_S * 2 ** (failures - 1), LONGEST_WAIT_S)
                logger.warning("event=download_cut file=%s again_in_s=%.0f reason=%s", file.name, wait_s, error)
                self._meter.say(f"{error}; next attempt in {wait_s:.0f} s")
                if self._stop.wait(wait_s):
                    raise Stopped from None
            except OSError as error:
                raise _disk_error(error, self._cache.folder) from None

    def _attempt(self, file: RemoteFile) -> None:
        path = self._cache.part(file)
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as part:
            digest = self._digest_of(part, file)
            if part.tell() < file.size or not file.size:
                digest = self._receive(part, file, digest)
            if file.digest and digest.hexdigest() != file.digest:
                self._discard(part, file)
                raise Damaged(
                    f"{self._hub.where} sends {file.name} with the {file.algorithm} checksum {digest.hexdigest()} and announces "
                    f"{file.digest}"
                )
            os.fsync(part.fileno())
        os.replace(path, self._cache.blob(file))

    def _digest_of(self, part: BinaryIO, file: RemoteFile) -> Any:
        """The digest of what is here, at whose end the file is left."""
        digest = file.hasher()
        if os.fstat(part.fileno()).st_size > file.size:
            self._discard(part, file)
        while piece := part.read(8 * PIECE_BYTES):
            digest.update(piece)
            self._meter.touch()
        return digest

    def _receive(self, part: BinaryIO, file: RemoteFile, digest: Any) -> Any:
        """The digest of the whole file, which is then in `part`."""
        start = part.tell()
        with open_file(self._hub, file, start, self._model) as response:
            if response.status_code == 416 or (start and response.status_code != 206):  # it cannot begin in the middle
                self._discard(part, file)
                start, digest = 0, file.hasher()
                if response.status_code == 416:
                    raise Unavailable(f"{self._hub.where} has no bytes of {file.name} from {start} on")
            self._check_range(response, file, start)
            while part.tell() < file.size:
                if self._stop.is_set():
                    raise Stopped
                piece = self._read(response, file)
                if not piece:
                    raise Unavailable(
                        f"{self._hub.where} cut the connection at byte {part.tell()} of {file.size} of {file.name}"
                    )
                if part.tell() + len(piece) > file.size:
                    self._discard(part, file)
                    raise self._wrong_size(file, "more")
                part.write(piece)
                part.flush()
                digest.update(piece)
                self._meter.say("")
                self._meter.add(len(piece), file.name)
        return digest

    def _check_range(self, response: requests.Response, file: RemoteFile, start: int) -> None:
        given, length = response.headers.get("Content-Range", ""), response.headers.get("Content-Length", "")
        if response.status_code == 206:
            begins, _, total = given.removeprefix("bytes ").partition("/")
            if begins.partition("-")[0] != str(start):
                raise Unavailable(f"{self._hub.where} answers with the wrong part of {file.name}: {given[:60]}")
            if total.isdigit() and int(total) != file.size:
                raise self._wrong_size(file, total)
        elif length.isdigit() and not response.headers.get("Content-Encoding") and int(length) != file.size:
            raise self._wrong_size(file, length)

    def _wrong_size(self, file: RemoteFile, sent: str) -> Damaged:
        return Damaged(f"{self._hub.where} announces {file.size} bytes of {file.name} and sends {sent}")

    def _read(self, response: requests.Response, file: RemoteFile) -> bytes:
        """What has arrived, at most a piece; waits for a byte as long as the connection may be silent."""
        try:
            return response.raw.read1(PIECE_BYTES, decode_content=True) or b""
        except (HTTPError, OSError) as error:
            raise Unavailable(f"{self._hub.where} stopped sending {file.name}: {reason_of(error)}") from None

    def _discard(self, part: BinaryIO, file: RemoteFile) -> None:
        self._meter.add(-os.fstat(part.fileno()).st_size, file.name)
        part.seek(0)
        part.truncate()


def _disk_error(error: OSError, folder: Path) -> LoadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LoadError(
            f"{folder}: the disk is full. Free some space, or set HF_HOME (MODELSCOPE_CACHE) to a folder on a larger disk."
        )
    return LoadError(f"{folder}: the download cannot be written: {error.strerror or error}")
