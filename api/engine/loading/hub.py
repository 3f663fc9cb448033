"""The two hubs that serve models, Hugging Face (or a mirror of it) and ModelScope: what they list, and where each file is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import requests
from huggingface_hub import get_token

CONNECT_S = 10.0
SILENCE_S = 60.0  # without a byte for this long a connection is given up
SUFFIXES = (".json", ".jinja", ".txt", ".safetensors")  # nothing that could hold code
LATER = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may be others in a moment
LONGEST_WAIT_S = 60.0


class HubError(Exception):
    """One sentence: what a hub does not give, and why."""


class Refused(HubError):
    """The hub has answered that it does not give this: asking again changes nothing."""


class Unavailable(HubError):
    """The hub cannot be reached or cannot serve now. `wait_s`: what it asks to wait."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Damaged(HubError):
    """What the hub sends is not what it has announced, whether by its size or by its checksum."""


@dataclass(frozen=True)
class RemoteFile:
    """`digest`: hex, as `algorithm` makes it; empty if the hub tells none. `git`: the SHA-1 of a git blob, with its header."""

    name: str
    url: str
    size: int
    algorithm: Literal["sha256", "git"] = "sha256"
    digest: str = ""

    @property
    def key(self) -> str:
        """The name of the file in the cache: equal for equal contents, on whichever hub."""
        return self.digest or hashlib.sha256(self.url.encode()).hexdigest()

    def hasher(self) -> Any:
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """The files of one commit of a model that are worth downloading."""

    commit: str
    files: tuple[RemoteFile, ...]


class HuggingFace:
    name: Literal["huggingface", "modelscope"] = "huggingface"
    title = "Hugging Face"
    default_revision = "main"

    def __init__(self) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    @property
    def where(self) -> str:
        return _where(self.title, self.endpoint)

    @property
    def cache(self) -> Path:
        """The folder of models, shared with huggingface_hub."""
        home = (
            os.environ.get("HF_HOME")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
        )
        return Path(
            os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
        ).expanduser()

    def folder(self, model: str) -> Path:
        return self.cache / f"models--{model.replace('/', '--')}"

    def older_folders(self, model: str) -> list[Path]:
        return []

    def headers(self) -> dict[str, str]:
        token = get_token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def files(self, model: str, revision: str) -> Listing:
        """Raises HubError."""
        body = _json(self, f"{self.endpoint}/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true", model)
        commit, siblings = body.get("sha"), body.get("siblings")
        if not isinstance(commit, str) or not commit.isalnum() or not isinstance(siblings, list):
            raise Unavailable(f"{self.where} answers about {model} with something else than a list of files")
        return Listing(commit, tuple(self._files(model, commit, siblings)))

    def _files(self, model: str, commit: str, siblings: list[Any]) -> Iterator[RemoteFile]:
        for sibling in siblings:
            name = sibling.get("rfilename")
            if not _is_wanted(name):
                continue
            url = f"{self.endpoint}/{model}/resolve/{commit}/{quote(name)}"
            lfs, size = sibling.get("lfs") or {}, sibling.get("size")
            if size is None:  # a mirror that lists names only
                yield self._asked_for(name, url, model)
            elif lfs.get("sha256"):
                yield RemoteFile(name, url, _size(size), "sha256", _hex(lfs["sha256"], 64))
            else:
                yield RemoteFile(name, url, _size(size), "git", _hex(sibling.get("blobId"), 40))

    def _asked_for(self, name: str, url: str, model: str) -> RemoteFile:
        response = _request(self, "HEAD", url, model, allow_redirects=False, headers={"Accept-Encoding": "identity"})
        with response:
            size = response.headers.get("X-Linked-Size") or response.headers.get("Content-Length") or ""
            digest = (
                (response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or "")
                .removeprefix("W/")
                .strip('"')
            )
        if not size.isdigit():
            raise Unavailable(f"{self.where} does not tell the size of {name}")
        if len(digest) == 40:
            return RemoteFile(name, url, int(size), "git", _hex(digest, 40))
        return RemoteFile(name, url, int(size), "sha256", _hex(digest, 64))


class ModelScope:
    name: Literal["huggingface", "modelscope"] = "modelscope"
    title = "ModelScope"
    default_revision = "master"

    def __init__(self) -> None:
        endpoint = (
            os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "https://modelscope.cn"
        )
        self.endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")

    @property
    def where(self) -> str:
        return _where(self.title, self.endpoint)

    @property
    def cache(self) -> Path:
        return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()

    def folder(self, model: str) -> Path:
        return self.cache / "models" / model.replace("/", "--")

    def older_folders(self, model: str) -> list[Path]:
        """Where the package modelscope has put models before version 1.38."""
        owner, _, name = model.partition("/")
        places = (self.cache / "models", self.cache / "hub" / "models", self.cache / "hub", self.cache)
        return [place / owner / spelled for place in places for spelled in (name.replace(".", "___"), name)]

    def headers(self) -> dict[str, str]:
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    def files(self, model: str, revision: str) -> Listing:
        """Raises HubError."""
        base, asked = f"{self.endpoint}/api/v1/models/{model}/repo", quote(revision, safe="")
        body = _json(self, f"{base}/files?Revision={asked}&Recursive=False", model)
        data = body.get("Data")
        if not isinstance(data, dict):
            data = {"Files": ()}
        entries = data.get("Files")
        if body.get("Success") is False or entries is None:  # so it answers for a revision it has not
            said = str(body.get("Message") or "no files")[:200]
            raise Refused(f"{self.where} has no {model} at revision {revision}: {said}")
        if not isinstance(entries, list):
            raise Unavailable(f"{self.where} answers about {model} with something else than a list of files")
        files = tuple(
            RemoteFile(
                entry["Path"], f"{base}?Revision={asked}&FilePath={quote(entry['Path'], safe='')}", _size(entry.get("Size")),
                "sha256", _hex(entry.get("Sha256"), 64),
            )
            for entry in entries if entry.get("Type") != "tree" and _is_wanted(entry.get("Path"))
        )  # fmt: skip
        return Listing(self._commit(data, entries, files), files)

    def _commit(self, data: dict[str, Any], entries: list[Any], files: tuple[RemoteFile, ...]) -> str:
        """The newest commit, of which the list has only the beginning unless it changed a file of it; else a digest of the files."""
        beginning = str((data.get("LatestCommitter") or {}).get("ShortId") or "")
        for entry in entries:
            revision = str(entry.get("Revision") or "")
            if len(beginning) >= 7 and revision.startswith(beginning) and revision.isalnum():
                return revision
        return hashlib.sha256("".join(f"{file.name} {file.key}\n" for file in files).encode()).hexdigest()[:40]


Hub = HuggingFace | ModelScope
HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def list_files(hub: Hub, model: str, revision: str) -> Listing:
    """Raises HubError."""
    try:
        return hub.files(model, revision)
    except (AttributeError, TypeError, ValueError) as error:  # entries of another form than the hub's
        raise Unavailable(f"{hub.where} answers about {model} with a list that cannot be read: {error}") from None


def open_file(hub: Hub, file: RemoteFile, start: int, model: str) -> requests.Response:
    """The answer of status 200 or 206 whose body are the bytes from `start`, or all; 416 if there are none. Raises HubError."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    return _request(hub, "GET", file.url, model, headers=headers, stream=True, also={416})


def _json(hub: Hub, url: str, model: str) -> dict[str, Any]:
    with _request(hub, "GET", url, model) as response:
        try:
            body = response.json()
        except requests.RequestException:
            body = None
    if not isinstance(body, dict):  # a page for people: a login of the network, or a block
        raise Unavailable(
            f"{hub.where} answers with something else than JSON; is there a login page or a block in between?"
        )
    return body


def _request(
    hub: Hub, method: str, url: str, model: str, also: set[int] | frozenset[int] = frozenset(), headers: dict[str, str] | None = None,
    **options: Any,
) -> requests.Response:  # fmt: skip
    """`requests` leaves the credentials out where a redirect leads to another host."""
    try:
        response = requests.request(
            method, url, headers={**hub.headers(), **(headers or {})}, timeout=(CONNECT_S, SILENCE_S), **options
        )
    except requests.RequestException as error:
        raise Unavailable(f"{hub.where} cannot be reached: {reason_of(error)}") from None
    status = response.status_code
    if status < 400 or status in also:
        return response
    with response:
        said = response.headers.get("X-Error-Message", "")[:200]
        wait = response.headers.get("Retry-After", "")
    if status in LATER:
        seconds = min(float(wait), LONGEST_WAIT_S) if wait.isdigit() else 0.0
        raise Unavailable(f"{hub.where} answers with status {status}" + (f": {said}" if said else ""), seconds)
    token = "HF_TOKEN" if hub.name == "huggingface" else "MODELSCOPE_API_TOKEN"
    why = {
        401: f"it does not exist, or needs a token of someone who may read it: set {token}",
        403: f"it is closed to you: accept its terms on the hub, and set {token}",
        404: "there is no such model, revision or file",
    }.get(status, "")
    raise Refused(
        f"{hub.where} refuses {model} with status {status}: {'; '.join(part for part in (why, said) if part) or 'no reason given'}"
    )


def reason_of(error: BaseException) -> str:
    """The innermost reason of a failed request, which its wrappers repeat with their own addresses."""
    while True:
        inner = error.__cause__ or error.__context__ or getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _is_wanted(name: object) -> bool:
    """Only files of the model's own folder: a name without a slash also stays in the cache's folder."""
    return (
        isinstance(name, str)
        and name.endswith(SUFFIXES)
        and "/" not in name
        and "\\" not in name
        and not name.startswith(".")
    )


def _size(value: object) -> int:
    """Raises ValueError for what is no size."""
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a size must be a whole number >= 0. Given: {value!r}")
    return value


def _hex(value: object, length: int) -> str:
    """The digest in lower case; empty if it is none, so that nothing else becomes the name of a file."""
    text = value.lower() if isinstance(value, str) else ""
    return text if len(text) == length and all(letter in "0123456789abcdef" for letter in text) else ""


def _where(title: str, endpoint: str) -> str:
    """Without what a mirror's address may hold to log in: it is shown to everyone."""
    return f"{title} ({endpoint.partition('://')[2].rpartition('@')[2]})"
