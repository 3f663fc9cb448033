"""Access control and security headers of the page: ASGI middleware around the whole app.

Owns the token in the link, the signed cookie that replaces it, and the security headers. It covers pages, uploads,
media and the WebSocket, so that no route that Streamlit adds can bypass it. The cookie also identifies the browser, so
that each visitor sees only their own chats. Knows nothing of Streamlit.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from html import escape
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.i18n.strings import Texts, language_for

COOKIE = "glm_visitor"
COOKIE_AGE_S = 90 * 86400
PROGRAM_PREFIX = "/_stcore/"  # for programs: a checker passes the token in the query and stores no cookie
SCRIPT_PATH = "/_stcore/script-health-check"  # runs the whole page script, so only this machine may call it
OPEN_PATH = "/_stcore/health"  # says only "ok"; the checker and start.sh call it without the token
FORM = "application/x-www-form-urlencoded"
FORM_LIMIT_BYTES = 4096
FORM_LIMIT_S = 10.0
_VISITOR = re.compile(r"[A-Za-z0-9_-]{22}")

HEADERS = {
    # Nothing is loaded from other hosts: text of the model can neither fetch an image nor run a script.
    # Streamlit needs an inline script and inline styles, eval for its charts, and data: URLs for camera photos.
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    b"font-src 'self' data:; connect-src 'self' data:; worker-src 'self' blob:; "
    b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    b"x-content-type-options": b"nosniff",
    # A URL may hold the token or a chat's id, which must not reach the host of a link.
    b"referrer-policy": b"no-referrer",
    b"permissions-policy": b"camera=(self), microphone=(), geolocation=()",
}


class VisitorCookies:
    """Creates and verifies the cookie: a random visitor id, signed with the token (HMAC-SHA-256).

    Changing the token invalidates every cookie.
    """

    def __init__(self, token: str) -> None:
        self.token = token

    def token_matches(self, candidate: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(candidate.strip().encode(), self.token.encode())

    def sign(self, visitor: str) -> str:
        return f"{visitor}.{self._signature(visitor)}"

    def visitor_of(self, cookie: str | None) -> str | None:
        """The visitor's id, None if the signature is invalid."""
        visitor, _, signature = (cookie or "").partition(".")
        if not _VISITOR.fullmatch(visitor) or not signature.isascii():
            return None
        return visitor if hmac.compare_digest(signature, self._signature(visitor)) else None

    def renew(self, cookie: str | None) -> str:
        """A valid cookie for a browser that presented the token.

        An id signed with an earlier token is kept: nobody can guess its 132 bits, and the browser's chats belong to it.
        """
        visitor = (cookie or "").partition(".")[0]
        return self.sign(visitor if _VISITOR.fullmatch(visitor) else secrets.token_urlsafe(16))

    def _signature(self, visitor: str) -> str:
        return hmac.new(self.token.encode(), f"visitor:{visitor}".encode(), hashlib.sha256).hexdigest()


class Access:
    """Rejects requests without a valid token or cookie, if a token is set; adds HEADERS to every HTTP response."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._cookies = VisitorCookies(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket" and not self._may_connect(scope):
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        cookie, token, query = _cookie(connection), self._cookies.token, dict(connection.query_params)
        candidate = query.get("token", "")
        new_cookie = ""
        from_form = bool(token) and _is_form(scope)
        if from_form:
            candidate = await _token_of_form(receive)
        if scope["path"].rstrip("/") == SCRIPT_PATH and not _is_local(scope):
            await _respond(send, 404, b"", [])
            return
        may_log_in = from_form or scope["method"] == "GET"
        has_token = bool(token) and may_log_in and self._cookies.token_matches(candidate)
        from_program = scope["path"].startswith(PROGRAM_PREFIX)
        if has_token and not from_program:
            await _redirect(scope, self._cookies.renew(cookie), query, send)
            return
        if from_form:
            await _refuse(scope, True, send)
            return
        if self._cookies.visitor_of(cookie) is None and scope["path"] != OPEN_PATH and not (has_token and from_program):
            if token:
                await _refuse(scope, bool(candidate), send)
                return
            new_cookie = self._cookies.renew(cookie)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(message)
                if new_cookie and _is_page(message):
                    message["headers"].append((b"set-cookie", _set_cookie(scope, new_cookie)))
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _may_connect(self, scope: Scope) -> bool:
        """A browser has the cookie; a checker that opens only the WebSocket has the token in the query."""
        connection = HTTPConnection(scope)
        if not self._cookies.token or self._cookies.visitor_of(_cookie(connection)) is not None:
            return True
        return self._cookies.token_matches(connection.query_params.get("token", ""))


def _is_local(scope: Scope) -> bool:
    """Sent from this machine and not through a proxy, which forwards requests of other machines."""
    if any(name.startswith(b"x-forwarded-") or name in (b"x-real-ip", b"forwarded") for name, _ in scope["headers"]):
        return False
    client, server = ((scope.get(end) or ("", 0))[0] for end in ("client", "server"))
    try:
        return ip_address(client).is_loopback or client == server  # the page may listen on one external address only
    except ValueError:
        return False


def _is_form(scope: Scope) -> bool:
    """Whether it is the login form: a POST, so that the token is in no URL, which browsers keep and proxies log."""
    kind = HTTPConnection(scope).headers.get("content-type", "").partition(";")[0].strip().lower()
    return scope["method"] == "POST" and kind == FORM and not scope["path"].startswith(PROGRAM_PREFIX)


async def _token_of_form(receive: Receive) -> str:
    """Empty for a body that is too long, late or no form."""
    body = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(FORM_LIMIT_S):
            while len(body) <= FORM_LIMIT_BYTES:
                message = await receive()
                if message["type"] != "http.request":
                    break  # the browser is gone
                body += message.get("body", b"")
                if not message.get("more_body", False) and len(body) <= FORM_LIMIT_BYTES:
                    return parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
    return ""


async def _redirect(scope: Scope, cookie: str, query: dict[str, str], send: Send) -> None:
    """To the same page without the token, which must not stay in the browser's history or in a copied link."""
    query.pop("token", None)
    # Relative, because a proxy may have stripped a path prefix that only the browser knows.
    page = "./" + quote(scope["path"].rpartition("/")[2])
    location = f"{page}?{urlencode(query)}" if query else page
    headers = [(b"location", location.encode()), (b"set-cookie", _set_cookie(scope, cookie))]
    await _respond(send, 303, b"", headers)


async def _refuse(scope: Scope, wrong_token: bool, send: Send) -> None:
    locale = HTTPConnection(scope).headers.get("accept-language", "").split(",")[0]
    query = {name: value for name, value in HTTPConnection(scope).query_params.items() if name != "token"}
    page = _login_page(Texts(language_for(locale)), wrong_token, query)
    await _respond(send, 401, page.encode(), [(b"content-type", b"text/html; charset=utf-8")])


async def _respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    message = {"type": "http.response.start", "status": status, "headers": headers}
    _add_headers(message)
    await send(message)
    await send({"type": "http.response.body", "body": body})


def _add_headers(message: MutableMapping[str, Any]) -> None:
    others = [(name, value) for name, value in message.get("headers", []) if name.lower() not in HEADERS]
    message["headers"] = [*others, *HEADERS.items()]


def _is_page(message: Mapping[str, Any]) -> bool:
    return any(n.lower() == b"content-type" and v.startswith(b"text/html") for n, v in message["headers"])


def _set_cookie(scope: Scope, value: str) -> bytes:
    secure = scope.get("scheme") == "https" or HTTPConnection(scope).headers.get("x-forwarded-proto") == "https"
    # Without a Path attribute the browser uses the page's directory, which behind a path prefix is that prefix.
    # Lax, not Strict: people follow the link with the token from mails and chats.
    return f"{COOKIE}={value}; Max-Age={COOKIE_AGE_S}; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}".encode()


def _cookie(connection: HTTPConnection) -> str | None:
    # Starlette parses cookies as leniently as browsers do. http.cookies would drop the whole header for one irregular
    # cookie of another program on this host.
    return connection.cookies.get(COOKIE)


def _login_page(texts: Texts, wrong_token: bool, query: Mapping[str, str]) -> str:
    wrong = f'<p role="alert" class="wrong">{escape(texts("login.wrong"))}</p>' if wrong_token else ""
    return LOGIN_PAGE.format(
        language=texts.language,
        title=escape(texts("login.title")),
        how=escape(texts("login.how")),
        wrong=wrong,
        action=escape(f"?{urlencode(query)}"),  # without a wrong token that came in the link
        token=escape(texts("login.token")),
        open=escape(texts("login.open")),
    )


LOGIN_PAGE = """<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 26rem; margin: 18vh auto 0; padding: 0 1.25rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .5rem; }}
label {{ display: block; margin: 1.25rem 0 .25rem; }}
form div {{ display: flex; gap: .5rem; }}
input, button {{ font: inherit; padding: .5rem .75rem; border: 1px solid #8d93a5; border-radius: .6rem; }}
input {{ flex: 1; min-width: 0; }}
button {{ background: #3b5bdb; border-color: #3b5bdb; color: #fff; cursor: pointer; }}
.wrong {{ border-left: .25rem solid #e5484d; padding-left: .75rem; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{how}</p>
{wrong}
<form method="post" action="{action}">
<label for="token">{token}</label>
<div><input id="token" name="token" type="password" autocomplete="off" autofocus required><button>{open}</button></div>
</form>
</main>
</body>
</html>
"""
