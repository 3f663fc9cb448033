"""The alert channels: DingTalk, Feishu, WeCom, a signed webhook, Slack, e-mail. Each reports whether it accepted a message.

Several of them answer 200 with an error in the body, so the body decides. No channel raises, and no error text contains a
URL, because URLs hold tokens.

Why not apprise: version 2.3.0, tried against the tests' servers, would have covered e-mail only, and without opportunistic
STARTTLS. Its DingTalk, Feishu, WeCom and Slack plugins send to a fixed host and reject a custom URL. Its DingTalk, WeCom
and JSON webhook plugins treat an error in a 200 body as success. It cannot sign Feishu and webhook messages, encodes
DingTalk's signature twice, and reports the reason of a failure in a log only. It adds 37 MiB to a run that sends.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import smtplib
import ssl
import time
from abc import abstractmethod
from collections.abc import Mapping
from email.message import EmailMessage
from typing import Any, Protocol
from urllib.parse import parse_qs, quote_plus, unquote, urlsplit

from monitor.observe.http_exchange import Reply, exchange
from settings import Settings

LIMIT_S = 5.0
REPLIES_LIMIT_BYTES = 2**20
TEXT_LIMIT_BYTES = 3800  # WeCom accepts 4096, DingTalk 20000
TITLE = "GLM-4.6V-Flash-WEB"


class Channel(Protocol):
    name: str

    @abstractmethod
    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        """Empty if the message was accepted, otherwise why not. Never raises; blocks for a few times LIMIT_S at most."""


def configured(settings: Settings) -> list[Channel]:
    def value(name: str) -> str:
        secret = getattr(settings, name)
        return secret.get_secret_value() if secret is not None else ""

    found: list[Channel] = []
    if value("dingtalk_url"):
        found.append(DingTalk(value("dingtalk_url"), value("dingtalk_secret")))
    if value("feishu_url"):
        found.append(Feishu(value("feishu_url"), value("feishu_secret")))
    if value("wecom_url"):
        found.append(WeCom(value("wecom_url")))
    if value("webhook_url"):
        found.append(Webhook(value("webhook_url"), value("webhook_secret")))
    if value("slack_url"):
        found.append(Slack(value("slack_url")))
    if value("smtp_url"):
        found.append(Mail(value("smtp_url")))
    return found


class DingTalk:
    """Signature: base64(HMAC-SHA256(secret, "<ms>\\n<secret>")), URL-encoded. Mentions everybody for severity `page` only."""

    name = "dingtalk"

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._secret = url, secret

    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        url = self._url
        if self._secret:
            stamp = str(round(time.time() * 1000))
            digest = hmac.new(self._secret.encode(), f"{stamp}\n{self._secret}".encode(), hashlib.sha256).digest()
            url += f"{'&' if '?' in url else '?'}timestamp={stamp}&sign={quote_plus(base64.b64encode(digest))}"
        body = {
            "msgtype": "markdown",
            "markdown": {"title": TITLE, "text": f"#### {TITLE}\n\n" + _truncated(text).replace("\n", "\n\n")},
            "at": {"isAtAll": severity == "page"},
        }
        return _refusal(_post(url, body), "errcode", "errmsg")


class Feishu:
    """Signature: base64(HMAC-SHA256("<s>\\n<secret>", "")), in the body beside the timestamp."""

    name = "feishu"

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._secret = url, secret

    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        body: dict[str, Any] = {"msg_type": "text", "content": {"text": f"{TITLE}\n{_truncated(text)}"}}
        if self._secret:
            stamp = str(int(time.time()))
            digest = hmac.new(f"{stamp}\n{self._secret}".encode(), b"", hashlib.sha256).digest()
            body |= {"timestamp": stamp, "sign": base64.b64encode(digest).decode()}
        return _refusal(_post(self._url, body), "code", "msg")


class WeCom:
    name = "wecom"

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        body = {"msgtype": "markdown", "markdown": {"content": f"**{TITLE}**\n{_truncated(text)}"}}
        return _refusal(_post(self._url, body), "errcode", "errmsg")


class Webhook:
    """X-GLM-Signature: sha256=HMAC(secret, "<timestamp>.<body>"), so that a receiver can reject forgeries and replays."""

    name = "webhook"

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._secret = url, secret

    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        body = {"service": TITLE, "severity": severity, "text": _truncated(text), "messages": list(messages)}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        stamp = str(int(time.time()))
        headers = {"Content-Type": "application/json", "X-GLM-Timestamp": stamp}
        if self._secret:
            digest = hmac.new(self._secret.encode(), stamp.encode() + b"." + data, hashlib.sha256).hexdigest()
            headers["X-GLM-Signature"] = f"sha256={digest}"
        return _refusal(exchange(self._url, LIMIT_S, "POST", data, headers, connect_s=3.0), "", "")


class Slack:
    """Slack, and any other receiver of {"text": ...}."""

    name = "slack"

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        mention = "<!channel> " if severity == "page" else ""
        return _refusal(_post(self._url, {"text": f"{mention}*{TITLE}*\n{_truncated(text)}"}), "", "")


class Mail:
    """smtps://user:password@host:465/?from=a@b.c&to=d@e.f,g@h.i; smtp:// uses STARTTLS if the server offers it."""

    name = "email"

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, text: str, severity: str, messages: list[Mapping[str, Any]]) -> str:
        parts = urlsplit(self._url)
        query = parse_qs(parts.query)
        mail = EmailMessage()
        mail["Subject"] = f"[{severity}] {TITLE}: {text.splitlines()[0][:120] if text else ''}"
        mail["From"] = query.get("from", ["health_check@localhost"])[0]
        mail["To"] = ", ".join(query.get("to", []))
        mail.set_content(text)
        try:
            with self._connect(parts.scheme, parts.hostname or "localhost", parts.port) as server:
                if parts.username:
                    server.login(unquote(parts.username), unquote(parts.password or ""))
                server.send_message(mail)
        except (OSError, smtplib.SMTPException) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    @staticmethod
    def _connect(scheme: str, host: str, port: int | None) -> smtplib.SMTP:
        if scheme == "smtps":
            return _SmtpSsl(host, port or 465, timeout=LIMIT_S, context=ssl.create_default_context())
        server = _Smtp(host, port or 25, timeout=LIMIT_S)
        server.ehlo()
        if server.has_extn("starttls"):
            server.starttls(context=ssl.create_default_context())
            server.ehlo()
        return server


class _BoundedReplies:
    """What a mail server sends, up to REPLIES_LIMIT_BYTES; smtplib limits only the length of a line, not their number."""

    def __init__(self, replies: Any) -> None:
        self._replies, self._left = replies, REPLIES_LIMIT_BYTES

    def readline(self, limit: int) -> bytes:
        line: bytes = self._replies.readline(limit)
        self._left -= len(line)
        if self._left < 0:
            raise OSError(f"the mail server sends more than {REPLIES_LIMIT_BYTES} bytes")
        return line

    def close(self) -> None:
        self._replies.close()


class _Smtp(smtplib.SMTP):
    def getreply(self) -> tuple[int, bytes]:
        if self.file is None and self.sock is not None:
            self.file = _BoundedReplies(self.sock.makefile("rb"))
        return super().getreply()


class _SmtpSsl(smtplib.SMTP_SSL):
    getreply = _Smtp.getreply


def _post(url: str, body: Mapping[str, Any]) -> Reply:
    data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    return exchange(url, LIMIT_S, "POST", data, {"Content-Type": "application/json"}, connect_s=3.0)


def _refusal(reply: Reply, code_name: str, message_name: str) -> str:
    """Why the message was not accepted; empty if it was.

    `code_name`: the field that must be present and 0. If empty, any field that reports an error counts.
    """
    if reply.outcome != "answered":
        return f"{reply.outcome}: {reply.detail}"
    body = reply.json()
    if not 200 <= reply.status < 300:
        return f"HTTP {reply.status}: {reply.body[:150].decode('utf-8', 'replace')}"
    if code_name:
        if body is None or body.get(code_name) != 0:
            reason = (body or {}).get(message_name) or reply.body[:150].decode("utf-8", "replace")
            return f"refused with {code_name} {(body or {}).get(code_name)}: {reason}"
        return ""
    if body is None:
        return ""
    for name in ("errcode", "code", "error_code", "StatusCode"):
        if isinstance(body.get(name), int) and body[name] not in (0, 200):
            return f"refused with {name} {body[name]}"
    if body.get("ok") is False or body.get("success") is False or body.get("error"):
        return f"refused: {body.get('error') or 'not ok'}"
    return ""


def _truncated(text: str) -> str:
    data = text.encode()
    return text if len(data) <= TEXT_LIMIT_BYTES else data[:TEXT_LIMIT_BYTES].decode("utf-8", "ignore") + " ..."
