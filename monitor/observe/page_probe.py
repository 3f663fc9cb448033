"""Probes the page: its health route, the WebSocket, its script, and the same through a reverse proxy; each with a deadline."""

from __future__ import annotations

import time
from functools import partial
from urllib.parse import quote

from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from monitor.judge.evidence import ApiContact, PageEvidence, PageReply
from monitor.observe.http_exchange import Deadline, exchange, failed_reply, seconds_since
from monitor.observe.self_report import count, text
from settings import Settings

LIMIT_S = 10.0
CLOSE_LIMIT_S = 0.5
CONTACT_LIMIT_S = 8.0  # the page gives up on its API after 7
REFUSED = (401, 403)
API_ANSWERS = ("ok", "refused", "loading", "unreachable")


def probe_page(settings: Settings, with_script: bool) -> PageEvidence:
    """Takes at most four times LIMIT_S; a refused handshake takes none of it. `with_script` also runs the page's script, which puts load on the page."""
    url = page_url(settings)
    health = get(f"{url}/_stcore/health", LIMIT_S)
    if not health.good:
        return PageEvidence(url, health=health)
    # Every route but the health route requires the token.
    query = f"?token={quote(settings.web_token.get_secret_value())}" if settings.web_token else ""
    websocket = handshake(f"{url}/_stcore/stream{query}", LIMIT_S)
    # Meanwhile: the page may wait for an API that does not answer.
    asking = Deadline(lambda: api_contact(f"{url}/_stcore/api-contact{query}"), CONTACT_LIMIT_S, None) if websocket.good else None
    # The WebSocket may be refused for other reasons too. Any other route says whether the token was the reason.
    token = get(f"{url}/_stcore/host-config{query}", LIMIT_S) if websocket.status in REFUSED else None
    tokenless = get(f"{url}/_stcore/host-config", LIMIT_S) if query and websocket.good else None
    script = get(f"{url}/_stcore/script-health-check{query}", LIMIT_S) if with_script else None
    front: PageReply | None = None
    if settings.front_url:
        front_url = settings.front_url.rstrip("/")
        front = get(f"{front_url}/_stcore/health", LIMIT_S)
        if front.good:
            front = handshake(f"{front_url}/_stcore/stream{query}", LIMIT_S)
    contact = asking.result() if asking else None
    return PageEvidence(url, health=health, websocket=websocket, script=script, front=front, token=token, tokenless=tokenless, api_contact=contact)


def page_url(settings: Settings) -> str:
    host = settings.web_host
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.web_port}"


def get(url: str, limit_s: float) -> PageReply:
    reply = exchange(url, limit_s)
    body = reply.body.decode("utf-8", "replace").strip()[:200] if reply.status not in (0, 200) else ""
    return PageReply(reply.outcome, reply.seconds, reply.status, reply.detail or body)


def api_contact(url: str) -> ApiContact | None:
    """Whether the page can ask the API, by its own words; None if it does not say."""
    reply = exchange(url, CONTACT_LIMIT_S)
    said = (reply.json() or {}) if reply.status == 200 else {}
    if said.get("api") not in API_ANSWERS:
        return None
    return ApiContact(said["api"], count(said.get("status")) or 0, text(said.get("address"), 80))


def handshake(url: str, limit_s: float) -> PageReply:
    """Opens a WebSocket (RFC 6455), without which a browser shows nothing. `url` starts with http(s); 101 is good."""
    timeout = PageReply("silent", limit_s, detail=f"no handshake within {limit_s:.1f} s")
    return Deadline(partial(_shake_hands, url, limit_s), limit_s, timeout).result()


def _shake_hands(url: str, limit_s: float) -> PageReply:
    started = time.monotonic()
    try:
        with connect(
            "ws" + url.removeprefix("http"), subprotocols=[Subprotocol("streamlit")], compression=None, proxy=None,
            user_agent_header="health_check", open_timeout=limit_s, close_timeout=CLOSE_LIMIT_S,
        ):  # fmt: skip
            return PageReply("answered", seconds_since(started), 101)
    except InvalidStatus as error:
        status = error.response.status_code
        return PageReply("answered", seconds_since(started), status, f"HTTP {status} instead of 101")
    except InvalidHandshake as error:
        return PageReply("failed", seconds_since(started), 101, f"the handshake is invalid: {error}"[:200])
    except Exception as error:
        failed = failed_reply(error, started, limit_s)
        return PageReply(failed.outcome, failed.seconds, detail=failed.detail)
