"""nginx in front of the real API: what it passes on, how soon, what it refuses in which words, and what it logs."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from nginx_process import Nginx, check, self_signed, written
from ports import free_port
from started_api import (
    KEY,
    OTHER_KEY,
    PROBE_TOKEN,
    ROOT,
    WAIT_S,
    StartedApi,
    events,
    headers,
    long_question,
    picture_question,
)

from api import errors
from api.server import KEEP_ALIVE_S
from deploy import proxy as proxy_module
from deploy.proxy import FLOOD, KEEPALIVE_S, Proxy, ProxyError, main, render
from settings import Settings

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
PAGE_TOKEN = "token-of-the-page-0123456789"
NOWHERE = ("192.0.2.1",)  # an address of documentation, from which nobody connects
STREAMS = 64


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedApi]:
    with StartedApi(tmp_path_factory.mktemp("api"), GLM_SLOTS=str(STREAMS), GLM_MAX_BODY_BYTES="300000") as started:
        yield started


@pytest.fixture
def front(api: StartedApi, tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """front(limits, **options of Proxy) -> nginx in front of the API, and of a page that does not run."""
    with contextlib.ExitStack() as running:

        def start(limits: dict[str, Any] | None = None, **options: Any) -> Nginx:
            folder = tmp_path / f"nginx-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            proxy = Proxy(**{"api": f"127.0.0.1:{api.port}", "page": f"127.0.0.1:{free_port()}", **options})
            return running.enter_context(Nginx(folder, proxy, Settings(**{"max_body_bytes": 300_000, **(limits or {})})))

        yield start


@pytest.fixture(scope="module")
def any_front(api: StartedApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    proxy = Proxy(api=f"127.0.0.1:{api.port}", page=f"127.0.0.1:{free_port()}")
    with Nginx(tmp_path_factory.mktemp("nginx"), proxy, Settings()) as nginx:
        yield nginx


def post(nginx: Nginx, body: Any, path: str = CHAT, **more: Any) -> httpx.Response:
    return httpx.post(nginx.url + path, json=body, **{"headers": headers(), "timeout": WAIT_S, **more})


def test_a_picture_question_is_answered_as_without_nginx(api: StartedApi, front: Callable[..., Nginx]) -> None:
    direct = httpx.post(api.url + CHAT, json=picture_question(), headers=headers(), timeout=WAIT_S)
    passed = post(front(), picture_question())

    assert "red circle" in passed.json()["choices"][0]["message"]["content"]
    assert passed.json()["choices"] == direct.json()["choices"]
    assert passed.headers["x-request-id"] == passed.json()["request_id"]


def test_64_streams_arrive_token_by_token(front: Callable[..., Nginx]) -> None:
    nginx = front()

    def stream(seed: int) -> list[tuple[float, Any]]:
        body = long_question(30, seed=seed, stream=True)
        with httpx.stream("POST", nginx.url + CHAT, json=body, headers=headers(), timeout=WAIT_S) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            return events(answer)

    with ThreadPoolExecutor(STREAMS) as pool:
        streams = list(pool.map(stream, range(STREAMS)))

    for stream_events in streams:
        assert stream_events[-1][1] == "[DONE]"
        assert stream_events[-2][1]["choices"][0]["finish_reason"] == "length"
        times = [at for at, _ in stream_events]
        lasting = times[-1] - times[0]
        assert len([1 for before, after in itertools.pairwise(times) if after - before > lasting / 200]) >= 10, "in one piece"
    assert [line["http"]["response"]["status_code"] for line in nginx.logged()] == [200] * STREAMS


def test_a_client_that_leaves_ends_its_request(api: StartedApi, front: Callable[..., Nginx]) -> None:
    body = long_question(4000, stream=True)
    with httpx.stream("POST", front().url + CHAT, json=body, headers=headers(), timeout=WAIT_S) as answer:
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)
        assert httpx.get(f"{api.url}/health", timeout=WAIT_S).json()["running"] == 1

    left, deadline = time.monotonic(), time.monotonic() + WAIT_S
    while httpx.get(f"{api.url}/health", timeout=WAIT_S).json()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert time.monotonic() - left < 10, "the whole answer takes longer"


def test_the_largest_body_passes_and_a_larger_one_is_refused_in_the_words_of_the_api(api: StartedApi, front: Callable[..., Nginx]) -> None:
    nginx = front()
    largest = b'"' + b"x" * 299_998 + b'"'
    passed = post(nginx, None, content=largest)
    assert passed.status_code == 400, "the API has read it"

    for path in (CHAT, MESSAGES):
        refused, direct = (
            httpx.post(url + path, content=largest + b" ", headers=headers(), timeout=WAIT_S) for url in (nginx.url, api.url)
        )
        assert refused.status_code == direct.status_code == 413
        said, meant = refused.json(), direct.json()
        assert said["error"].pop("message").split(" Given")[0] == meant["error"].pop("message").split(" Given")[0]
        assert said == meant
    chunked = httpx.post(nginx.url + CHAT, content=iter([largest, b" "]), headers=headers(), timeout=WAIT_S)
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")


def test_a_flood_of_a_key_ends_at_nginx_whichever_way_it_is_written(front: Callable[..., Nginx]) -> None:
    nginx = front({"key_requests_per_minute": 1})
    ways = [headers(), {"x-api-key": KEY}, {"Authorization": f"bearer   {KEY}"}]
    statuses = [post(nginx, {"messages": []}, headers=ways[number % 3]).status_code for number in range(30)]

    assert statuses[: FLOOD + 1] == [400] * (FLOOD + 1), "the API refuses the body; nginx passes more than the rate of the key"
    assert 429 in statuses[FLOOD + 1 :]
    refused = post(nginx, {"messages": []})
    expected = errors.too_many_in_a_minute(1, 60)
    assert (refused.status_code, refused.json()) == (429, expected.body())
    assert (refused.headers["retry-after"], refused.headers["content-type"]) == ("60", "application/json")
    assert post(nginx, {}, MESSAGES, headers={"x-api-key": KEY}).json() == errors.anthropic_body(expected)
    assert post(nginx, {"messages": []}, headers=headers(OTHER_KEY)).status_code == 400, "another key"
    assert httpx.get(f"{nginx.url}/v1/models", headers=headers(), timeout=WAIT_S).status_code == 200, "a reading"


def test_bodies_that_are_still_arriving_leave_a_key_its_requests(front: Callable[..., Nginx]) -> None:
    """As at the API, which counts a request once its body is there."""
    nginx = front({"key_concurrency": 1})
    with contextlib.ExitStack() as arriving:
        for _ in range(4):
            wire = arriving.enter_context(contextlib.closing(raw(nginx)))
            wire.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert post(nginx, picture_question()).status_code == 200


REFUSED_UNREAD = {
    "GET /metrics%00 HTTP/1.1": 400, "GET /%zz HTTP/1.1": 400, "GET /v1/messages/%zz HTTP/1.1": 400, "GET /../../etc HTTP/1.1": 400,
    "CONNECT a:80 HTTP/1.1": 400, "GET http://u:pw@host/?token=x HTTP/1.1": 400, "\x16\x03\x01\x02": 400, "rubbish": 400,
    f"GET /{'a' * 9000} HTTP/1.1": 414, f"POST /v1/messages?{'a' * 9000} HTTP/1.1": 414, f"GET / HTTP/1.1\r\nX: {'a' * 9000}": 414,
    "TRACE / HTTP/1.1": 405, "GET / HTTP/9": 505, "POST /v1/messages HTTP/1.1\r\nTransfer-Encoding: x": 501,
}  # fmt: skip


def ask_line(port: int, line: str) -> tuple[int, dict[str, Any]]:
    """(status, error) of a request that is sent as it is."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)) as wire:
        wire.sendall(f"{line}\r\nHost: a\r\n\r\n".encode("latin-1"))
        answer = http.client.HTTPResponse(wire)
        answer.begin()
        assert answer.headers["content-type"] == "application/json", line
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("line, status", REFUSED_UNREAD.items(), ids=lambda value: str(value)[:30].encode("unicode_escape").decode())
def test_what_nginx_cannot_read_is_refused_in_the_form_of_the_api(any_front: Nginx, line: str, status: int) -> None:
    answered, body = ask_line(any_front.port, line)
    assert answered == status
    assert body["error"]["message"] and body["error"]["code"]
    assert (body.get("type") == "error") is ("/v1/messages" in line), "Anthropic's format"


def test_a_refusal_is_logged_with_the_path_that_was_asked(any_front: Nginx) -> None:
    ask_line(any_front.port, "TRACE /a/b?token=x HTTP/1.1")
    deadline = time.monotonic() + WAIT_S
    while not (lines := [line for line in any_front.logged() if line["url"]["path"] == "/a/b"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [(line["http"]["request"]["method"], line["message"]) for line in lines] == [("TRACE", "TRACE /a/b 405")]


def test_the_locations_of_refusals_cannot_be_asked_for(any_front: Nginx) -> None:
    assert httpx.get(f"{any_front.url}/glm-refused/400", timeout=WAIT_S).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_a_check_by_http_1_0_needs_no_host(any_front: Nginx, path: str) -> None:
    """Some load balancers check so."""
    with contextlib.closing(raw(any_front)) as wire:
        wire.sendall(f"GET {path} HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        assert wire.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_v1_itself_is_answered_by_the_api(any_front: Nginx) -> None:
    answer = httpx.get(f"{any_front.url}/v1", headers=headers(), timeout=WAIT_S)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")


CLOSED = [
    "/metrics", "/info", "/control", "//metrics", "/./metrics", "/%6detrics", "/v1/../metrics", "/v1/%2e%2e/info", "/v1/..%2finfo",
    "/metrics?x=1", "/metrics#", "/console", "/console/", "//console", "/%63onsole", "/_stcore/metrics",
]  # fmt: skip


def ask_raw(nginx: Nginx, path: str, **more: str) -> tuple[int, str]:
    """The path as it is: clients of Python would tidy it up."""
    options = [part for name, value in more.items() for part in ("-H", f"{name}: {value}")]
    command = ["curl", "-s", "--path-as-is", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {KEY}", *options, nginx.url + path]
    text, _, status = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True).stdout.rpartition("\n")
    return int(status), text


def test_what_is_the_operators_is_closed_from_outside(front: Callable[..., Nginx]) -> None:
    outside = front(inside=NOWHERE)
    claims = {"X-Forwarded-For": "192.0.2.1", "X-Real-IP": "192.0.2.1", "X-GLM-Console": "", "X-GLM-Probe": PROBE_TOKEN}
    for path in CLOSED:
        status, text = ask_raw(outside, path, **claims)
        assert status == 404, (path, status, text)
        if "console" not in path.replace("%63", "c") and "_stcore" not in path:
            assert json.loads(text)["error"]["code"] == "unknown_url", path
    for path in ("/health", "/ping", "/v1/models", "/openapi.json"):
        assert ask_raw(outside, path)[0] == 200, path


def test_the_operator_reaches_it_from_inside_with_the_key(front: Callable[..., Nginx]) -> None:
    inside = front()

    assert "glm_" in httpx.get(f"{inside.url}/metrics", headers=headers(), timeout=WAIT_S).text
    assert httpx.get(f"{inside.url}/info", headers=headers(), timeout=WAIT_S).json()["model"] == "glm-shapes-demo"
    assert httpx.get(f"{inside.url}/metrics", timeout=WAIT_S).status_code == 401
    assert ask_raw(inside, "/_stcore/metrics")[0] == 404, "Streamlit's own figures are for nobody"


def test_addresses_that_are_not_allowed_are_refused(front: Callable[..., Nginx]) -> None:
    nginx = front(allow=NOWHERE)
    claims = {**headers(), "X-Forwarded-For": "192.0.2.1"}
    for path in (CHAT, "/v1/models", "/health"):
        refused = httpx.get(nginx.url + path, headers=claims, timeout=WAIT_S)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "address_not_allowed")
    assert httpx.get(nginx.url, headers=claims, timeout=WAIT_S).status_code == 403
    assert httpx.get(front(allow=("127.0.0.0/8",)).url + "/health", timeout=WAIT_S).status_code == 200


def test_while_nothing_runs_programs_get_an_error_and_people_a_page(front: Callable[..., Nginx]) -> None:
    nginx = front(api=f"127.0.0.1:{free_port()}")
    refused = post(nginx, picture_question())
    assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (503, "not_running", "5")
    assert post(nginx, {}, MESSAGES).json()["error"]["type"] == "overloaded_error"

    page = httpx.get(f"{nginx.url}/?token={PAGE_TOKEN}", timeout=WAIT_S)
    assert (page.status_code, page.headers["content-type"], page.headers["retry-after"]) == (503, "text/html; charset=utf-8", "5")
    assert page.text == (ROOT / "deploy" / "nginx" / "waiting.html").read_text(encoding="utf-8").strip()
    upload = httpx.post(f"{nginx.url}/_stcore/upload_file/x", content=b"x" * (22 * 2**20 + 1), timeout=WAIT_S)
    assert upload.status_code == 413 and "<= 20971520 bytes" in upload.text


def test_no_log_has_a_token_or_a_key(front: Callable[..., Nginx]) -> None:
    """Of requests that are answered, refused, limited, not HTTP at all, or meet nothing behind nginx."""
    nginx = front({"key_requests_per_minute": 1})
    secret = {"headers": {"Authorization": f"Bearer {KEY}", "Cookie": f"glm_visitor={PAGE_TOKEN}", "Referer": f"http://x/?token={PAGE_TOKEN}"}}
    for path in ("/", "/console", "/v1/models", "/metrics", "/_stcore/stream", "/health", "/v1/messages", "/static/%00", "/a" * 9000):
        httpx.get(f"{nginx.url}{path}?token={PAGE_TOKEN}&key={KEY}", timeout=WAIT_S, **secret)
    for _ in range(30):
        httpx.post(f"{nginx.url}{CHAT}?token={PAGE_TOKEN}", json={}, timeout=WAIT_S, **secret)
    for line in (f"GET /?token={PAGE_TOKEN}\r\n\r\n", f"G{KEY} / HTTP/9\r\n\r\n", f"GET /?token={PAGE_TOKEN} HTTP/1.1\r\n\r\n"):
        with contextlib.suppress(OSError), contextlib.closing(raw(nginx)) as wire:
            wire.sendall(line.encode())
            wire.recv(1000)

    deadline = time.monotonic() + WAIT_S
    while len(nginx.logged()) < 42:
        assert time.monotonic() < deadline, nginx.logged()
        time.sleep(0.05)
    assert {502, 429} & {int(code) for line in nginx.logged() for code in re.findall(r"\d{3}", line["glm"]["upstream_status"])} == {502}
    assert any(line["http"]["response"]["status_code"] == 429 for line in nginx.logged())
    assert PAGE_TOKEN not in nginx.all_logs() and KEY not in nginx.all_logs()


def raw(nginx: Nginx) -> socket.socket:
    return socket.create_connection(("127.0.0.1", nginx.port), timeout=WAIT_S)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return self_signed(tmp_path_factory.mktemp("tls"))


def test_with_a_certificate_it_serves_tls_and_redirects_to_it(front: Callable[..., Nginx], certificate: dict[str, str]) -> None:
    nginx = front(**certificate)
    body = long_question(20, stream=True)
    with httpx.stream(
        "POST", nginx.url + CHAT, json=body, headers=headers(), timeout=WAIT_S, verify=ssl.create_default_context(cafile=certificate["certificate"])
    ) as answer:
        assert events(answer)[-1][1] == "[DONE]"
        assert "max-age" in answer.headers["strict-transport-security"]
    redirected = httpx.post(f"http://127.0.0.1:{nginx.plain_port}{CHAT}", json={}, timeout=WAIT_S)
    assert (redirected.status_code, redirected.headers["location"]) == (308, f"https://127.0.0.1:{nginx.port}{CHAT}")
    for port, line in ((nginx.plain_port, "GET /%zz HTTP/1.1"), (nginx.port, "GET / HTTP/1.1")):  # the other: no TLS at its port
        status, body = ask_line(port, line)
        assert (status, body["error"]["code"]) == (400, "bad_request")


def test_nginx_accepts_every_configuration(tmp_path: Path, certificate: dict[str, str]) -> None:
    """By names instead of addresses too, as in a container."""
    many = Settings(key_requests_per_minute=1, key_concurrency=1, max_image_bytes=1, max_body_bytes=1, request_timeout_s=0.1)
    rare = Proxy(
        api="localhost:8080", page="localhost:8081", page_path="/glm/", name="a.example", allow=("10.0.0.0/8", "::1"),
        inside=("fc00::/7", "10.1.2.3"), **certificate,
    )  # fmt: skip
    for number, (proxy, settings) in enumerate([(Proxy(), Settings()), (rare, many), (Proxy(page_path="/a/b/"), many)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = check(written(folder, proxy, settings))
        assert done.returncode == 0 and "warn" not in done.stderr, done.stderr


@pytest.mark.parametrize("option, value", [
    ("allow", ("10.0.0.0/33",)), ("inside", ("evil; }",)), ("page_path", "glm"), ("name", "a b"), ("log", "x';"), ("certificate", "x.pem"),
])  # fmt: skip
def test_an_option_that_nginx_could_not_use_is_named(option: str, value: Any) -> None:
    with pytest.raises(ProxyError, match="--" + option.replace("_", "-")):
        render(Proxy(**{option: value}), Settings())


def test_the_command_takes_the_limits_from_the_settings(tmp_path: Path) -> None:
    env = tmp_path / "my.env"
    env.write_text("GLM_MAX_BODY_BYTES=12345\nGLM_API_PORT=18080\nGLM_KEY_CONCURRENCY=7\n")
    command = [sys.executable, "-m", "deploy.proxy", "--page", "glm:8081", "--inside", "10.0.0.0/8", "--output", str(tmp_path / "glm.conf")]
    done = subprocess.run(command, cwd=ROOT, env={"GLM_ENV_FILE": str(env)}, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "glm.conf").read_text()

    for part in ("client_max_body_size 12345;", "server 127.0.0.1:18080;", "http://glm:8081;", "10.0.0.0/8 1;"):
        assert part in text
    assert "limit_req_zone" not in text and "limit_conn" not in text and "{{" not in text


def test_a_folder_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "none" / "glm.conf")]) == 2
    assert re.fullmatch(r"--output must be a file .*/none/glm.conf \(No such file or directory\)\n", capsys.readouterr().err)


DEBIANS = "server { listen 80 default_server; listen [::]:80 default_server; server_name _; root /var/www/html; }"


def test_another_default_server_is_not_overlooked(tmp_path: Path) -> None:
    """Debian's own site would answer in place of the service, and `nginx -t` would only warn."""
    for proxy, accepted in ((Proxy(), False), (Proxy(name="a.example"), True)):
        conf = written(tmp_path, proxy, Settings())
        conf.write_text(conf.read_text().replace("include", f"{DEBIANS} include"))
        done = check(conf)
        assert (done.returncode == 0) is accepted, done.stderr
        assert accepted or "a duplicate default server" in done.stderr


def test_it_listens_on_ipv6_where_the_kernel_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listening(**options: Any) -> list[str]:
        return re.findall(r"listen (\S+) default_server", render(Proxy(**options), Settings()))

    assert listening(ipv6=True) == ["80", "[::]:80"]
    assert listening(ipv6=True, listen="127.0.0.1:80") == ["127.0.0.1:80"]
    assert listening(ipv6=True, certificate="c.pem", certificate_key="k.pem") == ["80", "[::]:80", "443", "[::]:443"]
    assert listening(ipv6=False) == ["80"]
    written_to = tmp_path / "glm.conf"
    for kernels, options, expected in ((tmp_path, [], True), (tmp_path / "none", [], False), (tmp_path, ["--no-ipv6"], False)):
        monkeypatch.setattr(proxy_module, "IPV6", kernels)
        assert main([*options, "--output", str(written_to)]) == 0
        assert ("listen [::]:80 " in written_to.read_text()) is expected


def test_nginx_closes_idle_connections_before_the_api_does() -> None:
    """Otherwise a question may meet a connection that is being closed, and is answered with 502."""
    assert KEEPALIVE_S < KEEP_ALIVE_S
