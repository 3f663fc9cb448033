"""The console: current state, then trends, then incidents, from the checker's store and the API.

The history is shown even while the API is down. The upper part redraws itself every `REFRESH_S`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

from settings import Settings
from web.api_client.client import ApiClient
from web.console import api_metrics, check_history, checker_store, log_tail, right_sizing
from web.console.api_metrics import ApiMetrics
from web.console.charts import Trend, bars_chart, trend_chart
from web.console.check_history import Bar, CurrentState, Point
from web.console.checker_store import DAY_S, History, HistoryUnavailable
from web.console.operator_actions import show_actions
from web.console.replicas_view import show_replicas
from web.console.settings_view import show_settings
from web.i18n.strings import TABLE, Texts
from web.safe_text import escaped

REFRESH_S = 10
CACHE_S = 5
SPANS = ("1h", "24h", "7d")
SPAN_S = {"1h": 3600.0, "24h": DAY_S, "7d": 7 * DAY_S}
WIDTH_S = {"1h": 60.0, "24h": 60.0, "7d": 3600.0}
ICONS = {
    "up": ":material/check_circle:", "busy": ":material/bolt:", "degraded": ":material/warning:",
    "starting": ":material/hourglass_top:", "down": ":material/error:", "unknown": ":material/help:",
    "none": ":material/sensors_off:",
}  # fmt: skip
FIGURES_PER_ROW = 3
CHECKER_NOTICES = ("settings", "store")
SHOWN_INCIDENTS = 20
SHOWN_EVIDENCE_BYTES = 64 * 1024


def show_console(client: ApiClient, settings: Settings, texts: Texts) -> None:
    st.header(texts("console.title"), anchor=False)
    zone = _zone()
    _live(client, settings, texts, zone)
    token = settings.operator_token.get_secret_value() if settings.operator_token else ""
    show_actions(token, settings.log_dir, _model(client), texts, settings.replica_count)
    _show_log(settings, texts)
    show_settings(_info(client.base_url, client), settings, texts)


@st.fragment(run_every=REFRESH_S)
def _live(client: ApiClient, settings: Settings, texts: Texts, zone: tzinfo) -> None:
    now = time.time()
    notice = st.session_state.pop("request_notice", None)
    if notice:
        _history.clear()  # so that the operator sees the request at once
    try:
        history = _history(str(settings.log_dir))
    except HistoryUnavailable:
        history = History()
    health = _health(client.base_url, client, settings.replica_count)
    info, metrics = _info(client.base_url, client), _metrics(client.base_url, client, settings.replica_count)
    current = check_history.current_state(history.runs, history.flips, now, settings.check_period_s)
    _show_state(current, {**info, **health}, history.report, texts, zone, now)
    if notice:
        st.success(notice, icon=":material/outgoing_mail:")
    show_replicas(history.report, texts, lambda word: _word(word, texts), lambda at: format_time(at, zone, now))
    _show_notices(history.report, texts)
    if not history.runs and not history.hours:
        st.info(texts("console.no_history"), icon=":material/schedule:")
        return
    _show_figures(history, health, metrics, settings.check_period_s, texts, now)
    _show_bars(history, texts, now)
    _show_trends(history, settings, texts, now)
    _show_incidents(history, settings, texts, zone, now)
    _show_requests(history, current, texts, zone)
    _show_advice(history, info, texts, zone, now)


@st.cache_data(ttl=CACHE_S, show_spinner=False)
def _history(log_dir: str) -> History:
    return checker_store.read(Path(log_dir), time.time())


@st.cache_data(ttl=CACHE_S, show_spinner=False)
def _health(base_url: str, _client: ApiClient, replicas: int = 1) -> dict[str, Any]:
    """Of several replicas the body of one that answers, with the requests of all."""
    body = _client.health_body()
    if replicas > 1 and body:
        each = [_client.replica_health(number) for number in range(replicas)]
        body |= {name: sum(one.get(name) or 0 for one in each) for name in ("running", "waiting")}
    return body


@st.cache_data(ttl=CACHE_S, show_spinner=False)
def _metrics(base_url: str, _client: ApiClient, replicas: int = 1) -> ApiMetrics:
    if replicas == 1:
        return api_metrics.parse(_client.metrics_text())
    return api_metrics.parse(*(_client.metrics_text(number) for number in range(replicas)))


@st.cache_data(ttl=CACHE_S, show_spinner=False)
def _info(base_url: str, _client: ApiClient) -> dict[str, Any]:
    return _client.info_body()


def _model(client: ApiClient) -> str:
    return str(_health(client.base_url, client).get("model") or "")


def _zone() -> tzinfo:
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, TypeError):
        return UTC


# The current state.


def _show_state(
    current: CurrentState, service: dict[str, Any], report: dict[str, Any], texts: Texts, zone: tzinfo, now: float
) -> None:
    callout: Callable[..., Any] = {"up": st.success, "busy": st.success, "down": st.error, "none": st.info}.get(
        current.state, st.warning
    )
    if current.age_s is None:
        sentence = texts("state.never")
    elif current.stale:
        sentence = texts("state.stale", age=format_duration(current.age_s, texts), word=_word(current.word, texts))
    else:
        since = current.since if current.since is not None else now
        sentence = texts(
            f"state.{current.state}", since=format_time(since, zone, now), span=format_duration(now - since, texts),
            age=format_duration(current.age_s, texts),
        )  # fmt: skip
    callout(sentence, icon=ICONS[current.state])
    for reason in current.reasons:
        target, word = target_name(reason["target"], texts), _word(reason["word"], texts)
        st.markdown(f"**{target}: {word}** — {escaped(reason[texts.language])}")
    st.caption(_service_line(service, report, texts))
    if baseline := baseline_line(service.get("health_baseline"), texts, zone, now):
        st.caption(baseline)


def _show_notices(report: dict[str, Any], texts: Texts) -> None:
    """What the last check says of itself: invalid settings, a store that it had to replace."""
    for warning in report.get("warnings") or ():
        if isinstance(warning, dict) and warning.get("name") in CHECKER_NOTICES:
            st.warning(escaped(str(warning.get(texts.language) or "")), icon=":material/build:")


def baseline_line(baseline: object, texts: Texts, zone: tzinfo, now: float) -> str:
    """How many of the checker's questions this model answered rightly after its first start; empty if it is unknown."""
    kinds = baseline.get("kinds") if isinstance(baseline, dict) else None
    if not isinstance(baseline, dict) or not isinstance(kinds, dict):
        return ""
    parts = []
    for kind, counts in kinds.items():
        if isinstance(counts, dict) and isinstance(counts.get("asked"), int) and isinstance(counts.get("right"), int):
            name = texts(f"question.{kind}") if f"question.{kind}" in TABLE else escaped(str(kind))
            parts.append(texts("console.baseline_kind", kind=name, right=counts["right"], asked=counts["asked"]))
    if not parts:
        return ""
    taken = baseline.get("taken_at")
    at = format_time(taken, zone, now) if isinstance(taken, int | float) else "?"
    return texts("console.baseline", at=at, kinds=", ".join(parts))


def _service_line(service: dict[str, Any], report: dict[str, Any], texts: Texts) -> str:
    """The model, its device and its uptime, from `/info`, `/health` (`service`) and the last check (`report`)."""
    if not service:
        return texts("console.api_silent")
    parts = [escaped(str(service.get("model") or "?"))]
    if service.get("version"):
        parts.append(texts("console.version", version=escaped(str(service["version"]))))
    parts += sorted({escaped(str(card["name"])) for card in _cards(report) if card.get("name")}) or [escaped(str(service.get("device") or ""))]
    parts.append(escaped(str(service.get("dtype") or "")))
    if isinstance(service.get("context_tokens"), int):
        parts.append(texts("console.context", count=f"{service['context_tokens']:,}"))
    if isinstance(service.get("slots"), int):
        parts.append(texts("console.slots", count=service["slots"]))
    if isinstance(service.get("uptime_s"), int | float):
        parts.append(texts("console.runs_for", span=format_duration(service["uptime_s"], texts)))
    if phase := service.get("phase"):
        parts.append(texts("console.phase", phase=escaped(str(phase))))
    return " · ".join(part for part in parts if part)


def _cards(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The GPUs that the last check saw."""
    return ((report.get("evidence") or {}).get("gpu") or {}).get("gpus") or []


def _word(word: str, texts: Texts) -> str:
    return texts(f"word.{word}") if f"word.{word}" in TABLE else escaped(word)


def _request_state(state: str, texts: Texts) -> str:
    return texts(f"request.{state}")


def target_key(target: str) -> str:
    return f"target.{target}" if f"target.{target}" in TABLE else "target.other"


def target_name(target: str, texts: Texts) -> str:
    name, _, number = target.partition("/")
    return texts("target.replica", number=escaped(number)) if name == "api" and number else texts(target_key(target))


# Figures, bars, trends.


def _show_figures(
    history: History, health: dict[str, Any], metrics: ApiMetrics, period_s: float, texts: Texts, now: float
) -> None:
    spans = (("24h", history.minutes, 60.0, DAY_S), ("7d", history.hours, 3600.0, 7 * DAY_S), ("30d", history.hours, 3600.0, 30 * DAY_S))
    figures: list[tuple[str, str, str | None]] = []
    seen: dict[str, str] = {}
    for name, rows, width_s, span_s in spans:
        uptime = check_history.uptime(rows, "api", width_s, span_s, now, period_s)
        share = "–" if uptime.share is None else f"{percent_rounded_down(uptime.share)} %"
        label = texts(f"figure.uptime_{name}")
        covered = percent_rounded_down(uptime.coverage) if uptime.coverage >= 0.0001 else "< 0.01"
        if uptime.seen_s:
            seen[label] = texts("figure.seen", share=covered)
        span = format_duration(uptime.seen_s, texts)
        figures.append((label, share, texts("figure.coverage", share=covered if uptime.seen_s else "0", span=span)))
    ttfts = [(run["readings"] or {}).get("first_token_s") for run in history.runs]
    p95 = check_history.percentile(ttfts, 0.95)
    figures.append((texts("figure.first_word"), "–" if p95 is None else f"{p95:.2f} s", texts("figure.first_word_help")))
    running, waiting = health.get("running"), health.get("waiting")
    figures.append((texts("figure.load"), "–" if running is None else f"{running} / {waiting}", texts("figure.load_help")))
    if metrics.tokens_per_s is not None:
        figures.append((texts("figure.speed"), f"{format_number(metrics.tokens_per_s)} t/s", texts("figure.speed_help")))
    if metrics.kv_used is not None:
        reused = None if metrics.reused is None else texts("figure.reused", share=f"{100 * metrics.reused:.0f}")
        figures.append((texts("figure.kv"), f"{100 * metrics.kv_used:.0f} %", reused))
    figures.append(_gpu_figure(history.report, texts))
    figures.append((texts("figure.failed"), str(check_history.failed_checks(history.runs, now - 3600)), None))
    for start in range(0, len(figures), FIGURES_PER_ROW):
        with st.container(horizontal=True):  # wraps again on a phone
            for label, value, tooltip in figures[start : start + FIGURES_PER_ROW]:
                st.metric(label, value, seen.get(label), delta_color="off", delta_arrow="off", border=True, help=tooltip)


def percent_rounded_down(share: float) -> str:
    """So that 99.996 % is not shown as 100 %."""
    hundredths = int(share * 10_000 + 1e-9)
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".")


def _gpu_figure(report: dict[str, Any], texts: Texts) -> tuple[str, str, str | None]:
    cards = _cards(report)
    if not cards:
        return texts("figure.gpu"), texts("figure.no_gpu"), None
    card = max(cards, key=lambda each: each.get("memory_used_mib") or 0)
    used, total, temperature = card.get("memory_used_mib"), card.get("memory_total_mib"), card.get("temperature_c")
    memory = "–" if used is None else f"{used / 1024:.1f} GiB"
    parts = [texts("figure.gpu_of", total=f"{total / 1024:.0f}", name=card.get("name") or "GPU")] if total else []
    return texts("figure.gpu"), memory, " · ".join([*parts, *([] if temperature is None else [f"{temperature:g} °C"])]) or None


def _show_bars(history: History, texts: Texts, now: float) -> None:
    st.subheader(texts("bars.title"), anchor=False)

    def name(bar: Bar) -> str:
        word = texts("bars.none") if bar.state == "none" else _word(bar.word, texts)
        return word if bar.answer_s is None else texts("bars.answered", word=word, seconds=f"{bar.answer_s:.2f}")

    for target in ("api", "page"):
        bars = check_history.bars(history.minutes, target, now)
        if target == "page" and all(bar.state == "none" for bar in bars):
            continue
        bad = sum(1 for bar in bars if bar.state not in ("up", "busy", "none"))
        empty = sum(1 for bar in bars if bar.state == "none")
        summary = texts("bars.alt", target=texts(f"target.{target}"), bad=bad, none=empty, count=len(bars))
        st.caption(summary)
        st.vega_lite_chart(spec=bars_chart(bars, name, summary), width="stretch", key=f"bars-{target}")
    st.caption(texts("bars.legend"))


def _show_trends(history: History, settings: Settings, texts: Texts, now: float) -> None:
    st.subheader(texts("trend.title"), anchor=False)
    span = st.segmented_control(
        texts("trend.span"), SPANS, default="24h", required=True, key="span", label_visibility="collapsed",
        format_func=lambda name: texts(f"span.{name}"),
    )  # fmt: skip
    trends = trends_of(history, settings, str(span), texts, now)
    shown = [trend for trend in trends if any(point.value is not None for point in trend.points)]
    if not shown:
        st.caption(texts("trend.none"))
    for start in range(0, len(shown), 2):
        for column, trend in zip(st.columns(2), shown[start : start + 2], strict=False):
            with column:
                values = [point.value for point in trend.points if point.value is not None]
                limit = "" if trend.limit is None else " · " + texts("trend.limit", limit=f"{format_number(trend.limit)} {trend.unit}")
                st.caption(f"**{trend.title}** {format_number(values[-1])} {trend.unit}{limit}")
                st.vega_lite_chart(spec=trend_chart(trend, trend.title), width="stretch", key=f"trend-{trend.title}")


def trends_of(history: History, settings: Settings, span: str, texts: Texts, now: float) -> list[Trend]:
    """The trends of a span, each with the limit at which the checker alerts."""
    since = now - SPAN_S[span]

    def points(reading: str) -> list[Point]:
        if span == "1h":
            known = check_history.points_of_runs([run for run in history.runs if run["at"] >= since], reading)
        else:
            rows = history.minutes if span == "24h" else history.hours
            known = check_history.points_of_rollups([row for row in rows if row["start"] >= since], reading)
        return check_history.with_gaps(known, max(WIDTH_S[span], settings.check_period_s))

    in_percent = settings.gpu_memory_limit_mib == 0
    gpu_memory = "gpu_memory_used_percent" if in_percent else "gpu_memory_used"
    gpu_limit = settings.gpu_memory_limit_percent if in_percent else settings.gpu_memory_limit_mib
    gpu_setting = "GLM_GPU_MEMORY_LIMIT_PERCENT" if in_percent else "GLM_GPU_MEMORY_LIMIT_MIB"
    rows: tuple[tuple[str, str, float | None, str], ...] = (
        ("picture_s", "s", settings.probe_timeout_s, "GLM_PROBE_TIMEOUT_S"),
        ("first_token_s", "s", None, ""),
        ("pending", "", None, ""),
        ("gpu_load", "%", settings.gpu_load_limit_percent or None, "GLM_GPU_LOAD_LIMIT_PERCENT"),
        (gpu_memory, "%" if in_percent else "MiB", gpu_limit, gpu_setting),
        ("cpu_percent", "%", settings.cpu_limit_percent, "GLM_CPU_LIMIT_PERCENT"),
        ("memory_used_percent", "%", settings.memory_limit_percent, "GLM_MEMORY_LIMIT_PERCENT"),
        ("page_s", "s", None, ""),
    )
    time_format = "%d.%m." if span == "7d" else "%H:%M"
    return [Trend(texts(f"trend.{name}"), unit, points(name), limit, setting, time_format) for name, unit, limit, setting in rows]


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Incidents, requests, advice.


def _show_incidents(history: History, settings: Settings, texts: Texts, zone: tzinfo, now: float) -> None:
    st.subheader(texts("incident.title"), anchor=False)
    if not history.incidents:
        st.caption(texts("incident.none"))
    for incident in history.incidents[:SHOWN_INCIDENTS]:
        begin, end = incident["first_seen_at"] or incident["opened_at"], incident["closed_at"]
        span = format_duration((incident["recovered_at"] or end or now) - begin, texts)
        recovered = bool(incident["recovered_at"]) and not end
        icon = ":material/check:" if end else ":material/visibility:" if recovered else ":material/error:"
        label = texts(
            "incident.line" if end else "incident.watched_line" if recovered else "incident.open_line", at=format_time(begin, zone, now), span=span,
            target=target_name(incident["target"], texts), word=_word(incident["word"], texts),
        )  # fmt: skip
        with st.expander(label, icon=icon, expanded=not end):
            _show_incident(incident, history, settings, texts, zone, now)


def _show_incident(
    incident: dict[str, Any], history: History, settings: Settings, texts: Texts, zone: tzinfo, now: float
) -> None:
    other = "zh" if texts.language == "en" else "en"
    st.markdown(f"{escaped(incident[texts.language])}  \n:small[{escaped(incident[other])}]")
    st.caption(texts("incident.facts", rule=escaped(incident["rule"]), restarts=incident["restarts"] or 0, id=incident["id"]))
    lines = []
    for event in check_history.timeline(incident, history.flips, history.actions, history.messages):
        description = escaped(event.text[texts.language])
        lines.append(f"- `{format_time(event.at, zone, now, seconds=True)}` {texts(f'timeline.{event.kind}')} {description}")
    st.markdown("\n".join(lines))
    files = checker_store.evidence_files(settings.log_dir, incident["id"])
    if files:
        root = settings.log_dir / "incidents" / incident["id"]
        names = {str(path.relative_to(root)): path for path in files}
        name = st.selectbox(texts("incident.evidence"), list(names), index=None, key=f"evidence-{incident['id']}")
        if name:
            data = names[name].read_bytes()
            st.code(data[:SHOWN_EVIDENCE_BYTES].decode("utf-8", "replace"), language=None, wrap_lines=True, height=320)
            st.download_button(texts("log.save"), data, names[name].name, on_click="ignore", key=f"save-{incident['id']}")


def _show_requests(history: History, current: CurrentState, texts: Texts, zone: tzinfo) -> None:
    if not history.requests:
        return
    st.subheader(texts("request.title"), anchor=False)
    if current.stale and any(row["state"] == "waiting" for row in history.requests):
        st.warning(texts("request.no_checker"), icon=":material/sensors_off:")
    head = "| # | " + " | ".join(texts(f"request.{name}") for name in ("at", "actor", "what", "state", "outcome")) + " |"
    rows = [
        f"| {row['id']} | {format_time(row['made_at'], zone, time.time(), seconds=True)} | {escaped(row['actor'] or '')} "
        f"| {escaped(row['kind'])} {escaped(row['target'] or '')} | {_request_state(row['state'], texts)} "
        f"| {escaped(row['outcome'] or '')} |"
        for row in history.requests[:10]
    ]
    st.markdown("\n".join([head, "|---|---|---|---|---|---|", *rows]))


def _show_advice(history: History, info: dict[str, Any], texts: Texts, zone: tzinfo, now: float) -> None:
    st.subheader(texts("size.title"), anchor=False)
    total = max((card.get("memory_total_mib") or 0 for card in _cards(history.report)), default=0) or None
    week = right_sizing.summarize_week(history.hours, now, int(info.get("slots") or 1), zone)
    advice = right_sizing.advise(week, total, info.get("card_classes") or (), str(info.get("weights") or ""))
    st.markdown("\n".join(f"- {texts(item.key, **item.values)}" for item in advice))


# The log.


def _show_log(settings: Settings, texts: Texts) -> None:
    st.subheader(texts("log.title"), anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(texts("log.file"), log_tail.logs_of(settings.replica_count), key="log-file", width=160)
        level = st.selectbox(texts("log.level"), log_tail.LEVELS, index=1, key="log-level", width=140)
        search = st.text_input(texts("log.search"), key="log-search", width=260)
        st.button(texts("log.again"), icon=":material/refresh:", key="log-again")
    try:
        lines = log_tail.tail(settings.log_dir / name, 200, level, search.strip())
    except OSError:
        st.caption(texts("log.missing", name=name))
        return
    text = "\n".join(lines) or texts("log.empty")
    with st.container(height=320, autoscroll=True):  # shows the newest line
        st.code(text, language=None, wrap_lines=True)
    st.download_button(texts("log.save"), text, name, "text/plain", on_click="ignore", icon=":material/download:")


def format_duration(seconds: float, texts: Texts) -> str:
    """The two largest units: 2 h 10 min."""
    whole = max(0, int(seconds))
    parts = [(whole // 86400, "day"), (whole % 86400 // 3600, "hour"), (whole % 3600 // 60, "minute"), (whole % 60, "second")]
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    shown = [texts(f"unit.{unit}", count=count) for count, unit in parts[first : first + 2] if count]
    return " ".join(shown) if shown else texts("unit.second", count=0)


def format_time(at: float, zone: tzinfo, now: float, seconds: bool = False) -> str:
    """The time of day; with the date if it is more than half a day ago."""
    moment = datetime.fromtimestamp(at, zone)
    time_format = "%H:%M:%S" if seconds else "%H:%M"
    return moment.strftime(time_format if now - at < DAY_S / 2 else f"%Y-%m-%d {time_format}")
