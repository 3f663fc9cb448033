"""Downloads a model from Hugging Face (or the mirror in HF_ENDPOINT) or ModelScope, once: a whole copy on disk needs no network."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path

from api.engine.loaded_model import LoadError
from api.engine.loading.hub import HUBS, Damaged, Hub, Refused, RemoteFile, Unavailable, list_files
from api.engine.loading.hub_cache import POLL_S, HubCache
from api.engine.loading.progress import DownloadMeter, Progress
from api.engine.loading.transfer import Stopped, Transfer

logger = logging.getLogger(__name__)

CONNECTIONS = 4  # files at a time
ROUND_WAIT_S = 30.0  # between two rounds through the hubs, once bytes have come
SPARE_BYTES = 2**29  # of the disk, for logs and what else is written meanwhile
LOG_S = 30.0
NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
REVISION = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
# The same publisher under the name that it has on each hub. Whoever has a name on one hub need not have it on the other, so a
# model of anyone else is never looked for on another hub than the one that is set.
PUBLISHERS = ({"huggingface": "zai-org", "modelscope": "ZhipuAI"},)
ADVICE = "Set GLM_MODEL to a folder, GLM_HUB to another hub, or HF_ENDPOINT to a mirror."


def split_revision(model: str) -> tuple[str, str]:
    """`owner/name@revision`: the id, and the revision or nothing."""
    name, _, revision = model.partition("@")
    return name, revision


def is_hub_id(model: str) -> bool:
    name, revision = split_revision(model)
    return NAME.fullmatch(name) is not None and not name.startswith(".") and ("@" not in model or revision != "")


def download(model: str, hub: str, progress: Progress) -> Path:
    """The folder of a downloaded model. `model`: owner/name, or owner/name@revision. `progress` is called for each piece that has
    come. Raises LoadError."""
    name, revision = split_revision(model)
    if revision and not REVISION.fullmatch(revision):
        raise LoadError(f"GLM_MODEL: the revision after @ must be a commit, tag or branch. Given: {revision}")
    sources = _sources(name, hub, revision)
    for source in sources:
        if folder := source.cache.find(revision):
            logger.info("event=model_on_disk model=%s hub=%s folder=%s", model, source.hub.name, folder)
            return folder
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise LoadError(
            f"{model} is not completely in {sources[0].cache.folder}, and HF_HUB_OFFLINE forbids to download it."
        )
    try:
        return _download(sources, model, revision, DownloadMeter(progress))
    except OSError as error:
        raise LoadError(
            f"{sources[0].cache.folder}: the download cannot be written: {error.strerror or error}"
        ) from None


class _Source:
    """A model under its name on one hub, and its place on disk."""

    def __init__(self, hub: Hub, model: str, peers: tuple[Path, ...]) -> None:
        self.hub, self.model, self.cache = hub, model, HubCache(hub, model, peers)


def _sources(model: str, hub: str, revision: str) -> list[_Source]:
    """The hub that is set, then the other one, if the same publisher is there. A pinned revision exists on one hub only."""
    owner, _, name = model.partition("/")
    ids = {hub: model}
    for names in PUBLISHERS:
        if names.get(hub) == owner and not revision:
            ids |= {other: f"{other_owner}/{name}" for other, other_owner in names.items() if other != hub}
    hubs = {each: HUBS[each]() for each in ids}
    return [
        _Source(hubs[each], ids[each], tuple(hubs[peer].folder(ids[peer]) / "blobs" for peer in ids if peer != each))
        for each in ids
    ]


def _download(sources: list[_Source], model: str, revision: str, meter: DownloadMeter) -> Path:
    """Goes on for as long as the line may come back, once it has brought anything; the checker sees that nothing moves."""
    reasons: dict[str, str] = {}
    while True:
        for source in list(sources):
            trouble = "; ".join(reasons.values())
            if trouble:
                trouble = f"{trouble}; trying {source.hub.where}"
                logger.warning(
                    "event=download_elsewhere hub=%s model=%s reason=%s", source.hub.name, source.model, trouble
                )
            meter.connect(source.hub.where, trouble)
            try:
                return _from_hub(source, revision, meter)
            except (Unavailable, Damaged, Refused) as error:
                reasons[source.hub.name] = str(error)
                logger.warning("event=hub_failed hub=%s model=%s reason=%s", source.hub.name, source.model, error)
                if isinstance(error, Refused) and source is sources[0] and len(reasons) == 1:
                    break  # what the hub that is set refuses must not come from elsewhere unnoticed
                if not isinstance(error, Unavailable):
                    sources.remove(source)
        else:
            if sources and meter.moved:
                meter.say(f"{'; '.join(reasons.values())}; next attempt in {ROUND_WAIT_S:.0f} s")
                time.sleep(ROUND_WAIT_S)
                continue
        raise LoadError(
            f"{model} is not a local folder and cannot be downloaded: {'; '.join(reasons.values())}. {ADVICE}"
        )


def _from_hub(source: _Source, revision: str, meter: DownloadMeter) -> Path:
    """Raises Unavailable, Damaged, Refused, LoadError, OSError."""
    cache, hub = source.cache, source.hub
    listing = list_files(hub, source.model, revision or hub.default_revision)
    if not any(file.name.endswith(".safetensors") for file in listing.files):
        raise Refused(f"{hub.where} has no *.safetensors in {source.model}, and other weights are not loaded")
    files = list({file.key: file for file in listing.files}.values())  # two with the same content are one on disk
    total = sum(file.size for file in files)
    meter.begin(hub.where, _present(cache, files), total)
    with cache.locked(lambda: _wait_for_other(cache, files, meter)):
        for file in files:
            cache.adopt(file)
        missing = [file for file in files if not cache.has(file)]
        present = _present(cache, files)
        _check_disk(source, total - present)
        meter.begin(hub.where, present, total)
        logger.info(
            "event=download hub=%s model=%s commit=%s files=%d bytes=%d present=%d", hub.name, source.model, listing.commit,
            len(listing.files), total, present,
        )  # fmt: skip
        began = time.monotonic()
        _fetch_all(source, missing, meter)
        folder = cache.publish(listing, revision)
    logger.info("event=downloaded folder=%s bytes=%d seconds=%.1f", folder, total - present, time.monotonic() - began)
    return folder


def _present(cache: HubCache, files: list[RemoteFile]) -> int:
    return sum(min(cache.bytes_of(file), file.size) for file in files)


def _wait_for_other(cache: HubCache, files: list[RemoteFile], meter: DownloadMeter) -> None:
    meter.say("another process downloads it")
    meter.set_present(_present(cache, files))
    time.sleep(POLL_S)


def _check_disk(source: _Source, needed: int) -> None:
    free = shutil.disk_usage(source.cache.blobs).free
    if needed and free < needed + SPARE_BYTES:
        setting = "HF_HOME" if source.hub.name == "huggingface" else "MODELSCOPE_CACHE"
        raise LoadError(
            f"Not enough disk for {source.model}: {needed / 1e9:.1f} GB are still to be downloaded and {SPARE_BYTES / 1e9:.1f} GB must stay "
            f"free, but {free / 1e9:.1f} GB are free in {source.cache.folder}. Free some space, or set {setting} to a folder on a larger disk."
        )


def _fetch_all(source: _Source, files: list[RemoteFile], meter: DownloadMeter) -> None:
    """A few files at a time, in threads that do not keep the process from ending. Raises what the first failure was."""
    stop, failures = threading.Event(), list[BaseException]()
    transfer = Transfer(source.hub, source.model, source.cache, meter, stop)
    queue = iter(sorted(files, key=lambda file: file.size))  # small ones first: what is refused is known at once
    lock = threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                file = next(queue, None)
            if file is None:
                return
            try:
                transfer.fetch(file)
            except Stopped:
                return
            except BaseException as error:
                failures.append(error)
                stop.set()

    threads = [threading.Thread(target=work, name=f"download-{number}", daemon=True) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    logged_at = time.monotonic()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
            if time.monotonic() - logged_at > LOG_S:
                logged_at = time.monotonic()
                now = meter.read()
                logger.info(
                    "event=download_progress hub=%s bytes=%d of=%d bytes_per_s=%.0f file=%s trouble=%s", source.hub.name,
                    now.downloaded_bytes, now.total_bytes, now.bytes_per_s, now.file, now.trouble or "none",
                )  # fmt: skip
    if failures:
        raise failures[0]
