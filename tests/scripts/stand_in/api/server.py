"""A stand-in for the API with faults on demand.

STAND_IN_API: empty (answers), die, loading, dead, deaf (opens no port), stubborn (ignores SIGTERM), parent (has a child).
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


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        state, status = STATES.get(MODE, ("idle", 200))
        body = json.dumps({"state": state, "progress": 0.4, "reason": "the engine thread ended"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    print("stand-in API starts", flush=True)
    if MODE == "die":
        sys.exit("there is no such model: nowhere/at-all")
    if MODE == "deaf":
        time.sleep(600)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "parent":
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", settings.load().api_port), Handler).serve_forever()
