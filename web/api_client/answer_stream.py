"""One streamed answer: its server-sent events as typed records, read in a thread of its own.

Owns the meaning of the events, the retries while the model loads, and the immediate closing of the connection. A
blocked read cannot see Stop; the page therefore polls for batches of events, which may be empty.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import requests

from web.api_client.client import ApiClient, ApiError, Health, classify_error, error_of_response, shut_down

LOADING_STILL_S = 900.0  # a model may load for hours, but not without any progress
LINE_LIMIT_BYTES = 4 * 2**20
STREAM_LIMIT_BYTES = 256 * 2**20  # an hour of heartbeats and the longest answer are less
WAITING_EVENTS = 10_000
LOADING_RETRY_S = 2.0  # the longest wait before a retry, so that the page's progress stays current


@dataclass(frozen=True)
class Queued:
    """A heartbeat before the answer begins. `position`: in the queue, None if the API does not report it."""

    position: int | None


@dataclass(frozen=True)
class Loading:
    """The model is still loading, and the request will be retried. `progress`: 0 to 1."""

    progress: float | None


@dataclass(frozen=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class BoundingBox:
    """A bounding box, point or polygon in the image with index `image` of the request, from 0.

    `corners`: x, y pairs in thousandths of width and height: one for a point, two for a box, more for a
    polygon. `pixels`: the same in pixels of the image as it was sent; empty if the API gave none.
    """

    corners: tuple[float, ...]
    image: int = 0
    label: str = ""
    pixels: tuple[int, ...] = ()


@dataclass(frozen=True)
class InvalidBox:
    """A box with coordinates outside 0-1000, which cannot be drawn."""


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of the tool call `index`: the first has its name and id; the parts of `arguments` are joined."""

    index: int
    name: str = ""
    arguments: str = ""
    id: str = ""


@dataclass(frozen=True)
class Finished:
    """The end of an answer, with the API's own figures; None where it reports none."""

    reason: str | None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    cached_tokens: int | None = None
    request_id: str = ""


Event = Queued | Loading | ReasoningDelta | TextDelta | BoundingBox | InvalidBox | ToolCallDelta | Finished


class AnswerStream:
    """A context manager: entering sends the request, leaving closes the connection, so that the API aborts it.

    Only one thread may iterate over `batches`; any may call `close`. `session`: the name of the conversation.
    """

    def __init__(self, client: ApiClient, body: dict[str, Any], session: str = "") -> None:
        self._client = client
        self._session = session
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._arrived: queue.Queue[Event | ApiError | None] = queue.Queue(WAITING_EVENTS)
        self._closed = threading.Event()
        self._response: requests.Response | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="answer-stream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent, from any thread. Ends a blocked read."""
        self._closed.set()
        with self._lock:
            if self._response is not None:
                shut_down(self._response)

    def batches(self, wait_s: float = 0.2, gather_s: float = 0.08) -> Iterator[list[Event]]:
        """Events in order, gathered for `gather_s` from the first one; an empty list if none arrives within `wait_s`.

        Raises ApiError after the events that arrived before it.
        """
        ended = False
        while not ended:
            batch: list[Event] = []
            deadline = time.monotonic() + wait_s
            while not ended and (left := deadline - time.monotonic()) > 0:
                try:
                    item = self._arrived.get(timeout=left)
                except queue.Empty:
                    break
                if isinstance(item, ApiError):
                    if batch:
                        yield batch
                    raise item
                if item is None:
                    ended = True
                else:
                    if not batch:
                        deadline = min(deadline, time.monotonic() + gather_s)
                    batch.append(item)
            yield batch

    def _run(self) -> None:
        try:
            response = self._open()
            if response is not None:
                self._read(response)
        except ApiError as error:
            self._deliver(error)
        except Exception as error:  # whatever fails, the page must not wait forever
            self._deliver(ApiError("broken", type(error).__name__))
        finally:
            self._deliver(None)

    def _deliver(self, item: Event | ApiError | None) -> None:
        """Waits while the page is behind, until the stream is closed."""
        while True:
            try:
                return self._arrived.put(item, timeout=0.2)
            except queue.Full:
                if self._closed.is_set():
                    return

    def _open(self) -> requests.Response | None:
        """The response to read, None if the stream was closed meanwhile. Raises ApiError."""
        moved_at, last = time.monotonic(), Health("down")
        while not self._closed.is_set():
            try:
                response = self._client.post_stream(self._body, self._session)
            except requests.ReadTimeout:
                raise ApiError("silent") from None
            except requests.RequestException:
                raise ApiError("down") from None
            with self._lock:
                self._response = response
                if self._closed.is_set():
                    response.close()
                    return None
            if response.status_code == 200:
                return response
            error = error_of_response(response)
            response.close()
            if error.kind != "loading":
                raise error
            health = self._client.health()
            if _moved(last, health):
                moved_at, last = time.monotonic(), health
            elif time.monotonic() - moved_at > LOADING_STILL_S:
                raise error
            self._deliver(Loading(health.progress))
            self._closed.wait(min(error.retry_after_s or LOADING_RETRY_S, LOADING_RETRY_S))
        return None

    def _read(self, response: requests.Response) -> None:
        request_id = response.headers.get("x-request-id", "")
        reader = EventReader(request_id)
        rest, total = b"", 0
        try:
            while not self._closed.is_set() and not reader.done:
                received = response.raw.read1(65536)
                if not received:
                    break
                *lines, rest = (rest + received).split(b"\n")
                total += len(received)
                if len(rest) > LINE_LIMIT_BYTES or total > STREAM_LIMIT_BYTES:
                    raise ApiError("broken", "the answer is longer than any answer can be", request_id)
                for line in lines:
                    for event in reader.read(line.decode("utf-8", "replace").rstrip("\r")):
                        self._deliver(event)
        except ApiError:
            raise
        except Exception as error:  # urllib3, http.client and ssl raise errors of their own for a lost connection
            if not self._closed.is_set():
                kind = "silent" if "timed out" in str(error).lower() else "lost"
                raise ApiError(kind, request_id=request_id) from None
        finally:
            response.close()
        if not reader.done and not self._closed.is_set():
            raise ApiError("lost", request_id=request_id)


@dataclass
class EventReader:
    """Turns the lines of an event stream into events. Pure: no socket, no thread.

    Not `sseclient-py` or `httpx-sse`: as the WHATWG specification of server-sent events requires, both drop comment
    lines, in which the API reports the queue position (`: queue_position=3`). Each `data:` line is one JSON document,
    as in all OpenAI-compatible streams.
    """

    request_id: str = ""
    done: bool = False
    _reason: str | None = None
    _usage: dict[str, Any] = field(default_factory=dict)
    _timings: dict[str, Any] = field(default_factory=dict)

    def read(self, line: str) -> Iterator[Event]:
        """Raises ApiError for an error event or data that is not JSON."""
        if self.done:
            return
        if line.startswith(":"):
            yield Queued(_queue_position(line))
            return
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            self.done = True
            yield self._finished()
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise ApiError("broken", request_id=self.request_id) from None
        if isinstance(chunk, dict):
            yield from self._chunk(chunk)

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[Event]:
        if isinstance(chunk.get("error"), dict):
            raise classify_error(0, chunk["error"], self.request_id)
        self._usage = chunk.get("usage") or self._usage
        self._timings = chunk.get("timings") or self._timings
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
                yield ReasoningDelta(str(reasoning))
            if text := delta.get("content"):
                yield TextDelta(str(text))
            for box in delta.get("boxes") or []:
                if parsed := _bounding_box(box):
                    yield parsed
            for call in delta.get("tool_calls") or []:
                if part := _tool_call_delta(call):
                    yield part
            self._reason = choice.get("finish_reason") or self._reason

    def _finished(self) -> Finished:
        return Finished(
            reason=self._reason,
            completion_tokens=self._usage.get("completion_tokens"),
            prompt_tokens=self._usage.get("prompt_tokens"),
            ttft_s=self._timings.get("ttft_s"),
            tokens_per_s=self._timings.get("tokens_per_s"),
            cached_tokens=(self._usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            request_id=self.request_id,
        )


def _moved(before: Health, now: Health) -> bool:
    """Whether a load has come any further."""
    if before.state != now.state or before.progress != now.progress:
        return True
    return now.download is not None and (
        before.download is None or before.download.downloaded_bytes != now.download.downloaded_bytes
    )


def _queue_position(comment: str) -> int | None:
    _, _, value = comment.partition("queue_position=")
    return int(value.strip()) if value.strip().isdigit() else None


def _bounding_box(box: object) -> BoundingBox | InvalidBox | None:
    """None for anything that is not a box, a point or a polygon."""
    if not isinstance(box, dict):
        return None
    for kind in ("bbox", "point", "polygon"):
        corners = _flat(box.get(f"{kind}_2d"))
        count = len(corners)
        if not (count == 4 if kind == "bbox" else count == 2 if kind == "point" else count >= 6 and count % 2 == 0):
            continue
        if not all(0 <= value <= 1000 for value in corners):
            return InvalidBox()
        if kind == "bbox" and (corners[2] <= corners[0] or corners[3] <= corners[1]):
            return None
        image, pixels = box.get("image", 0), _flat(box.get(f"{kind}_pixels"))
        if not isinstance(image, int):
            return None
        rounded = tuple(round(value) for value in pixels) if len(pixels) == count else ()
        return BoundingBox(corners, image, str(box.get("label") or ""), rounded)
    return None


def _flat(numbers: object) -> tuple[float, ...]:
    """Flattens a list of numbers or a list of such lists; empty for anything else."""
    if not isinstance(numbers, list):
        return ()
    flat = [each for item in numbers for each in (item if isinstance(item, list) else [item])]
    return tuple(float(each) for each in flat) if all(isinstance(each, int | float) for each in flat) else ()


def _tool_call_delta(call: object) -> ToolCallDelta | None:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return None
    index, function = call.get("index") or 0, call["function"]
    return ToolCallDelta(
        int(index), str(function.get("name") or ""), str(function.get("arguments") or ""), str(call.get("id") or "")
    )
