"""Which replica a request goes to: the one that its session's earlier requests went to.

Ray Serve's own consistent hashing, by a key that is looked for in two headers. Runs in each proxy, all of which agree.
"""

from __future__ import annotations

import pickle
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

SESSION_HEADERS = (b"x-session-id", b"x-glm-cache-key")  # the first that a request has
