"""The console: a glance, then a trend, then a cause. Draws what the store and the API tell; decides nothing.

Everything historical is there when the API is down. The upper part draws itself again every few seconds.
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
from web.console import api_metrics, log_tail, right_sizing
from web.console import history as console_history
from web.console import store as console_store
from web.console.api_metrics import ApiMetrics
from web.console.charts import Trend, bars_chart, trend_chart
from web.console.history import Bar, Now, Point
from web.console.operator_actions import show_actions
from web.console.settings_view import show_settings
from web.console.store import DAY_S, History, NoHistory
from web.i18n.strings import TABLE, Words
from web.safe_text import plain

REFRESH_S = 10
FRESH_S = 5
SPANS = ("1h", "24h", "7d")
SPAN_S = {"1h": 3600.0, "24h": DAY_S, "7d": 7 * DAY_S}
WIDTH_S = {"1h": 60.0, "24h": 60.0, "7d": 3600.0}
ICONS = {
    "up": ":material/check_circle:", "busy": ":material/bolt:", "degraded": ":material/warning:",
    "starting": ":material/hourglass_top:", "down": ":material/error:", "unknown": ":material/help:",
    "none": ":material/sensors_off:",
}  # fmt: skip
FIGURES_IN_A_ROW = 3
SHOWN_INCIDENTS = 20
EVIDENCE_BYTES = 64 * 1024


def show(client: ApiClient, settings: Settings, words: Words) -> None:
    st.header(words("console.title"), anchor=False)
    zone = _zone()
    _live(client, settings, words, zone)
    token = settings.operator_token.get_secret_value() if settings.operator_token else ""
    show_actions(token, settings.log_dir, _model(client), words)
    _show_log(settings, words)
    show_settings(_info(client.base_url, client), settings, words)


@st.fragment(run_every=REFRESH_S)
def _live(client: ApiClient, settings: Settings, words: Words, zone: tzinfo) -> None:
    now = time.time()
    asked = st.session_state.pop("asked", None)
    if asked:
        _history.clear()  # so that who asked sees the request at once
    try:
        history = _history(str(settings.log_dir))
    except NoHistory:
        history = History()
    live = _live_numbers(client.base_url, client)
    info, metrics = _info(client.base_url, client), _metrics(client.base_url, client)
    what = console_history.present(history.runs, history.flips, now, settings.check_period_s)
    _show_sentence(what, {**info, **live}, history.report, words, zone, now)
    if asked:
        st.success(asked, icon=":material/outgoing_mail:")
    if not history.runs and not history.hours:
        st.info(words("console.no_history"), icon=":material/schedule:")
        return
    _show_figures(history, live, metrics, words, now)
    _show_bars(history, words, now)
    _show_trends(history, settings, words, now)
    _show_incidents(history, settings, words, zone, now)
    _show_requests(history, what, words, zone)
    _show_advice(history, info, words, zone, now)


@st.cache_data(ttl=FRESH_S, show_spinner=False)
def _history(log_dir: str) -> History:
    """One reading for all who watch."""
    return console_store.read(Path(log_dir), time.time())


@st.cache_data(ttl=FRESH_S, show_spinner=False)
def _live_numbers(base_url: str, _client: ApiClient) -> dict[str, Any]:
    return _client.health_body()


@st.cache_data(ttl=FRESH_S, show_spinner=False)
def _metrics(base_url: str, _client: ApiClient) -> ApiMetrics:
    return api_metrics.read(_client.metrics_text())


@st.cache_data(ttl=FRESH_S, show_spinner=False)
def _info(base_url: str, _client: ApiClient) -> dict[str, Any]:
    return _client.info_body()


def _model(client: ApiClient) -> str:
    return str(_live_numbers(client.base_url, client).get("model") or "")


def _zone() -> tzinfo:
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, TypeError):
        return UTC


# The sentence on top.


def _show_sentence(
    what: Now, live: dict[str, Any], report: dict[str, Any], words: Words, zone: tzinfo, now: float
) -> None:
    box: Callable[..., Any] = {"up": st.success, "busy": st.success, "down": st.error, "none": st.info}.get(
        what.state, st.warning
    )
    if what.age_s is None:
        sentence = words("state.never")
    elif what.stale:
        sentence = words("state.stale", age=duration(what.age_s, words), word=_word(what.word, words))
    else:
        since = what.since if what.since is not None else now
        sentence = words(
            f"state.{what.state}", since=clock(since, zone, now), span=duration(now - since, words),
            age=duration(what.age_s, words),
        )  # fmt: skip
    box(sentence, icon=ICONS[what.state])
    for reason in what.reasons:
        target, word = words(target_key(reason["target"])), _word(reason["word"], words)
        st.markdown(f"**{target}: {word}** — {plain(reason[words.language])}")
    st.caption(_who(live, report, words))


def _who(live: dict[str, Any], report: dict[str, Any], words: Words) -> str:
    """The model, what it runs on and since when: of what `/info`, `/health` and the last check tell."""
    if not live:
        return words("console.api_silent")
    parts = [plain(str(live.get("model") or "?"))]
    if live.get("version"):
        parts.append(words("console.version", version=plain(str(live["version"]))))
    parts += sorted({plain(str(card["name"])) for card in _cards(report) if card.get("name")}) or [plain(str(live.get("device") or ""))]
    parts.append(plain(str(live.get("dtype") or "")))
    if isinstance(live.get("context_tokens"), int):
        parts.append(words("console.context", count=f"{live['context_tokens']:,}"))
    if isinstance(live.get("slots"), int):
        parts.append(words("console.slots", count=live["slots"]))
    if isinstance(live.get("uptime_s"), int | float):
        parts.append(words("console.runs_for", span=duration(live["uptime_s"], words)))
    if phase := live.get("phase"):
        parts.append(words("console.phase", phase=plain(str(phase))))
    return " · ".join(part for part in parts if part)


def _cards(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The GPUs that the last check saw."""
    return ((report.get("evidence") or {}).get("gpu") or {}).get("gpus") or []


def _word(word: str, words: Words) -> str:
    return words(f"word.{word}") if f"word.{word}" in TABLE else plain(word)


def _told(state: str, words: Words) -> str:
    return words(f"request.{state}")


def target_key(target: str) -> str:
    return f"target.{target}" if f"target.{target}" in TABLE else "target.other"


# Figures, bars, trends.


def _show_figures(history: History, live: dict[str, Any], metrics: ApiMetrics, words: Words, now: float) -> None:
    spans = (("24h", history.minutes, 60.0, DAY_S), ("7d", history.hours, 3600.0, 7 * DAY_S), ("30d", history.hours, 3600.0, 30 * DAY_S))
    figures: list[tuple[str, str, str | None]] = []
    for name, rows, width_s, span_s in spans:
        found = console_history.uptime(rows, "api", width_s, span_s, now)
        share = "–" if found.share is None else f"{percent_down(found.share)} %"
        figures.append((words(f"figure.uptime_{name}"), share, words("figure.seen", share=f"{100 * found.seen:.0f}")))
    first = [(run["readings"] or {}).get("first_token_s") for run in history.runs]
    p95 = console_history.percentile(first, 0.95)
    figures.append((words("figure.first_word"), "–" if p95 is None else f"{p95:.2f} s", words("figure.first_word_help")))
    running, waiting = live.get("running"), live.get("waiting")
    figures.append((words("figure.load"), "–" if running is None else f"{running} / {waiting}", words("figure.load_help")))
    if metrics.tokens_per_s is not None:
        figures.append((words("figure.speed"), f"{short(metrics.tokens_per_s)} t/s", words("figure.speed_help")))
    if metrics.kv_used is not None:
        reused = None if metrics.reused is None else words("figure.reused", share=f"{100 * metrics.reused:.0f}")
        figures.append((words("figure.kv"), f"{100 * metrics.kv_used:.0f} %", reused))
    figures.append(_gpu_figure(history.report, words))
    figures.append((words("figure.failed"), str(console_history.failed_checks(history.runs, now - 3600)), None))
    for left in range(0, len(figures), FIGURES_IN_A_ROW):
        with st.container(horizontal=True):  # a phone breaks each row once more
            for label, value, help in figures[left : left + FIGURES_IN_A_ROW]:
                st.metric(label, value, border=True, help=help)


def percent_down(share: float) -> str:
    """Never rounded up to 100: 99.996 % is not 100 %."""
    hundredths = int(share * 10_000 + 1e-9)
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".")


def _gpu_figure(report: dict[str, Any], words: Words) -> tuple[str, str, str | None]:
    cards = _cards(report)
    if not cards:
        return words("figure.gpu"), words("figure.no_gpu"), None
    card = max(cards, key=lambda each: each.get("memory_used_mib") or 0)
    used, total, hot = card.get("memory_used_mib"), card.get("memory_total_mib"), card.get("temperature_c")
    memory = "–" if used is None else f"{used / 1024:.1f} GiB"
    told = [words("figure.gpu_of", total=f"{total / 1024:.0f}", name=card.get("name") or "GPU")] if total else []
    return words("figure.gpu"), memory, " · ".join([*told, *([] if hot is None else [f"{hot:g} °C"])]) or None


def _show_bars(history: History, words: Words, now: float) -> None:
    st.subheader(words("bars.title"), anchor=False)

    def name(bar: Bar) -> str:
        word = words("bars.none") if bar.state == "none" else _word(bar.word, words)
        return word if bar.answer_s is None else words("bars.answered", word=word, seconds=f"{bar.answer_s:.2f}")

    for target in ("api", "page"):
        bars = console_history.bars(history.minutes, target, now)
        if target == "page" and all(bar.state == "none" for bar in bars):
            continue
        bad = sum(1 for bar in bars if bar.state not in ("up", "busy", "none"))
        blank = sum(1 for bar in bars if bar.state == "none")
        told = words("bars.alt", target=words(f"target.{target}"), bad=bad, none=blank, count=len(bars))
        st.caption(told)
        st.vega_lite_chart(spec=bars_chart(bars, name, told), width="stretch", key=f"bars-{target}")
    st.caption(words("bars.legend"))


def _show_trends(history: History, settings: Settings, words: Words, now: float) -> None:
    st.subheader(words("trend.title"), anchor=False)
    span = st.segmented_control(
        words("trend.span"), SPANS, default="24h", required=True, key="span", label_visibility="collapsed",
        format_func=lambda name: words(f"span.{name}"),
    )  # fmt: skip
    trends = trends_of(history, settings, str(span), words, now)
    shown = [trend for trend in trends if any(point.value is not None for point in trend.points)]
    if not shown:
        st.caption(words("trend.none"))
    for left in range(0, len(shown), 2):
        for column, trend in zip(st.columns(2), shown[left : left + 2], strict=False):
            with column:
                known = [point.value for point in trend.points if point.value is not None]
                limit = "" if trend.limit is None else " · " + words("trend.limit", limit=f"{short(trend.limit)} {trend.unit}")
                st.caption(f"**{trend.title}** {short(known[-1])} {trend.unit}{limit}")
                st.vega_lite_chart(spec=trend_chart(trend, trend.title), width="stretch", key=f"trend-{trend.title}")


def trends_of(history: History, settings: Settings, span: str, words: Words, now: float) -> list[Trend]:
    """Each with the limit at which the checker warns."""
    since = now - SPAN_S[span]

    def points(reading: str) -> list[Point]:
        if span == "1h":
            found = console_history.points_of_runs([run for run in history.runs if run["at"] >= since], reading)
        else:
            rows = history.minutes if span == "24h" else history.hours
            found = console_history.points_of_rollups([row for row in rows if row["start"] >= since], reading)
        return console_history.with_gaps(found, max(WIDTH_S[span], settings.check_period_s))

    in_percent = settings.gpu_memory_limit_mib == 0
    gpu_memory = "gpu_memory_used_percent" if in_percent else "gpu_memory_used"
    gpu_limit = settings.gpu_memory_limit_percent if in_percent else settings.gpu_memory_limit_mib
    rows: tuple[tuple[str, str, float | None, str], ...] = (
        ("picture_s", "s", settings.probe_timeout_s, "GLM_PROBE_TIMEOUT_S"),
        ("first_token_s", "s", None, ""),
        ("pending", "", None, ""),
        ("gpu_load", "%", settings.gpu_load_limit_percent, "GLM_GPU_LOAD_LIMIT_PERCENT"),
        (gpu_memory, "%" if in_percent else "MiB", gpu_limit, "GLM_GPU_MEMORY_LIMIT_MIB"),
        ("cpu_percent", "%", settings.cpu_limit_percent, "GLM_CPU_LIMIT_PERCENT"),
        ("memory_used_percent", "%", settings.memory_limit_percent, "GLM_MEMORY_LIMIT_PERCENT"),
        ("page_s", "s", None, ""),
    )
    form = "%d.%m." if span == "7d" else "%H:%M"
    return [Trend(words(f"trend.{name}"), unit, points(name), limit, setting, form) for name, unit, limit, setting in rows]


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Causes.


def _show_incidents(history: History, settings: Settings, words: Words, zone: tzinfo, now: float) -> None:
    st.subheader(words("incident.title"), anchor=False)
    if not history.incidents:
        st.caption(words("incident.none"))
    for incident in history.incidents[:SHOWN_INCIDENTS]:
        begin, end = incident["first_seen_at"] or incident["opened_at"], incident["closed_at"]
        span = duration((incident["recovered_at"] or end or now) - begin, words)
        over = bool(incident["recovered_at"]) and not end
        icon = ":material/check:" if end else ":material/visibility:" if over else ":material/error:"
        label = words(
            "incident.line" if end else "incident.watched_line" if over else "incident.open_line", at=clock(begin, zone, now), span=span,
            target=words(target_key(incident["target"])), word=_word(incident["word"], words),
        )  # fmt: skip
        with st.expander(label, icon=icon, expanded=not end):
            _show_incident(incident, history, settings, words, zone, now)


def _show_incident(
    incident: dict[str, Any], history: History, settings: Settings, words: Words, zone: tzinfo, now: float
) -> None:
    other = "zh" if words.language == "en" else "en"
    st.markdown(f"{plain(incident[words.language])}  \n:small[{plain(incident[other])}]")
    st.caption(words("incident.facts", rule=plain(incident["rule"]), restarts=incident["restarts"] or 0, id=incident["id"]))
    lines = []
    for moment in console_history.timeline(incident, history.flips, history.actions, history.messages):
        said = plain(moment.text[words.language])
        lines.append(f"- `{clock(moment.at, zone, now, seconds=True)}` {words(f'moment.{moment.kind}')} {said}")
    st.markdown("\n".join(lines))
    files = console_store.evidence_files(settings.log_dir, incident["id"])
    if files:
        root = settings.log_dir / "incidents" / incident["id"]
        names = {str(path.relative_to(root)): path for path in files}
        name = st.selectbox(words("incident.evidence"), list(names), index=None, key=f"evidence-{incident['id']}")
        if name:
            data = names[name].read_bytes()
            st.code(data[:EVIDENCE_BYTES].decode("utf-8", "replace"), language=None, wrap_lines=True, height=320)
            st.download_button(words("log.save"), data, names[name].name, on_click="ignore", key=f"save-{incident['id']}")


def _show_requests(history: History, what: Now, words: Words, zone: tzinfo) -> None:
    if not history.requests:
        return
    st.subheader(words("request.title"), anchor=False)
    if what.stale and any(row["state"] == "waiting" for row in history.requests):
        st.warning(words("request.no_checker"), icon=":material/sensors_off:")
    head = "| # | " + " | ".join(words(f"request.{name}") for name in ("at", "actor", "what", "state", "outcome")) + " |"
    rows = [
        f"| {row['id']} | {clock(row['made_at'], zone, time.time(), seconds=True)} | {plain(row['actor'] or '')} "
        f"| {plain(row['kind'])} {plain(row['target'] or '')} | {_told(row['state'], words)} "
        f"| {plain(row['outcome'] or '')} |"
        for row in history.requests[:10]
    ]
    st.markdown("\n".join([head, "|---|---|---|---|---|---|", *rows]))


def _show_advice(history: History, info: dict[str, Any], words: Words, zone: tzinfo, now: float) -> None:
    st.subheader(words("size.title"), anchor=False)
    total = max((card.get("memory_total_mib") or 0 for card in _cards(history.report)), default=0) or None
    week = right_sizing.look_at(history.hours, now, int(info.get("slots") or 1), zone)
    advice = right_sizing.advise(week, total)
    st.markdown("\n".join(f"- {words(each.key, **each.values)}" for each in advice))


# The log.


def _show_log(settings: Settings, words: Words) -> None:
    st.subheader(words("log.title"), anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(words("log.file"), log_tail.LOGS, key="log-file", width=160)
        level = st.selectbox(words("log.level"), log_tail.LEVELS, index=1, key="log-level", width=140)
        search = st.text_input(words("log.search"), key="log-search", width=260)
        st.button(words("log.again"), icon=":material/refresh:", key="log-again")
    try:
        lines = log_tail.tail(settings.log_dir / name, 200, level, search.strip())
    except OSError:
        st.caption(words("log.missing", name=name))
        return
    text = "\n".join(lines) or words("log.empty")
    with st.container(height=320, autoscroll=True):  # the newest line is what people look for
        st.code(text, language=None, wrap_lines=True)
    st.download_button(words("log.save"), text, name, "text/plain", on_click="ignore", icon=":material/download:")


def duration(seconds: float, words: Words) -> str:
    """The two largest units: 2 h 10 min."""
    whole = max(0, int(seconds))
    parts = [(whole // 86400, "day"), (whole % 86400 // 3600, "hour"), (whole % 3600 // 60, "minute"), (whole % 60, "second")]
    told = [words(f"unit.{unit}", count=count) for count, unit in parts if count]
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    kept = [words(f"unit.{unit}", count=count) for count, unit in parts[first : first + 2] if count]
    return " ".join(kept) if told else words("unit.second", count=0)


def clock(at: float, zone: tzinfo, now: float, seconds: bool = False) -> str:
    moment = datetime.fromtimestamp(at, zone)
    form = "%H:%M:%S" if seconds else "%H:%M"
    return moment.strftime(form if now - at < DAY_S / 2 else f"%Y-%m-%d {form}")
