"""Alerts: which channels, when, how often, and whether they were accepted."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest
from traces import GONE, Replay, api

from monitor.judge.evidence import Traffic
from monitor.judge.history import History, Incident
from monitor.judge.limiter import Decision
from monitor.store.store import Store
from monitor.tell import alerts, channels
from monitor.tell.redaction import redact

NOW = 1_800_000_000.0


class Hook:
    """A channel's server: records what it receives and sends the configured answers."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.default = (200, b"{}")
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        self.port = 0


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found.received.append((self.path, dict(self.headers), body))
            status, answer = found.answers.pop(0) if found.answers else found.default
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


OK = {"dingtalk": b'{"errcode":0}', "feishu": b'{"code":0}', "wecom": b'{"errcode":0}', "webhook": b"{}", "slack": b"ok"}
REFUSED = {
    "dingtalk": b'{"errcode":310000,"errmsg":"sign not match"}', "feishu": b'{"code":19021,"msg":"sign match fail"}',
    "wecom": b'{"errcode":45009,"errmsg":"api freq out of limit"}', "webhook": b'{"ok":false}', "slack": b'{"ok":false,"error":"no_service"}',
}  # fmt: skip


def settings_for(make_settings, name: str, hook: Hook, **changes):
    url = f"http://127.0.0.1:{hook.port}/robot?access_token=TOKEN-0123456789"
    return make_settings(1, **{f"{name}_url": url, "alert_language": "en", **changes})


@pytest.mark.parametrize("name", OK)
def test_a_message_is_accepted(name, hook, make_settings):
    hook.default = (200, OK[name])

    (channel,) = channels.configured(settings_for(make_settings, name, hook))

    assert channel.name == name
    assert channel.send("api: dead.", "page", []) == ""
    assert b"api: dead." in hook.received[0][2]


@pytest.mark.parametrize("name", OK)
def test_an_error_in_the_body_of_a_200_is_a_failure(name, hook, make_settings):
    hook.default = (200, REFUSED[name])

    (channel,) = channels.configured(settings_for(make_settings, name, hook))

    assert "refused" in channel.send("api: dead.", "page", [])


@pytest.mark.parametrize("name", OK)
def test_an_http_error_is_a_failure(name, hook, make_settings):
    hook.default = (500, b"oops")

    (channel,) = channels.configured(settings_for(make_settings, name, hook))

    assert "HTTP 500" in channel.send("x", "page", [])


def test_dingtalk_is_signed(hook, make_settings):
    hook.default = (200, OK["dingtalk"])
    (channel,) = channels.configured(settings_for(make_settings, "dingtalk", hook, dingtalk_secret="SEC0"))

    channel.send("x", "page", [])

    query = parse_qs(urlsplit(hook.received[0][0]).query)
    stamp = query["timestamp"][0]
    digest = hmac.new(b"SEC0", f"{stamp}\nSEC0".encode(), hashlib.sha256).digest()
    assert query["sign"] == [base64.b64encode(digest).decode()] and len(stamp) == 13
    assert query["access_token"] == ["TOKEN-0123456789"]


def test_feishu_is_signed(hook, make_settings):
    hook.default = (200, OK["feishu"])
    (channel,) = channels.configured(settings_for(make_settings, "feishu", hook, feishu_secret="SEC0"))

    channel.send("x", "page", [])

    body = json.loads(hook.received[0][2])
    digest = hmac.new(f"{body['timestamp']}\nSEC0".encode(), b"", hashlib.sha256).digest()
    assert body["sign"] == base64.b64encode(digest).decode() and len(body["timestamp"]) == 10


def test_the_webhook_is_signed_over_time_and_body(hook, make_settings):
    (channel,) = channels.configured(settings_for(make_settings, "webhook", hook, webhook_secret="SEC0"))

    channel.send("x", "page", [{"kind": "fire"}])

    _, headers, body = hook.received[0]
    digest = hmac.new(b"SEC0", headers["X-GLM-Timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["X-GLM-Signature"] == f"sha256={digest}"
    assert json.loads(body)["messages"] == [{"kind": "fire"}]


def test_mail_arrives(make_settings):
    got: list[bytes] = []

    class Smtp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            data = False
            for line in self.rfile:
                if data:
                    got.append(line)
                    if line == b".\r\n":
                        data = False
                        self.wfile.write(b"250 ok\r\n")
                elif line.upper().startswith(b"DATA"):
                    data = True
                    self.wfile.write(b"354 go\r\n")
                elif line.upper().startswith(b"QUIT"):
                    self.wfile.write(b"221 bye\r\n")
                    return
                else:
                    self.wfile.write(b"250 ok\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Smtp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"smtp://127.0.0.1:{server.server_address[1]}/?from=a@b.c&to=d@e.f"
        (channel,) = channels.configured(make_settings(1, smtp_url=url))
        assert channel.send("api: dead.\nmore", "page", []) == ""
        server.shutdown()

    text = b"".join(got)
    assert b"Subject: [page] GLM-4.6V-Flash-WEB: api: dead." in text and b"To: d@e.f" in text


def message(kind: str = "fire", severity: str = "page", text: str = "api: dead.") -> dict:
    return {"kind": kind, "severity": severity, "incident": "1-api-dead", "en": text, "zh": "坏了"}


def test_a_channel_that_was_down_gets_its_messages_later_and_in_order(hook, make_settings, tmp_path):
    settings = settings_for(make_settings, "webhook", hook)
    store = Store.open(tmp_path)
    hook.default = (503, b"")
    alerts.queue(store, [message(text="first")], settings, NOW)
    alerts.deliver(store, settings, {}, NOW)
    alerts.queue(store, [message("resolve", text="second")], settings, NOW + 60)
    alerts.deliver(store, settings, {}, NOW + 31)
    store.close()

    store = Store.open(tmp_path)  # another run of the checker
    assert {row["error"][:8] for row in store.rows("SELECT error FROM outbox WHERE error IS NOT NULL")} == {"HTTP 503"}
    hook.default, hook.received = (200, b"{}"), []
    alerts.deliver(store, settings, {}, NOW + 4000)
    alerts.deliver(store, settings, {}, NOW + 5000)

    assert [json.loads(body)["text"] for _, _, body in hook.received] == ["first", "second"]
    assert not store.rows("SELECT id FROM outbox WHERE sent_at IS NULL")


def test_many_messages_become_one_digest(hook, make_settings, tmp_path):
    settings = settings_for(make_settings, "webhook", hook)
    store = Store.open(tmp_path)
    alerts.queue(store, [message(text=f"number {n}") for n in range(30)], settings, NOW)

    alerts.deliver(store, settings, {}, NOW)

    assert len(hook.received) == 1 and json.loads(hook.received[0][2])["text"].count("number") == 30


def test_messages_per_hour_are_limited(hook, make_settings, tmp_path):
    settings = settings_for(make_settings, "webhook", hook, alerts_per_hour=2)
    store = Store.open(tmp_path)
    for minute in range(10):
        alerts.queue(store, [message(text=str(minute))], settings, NOW + 60 * minute)
        alerts.deliver(store, settings, {}, NOW + 60 * minute)

    assert len(hook.received) == 2
    alerts.deliver(store, settings, {}, NOW + 4000)
    assert len(hook.received) == 3 and json.loads(hook.received[2][2])["text"].split() == [str(n) for n in range(2, 10)]


def test_a_hanging_channel_does_not_delay_the_run_or_the_others(hung, hook, make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(channels, "LIMIT_S", 1.0)
    settings = settings_for(make_settings, "webhook", hook, slack_url=f"http://127.0.0.1:{hung}/x")
    store = Store.open(tmp_path)
    alerts.queue(store, [message()], settings, NOW)

    alerts.deliver(store, settings, {}, NOW)

    left = store.rows("SELECT channel, error FROM outbox WHERE sent_at IS NULL")
    assert [row["channel"] for row in left] == ["slack"] and left[0]["error"]


def test_silence_delays_messages_until_its_end(hook, make_settings, tmp_path):
    settings = settings_for(make_settings, "webhook", hook)
    store = Store.open(tmp_path)
    alerts.queue(store, [message()], settings, NOW)
    hold = {"silence": {"from": NOW - 1, "until": NOW + 600, "reason": ""}}

    alerts.deliver(store, settings, hold, NOW)
    assert hook.received == []
    alerts.deliver(store, settings, hold, NOW + 601)
    assert len(hook.received) == 1


@pytest.mark.parametrize(
    ("local", "waits_h"), [("23:30", 7.5), ("06:59", 1 / 60), ("07:00", 0), ("12:00", 0), ("22:59", 0), ("23:00", 8)]
)
def test_quiet_hours_cross_midnight(make_settings, local, waits_h):
    from datetime import datetime
    from zoneinfo import ZoneInfo

    settings = make_settings(1, quiet_hours="23:00-07:00", timezone="Asia/Shanghai")
    at = datetime.fromisoformat(f"2026-11-22T{local}").replace(tzinfo=ZoneInfo("Asia/Shanghai")).timestamp()

    assert alerts.after_quiet_hours(settings, at) - at == pytest.approx(3600 * waits_h)


def test_only_warnings_wait_for_the_end_of_quiet_hours(hook, make_settings, tmp_path):
    settings = settings_for(make_settings, "webhook", hook, quiet_hours="00:00-23:59", timezone="UTC")
    store = Store.open(tmp_path)
    alerts.queue(store, [message(text="burns"), message(severity="warn", text="warm")], settings, NOW)

    alerts.deliver(store, settings, {}, NOW)

    assert [json.loads(body)["text"] for _, _, body in hook.received] == ["burns"]


def test_incidents_of_one_run_share_a_message_with_rule_and_runbook(make_settings):
    replay = Replay()
    replay.run(GONE)
    opened = [change for change in replay.changes if change.kind == "opened"]
    page = replace(opened[0], target="page", incident=replace(opened[0].incident, id="x", target="page"))
    decisions = {"api": Decision("restart", "dead: process_gone")}

    (fire,) = alerts.compose([*opened, page], [], decisions, {}, {}, make_settings(1), NOW)

    assert fire["kind"] == "fire" and fire["en"].count("\n") == 1
    assert "docs/operations.md#process_gone" in fire["en"] and "restart" in fire["en"] and "处理" in fire["zh"]


def test_reminders_have_growing_intervals_and_stop_for_a_flapping_service(make_settings):
    incident = Incident("1-api-dead", "api", "dead", "process_gone", NOW, NOW, NOW, "gone", "没了")
    histories = {"api": History(word="dead", seen=3, incident=incident)}
    settings, times = make_settings(1), []
    for minute in range(0, 60 * 60):
        if alerts.compose([], [], {}, {}, histories, settings, NOW + 60 * minute):
            times.append(minute)

    assert times == [30, 120, 360, 1440, 2880]
    flapping = {"api": History(word="dead", seen=1, incident=replace(incident, flaps=4))}
    assert alerts.compose([], [], {}, {}, flapping, settings, NOW + 86400) == []


def test_an_open_circuit_is_alerted(make_settings):
    decisions = {"api": Decision("hold", "3 restarts in the last hour, 3 allowed", opens=True)}

    (alert,) = alerts.compose([], [], decisions, {}, {"api": History()}, make_settings(1), NOW)

    assert alert["kind"] == "circuit" and "health_check.py reset" in alert["en"]


def test_secrets_are_redacted(make_settings):
    settings = make_settings(
        1, api_key="sk-abcdef123456", dingtalk_url="https://oapi.example/robot/send?access_token=feedface0001",
        smtp_url="smtps://me:passw0rd99@mail.example:465/?to=a@b.c",
    )  # fmt: skip
    text = "key sk-abcdef123456 at https://oapi.example/robot/send?access_token=feedface0001 or access_token=other passw0rd99"

    clean = redact(text, settings)

    for secret in ("sk-abcdef123456", "feedface0001", "passw0rd99", "other"):
        assert secret not in clean


def test_flaps_in_shadow_send_at_most_two_messages(hook, make_settings, tmp_path):
    settings = settings_for(make_settings, "webhook", hook, alerts_per_hour=1000)
    store = Store.open(tmp_path)
    replay = Replay(mode="shadow")
    for number in range(1030):
        before = len(replay.changes)
        replay.run(GONE if number % 2 and number < 1000 else api())
        histories = {"api": replay.history}
        messages = alerts.compose(replay.changes[before:], [], {}, {}, histories, settings, replay.wall)
        replay.history = histories["api"]
        alerts.queue(store, messages, settings, replay.wall)
        alerts.deliver(store, settings, {}, replay.wall)

    kinds = [json.loads(body)["messages"][0]["kind"] for _, _, body in hook.received]
    assert kinds == ["fire", "resolve"]


@pytest.mark.parametrize(
    ("url", "good", "expected"),
    [
        ("https://hc.example/ping/abc/", True, "https://hc.example/ping/abc"),
        ("https://hc.example/ping/abc", False, "https://hc.example/ping/abc/fail"),
        ("https://hc.example/ping/abc?create=1", False, "https://hc.example/ping/abc/fail?create=1"),
        ("https://kuma/api/push/T?status=up&msg=OK&ping=", True, "https://kuma/api/push/T?status=up&msg=dead+it+is+gone&ping="),
        ("https://kuma/api/push/T?status=up&msg=OK&ping=", False, "https://kuma/api/push/T?status=down&msg=dead+it+is+gone&ping="),
    ],
)
def test_the_ping_url_fits_its_receiver(url, good, expected):
    assert alerts.ping_address(url, good, "dead it is gone")[0] == expected


def test_the_ping_reports_the_verdict_and_whether_it_was_accepted(hook, make_settings):
    settings = make_settings(1, ping_url=f"http://127.0.0.1:{hook.port}/ping/abc")

    assert alerts.ping(settings, {"service_healthy": True, "verdict": "healthy", "reasons": []}) == ""
    assert alerts.ping(settings, {"service_healthy": None, "verdict": "unknown", "reasons": []}) == "", "the checker is alive"
    assert alerts.ping(settings, {"service_healthy": False, "verdict": "dead", "reasons": ["It is gone."]}) == ""
    assert [(path, body) for path, _, body in hook.received] == [
        ("/ping/abc", b"healthy"), ("/ping/abc", b"unknown"), ("/ping/abc/fail", b"dead\nIt is gone."),
    ]  # fmt: skip
    hook.default = (404, b"not found")
    problem = alerts.ping(settings, {"service_healthy": True, "verdict": "healthy", "reasons": []})
    assert problem == "the outbound ping was not accepted: HTTP 404"


def test_a_degraded_target_is_told_once_and_once_when_it_is_well(make_settings) -> None:
    degraded = api(traffic=Traffic(30, {"engine": 29}, 60.0, 29, 1))
    replay, told = Replay(mode="shadow"), []
    for seen in (api(), degraded, degraded, api(), api()):
        before = len(replay.changes)
        replay.run(seen)
        histories = {"api": replay.history}
        told += alerts.compose(replay.changes[before:], [], {}, {"api": replay.verdicts[-1]}, histories, make_settings(1), replay.wall)

    assert [(message["kind"], message["severity"]) for message in told] == [("fire", "warn"), ("resolve", "warn")]
    assert "29 of 59 users' requests failed" in told[0]["en"] and "docs/operations.md#users_fail" in told[0]["zh"]
    assert "no longer degraded" in told[1]["en"]
