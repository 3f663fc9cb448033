"""python -m bench.proxy_gaps: the time between streamed tokens with nginx in front of the API and without it, side by side.

Each round asks the same questions directly and then through nginx, which has the configuration of deploy/proxy.py. The
demo model's answers all have the same length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from urllib.parse import urlsplit

from bench import servers
from bench.report import percentile
from bench.serve import machine
from deploy.proxy import Proxy, render
from settings import Settings

AROUND = """pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes auto;
events {{ worker_connections 1024; }}
http {{ client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; include {folder}/glm.conf; }}
"""


@contextmanager
def nginx(api_port: int) -> Iterator[int]:
    """The port of an nginx in front of the API."""
    with tempfile.TemporaryDirectory(prefix="glm-bench-") as name:
        folder, port = Path(name), servers._free_port()
        places = {"log": f"{folder}/access.log", "error_log": f"{folder}/glm.error.log"}
        proxy = Proxy(api=f"127.0.0.1:{api_port}", listen=f"127.0.0.1:{port}", **places)
        (folder / "glm.conf").write_text(render(proxy, Settings()), encoding="utf-8")
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder), encoding="utf-8")
        process = subprocess.Popen([which("nginx") or "/usr/sbin/nginx", "-c", f"{folder}/nginx.conf", "-g", "daemon off;"])
        try:
            time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait()


async def stream(port: int, key: str, tokens: int, seed: int) -> list[float]:
    """Seconds: first the time to the first event with text, then the gaps between events."""
    body = json.dumps({
        "messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": tokens, "ignore_eos": True, "seed": seed,
        "temperature": 1, "stream": True,
    }).encode()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started, times = time.monotonic(), []
    writer.write(head.encode() + body)
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            break
        if b'"delta":' in line and b'"role"' not in line:
            times.append(time.monotonic())
    writer.close()
    return [later - earlier for earlier, later in zip([started, *times], times, strict=False)]


async def measure(port: int, key: str, users: int, tokens: int) -> list[list[float]]:
    return await asyncio.gather(*(stream(port, key, tokens, seed) for seed in range(users)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.proxy_gaps", description=__doc__.splitlines()[0])
    parser.add_argument("--users", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=100)
    given = parser.parse_args(arguments)
    print(f"{machine()}; {given.rounds} rounds of each, in turn; {given.tokens} tokens a stream\n")
    print("| streams | | first token p50 | gap p50 | gap p95 | gap p99 | longest gap |\n|---|---|---|---|---|---|---|")
    demo = servers.ROOT / "models" / "shapes"
    with servers.this(demo, "float32", "cpu", GLM_SLOTS=str(max(given.users))) as server:
        api_port, key = urlsplit(server.address.url).port or 0, server.address.key
        with nginx(api_port) as front_port:
            ports = {"directly": api_port, "through nginx": front_port}
            asyncio.run(measure(front_port, key, max(given.users), 20))  # not measured: it pays for set-up
            for users in given.users:
                found: dict[str, list[list[float]]] = {name: [] for name in ports}
                for number in range(given.rounds):
                    for name in sorted(ports, reverse=bool(number % 2)):
                        found[name] += asyncio.run(measure(ports[name], key, users, given.tokens))
                for name, streams in found.items():
                    gaps = [gap for one in streams for gap in one[1:]]
                    shown = [statistics.median(one[0] for one in streams), *(percentile(gaps, p) or 0 for p in (0.5, 0.95, 0.99)), max(gaps)]
                    print(f"| {users} | {name} | " + " | ".join(f"{1000 * value:.1f} ms" for value in shown) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
