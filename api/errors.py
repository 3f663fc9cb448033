"""All errors that a caller can receive, in OpenAI's format, and under /v1/messages in Anthropic's.

Raised anywhere above the engine. Only `api.app` turns one into a response, and the request handler into an event.
"""

from __future__ import annotations

import math
import random
from typing import Any

from api.engine.request import Failure


class ServingError(Exception):
    """`type` and `code` are stable values for programs, `message` is for people, `param` names the field."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """A refusal of the server, which many get at once, names up to twice the time: they must not come back together."""
        if self.retry_after_s is None:
            return {}
        most_s = 2 * self.retry_after_s if self.status == 503 else self.retry_after_s
        return {"Retry-After": str(random.randint(self.retry_after_s, most_s))}


# The words of Anthropic's API, which its clients know errors by.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def anthropic_body(error: ServingError) -> dict[str, Any]:
    """The error as the clients of /v1/messages read it."""
    fields = error.body()["error"]
    return {"type": "error", "error": {**fields, "type": _ANTHROPIC_TYPES.get(error.status, "api_error")}}


def error_body(error: ServingError, path: str) -> dict[str, Any]:
    """The error in the format of the path that was asked."""
    of_messages = path == "/v1/messages" or path.startswith("/v1/messages/")
    return anthropic_body(error) if of_messages else error.body()


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ServingError:
    return ServingError(400, message, "invalid_request_error", code, param)


def too_large(message: str, param: str | None = None, code: str = "too_large") -> ServingError:
    return ServingError(413, message, "invalid_request_error", code, param)


def too_slow(limit_s: float) -> ServingError:
    return ServingError(408, f"The body did not arrive within {limit_s:g} s.", "invalid_request_error", "timeout")


def unauthorized() -> ServingError:
    message = "A valid key is needed: send `Authorization: Bearer <GLM_API_KEY>`."
    return ServingError(401, message, "authentication_error", "invalid_api_key")


def unknown_route(method: str, path: str) -> ServingError:
    return ServingError(
        404, f"There is no {method} {path}; see GET /openapi.json.", "invalid_request_error", "unknown_url"
    )


def wrong_method(method: str, path: str, allowed: str) -> ServingError:
    message = f"{path} takes {allowed}. Given: {method}"
    return ServingError(405, message, "invalid_request_error", "method_not_allowed")


def unknown_model(given: str, served: str) -> ServingError:
    message = f"`model` must be {served!r}, the one that is served. Given: {given!r}"
    return ServingError(404, message, "invalid_request_error", "model_not_found", "model")


def unavailable(message: str, code: str, retry_after_s: int) -> ServingError:
    return ServingError(503, message, "server_error", code, retry_after_s=retry_after_s)


def queue_full(limit: int) -> ServingError:
    return unavailable(f"The queue is full: {limit} requests are waiting.", "queue_full", 2)


def too_many_tokens(limit: int, under_way: int, given: int) -> ServingError:
    message = f"The queue is full: <= {limit} tokens may be under way, {under_way} are. Given: {given}"
    return unavailable(message, "queue_full", 5)


def too_many_image_bytes(limit: int, given: int) -> ServingError:
    """Does not tell how many there are: from that one key could read the sizes of another's pictures."""
    message = f"The queue is full: <= {limit} bytes of images may be under way. Given: {given}"
    return unavailable(message, "queue_full", 5)


def too_many_bytes(limit: int) -> ServingError:
    return unavailable(f"Too many request bodies are arriving at once: <= {limit} bytes in total.", "queue_full", 2)


def too_many_bytes_of_key(limit: int) -> ServingError:
    message = f"The request bodies of this key that are still arriving must have <= {limit} bytes in total."
    return ServingError(429, message, "rate_limit_error", "arriving_limit_exceeded", retry_after_s=2)


def too_many_in_a_minute(limit: int, wait_s: float) -> ServingError:
    message = f"This key may send <= {limit} requests per minute."
    return ServingError(
        429, message, "rate_limit_error", "rate_limit_exceeded", retry_after_s=max(1, math.ceil(wait_s))
    )


def too_many_at_once(limit: int) -> ServingError:
    message = f"This key may have <= {limit} requests at a time, counting each of `n`."
    return ServingError(429, message, "rate_limit_error", "concurrency_limit_exceeded", retry_after_s=2)


def not_accepting(state: str, progress: float, reason: str | None) -> ServingError:
    """The error while the engine is loading, draining, stalled or dead."""
    if state == "loading" and reason:  # of an engine behind
        return unavailable(f"The model cannot be asked: {reason}", "loading", 5)
    if state == "loading":
        return unavailable(f"The model is still loading ({progress:.0%}).", "loading", 5)
    if state == "draining":
        return unavailable("The server is shutting down.", "draining", 30)
    if state == "stalled":
        return unavailable("The model makes no progress and is about to be restarted.", "stalled", 60)
    return unavailable(f"The model is not running: {reason}", "dead", 60)


def failed(kind: Failure, message: str) -> ServingError:
    """The error of a request that the engine ended without an answer."""
    if kind is Failure.ENGINE:
        return ServingError(500, message, "server_error", "engine_error")
    if kind is Failure.GRAMMAR:
        return cannot_enforce(message)
    if kind is Failure.RELOAD:
        return unavailable(message, "reload", 5)
    if kind is Failure.NONFINITE:
        return ServingError(500, message, "server_error", "nonfinite_logits")
    if kind is Failure.DEAD:
        return unavailable(message, "dead", 60)
    if kind is Failure.DEADLINE:
        return ServingError(504, message, "server_error", "deadline")
    if kind is Failure.MEMORY:
        return ServingError(413, message, "invalid_request_error", "out_of_memory")
    return unavailable(message, "draining", 30)


def cannot_enforce(reason: str, param: str | None = None) -> ServingError:
    """A schema that no grammar can enforce, or only up to here. `reason` is the grammar's own error."""
    subject = f"`{param}`" if param else "The schema of the answer"
    return invalid(f"{subject} cannot be enforced: {reason}", param, "unsupported_schema")


def internal() -> ServingError:
    return ServingError(
        500, "Internal server error; the server's log has the details.", "server_error", "internal_error"
    )
