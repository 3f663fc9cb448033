"""The WebSocket handshake, as a browser makes it: a page whose health route answers may still be unable to connect."""

from __future__ import annotations

import base64
import hashlib
import os
import time

from monitor.judge.evidence import Exchange
from monitor.observe.exchange import Deadline, Wire, failure, opened, since

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


def handshake(url: str, limit_s: float) -> Exchange:
    """`url` starts with http(s). Good means status 101 and the right proof."""
    key = base64.b64encode(os.urandom(16))
    proof = base64.b64encode(hashlib.sha1(key + MAGIC).digest()).decode()
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key.decode(),
        "Sec-WebSocket-Protocol": "streamlit",
    }
    wire = Wire()
    late = Exchange("silent", limit_s, detail=f"no handshake within {limit_s:.1f} s")

    def talk() -> Exchange:
        started = time.monotonic()
        try:
            with opened(wire, url, limit_s, headers=headers) as reply:
                if reply.status != 101:
                    return Exchange("answered", since(started), reply.status, f"HTTP {reply.status} instead of 101")
                if reply.headers.get("Sec-WebSocket-Accept") != proof:
                    return Exchange("failed", since(started), 101, "the handshake's proof is wrong")
                return Exchange("answered", since(started), 101)
        except Exception as error:
            broken = failure(error, started, limit_s)
            return Exchange(broken.outcome, broken.seconds, detail=broken.detail)

    return Deadline(talk, limit_s, late, wire.close).result()
