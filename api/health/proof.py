"""The proof that an answer of /health comes from the server that holds the probe token, and was made for one question."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import Any


def sign(token: str, nonce: str, body: Mapping[str, Any]) -> str:
    """Hex HMAC-SHA256 under `token` of the nonce and `body`, which has no proof in it yet.

    The message is the nonce, a line feed, and the body as ASCII JSON with sorted keys and without spaces: any reader of
    the answer can make it again, whatever the order and spelling in which it arrived.
    """
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.new(token.encode(), f"{nonce}\n{text}".encode("ascii"), "sha256").hexdigest()
