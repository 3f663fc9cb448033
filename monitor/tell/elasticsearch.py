"""Pushes a document per run to Elasticsearch, through a queue of bounded size in a file.

A document is in the queue before it is sent and leaves it only when Elasticsearch has said what became of that very document.
Its id is fixed, so one that is sent again after a lost answer replaces itself.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from monitor.observe.http_exchange import Reply, exchange
from monitor.observe.small_file import read_small
from monitor.tell.report import replace_file

QUEUE = ".elasticsearch.pending"
QUEUE_LIMIT = 500  # documents: eight hours of a run a minute
QUEUE_LIMIT_BYTES = 32 * 2**20
SEND_LIMIT_S = 4.0
DEFAULT_INDEX = "glm-health"
TRY_AGAIN = 429  # and every 5xx: of an item too


def push(url: str, document: Mapping[str, Any], log_dir: Path) -> str:
    """Sends what waits, and this document. Empty if all was accepted, otherwise why not. The URL's path is the index."""
    parts = urlsplit(url)
    index = parts.path.strip("/") or DEFAULT_INDEX
    queue = _waiting(log_dir)
    queue.append((json.dumps({"index": {"_index": index, "_id": _id(document, log_dir)}}), json.dumps(document, ensure_ascii=False)))
    dropped, queue = max(0, len(queue) - QUEUE_LIMIT), queue[-QUEUE_LIMIT:]
    said = f"; {dropped} dropped: <= {QUEUE_LIMIT} documents may wait" if dropped else ""
    # A run that is killed while Elasticsearch stalls must not take its document along.
    stored = _store(log_dir, queue)
    headers = {"Content-Type": "application/x-ndjson"}
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
    port = f":{parts.port}" if parts.port else ""
    body = "".join(f"{action}\n{source}\n" for action, source in queue).encode("utf-8", "replace")
    reply = exchange(f"{parts.scheme}://{parts.hostname}{port}/_bulk", SEND_LIMIT_S, "POST", body, headers, connect_s=2.0)
    items = _items(reply, len(queue))
    if items is None:
        if not stored:
            return "Elasticsearch did not accept the documents, and the disk is not writable to keep them"
        why = reply.detail or (f"HTTP {reply.status}" if reply.status != 200 else "its answer does not say what became of each")
        return f"Elasticsearch did not accept the documents: {why}; {len(queue)} documents wait{said}"
    later = [entry for entry, item in zip(queue, items, strict=True) if _try_again(item)]
    # A document that is refused for its content would be refused again, and must not block later ones.
    refused = [item for item in items if _is_refused(item) and not _try_again(item)]
    _store(log_dir, later)
    problems = []
    if refused:
        problems.append(f"Elasticsearch rejected {len(refused)} of {len(items)}: {refused[0].get('error') or refused[0].get('status')}"[:300])
    if later:
        problems.append(f"Elasticsearch was too busy for {len(later)} of {len(items)} documents, which wait")
    return "; ".join(problems) + said if problems else said.removeprefix("; ")


def _id(document: Mapping[str, Any], log_dir: Path) -> str:
    """Two services on one machine may run in the same second."""
    service = hashlib.sha256(str(log_dir.absolute()).encode()).hexdigest()[:8]
    return f"{platform.node()}-{service}-{document['@timestamp']}"


def _waiting(log_dir: Path) -> list[tuple[str, str]]:
    """Pairs of lines, the oldest first; of a damaged file those that are whole."""
    try:
        lines = read_small(log_dir / QUEUE, QUEUE_LIMIT_BYTES).split("\n")
    except OSError:
        return []
    return [pair for pair in itertools.pairwise(lines) if "index" in _object(pair[0]) and "@timestamp" in _object(pair[1])]


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _store(log_dir: Path, queue: list[tuple[str, str]]) -> bool:
    """False if the disk is not writable."""
    try:
        if queue:
            replace_file(log_dir / QUEUE, "".join(f"{action}\n{source}\n" for action, source in queue))
        else:
            (log_dir / QUEUE).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _items(reply: Reply, count: int) -> list[dict[str, Any]] | None:
    """What became of each document, in their order; None if the reply does not say. A bulk reply is 200 for refused ones too."""
    rows = (reply.json() or {}).get("items") if reply.status == 200 else None
    if not isinstance(rows, list) or len(rows) != count:
        return None
    items = [next(iter(row.values()), None) if isinstance(row, dict) else None for row in rows]
    return items if all(isinstance(item, dict) for item in items) else None  # type: ignore[return-value]


def _is_refused(item: Mapping[str, Any]) -> bool:
    status = item.get("status")
    return bool(item.get("error")) or (isinstance(status, int) and status >= 300)


def _try_again(item: Mapping[str, Any]) -> bool:
    status = item.get("status")
    return isinstance(status, int) and (status == TRY_AGAIN or status >= 500)
