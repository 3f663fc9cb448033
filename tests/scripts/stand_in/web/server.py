"""A stand-in for the page: its health route and nothing else."""

from __future__ import annotations

import http.server

import settings


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/_stcore/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    print("stand-in page starts", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", settings.load().web_port), Handler).serve_forever()
