"""The HTTP client of the API: health, info, metrics, and the start of a streamed chat request.

Owns URLs, the key, deadlines and the classification of errors: each becomes an ApiError whose `kind` the page turns
into one sentence.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import requests

from settings import Settings

CONNECT_TIMEOUT_S = 4.0
STATUS_DEADLINE_S = 3.0  # for /health, /info and /metrics, which never wait for the model
BODY_LIMIT_BYTES = 4 * 2**20
SILENCE_S = 60.0  # the API sends a heartbeat every second; longer silence means that it hangs

READY_STATES = ("idle", "busy")


class ApiError(Exception):
    """A failed request. `kind`: the key of the sentence to show; `detail`: the API's own message, if any."""

    def __init__(self, kind: str, detail: str = "", request_id: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
        self.request_id = request_id
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Download:
    """A model on its way to the API. `total_bytes`: 0 until the hub has told it; `remaining_s`: None while nothing comes."""

    hub: str
    downloaded_bytes: float
    total_bytes: float
    bytes_per_s: float
    remaining_s: float | None


@dataclass(frozen=True)
class Health:
    """The body of `/health`; `state` is "down" without a response. `progress`: of loading, 0 to 1."""

    state: str
    progress: float | None = None
    download: Download | None = None

    @property
    def ready(self) -> bool:
        return self.state in READY_STATES


@dataclass(frozen=True)
class Info:
    """The body of `/info`; an external engine may leave out any field."""

    model: str = ""
    demo: bool = False
    knows: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    context_tokens: int | None = None


class ApiClient:
    """One API by its base URL and key. Thread-safe: every call opens a session of its own."""

    def __init__(self, base_url: str, key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def of(cls, settings: Settings) -> ApiClient:
        """The page's API, by the page's settings."""
        return cls(settings.api_base_url, settings.api_key.get_secret_value() if settings.api_key else None)

    def health(self) -> Health:
        body = self.health_body()
        if "state" not in body:
            return Health("down")
        return Health(str(body["state"]), body.get("progress"), _download(body.get("download")))

    def health_body(self) -> dict[str, Any]:
        """The whole body of `/health`; empty without a response."""
        return _json_object(self._get("/health"))

    def info(self) -> Info:
        """Raises ApiError."""
        response = self._get("/info")
        if response is None:
            raise ApiError("down")
        if response.status_code != 200:
            raise error_of_response(response)
        body = _json_object(response)
        return Info(
            model=str(body.get("model") or ""),
            demo=bool(body.get("demo")),
            knows=body.get("knows") or {},
            limits=body.get("limits") or {},
            generation=body.get("generation") or {},
            context_tokens=body.get("context_tokens"),
        )

    def info_body(self) -> dict[str, Any]:
        """The whole body of `/info`; empty without a response."""
        return _json_object(self._get("/info"))

    def replica_health(self, number: int) -> dict[str, Any]:
        """The whole body of `/health` of one of several replicas; empty without a response."""
        return _json_object(self._get(f"/replicas/{number}/health"))

    def metrics_text(self, replica: int | None = None) -> str:
        """The text of `/metrics`, or of that of one of several replicas; empty without a response."""
        response = self._get("/metrics" if replica is None else f"/replicas/{replica}/metrics")
        return response.text if response is not None and response.status_code == 200 else ""

    def models_status(self) -> int:
        """The status of `/v1/models`, the cheapest route that requires the key; 0 without a response."""
        response = self._get("/v1/models")
        return 0 if response is None else response.status_code

    def post_stream(self, body: dict[str, Any], session: str = "") -> requests.Response:
        """Send one streamed chat request; returns once the headers have arrived, whatever the status.

        `session`: the name of the conversation, so that all of it reaches the replica that has its images in its caches.
        The caller closes the response. Raises requests.RequestException.
        """
        return self._session().post(
            f"{self.base_url}/v1/chat/completions",
            json=body,
            stream=True,
            timeout=(CONNECT_TIMEOUT_S, SILENCE_S),
            headers={"Accept": "text/event-stream", "Accept-Encoding": "identity", **({"x-session-id": session} if session else {})},
        )

    def _get(self, path: str) -> requests.Response | None:
        """A complete response, None if there is none by the deadline."""
        timeouts = (CONNECT_TIMEOUT_S, STATUS_DEADLINE_S)
        try:
            response = self._session().get(f"{self.base_url}{path}", timeout=timeouts, stream=True)
            # The read timeout starts again with every byte, so a server that trickles needs a deadline besides.
            deadline = threading.Timer(STATUS_DEADLINE_S, shut_down, [response])
            deadline.start()
            try:
                read_bounded(response)
            finally:
                deadline.cancel()
        except (requests.RequestException, TooLong):
            return None
        return response

    def _session(self) -> requests.Session:
        session = requests.Session()
        # Rented machines often set HTTP_PROXY for downloads; calls to this machine must not go through it.
        session.trust_env = False
        session.headers.update(self._headers)
        return session


class TooLong(Exception):
    """The API sends more than any of its answers has."""


def read_bounded(response: requests.Response) -> None:
    """Read the body into the response. Raises TooLong above BODY_LIMIT_BYTES, RequestException as `content` does."""
    parts, size = [], 0
    for part in response.iter_content(65536):
        parts.append(part)
        size += len(part)
        if size > BODY_LIMIT_BYTES:
            response.close()
            raise TooLong(f"the body has more than {BODY_LIMIT_BYTES} bytes")
    response._content = b"".join(parts)


def shut_down(response: requests.Response) -> None:
    """End a blocked read of the response, from any thread."""
    # It may have been read to its end, or closed by the other side, at this moment.
    with suppress(ValueError, RuntimeError, OSError, AttributeError):
        response.raw.shutdown()


def error_of_response(response: requests.Response) -> ApiError:
    """The ApiError for a response with an error status. Reads its body."""
    try:
        read_bounded(response)
        error = _json_object(response).get("error")
    except (requests.RequestException, TooLong):
        error = None
    headers = response.headers
    return classify_error(
        response.status_code,
        error if isinstance(error, dict) else {},
        headers.get("x-request-id", ""),
        _seconds(headers.get("Retry-After")),
    )


def classify_error(
    status: int, error: dict[str, Any], request_id: str = "", retry_after_s: float | None = None
) -> ApiError:
    """The ApiError for an HTTP status (0: an event inside a stream) and the API's error object."""
    detail = str(error.get("message") or "")
    return ApiError(_kind(status, str(error.get("code") or ""), detail), detail, request_id, retry_after_s)


def _kind(status: int, code: str, message: str) -> str:
    if status in (401, 403):
        return "bad_key"
    if status in (408, 504) or code == "deadline":
        return "too_slow"
    if status == 413:
        return "too_large"
    if status in (400, 404, 422):
        return "too_long" if "context" in f"{code} {message}" else "refused"
    if status == 429:
        return "key_limit"
    if code in ("queue_full", "loading", "draining"):
        return code
    return "unavailable" if status == 503 or code == "dead" else "broken"


def _json_object(response: requests.Response | None) -> dict[str, Any]:
    """Empty for anything but a JSON object."""
    try:
        body = response.json() if response is not None else {}
    except (ValueError, RecursionError, requests.RequestException):
        return {}
    return body if isinstance(body, dict) else {}


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _download(body: Any) -> Download | None:
    if not isinstance(body, dict):
        return None
    here, total, rate, left = (
        _number(body.get(name)) for name in ("downloaded_bytes", "total_bytes", "bytes_per_s", "remaining_s")
    )
    return Download(str(body.get("hub") or "")[:200], here or 0.0, total or 0.0, rate or 0.0, left)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None
