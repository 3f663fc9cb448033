"""A real nginx with the configuration that `deploy/proxy.py` writes."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any, Self

from ports import free_port

from deploy.proxy import Proxy, render
from settings import Settings

# What a distribution's nginx.conf has around the files in conf.d.
AROUND = """
worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/around.log;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/glm.conf;
}}
"""


def self_signed(folder: Path) -> dict[str, str]:
    """Options of Proxy: a certificate of 127.0.0.1 and its key."""
    files = {"certificate": str(folder / "chain.pem"), "certificate_key": str(folder / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", files["certificate_key"], "-out", files["certificate"]]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return files


def check(conf: Path) -> subprocess.CompletedProcess[str]:
    """`nginx -t` on a whole configuration."""
    command = [which("nginx") or "/usr/sbin/nginx", "-t", "-c", str(conf), "-p", str(conf.parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def written(folder: Path, proxy: Proxy, settings: Settings) -> Path:
    """The whole configuration, in a folder for its logs."""
    placed = replace(proxy, log=str(folder / "access.log"), error_log=str(folder / "error.log"))
    (folder / "glm.conf").write_text(render(placed, settings), encoding="utf-8")
    conf = folder / "nginx.conf"
    conf.write_text(AROUND.format(folder=folder), encoding="utf-8")
    return conf


class Nginx:
    """Use as a context manager; `proxy` need not say where to listen and where to log."""

    def __init__(self, folder: Path, proxy: Proxy, settings: Settings) -> None:
        self.folder = folder
        tls = bool(proxy.certificate)
        self.port, self.plain_port = free_port(), free_port()
        listening = {"listen": f"127.0.0.1:{self.plain_port if tls else self.port}", "listen_tls": f"127.0.0.1:{self.port}"}
        self.conf = written(folder, replace(proxy, **listening), settings)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        nginx = which("nginx") or "/usr/sbin/nginx"
        self.process = subprocess.Popen([nginx, "-c", str(self.conf), "-p", str(self.folder), "-g", "daemon off;"])
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "around.log").read_text()
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def logged(self) -> list[dict[str, Any]]:
        """The lines of the access log."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text(encoding="utf-8").splitlines()]

    def all_logs(self) -> str:
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.folder.glob("*.log"))
