"""One answer as it arrives: read in a thread, handed over as typed events.

Owns the reading thread, waiting while the model loads, and closing the connection at once. What the lines mean is
in events.py. Knows nothing of Streamlit. The reader runs beside the page's thread because a blocked read cannot be stopped: the page asks for
what has come, gets an answer within `wait_s` even if nothing came, and so notices Stop in that time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

import requests

from web.api_client.client import ApiClient, ApiError, failure
from web.api_client.events import Event, EventReader, Loading

LOADING_PATIENCE_S = 900.0  # a 9B model on a slow disk; then the page says that it gave up
LOADING_RETRY_S = 2.0  # ask again at least this often, so that the waiting line stays true


class AnswerStream:
    """Use as a context manager; leaving it closes the connection, which makes the API abort the request."""

    def __init__(self, client: ApiClient, body: dict[str, Any]) -> None:
        self._client = client
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._arrived: queue.SimpleQueue[Event | ApiError | None] = queue.SimpleQueue()
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
        """Idempotent, from any thread. Wakes a blocked read."""
        self._closed.set()
        with self._lock:
            if self._response is not None:
                _hang_up(self._response)

    def batches(self, wait_s: float = 0.2, gather_s: float = 0.08) -> Iterator[list[Event]]:
        """What has arrived, in order. A list is empty when nothing came for `wait_s`. Raises ApiError."""
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
            self._arrived.put(error)
        except Exception as error:  # the page must hear of everything, or it would wait for ever
            self._arrived.put(ApiError("broken", type(error).__name__))
        finally:
            self._arrived.put(None)

    def _open(self) -> requests.Response | None:
        """The response to read, or None if the page hung up meanwhile."""
        give_up = time.monotonic() + LOADING_PATIENCE_S
        while not self._closed.is_set():
            try:
                response = self._client.post_stream(self._body)
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
            error = failure(response)
            response.close()
            if error.kind != "loading" or time.monotonic() > give_up:
                raise error
            self._arrived.put(Loading(self._client.health().progress))
            self._closed.wait(min(error.retry_after_s or LOADING_RETRY_S, LOADING_RETRY_S))
        return None

    def _read(self, response: requests.Response) -> None:
        request_id = response.headers.get("x-request-id", "")
        reader = EventReader(request_id)
        rest = b""
        try:
            while not self._closed.is_set() and not reader.done:
                received = response.raw.read1(65536)
                if not received:
                    break
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    for event in reader.read(line.decode("utf-8", "replace").rstrip("\r")):
                        self._arrived.put(event)
        except ApiError:
            raise
        except Exception as error:  # urllib3, http.client and ssl each say "gone" in their own way
            if not self._closed.is_set():
                kind = "silent" if "timed out" in str(error).lower() else "lost"
                raise ApiError(kind, request_id=request_id) from None
        finally:
            response.close()
        if not reader.done and not self._closed.is_set():
            raise ApiError("lost", request_id=request_id)


def _hang_up(response: requests.Response) -> None:
    # It may have been read to its end, or closed by the other side, in this very moment.
    with suppress(ValueError, RuntimeError, OSError, AttributeError):
        response.raw.shutdown()
