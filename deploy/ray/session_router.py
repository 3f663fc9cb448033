"""Which replica a request goes to: the one that its session's earlier requests went to.

Ray Serve's own consistent hashing, by a key that may come in either of two headers. It runs in every proxy, and all of them agree.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

SESSION_HEADERS = (b"x-session-id", b"x-glm-cache-key")  # the first of them that a request has


class SessionRouter(ConsistentHashRouter):
    """A full replica leaves its sessions to the next one on the ring. Requests without a session go anywhere."""

    def _routing_key(self, pending_request: Any) -> str | None:
        session = session_of(pending_request.args) if pending_request is not None else None
        return session or super()._routing_key(pending_request)


def session_of(arguments: Sequence[Any]) -> str | None:
    """The session of a request, from what a proxy sends to a replica: its ASGI scope, pickled."""
    for argument in arguments:
        request = pickle.loads(argument) if isinstance(argument, bytes) else argument
        headers = dict(getattr(request, "asgi_scope", {}).get("headers", ()))
        for name in SESSION_HEADERS:
            if value := headers.get(name):
                return str(value.decode("latin-1"))
    return None
