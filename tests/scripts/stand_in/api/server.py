"""A stand-in for the API with faults on demand.

STAND_IN_API: empty (answers), die, loading, download (for STAND_IN_LOAD_S, then it answers), dead, deaf (opens no port), stubborn (ignores SIGTERM), parent (has a child),
leaving (ends 7 s after SIGTERM).
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import time

import settings

MODE = os.environ.get("STAND_IN_API", "")
STATES = {"loading": ("loading", 503), "dead": ("dead", 503)}
BEGAN, LOAD_S = time.monotonic(), float(os.environ.get("STAND_IN_LOAD_S", "0"))
RATE = 45_200_000
LEAVE_S = 7.0  # more than a stop without a delay may take


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        mode = MODE
        health = {"progress": 0.4, "reason": "the engine thread ended."}
        if mode == "download" and time.monotonic() - BEGAN < LOAD_S:
            mode, here = "loading", int(RATE * (time.monotonic() - BEGAN))
            total = int(RATE * LOAD_S)
            health["download"] = {
                "hub": "ModelScope (modelscope.cn)", "file": "model.safetensors", "downloaded_bytes": here, "total_bytes": total,
                "bytes_per_s": RATE, "remaining_s": (total - here) / RATE, "trouble": "Hugging Face (huggingface.co) cannot be reached",
            }  # fmt: skip
        state, status = STATES.get(mode, ("idle", 200))
        body = json.dumps({"state": state, **health}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def leave(*_: object) -> None:
    time.sleep(LEAVE_S)
    print("left by itself", flush=True)
    os._exit(0)


if __name__ == "__main__":
    print("stand-in API starts", flush=True)
    if MODE == "die":
        sys.exit("there is no such model: nowhere/at-all")
    if MODE == "deaf":
        time.sleep(600)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "leaving":
        signal.signal(signal.SIGTERM, leave)
    if MODE == "parent":
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", settings.load().api_port), Handler).serve_forever()
