"""The page's memory over conversations with an image in every turn, in a real browser.

    python -m bench.page_memory [--chats 10] [--turns 20]

Each conversation is one visitor of the real web process in Chromium, who then leaves; a stand-in for the API answers at
once. Images are 640x480 JPEGs of noise, the worst case for their size. Prints the resident memory of the web process
after each conversation. Exit code 1 if the second half of the conversations added more than the limit.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from shutil import which
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from bench import servers

LIMIT_MIB = 30.0
TIMEOUT_MS = 60_000
SETTLE_MS = 500
LIMITS = {"max_images": 64, "max_image_bytes": 2**21, "max_image_pixels": 4_000_000, "default_max_tokens": 256}
CHUNKS: tuple[dict[str, Any], ...] = (
    {"choices": [{"index": 0, "delta": {"content": "It is noise."}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
)
STREAM = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"


class Api(BaseHTTPRequestHandler):
    """A stand-in for the API that answers the page at once."""

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


def noise_jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (640, 480), Random(seed).randbytes(640 * 480 * 3)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def talk(browser: Browser, url: str, number: int, turns: int) -> None:
    """One visitor from the empty page to the last answer."""
    visitor = browser.new_context(locale="en-US")
    page = visitor.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    for turn in range(turns):
        _ask(page, f"{number}-{turn}.jpg", noise_jpeg(1000 * number + turn), f"Question {turn}")
        expect(page.get_by_text("It is noise.")).to_have_count(turn + 1, timeout=TIMEOUT_MS)
        expect(page.get_by_role("button", name="Answer again")).to_be_enabled(timeout=TIMEOUT_MS)
        page.wait_for_timeout(SETTLE_MS)  # the page is redrawn; a person is slower
    visitor.close()


def _ask(page: Page, name: str, image: bytes, question: str) -> None:
    box = page.get_by_test_id("stChatInput")
    box.locator("input[type=file]").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": image})
    expect(box.get_by_text(name)).to_be_visible(timeout=TIMEOUT_MS)
    page.get_by_test_id("stChatInputTextArea").fill(question)
    send = page.get_by_test_id("stChatInputSubmitButton")
    expect(send).to_be_enabled(timeout=TIMEOUT_MS)
    send.click()


def measure(web: servers.Server, browser: Browser, chats: int, turns: int) -> list[float]:
    """MiB before the first conversation and after each."""
    levels = [(web.resident_bytes() or 0) / 2**20]
    for number in range(chats):
        talk(browser, f"{web.address.url}/?token={servers.PAGE_TOKEN}", number, turns)
        levels.append((web.resident_bytes() or 0) / 2**20)
        print(f"after {number + 1:2d} of {chats} conversations of {turns} turns: {levels[-1]:.0f} MiB", flush=True)
    return levels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := which(name))), None)
    if chromium is None:
        parser.error("no Chromium on PATH (Debian: apt install chromium)")
    api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    with servers.page(f"http://127.0.0.1:{api.server_address[1]}") as web, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        levels = measure(web, browser, given.chats, given.turns)
        browser.close()
    api.shutdown()
    grown = levels[-1] - levels[len(levels) // 2]
    print(f"before: {levels[0]:.0f} MiB; the second half added {grown:.1f} MiB (limit {LIMIT_MIB:g})")
    return 0 if grown <= LIMIT_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
