"""The proof that the API adds to /health, computed by a stand-in."""

from __future__ import annotations

import hashlib
import hmac
import json


def proof_of(body: dict, nonce: str, token: str) -> str:
    said = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.new(token.encode(), f"{nonce}\n{said}".encode(), hashlib.sha256).hexdigest()
