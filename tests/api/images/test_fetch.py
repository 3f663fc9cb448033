"""The guarded fetcher, against real servers on this machine: what it fetches, and everything it refuses."""

from __future__ import annotations

import itertools
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from api.errors import ServingError
from api.images.fetch import MAX_REDIRECTS, Fetcher, is_public
from settings import Settings

P = "messages[0].content[0].image_url.url"
BODY = b"image"


class Site(BaseHTTPRequestHandler):
    """/ok /gone /to?<url> /loop /large /endless /drip /slow-head /short /zipped /no-location"""

    seen: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Host", "")))
        name, _, query = self.path.partition("?")
        getattr(self, "get_" + name.strip("/").replace("-", "_"), self.get_gone)(query)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def get_ok(self, query: str) -> None:
        self.answer(200, BODY)

    def get_gone(self, query: str) -> None:
        self.answer(404)

    def get_to(self, query: str) -> None:
        self.answer(302, Location=query)

    def get_loop(self, query: str) -> None:
        self.answer(307, Location="/loop")

    def get_no_location(self, query: str) -> None:
        self.answer(301)

    def get_large(self, query: str) -> None:
        self.answer(200, b"x" * 10_001)

    def get_zipped(self, query: str) -> None:
        self.answer(200, BODY, Content_Encoding="gzip")

    def get_short(self, query: str) -> None:
        self.answer(200, BODY, Content_Length="100")

    def get_endless(self, query: str) -> None:
        self.pour(b"x" * 5_000, 0.0)

    def get_drip(self, query: str) -> None:
        self.pour(b"x", 0.05)

    def pour(self, data: bytes, pause_s: float) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(2_000):
                self.wfile.write(data)
                time.sleep(pause_s)
        except OSError:
            pass

    def get_slow_head(self, query: str) -> None:
        try:
            for byte in itertools.chain(b"HTTP/1.1 200 OK\r\nX: ", itertools.repeat(0x61, 1_000)):
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def fetcher(site: int) -> Callable[..., Fetcher]:
    """A fetcher that by default treats this machine as public."""

    def make(**options) -> Fetcher:
        given = {"public": lambda address: address == "127.0.0.1", "ports": frozenset({site}), "timeout_s": 20.0}
        return Fetcher(**{"enabled": True, "hosts": frozenset(), "max_bytes": 10_000, **given, **options})

    return make


def refusal(fetcher: Fetcher, url: str) -> ServingError:
    with pytest.raises(ServingError) as caught:
        fetcher.fetch(url, P)
    assert caught.value.param == P
    return caught.value


def resolve(monkeypatch, *answers: list[str]) -> list[str]:
    """Names resolve to `answers` one after the other, then always to the last. Returns the names looked up."""
    lookups: list[str] = []
    remaining = list(answers)
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest, **named):
        if host[0].isdigit():  # an address, looked up by the connection itself
            return real(host, port, *rest, **named)
        lookups.append(host)
        addresses = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr("api.images.fetch.socket.getaddrinfo", getaddrinfo)
    return lookups


def test_an_image_is_fetched(fetcher, site: int) -> None:
    assert fetcher().fetch(f"http://127.0.0.1:{site}/ok", P) == BODY


def test_it_is_off_unless_switched_on() -> None:
    error = refusal(Fetcher.of(Settings()), "https://example.org/a.png")

    assert "GLM_FETCH_IMAGES" in error.message and error.code == "unsupported_url"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
     "100.100.100.200", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
     "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "::ffff:a9fe:a9fe", "64:ff9b::7f00:1", "2002:7f00:1::1", "2001:0:1::1", "2001:db8::1", "::127.0.0.1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0",
     "localhost.", "127.0.0.1."],
)  # fmt: skip
def test_every_spelling_of_this_machine_is_refused(host: str, fetcher, site: int) -> None:
    Site.seen.clear()

    assert "ok" not in str(refusal(fetcher(public=is_public), f"http://{host}:{site}/ok").message)
    assert Site.seen == []


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:6379/_x", "http:///x", "http://", "http://[::1",
     "http://127.0.0.1\\@1.1.1.1/", "http://1.1.1.1 @127.0.0.1/", "http://user@1.1.1.1/", "http://user:pw@1.1.1.1/",
     "http://1.1.1.1%00.example.org/", "http://1.1.1.1\r\nHost: x/", "http://1.1.1.1:99999/", "http://1.1.1.1:x/",
     "http://①②⑦.⓪.⓪.①/", "http://exa mple.org/", "//1.1.1.1/x", "/etc/passwd", "http://1.1.1.1/\u2028"],
)  # fmt: skip
def test_urls_that_parsers_read_differently_are_refused_without_a_lookup(url: str, fetcher, monkeypatch) -> None:
    lookups = resolve(monkeypatch, ["127.0.0.1"])

    assert refusal(fetcher(ports=frozenset({80, 443})), url).code == "unsupported_url"
    assert lookups == []


def test_other_ports_are_refused(fetcher) -> None:
    assert (
        "its port must be one of [80, 443]. Given: 6379"
        in refusal(fetcher(ports=frozenset({80, 443})), "http://127.0.0.1:6379/").message
    )


def test_one_private_address_among_public_ones_is_enough_to_refuse(fetcher, site: int, monkeypatch) -> None:
    resolve(monkeypatch, ["1.1.1.1", "10.0.0.1"])

    assert "not public" in refusal(fetcher(public=is_public), f"http://both.example:{site}/ok").message


def test_the_connection_goes_to_the_address_that_was_checked(fetcher, site: int, monkeypatch) -> None:
    Site.seen.clear()
    lookups = resolve(monkeypatch, ["127.0.0.1"], ["10.255.255.1"])

    assert fetcher().fetch(f"http://moves.example:{site}/ok", P) == BODY
    assert lookups.count("moves.example") == 1  # only once: a second answer could differ
    assert Site.seen == [("/ok", f"moves.example:{site}")]


def test_a_redirect_is_followed_and_checked_again(fetcher, site: int, monkeypatch) -> None:
    assert fetcher().fetch(f"http://127.0.0.1:{site}/to?/ok", P) == BODY
    for target in (f"http://10.0.0.1:{site}/ok", f"http://[::1]:{site}/ok", "file:///etc/passwd", "http://127.0.0.1:22/",
                   "//169.254.169.254/latest"):  # fmt: skip
        refusal(fetcher(), f"http://127.0.0.1:{site}/to?{target}")
    for target in ("data:image/png;base64,AAAA", "ftp://example.org/"):
        message = refusal(fetcher(), f"http://127.0.0.1:{site}/to?{target}").message
        assert "a link may redirect to http or https only" in message and target.partition(":")[0] in message
    assert "not a valid URL" in refusal(fetcher(), f"http://127.0.0.1:{site}/to?http://[").message
    resolve(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])  # the name resolves differently for the second request
    assert "not public" in refusal(fetcher(), f"http://moves.example:{site}/to?/ok").message


def test_redirects_are_counted(fetcher, site: int) -> None:
    Site.seen.clear()

    assert f"more than {MAX_REDIRECTS} redirects" in refusal(fetcher(), f"http://127.0.0.1:{site}/loop").message
    assert len(Site.seen) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "answered 404"),
        ("no-location", "answered 301 without a Location header."),
        ("short", "cannot be fetched"),
        ("large", "10001"),
    ],
)
def test_an_unusable_response_is_refused(path: str, message: str, fetcher, site: int) -> None:
    assert message in refusal(fetcher(), f"http://127.0.0.1:{site}/{path}").message


def test_bytes_are_counted_while_they_arrive(fetcher, site: int) -> None:
    error = refusal(fetcher(), f"http://127.0.0.1:{site}/endless")

    assert (error.status, error.code) == (413, "image_too_large") and "<= 10000 bytes" in error.message


def test_compressed_bytes_are_not_unpacked(fetcher, site: int) -> None:
    assert fetcher().fetch(f"http://127.0.0.1:{site}/zipped", P) == BODY


@pytest.mark.parametrize("path", ["drip", "slow-head"])
def test_a_slow_server_times_out(path: str, fetcher, site: int) -> None:
    began = time.monotonic()

    assert "did not arrive within 0.5 s" in refusal(fetcher(timeout_s=0.5), f"http://127.0.0.1:{site}/{path}").message
    assert time.monotonic() - began < 10


def test_a_silent_server_times_out(fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        error = refusal(fetcher(timeout_s=0.5, ports=frozenset({port})), f"http://127.0.0.1:{port}/")

    assert "did not arrive within 0.5 s" in error.message


def test_a_name_that_is_not_resolved_in_time_times_out(fetcher, site: int, monkeypatch) -> None:
    """Also if many names hang at once: those that wait for their turn have the same deadline."""
    answer = threading.Event()
    monkeypatch.setattr("api.images.fetch.socket.getaddrinfo", lambda *_, **__: answer.wait(60) and [])
    began = time.monotonic()

    def refused() -> str:
        return refusal(fetcher(timeout_s=0.5), f"http://slow.example:{site}/ok").message

    with ThreadPoolExecutor(40) as pool:
        messages = [future.result() for future in [pool.submit(refused) for _ in range(40)]]
    lasted = time.monotonic() - began
    answer.set()

    assert all("did not arrive within 0.5 s" in message for message in messages)
    assert lasted < 10
    monkeypatch.undo()
    assert fetcher().fetch(f"http://localhost:{site}/ok", P) == BODY  # the threads that hung are free again


def test_only_listed_hosts_are_contacted_if_any_are_listed(fetcher, site: int) -> None:
    listed = fetcher(hosts=frozenset({"127.0.0.1"}))

    assert listed.fetch(f"http://127.0.0.1:{site}/ok", P) == BODY
    assert "GLM_FETCH_HOSTS" in refusal(listed, f"http://localhost:{site}/ok").message
    assert "GLM_FETCH_HOSTS" in refusal(listed, f"http://127.0.0.1:{site}/to?http://example.org:{site}/").message


def test_the_list_of_hosts_is_a_setting() -> None:
    made = Fetcher.of(Settings(fetch_images=True, fetch_hosts=" Example.org., cdn.example.org "))

    assert made.enabled and made.hosts == {"example.org", "cdn.example.org"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.example",
         "-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


def test_a_certificate_must_match_the_name_although_the_address_is_pinned(certificate, fetcher, monkeypatch) -> None:
    key, cert = certificate
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    resolve(monkeypatch, ["127.0.0.1"])
    trusting = fetcher(ports=frozenset({port}), authorities=str(cert))

    assert trusting.fetch(f"https://pictures.example:{port}/ok", P) == BODY
    assert "cannot be fetched" in refusal(trusting, f"https://other.example:{port}/ok").message
    assert (
        "cannot be fetched" in refusal(fetcher(ports=frozenset({port})), f"https://pictures.example:{port}/ok").message
    )
    server.shutdown()
