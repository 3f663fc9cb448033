"""How much memory the page takes: conversations with a picture in every turn, through the page's own script.

    python -m bench.page_memory [--chats 10] [--turns 20]

Each conversation is one visitor in a session of its own, driven by Streamlit's AppTest against a small API that
answers at once; pictures are 640x480 photographs of noise, the worst to keep. Prints the process's memory after each
conversation. Exit code 1 if the second half of the conversations added more than the limit.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import os
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

APP = Path(__file__).resolve().parents[1] / "web" / "app.py"
LIMIT_MIB = 30.0
LIMITS = {"max_images": 64, "max_image_bytes": 2**21, "max_image_pixels": 4_000_000, "default_max_tokens": 256}
CHUNKS: tuple[dict[str, Any], ...] = (
    {"choices": [{"index": 0, "delta": {"content": "It is noise."}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
)
STREAM = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"


class Api(BaseHTTPRequestHandler):
    """Says what the page needs to hear, in no time."""

    def do_GET(self) -> None:
        body = {"state": "idle"} if self.path == "/health" else {"model": "none", "limits": LIMITS, "context_tokens": 8192}
        self._send(json.dumps(body).encode(), "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(STREAM.encode(), "text/event-stream")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def photograph(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (640, 480), Random(seed).randbytes(640 * 480 * 3)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def memory_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def talk(number: int, turns: int) -> None:
    """One conversation from the empty page to its last answer."""
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_file(str(APP), default_timeout=120).run()
    for turn in range(turns):
        page.chat_input[0].upload(f"{number}-{turn}.jpg", photograph(1000 * number + turn), "image/jpeg")
        page.chat_input[0].set_value(f"Question {turn}").run()
        assert not page.exception, page.exception
    answers = sum("It is noise." in str(part.value) for part in page.markdown)
    assert answers == turns, f"{answers} of {turns} questions were answered"


def measure(chats: int, turns: int) -> list[float]:
    """MiB before the first conversation and after each."""
    found = [memory_mib()]
    for number in range(chats):
        talk(number, turns)
        gc.collect()
        found.append(memory_mib())
        print(f"after {number + 1:2d} of {chats} conversations of {turns} turns: {found[-1]:.0f} MiB", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--turns", type=int, default=20)
    wanted = parser.parse_args()
    logging.disable(logging.WARNING)  # Streamlit says at each run that it is not its server
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GLM_API_URL": f"http://127.0.0.1:{server.server_address[1]}", "GLM_LOG_DIR": folder}
        found = measure(wanted.chats, wanted.turns)
    server.shutdown()
    grown = found[-1] - found[len(found) // 2]
    print(f"the second half added {grown:.1f} MiB (limit {LIMIT_MIB:g})")
    return 0 if grown <= LIMIT_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
