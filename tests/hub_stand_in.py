"""A hub on this machine that speaks the APIs of Hugging Face and ModelScope, and misbehaves in one exact way.

python hub_stand_in.py FOLDER BYTES_PER_S     serves the files of a folder as any model, at this rate, until it is killed
"""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCOPE_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@dataclass
class Fault:
    """Of the next answers that send a file. `after`: bytes that are sent properly before it.

    `kind`: stall (nothing more comes), cut (the connection is closed), status (another status instead), flip (one byte is
    another), short (announces and sends less), whole (ignores the range).
    """

    kind: str
    after: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    name: str = ".safetensors"  # how the name of the file ends


class HubStandIn:
    """`files`: name to content. `token`: needed if it is not empty. `rate`: bytes per second of all connections together."""

    def __init__(self, files: dict[str, bytes], rate: float = 0.0) -> None:
        self.files, self.rate = files, rate
        self.token = ""
        self.faults: list[Fault] = []
        self.listed: dict[str, dict[str, Any]] = {}  # what the list says of a file instead of the truth
        self.names_only = False  # as a simple mirror lists
        self.page: bytes | None = None  # answers everything, as a login page of a network does
        self.asked: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.sent = 0
        self._sent_at = time.monotonic()
        self.lock = threading.Lock()
        stand_in = self

        class Handler(_Handler):
            hub = stand_in

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.released = threading.Event()  # ends what stalls
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def total(self) -> int:
        """Bytes of the files that a model needs."""
        return sum(
            len(content) for name, content in self.files.items() if name.endswith((".json", ".jinja", ".safetensors"))
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def other_host(self) -> str:
        return f"http://localhost:{self.server.server_port}"

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def requests_of(self, name: str) -> list[dict[str, str]]:
        """Headers of the requests that were answered with a file's bytes, or should have been."""
        return [
            headers
            for method, path, headers in self.asked
            if method == "GET" and path.startswith("/cdn/") and path.endswith(name)
        ]

    def fault_for(self, name: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and name.endswith(fault.name):
                    fault.times -= 1
                    return fault
        return None

    def pace(self, size: int) -> None:
        with self.lock:
            self.sent += size
            if not self.rate:
                return
            self._sent_at = max(self._sent_at, time.monotonic()) + size / self.rate
            wait_s = self._sent_at - time.monotonic()
        time.sleep(max(wait_s, 0.0))


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        with hub.lock:
            hub.asked.append((self.command, self.path, dict(self.headers.items())))
        steps = [unquote(step) for step in parts.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        allowed = not hub.token or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.page is not None:
            self._send(200, hub.page, {"Content-Type": "text/html"})
        elif steps[0] == "cdn":
            self._send_file(steps[-1])
        elif not allowed:
            self._send(
                401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
            )
        elif steps[:2] == ["api", "models"] and "revision" in steps:
            self._list_huggingface(steps[-1])
        elif steps[:2] == ["api", "models"] and "tree" in steps:
            self._list_tree()
        elif steps[:3] == ["api", "v1", "models"] and steps[-1] == "files":
            self._list_modelscope(query["Revision"])
        elif "resolve" in steps and steps[-1] in hub.files:
            self._redirect(steps[-1])
        elif steps[:3] == ["api", "v1", "models"] and query.get("FilePath") in hub.files:
            self._redirect(query["FilePath"])
        else:
            self._send(404, b"{}", {"X-Error-Message": "Repository not found"})

    do_HEAD = do_GET

    def _list_huggingface(self, revision: str) -> None:
        if revision not in ("main", "v1", COMMIT):
            return self._send(404, b"{}", {"X-Error-Message": f"Invalid rev id: {revision}"})
        siblings = []
        for name, content in self.hub.files.items():
            entry: dict[str, Any] = {"rfilename": name}
            if not self.hub.names_only:
                entry |= {"size": len(content), "blobId": git_digest(content)}
                if name.endswith(".safetensors"):
                    entry["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 134,
                    }
            siblings.append(entry | self.hub.listed.get(name, {}))
        self._send(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())

    def _list_tree(self) -> None:
        """As huggingface_hub asks for it."""
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": git_digest(content)}
            | (
                {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                if name.endswith(".safetensors")
                else {}
            )
            for name, content in self.hub.files.items()
        ]
        self._send(200, json.dumps(entries).encode())

    def _list_modelscope(self, revision: str) -> None:
        files: list[dict[str, Any]] | None = [
            {
                "Path": name, "Name": name, "Type": "blob", "Size": len(content), "IsLFS": name.endswith(".safetensors"),
                "Sha256": hashlib.sha256(content).hexdigest(), "Revision": SCOPE_COMMIT,
                **self.hub.listed.get(name, {}),
            }
            for name, content in self.hub.files.items()
        ] + [{"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0, "Revision": SCOPE_COMMIT}]  # fmt: skip
        if revision not in ("master", "v1", SCOPE_COMMIT):
            files = None
        data = {"Files": files, "LatestCommitter": {"Id": "", "ShortId": SCOPE_COMMIT[:8]} if files else None}
        self._send(200, json.dumps({"Code": 200, "Data": data, "Success": True, "Message": "success"}).encode())

    def _redirect(self, name: str) -> None:
        content = self.hub.files[name]
        large = name.endswith(".safetensors")
        headers = {"Location": f"{self.hub.other_host}/cdn/{name}", "X-Linked-Size": str(len(content))}
        headers["X-Repo-Commit"] = COMMIT
        headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest() if large else git_digest(content)}"'
        self._send(302, b"", headers)

    def _send_file(self, name: str) -> None:
        hub, content = self.hub, self.hub.files[name]
        fault = hub.fault_for(name)
        if fault is not None and fault.kind == "status":
            return self._send(fault.status, b"", fault.headers)
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if fault is not None and fault.kind == "whole":
            start = 0
        if wanted and start >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        end = len(content) - (1 if fault is not None and fault.kind == "short" else 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        body = bytearray(content[start:end])
        if fault is not None and fault.kind == "flip":
            body[fault.after] ^= 1
        limit = fault.after if fault is not None and fault.kind in ("stall", "cut") else len(body)
        self._send_slowly(bytes(body[:limit]))
        if fault is not None and fault.kind == "stall":
            hub.released.wait(300)
        if limit < len(body):
            self.close_connection = True
        return None

    def _send_slowly(self, body: bytes) -> None:
        piece = max(int(self.hub.rate / 20), 1) if self.hub.rate else 65536
        try:
            for at in range(0, len(body), piece):
                self.wfile.write(body[at : at + piece])
                self.wfile.flush()
                self.hub.pace(min(piece, len(body) - at))
        except OSError:
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".jinja", ".safetensors", ".md", ".py")
    }


if __name__ == "__main__":
    print(HubStandIn(files_of(Path(sys.argv[1])), float(sys.argv[2])).url, flush=True)
    threading.Event().wait()
