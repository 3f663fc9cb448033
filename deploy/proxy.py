"""`python -m deploy.proxy`: writes the configuration of nginx for the API and the page, with the limits of the settings.

The template is `deploy/nginx/glm.conf`. `render_front` writes that of the nginx which start.sh runs in front of several replicas,
from `deploy/nginx/front.conf`. What nginx refuses itself has the words and the format of the API's errors. Only
the standard library is imported until the settings are read.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import os
import pwd
import re
import resource
import shlex
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from settings import Settings

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "deploy" / "nginx"
RETRY_S = 5  # while nothing answers behind nginx
FLOOD = 10  # times the rate of a key; the API counts exactly, and nginx only ends what goes far beyond it
KEEPALIVE_S = 15  # the API closes idle connections after 20
READ_MARGIN_S = 30.0  # the API ends a request itself before nginx does
FORM_BYTES = 2**20  # around the file of an upload
MESSAGES = "/v1/messages(/|$)"
MESSAGES_LINE = "[A-Z]+ /v1/messages[/? ]"  # of a request line
IPV6 = Path("/proc/net/if_inet6")  # missing where the kernel has no IPv6, and then nginx could not open such a socket
MOST_FILES = 16_384  # that one process of nginx in front of replicas has open
LONGEST_TEXT_BYTES = 4000  # of one parameter in nginx's configuration

# The words that the clients of /v1/messages know errors by; the others are the same as in OpenAI's format.
ANTHROPIC_TYPES = {
    400: "invalid_request_error", 403: "permission_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "invalid_request_error", 413: "request_too_large", 414: "invalid_request_error", 429: "rate_limit_error",
    500: "api_error", 501: "invalid_request_error", 503: "overloaded_error", 504: "timeout_error", 505: "invalid_request_error",
}  # fmt: skip


class ProxyError(ValueError):
    """An option that nginx could not use; the message names it, what is allowed and what was given."""


@dataclass(frozen=True)
class Proxy:
    """Where nginx listens and what it reaches. Addresses are as nginx takes them: `80`, `127.0.0.1:80`, `glm:8080`."""

    api: str = ""
    page: str = ""
    page_path: str = "/"
    listen: str = "80"
    listen_tls: str = "443"
    certificate: str = ""
    certificate_key: str = ""
    name: str = "_"
    ipv6: bool = field(default_factory=IPV6.exists)
    allow: tuple[str, ...] = ()
    inside: tuple[str, ...] = ("127.0.0.1", "::1")
    log: str = "/var/log/nginx/glm.access.log"
    error_log: str = "/var/log/nginx/glm.error.log"
    command: str = field(default="python -m deploy.proxy", compare=False)


def render(proxy: Proxy, settings: Settings) -> str:
    """The text of the configuration, for `include` inside of `http`. Raises ProxyError."""
    _check(proxy)
    values = {
        "command": proxy.command,
        "api": proxy.api or f"127.0.0.1:{settings.api_port}",
        "keepalive_s": KEEPALIVE_S,
        "limit_zones": _limit_zones(settings),
        "limits": _limits(settings),
        "inside": "\n".join(f"    {network} 1;" for network in proxy.inside),
        "redirect": _redirect(proxy, settings),
        "listen": _listen(proxy),
        "name": proxy.name,
        "log": f"{_quoted(proxy.log)} glm_ecs" if proxy.log != "off" else "off",
        "error_log": _quoted(proxy.error_log),
        "allow": "".join(f"    allow {network};\n" for network in proxy.allow) + ("    deny all;\n" if proxy.allow else ""),
        "body_bytes": settings.max_body_bytes,
        "read_s": math.ceil(settings.request_timeout_s + READ_MARGIN_S),
        "page": _page(proxy, settings),
        "error_bodies": _error_bodies(settings),
        "error_pages": _error_pages(_refusals(settings)),
        "error_locations": _error_locations(_refusals(settings)),
        "retry_s": RETRY_S,
        "waiting": _text((FILES / "waiting.html").read_text(encoding="utf-8").strip(), "deploy/nginx/waiting.html"),
        "image_bytes": settings.max_image_bytes,
    }
    template = (FILES / "glm.conf").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: str(values[found[1]]), template)


def render_front(settings: Settings, out: Collection[int] = ()) -> str:
    """The whole configuration of the nginx in front of the replicas. `out`: the numbers of those that get no requests.

    Raises ProxyError for a log folder that nginx could not name.
    """
    folder = str(settings.log_dir)
    if re.search(r"[\s;{}'\"\\$]", folder):
        raise ProxyError(f"GLM_LOG_DIR must have no spaces, quotes, braces, `;`, `\\` or `$` with several replicas. Given: {folder}")
    count = settings.replica_count
    addresses = [f"127.0.0.1:{settings.replica_port(number)}" for number in range(count)]
    # Not as `nobody`, which may not enter the log folder, and whose rights the API does not have either.
    user = f"user {pwd.getpwuid(0).pw_name};\n" if os.geteuid() == 0 else ""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    each = f"/replicas/{{0..{count - 1}}}"
    refused = [
        _json({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "unknown_url"}})[1:-1]
        for message in (f"Each of the {count} replicas counts for itself: GET {each}/metrics.", "Each replica takes this at its own port only.")
    ]
    host = settings.api_host or "0.0.0.0"
    values = {
        "user": user, "workers": max(1, min(4, os.cpu_count() or 1)), "files": files, "connections": max(64, min(4096, files // 2)),
        "folder": folder, "keepalive_s": KEEPALIVE_S, "count": count,
        "replicas": "\n".join(
            f"        server {address} max_fails=0{' down' if number in out else ''};" for number, address in enumerate(addresses)
        ),
        "limit_zones": _limit_zones(settings),
        "limits": _limits(settings),
        "listen": f"{f'[{host}]' if ':' in host else host}:{settings.api_port}",
        "body_bytes": settings.max_body_bytes,
        "read_s": math.ceil(settings.request_timeout_s + READ_MARGIN_S),
        "error_bodies": _error_bodies(settings),
        "error_pages": _error_pages(_refusals(settings)),
        "error_locations": _error_locations(_refusals(settings)),
        "metrics": refused[0], "control": refused[1],
        "places": "\n".join(
            f"        location ~ ^/replicas/{number}/(health|livez|readyz|info|metrics)$ {{\n"
            f"            proxy_pass http://{address}/$1$is_args$args;\n        }}"
            for number, address in enumerate(addresses)
        ),
    }  # fmt: skip
    template = (FILES / "front.conf").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: str(values[found[1]]), template)


def _check(proxy: Proxy) -> None:
    for option, value in vars(proxy).items():
        for text in value if isinstance(value, tuple) else (str(value),):
            if option != "command" and re.search(r"[\s;{}'\"\\$]", text):
                raise ProxyError(f"--{option.replace('_', '-')} must have no spaces, quotes, braces, `;`, `\\` or `$`. Given: {text}")
    for option in ("allow", "inside"):
        for network in getattr(proxy, option):
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ProxyError(f"--{option} must be an address or a network like 10.0.0.0/8. Given: {network} ({error})") from None
    if not (proxy.page_path.startswith("/") and proxy.page_path.endswith("/")):
        raise ProxyError(f"--page-path must begin and end with a slash. Given: {proxy.page_path}")
    if bool(proxy.certificate) != bool(proxy.certificate_key):
        raise ProxyError("--certificate and --certificate-key must be given together")


def _limit_zones(settings: Settings) -> str:
    """For floods only: the API counts a key's requests itself, those that it refuses left out."""
    if not settings.key_requests_per_minute:
        return ""
    return f"limit_req_zone $glm_counted zone=glm_rate:10m rate={FLOOD * settings.key_requests_per_minute}r/m;\n"


def _limits(settings: Settings) -> str:
    if not settings.key_requests_per_minute:
        return ""
    burst = FLOOD * settings.key_requests_per_minute
    return f"        limit_req zone=glm_rate burst={burst} nodelay;\n        limit_req_status 429;\n"


def _sockets(proxy: Proxy, address: str, more: str = "") -> str:
    """The default server, unless it has a name: another file of nginx may have one for all names, and would win."""
    default = " default_server" if proxy.name == "_" else ""
    addresses = [address, f"[::]:{address}"] if address.isdigit() and proxy.ipv6 else [address]
    return "\n".join(f"    listen {each}{default}{more};" for each in addresses)


def _listen(proxy: Proxy) -> str:
    if not proxy.certificate:
        return _sockets(proxy, proxy.listen)
    return (
        f"{_sockets(proxy, proxy.listen_tls, ' ssl http2')}\n"
        f"    ssl_certificate {_quoted(proxy.certificate)};\n"
        f"    ssl_certificate_key {_quoted(proxy.certificate_key)};\n"
        "    ssl_protocols TLSv1.2 TLSv1.3;\n"
        "    ssl_session_cache shared:glm_tls:2m;\n"
        "    add_header Strict-Transport-Security max-age=31536000 always;"
    )


def _redirect(proxy: Proxy, settings: Settings) -> str:
    if not proxy.certificate:
        return ""
    port = proxy.listen_tls.rpartition(":")[2]
    suffix = "" if port == "443" else f":{port}"
    unread = [refusal for refusal in _refusals(settings) if refusal.unread]
    return (
        "\nserver {\n"
        f"{_sockets(proxy, proxy.listen)}\n"
        f"    server_name {proxy.name};\n"
        "    server_tokens off;\n"
        "    access_log off;\n"
        f"    error_log {_quoted(proxy.error_log)} emerg;\n"
        "    default_type application/json;\n"
        f"{_error_pages(unread)}\n\n"
        f"    location / {{\n        return 308 https://$host{suffix}$request_uri;\n    }}\n\n"
        f"{_error_locations(unread)}}}\n"
    )


def _page(proxy: Proxy, settings: Settings) -> str:
    """The page's locations; with a path of its own, what is neither its nor the API's is unknown."""
    path, target = proxy.page_path, proxy.page or f"127.0.0.1:{settings.web_port}"
    uri = "" if path == "/" else "/"  # a slash strips the prefix
    upload = -(-settings.max_image_bytes // 2**20) * 2**20 + FORM_BYTES
    proxied = f"""
        proxy_pass http://{target}{uri};
        proxy_set_header Host $glm_host;     # with the port: Streamlit compares it with the page's origin
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $glm_connection;
        proxy_set_header X-Real-IP $remote_addr;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-GLM-Console $glm_console;
        proxy_read_timeout 1h;               # a WebSocket is silent between questions
        client_max_body_size {upload};
        error_page 404 = @glm_page_closed;
        error_page 413 = @glm_page_too_large;
        error_page 502 503 504 = @glm_waiting;
    }}
"""
    closed = "        if ($glm_inside = 0) {\n            return 404;\n        }"
    console = proxied.replace(f"{target}{uri};", f"{target}{uri}{'console' if uri else ''};")
    text = (
        f"    location {path} {{{proxied}\n"
        f"    # By its own address, which is only one of the ways to it.\n    location ^~ {path}console {{\n{closed}{console}\n"
        f"    location ^~ {path}_stcore/metrics {{\n        return 404;\n    }}\n"
    )
    if path == "/":
        return text
    root = "    location / {\n        return 404;\n    }\n"
    return f"    location = {path[:-1]} {{\n        return 308 {path}$is_args$args;\n    }}\n\n{text}\n{root}"


@dataclass(frozen=True)
class Refusal:
    """What nginx answers by itself; `on` are the statuses of nginx that become this one.

    `unread`: nginx may answer so before it has a path, and takes no request without one to a named location.
    """

    status: int
    type: str
    code: str
    message: str
    on: tuple[int, ...] = ()
    retry_s: int | None = None
    unread: bool = False

    @property
    def location(self) -> str:
        return f"/glm-refused/{self.status}" if self.unread else f"@glm_{self.status}"

    def openai(self) -> str:
        return _json({"error": self._fields(self.type)})

    def anthropic(self) -> str:
        return _json({"type": "error", "error": self._fields(ANTHROPIC_TYPES[self.status])})

    def _fields(self, type: str) -> dict[str, str | None]:
        return {"message": self.message, "type": type, "param": None, "code": self.code}


def _refusals(settings: Settings) -> list[Refusal]:
    invalid, ours = "invalid_request_error", "server_error"
    rate, limit = settings.key_requests_per_minute, settings.max_body_bytes
    wait_s = max(1, math.ceil(60 / rate)) if rate else RETRY_S
    return [
        Refusal(400, invalid, "bad_request", "The request is not valid HTTP.", (400, 497), unread=True),
        Refusal(403, "permission_error", "address_not_allowed", "This address may not use the service."),
        Refusal(404, invalid, "unknown_url", "There is no such path here; see GET /openapi.json."),
        Refusal(405, invalid, "method_not_allowed", "This path does not take the method that was given.", unread=True),
        Refusal(408, invalid, "timeout", "The request did not arrive in time."),
        Refusal(413, invalid, "body_too_large", f"The body must be <= {limit} bytes. Given: more"),
        Refusal(414, invalid, "headers_too_large", "The request line and each header must be <= 8192 bytes. Given: more", (414, 494), unread=True),
        Refusal(429, "rate_limit_error", "rate_limit_exceeded", f"This key may send <= {rate} requests per minute.", retry_s=wait_s),
        Refusal(500, ours, "internal_error", "Internal error of the proxy."),
        Refusal(501, invalid, "bad_request", "`Transfer-Encoding` must be chunked, or not be given.", unread=True),
        Refusal(503, ours, "not_running", "The server is starting or restarting and does not answer yet.", (502, 503), RETRY_S),
        Refusal(504, ours, "deadline", "The server did not answer in time."),
        Refusal(505, invalid, "bad_request", "The version of HTTP must be 1.0, 1.1 or 2.", unread=True),
    ]


def _error_bodies(settings: Settings) -> str:
    """A variable for each status."""
    lines = []
    for refusal in _refusals(settings):
        source, of_messages = ("$request", MESSAGES_LINE) if refusal.unread else ("$uri", MESSAGES)
        lines.append(
            f"map {source} $glm_error_{refusal.status} {{\n"
            f"    '~^{of_messages}' {refusal.anthropic()};\n"
            f"    default {refusal.openai()};\n}}"
        )
    return "\n".join(lines)


def _error_pages(refusals: list[Refusal]) -> str:
    """`=`: the status is that of the location."""
    return "\n".join(f"    error_page {' '.join(map(str, r.on or (r.status,)))} = {r.location};" for r in refusals)


def _error_locations(refusals: list[Refusal]) -> str:
    lines = []
    for refusal in refusals:
        lines.append(f"    location {'= ' if refusal.unread else ''}{refusal.location} {{")
        if refusal.unread:
            lines.append("        internal;")
        if refusal.retry_s is not None:
            lines.append(f"        add_header Retry-After {refusal.retry_s} always;")
        lines.append(f"        return {refusal.status} $glm_error_{refusal.status};\n    }}\n")
    return "\n".join(lines)


def _json(value: object) -> str:
    return f"'{_text(json.dumps(value), 'an error')}'"


def _text(text: str, what: str) -> str:
    """As it is written between single quotes, where nginx knows no way to write a dollar. Raises ProxyError."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    if "$" in text or len(escaped.encode()) > LONGEST_TEXT_BYTES:
        raise ProxyError(f"{what} must have no `$` and <= {LONGEST_TEXT_BYTES} bytes. Given: {len(escaped.encode())} bytes")
    return escaped


def _quoted(path: str) -> str:
    return f"'{path}'"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.proxy", description="Write nginx's configuration for the API and the page.")
    default = Proxy()
    parser.add_argument("--api", metavar="HOST:PORT", default="", help="where nginx reaches the API (default: 127.0.0.1 and GLM_API_PORT)")
    parser.add_argument("--page", metavar="HOST:PORT", default="", help="where it reaches the page (default: 127.0.0.1 and GLM_WEB_PORT)")
    parser.add_argument("--page-path", metavar="PATH", default=default.page_path, help="path of the page, such as /glm/ (default: /)")
    parser.add_argument("--listen", metavar="ADDRESS", default=default.listen, help="port, or address:port (default: 80)")
    parser.add_argument("--listen-tls", metavar="ADDRESS", default=default.listen_tls, help="the same with TLS (default: 443)")
    parser.add_argument("--certificate", metavar="FILE", default="", help="chain in PEM; with it nginx serves TLS, and redirects to it")
    parser.add_argument("--certificate-key", metavar="FILE", default="", help="its key")
    parser.add_argument("--name", default=default.name, help="server_name (default: any, as nginx's default server)")
    parser.add_argument(
        "--no-ipv6", dest="ipv6", action="store_const", const=False, default=IPV6.exists(),
        help="listen on IPv4 only, where a port is given without an address (default: on IPv6 too, where the kernel has it)",
    )  # fmt: skip
    parser.add_argument("--allow", metavar="NETWORK", action="append", help="may use the service; repeat it (default: everyone)")
    parser.add_argument(
        "--inside", metavar="NETWORK", action="append",
        help="may reach /metrics, /info, /control and the console; repeat it (default: this machine)",
    )  # fmt: skip
    parser.add_argument("--log", metavar="FILE", default=default.log, help=f"access log, or `off` (default: {default.log})")
    parser.add_argument("--error-log", metavar="FILE", default=default.error_log, help=f"(default: {default.error_log})")
    parser.add_argument("--output", metavar="FILE", help="write it there (default: standard output)")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    options["allow"] = tuple(options["allow"] or ())
    options["inside"] = tuple(options["inside"] or default.inside)
    command = shlex.join(["python", "-m", "deploy.proxy", *(sys.argv[1:] if arguments is None else arguments)])
    from settings import SettingsError, load

    try:
        text = render(Proxy(**options, command=command.replace("\n", " ")), load())
    except (ProxyError, SettingsError) as error:
        print(error, file=sys.stderr)
        return 2
    if output is None:
        print(text, end="")
    else:
        try:
            Path(output).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"--output must be a file that can be written. Given: {output} ({error.strerror})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
