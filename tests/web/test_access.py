"""Access to the page: the token, the cookie, and that no path is open without them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from http.cookies import SimpleCookie
from typing import Any

import pytest
import requests
from browsing import TOKEN as PAGE_TOKEN
from page_process import Server
from playwright.sync_api import Browser

from web.access import COOKIE, Access, VisitorCookies

TOKEN = "open sesame"


def test_a_cookie_is_invalid_with_another_token_or_another_id() -> None:
    cookie = VisitorCookies(TOKEN).renew(None)
    visitor, _, signature = cookie.partition(".")

    assert VisitorCookies(TOKEN).visitor_of(cookie) == visitor
    assert VisitorCookies("new token").visitor_of(cookie) is None
    assert VisitorCookies(TOKEN).visitor_of(f"{'A' * 22}.{signature}") is None
    assert VisitorCookies(TOKEN).visitor_of(f"{visitor}.") is None
    assert VisitorCookies(TOKEN).visitor_of(f"{visitor}.\xe9") is None
    assert VisitorCookies(TOKEN).visitor_of(None) is None


def test_a_visitor_with_a_new_token_keeps_their_chats() -> None:
    old = VisitorCookies(TOKEN).renew(None)

    new = VisitorCookies("new token").renew(old)

    assert VisitorCookies("new token").visitor_of(new) == VisitorCookies(TOKEN).visitor_of(old)


def test_two_browsers_are_two_visitors() -> None:
    assert VisitorCookies(TOKEN).renew(None) != VisitorCookies(TOKEN).renew(None)


class Client:
    """Requests to `Access` in front of an app that records what reaches it."""

    def __init__(self, token: str = TOKEN) -> None:
        self.reached: list[str] = []
        self._access = Access(self._app, token)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
            await send({"type": "http.response.body", "body": b"inside"})
        else:
            await send({"type": "websocket.accept"})

    def request(
        self, path: str = "/", query: str = "", type: str = "http", method: str = "GET", client: str = "127.0.0.1",
        body: bytes = b"", **headers: str,
    ) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body} if method == "POST" else {"type": f"{type}.connect"}

        scope = {
            "type": type, "path": path, "query_string": query.encode(), "method": method, "scheme": "http", "client": (client, 40000), "server": ("10.0.0.5", 8081),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        # In a thread of its own: the browser tests leave an event loop running in this one.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, self._access(scope, receive, send)).result()
        return sent

    def header(self, sent: list[dict[str, Any]], name: str) -> str:
        return next((v.decode() for n, v in sent[0]["headers"] if n == name.encode()), "")


@pytest.mark.parametrize(
    "path", ["/", "/console", "/_stcore/stream", "/_stcore/upload_file/a/b", "/media/x.png", "/static/js/index.js",
             "/_stcore/host-config", "/_stcore/health/", "/x/_stcore/health", "/_stcore/agent/openapi.json"]
)  # fmt: skip
def test_a_stranger_reaches_nothing(path: str) -> None:
    client_app = Client()

    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        sent = client_app.request(path, method=method)

        assert sent[0]["status"] == 401, method
        assert client_app.reached == [], method
        assert b"inside" not in sent[1]["body"], method


def test_a_stranger_s_websocket_is_refused() -> None:
    client_app = Client()

    assert client_app.request("/_stcore/stream", type="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert client_app.request("/_stcore/stream", query="token=wrong", type="websocket")[0]["type"] == "websocket.close"
    assert client_app.reached == []


def test_the_health_route_is_open() -> None:
    assert Client().request("/_stcore/health")[0]["status"] == 200


def test_the_script_health_check_is_only_for_this_machine() -> None:
    """Each call runs the whole page: other machines may not call it, with or without the token."""
    path, query = "/_stcore/script-health-check", "token=open+sesame"

    assert Client().request(path, query)[0]["status"] == 200
    assert Client().request(path, query, client="::1")[0]["status"] == 200
    assert Client().request(path, query, client="10.0.0.5")[0]["status"] == 200, "its own address"
    assert Client().request(path)[0]["status"] == 401, "without the token, not even from this machine"
    for client_app in (Client(), Client(token="")):
        assert client_app.request(path, query, client="10.0.0.9")[0]["status"] == 404
        assert client_app.request(path + "/", query, client="10.0.0.9")[0]["status"] == 404
        assert client_app.request(path, query, x_forwarded_proto="https")[0]["status"] == 404, "through a proxy"
        assert client_app.request(path, query, x_forwarded_for="10.0.0.9")[0]["status"] == 404
        assert client_app.reached == []


def test_the_token_is_replaced_by_a_cookie_and_removed_from_the_url() -> None:
    client_app = Client()

    sent = client_app.request("/console", query="token=open+sesame&lang=zh")

    assert sent[0]["status"] == 303
    assert client_app.header(sent, "location") == "./console?lang=zh"
    cookie = client_app.header(sent, "set-cookie")
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    value = SimpleCookie(cookie)[COOKIE].value
    assert client_app.request("/", cookie=f"other=1; {COOKIE}={value}")[0]["status"] == 200
    assert client_app.request("/_stcore/stream", type="websocket", cookie=f"{COOKIE}={value}") == [{"type": "websocket.accept"}]


def test_behind_https_the_cookie_is_secure() -> None:
    client_app = Client()

    sent = client_app.request(query="token=open+sesame", x_forwarded_proto="https")

    assert "; Secure" in client_app.header(sent, "set-cookie")


def test_a_checker_may_open_the_websocket_with_the_token() -> None:
    client_app = Client()

    assert client_app.request("/_stcore/stream", query="token=open+sesame", type="websocket") == [{"type": "websocket.accept"}]


def test_a_checker_may_call_the_program_routes_with_the_token() -> None:
    client_app = Client()

    assert client_app.request("/_stcore/script-health-check", query="token=open+sesame")[0]["status"] == 200
    assert client_app.request("/_stcore/script-health-check", query="token=wrong")[0]["status"] == 401


def test_a_wrong_token_is_reported_in_the_visitor_s_language() -> None:
    page = Client().request(query="token=wrong", accept_language="zh-CN,zh;q=0.9")[1]["body"].decode()

    assert "令牌不正确" in page
    assert '<html lang="zh">' in page


def form(client_app: Client, body: bytes, path: str = "/console", **more: Any) -> list[dict[str, Any]]:
    return client_app.request(path, "lang=zh&token=old", method="POST", body=body, content_type="application/x-www-form-urlencoded", **more)


def test_the_form_sends_the_token_in_its_body_and_never_in_a_url() -> None:
    client_app = Client()
    page = client_app.request("/console", query="token=wrong&lang=zh&chat=a%22b")[1]["body"].decode()

    assert '<form method="post" action="?lang=zh&amp;chat=a%22b">' in page
    sent = form(client_app, b"token=open+sesame")
    assert (sent[0]["status"], client_app.header(sent, "location")) == (303, "./console?lang=zh")
    cookie = SimpleCookie(client_app.header(sent, "set-cookie"))[COOKIE].value
    assert VisitorCookies(TOKEN).visitor_of(cookie)
    assert client_app.reached == []


@pytest.mark.parametrize("body", [b"token=wrong", b"", b"\xff\xfe", b"x=open+sesame", b"token=open+sesame&a=" + b"a" * 5000])
def test_a_form_without_the_right_token_is_refused_also_with_a_cookie(body: bytes) -> None:
    client_app = Client()
    cookie = f"{COOKIE}={VisitorCookies(TOKEN).renew(None)}"

    for sent in (form(client_app, body), form(client_app, body, cookie=cookie)):
        assert sent[0]["status"] == 401 and b"set-cookie" not in dict(sent[0]["headers"])
    assert form(client_app, b"token=open+sesame", path="/_stcore/upload_file/a")[0]["status"] == 401, "no login there"
    assert client_app.reached == []


def test_a_browser_logs_in_and_its_token_is_in_no_url_and_no_log(one_page_server: Server, chromium: Browser) -> None:
    context = chromium.new_context()
    page = context.new_page()
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))

    page.goto(f"{one_page_server.url}/?lang=en")
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Open").click()
    page.get_by_role("alert").wait_for()
    page.get_by_label("Token").fill(PAGE_TOKEN)
    page.get_by_role("button", name="Open").click()
    page.get_by_test_id("stApp").wait_for()

    assert not [url for url in [page.url, *urls] if "token=" in url or PAGE_TOKEN in url]
    assert PAGE_TOKEN not in one_page_server.log_text()
    context.close()


def test_without_a_token_each_browser_still_gets_its_own_cookie() -> None:
    client_app = Client(token="")

    first, second = (client_app.header(client_app.request(), "set-cookie") for _ in range(2))

    assert first.startswith(f"{COOKIE}=")
    assert first != second


def test_the_real_page_gives_a_stranger_nothing(one_page_server: Server) -> None:
    running = one_page_server

    for path in ("/", "/console", "/_stcore/host-config", "/media/x", "/_stcore/upload_file/a/b", "/static/", "/x?y=1"):
        answer = requests.get(running.url + path, timeout=20)
        assert (answer.status_code, "This page is private" in answer.text) == (401, True), path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "set-cookie" not in answer.headers
    assert requests.put(f"{running.url}/_stcore/upload_file/a/b", data=b"x", timeout=20).status_code == 401
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
    assert requests.get(f"{running.url}/_stcore/stream", headers=upgrade, timeout=20).status_code == 403

    session = requests.Session()
    assert session.get(f"{running.url}/?token={PAGE_TOKEN}", timeout=20).status_code == 200
    assert session.get(f"{running.url}/_stcore/host-config", timeout=20).status_code == 200
    # Streamlit's own guard against forged requests comes after ours.
    assert session.put(f"{running.url}/_stcore/upload_file/a/b", data=b"x", timeout=20).status_code == 403


# Other programs on the same host set cookies that no grammar allows, and browsers send them.
IRREGULAR_COOKIES = (
    b"a[b]=c", b"foo=bar=baz", b"note=two words", b'prefs={"theme": "dark", "sizes": [1, 2]}', "name=王".encode(),
    b"name=J\xfcrgen", b"=no name", b"no-value", b"a,b=1", b'open="quote', b"at@sign=1", b";;",
)  # fmt: skip


def test_no_cookie_of_another_program_locks_a_browser_out(one_page_server: Server) -> None:
    running = one_page_server
    ours = f"{COOKIE}={VisitorCookies(PAGE_TOKEN).renew(None)}".encode()
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip

    def statuses(cookies: bytes) -> tuple[int, int]:
        page = requests.get(f"{running.url}/", headers={"Cookie": cookies}, timeout=20)
        socket = requests.get(
            f"{running.url}/_stcore/stream", headers={"Cookie": cookies, **upgrade}, timeout=20, stream=True
        )
        socket.close()
        return page.status_code, socket.status_code

    assert statuses(ours) == (200, 101)
    for other in IRREGULAR_COOKIES:
        assert statuses(other) == (401, 403), other
        assert statuses(other + b"; " + ours) == (200, 101), other
        assert statuses(ours + b"; " + other) == (200, 101), other
