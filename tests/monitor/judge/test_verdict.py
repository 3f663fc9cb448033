"""Each rule, with evidence just inside and just outside its threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from traces import FULL, GONE, IDLE, NO_HTTP, RIGHT, RUNS, SILENT, WEDGED, api, beat, busy, zombie

from monitor.judge.api_rules import judge_api
from monitor.judge.evidence import (
    AccuracyEvidence,
    Answer,
    ApiContact,
    ApiEvidence,
    CardEvent,
    Corruption,
    Fall,
    HealthReply,
    PageEvidence,
    PageReply,
    Process,
    SelfReport,
    Traffic,
)  # fmt: skip
from monitor.judge.page_rules import judge_page
from monitor.judge.verdict import SERVING, WORDS, Limits

LIMITS = Limits()
STRANGER = replace(RUNS, port_owner="stranger", holder="pid 9 (nc)")
CLOSED = replace(RUNS, port_owner="nobody")
CREDITED = (Answer("text", "credited"), Answer("picture", "credited"))
FULL_AND_MOVING = {"first": busy(1, 70), "answers": FULL, "last": busy(1, 90)}


def says(**report) -> HealthReply:
    return replace(IDLE, report=SelfReport(**report))


def loading(still_s: float | None, progress: float = 0.4) -> HealthReply:
    return HealthReply("answered", 0, 503, "loading", progress=progress, report=SelfReport(loading_still_s=still_s))


def loads(still_s: float | None, age_s: float) -> ApiEvidence:
    return api(first=loading(still_s), answers=(), process=replace(RUNS, age_s=age_s))


def silent_load(still_s: float, written_age_s: float) -> ApiEvidence:
    """The writer of the file is blocked together with the load, as by a library that holds Python's lock."""
    file = beat(written_age_s, written_age_s, state="loading", report=SelfReport(loading_still_s=still_s))
    return api(first=NO_HTTP, answers=SILENT, last=NO_HTTP, beat=file)


WRONG = (RIGHT[0], Answer("picture", "wrong", 3, 200, "red circle", "blue"))
UNJUDGED = (Answer("text", "unjudged", 0.2, 200), Answer("picture", "unjudged", 0.2, 200))
FALLEN = AccuracyEvidence((Fall("color", 12, 1, 220, 219),), ("color", "shape"), 8)
GARBAGE = HealthReply("failed", 0.1, detail="BadStatusLine: SSH-2.0")
UNKNOWN_NAME = HealthReply("failed", detail="gaierror: [Errno -2] Name or service not known")
NONSENSE = api(process=Process(), beat=None, first=GARBAGE, last=GARBAGE, answers=(Answer("text", "failed", detail="BadStatusLine: SSH-2.0"),))
CASES = {
    "right answers": (api(), "healthy", "answers_right", False),
    "a credit from users": (api(answers=(Answer("text", "credited"), Answer("picture", "credited"))), "healthy", "answers_right", False),
    "process gone": (GONE, "dead", "process_gone", True),
    "port stolen": (replace(GONE, process=Process("gone", 1, None, "stranger", "pid 9 (nc)")), "dead", "port_taken", False),
    "never started": (api(process=Process(), first=HealthReply("refused"), answers=(), beat=None), "dead", "not_started", False),
    "frozen by its group": (api(process=replace(RUNS, state="frozen", frozen_by="/sys/fs/cgroup/x/freezer.state")), "zombie", "frozen_by_group", False),
    "credits while frozen": (api(process=replace(RUNS, state="frozen"), answers=CREDITED), "zombie", "frozen_by_group", False),
    "right answers from another copy": (api(process=Process(), beat=None, other="process 9"), "broken", "other_process", False),
    "only /health fails": (api(first=HealthReply("failed", 0.1, 500, detail="HTTP 500 without a state")), "degraded", "health_route_fails", False),
    "/health failed for a moment": (api(first=HealthReply("failed", 0.1, 500), last=IDLE), "healthy", "answers_right", False),
    "pictures cannot be drawn": (api(answers=(RIGHT[0], Answer("picture", "skipped", detail="no folder"))), "degraded", "pictures_not_asked", False),
    "asked at another port": (api(first=HealthReply("refused"), answers=()), "broken", "address_unreachable", False),
    "asked by a name that is unknown": (api(first=UNKNOWN_NAME, answers=SILENT, last=UNKNOWN_NAME), "broken", "address_unreachable", False),
    "port closed": (api(process=CLOSED, first=HealthReply("refused"), answers=()), "dead", "port_closed", True),
    "a person restarts it": (replace(GONE, process=replace(GONE.process, restarting=True)), "starting", "restarting", False),
    "port not yet open": (api(process=replace(RUNS, age_s=5.0), first=HealthReply("refused"), answers=()), "starting", "process_fresh", False),
    "engine dead": (api(first=HealthReply("answered", 0, 503, "dead", reason="CUDA error"), answers=()), "dead", "engine_dead", True),
    "loading": (api(first=HealthReply("answered", 0, 503, "loading", progress=0.4), answers=(), process=replace(RUNS, age_s=800)), "starting", "loading", False),
    "loading too long": (api(first=HealthReply("answered", 0, 503, "loading"), answers=(), process=replace(RUNS, age_s=901)), "broken", "loading_too_long", True),
    "an old load that moves": (loads(12.0, 90000.0), "starting", "loading", False),
    "a load that stands still": (loads(301.0, 320.0), "broken", "loading_stands_still", True),
    "a load that stands still for a moment": (loads(299.0, 90000.0), "starting", "loading", False),
    "a silent load that stands still": (silent_load(200.0, 101.0), "broken", "loading_stands_still", True),
    "a silent load that moved": (silent_load(200.0, 99.0), "starting", "loading", False),
    "right answers from a stranger": (api(process=STRANGER), "dead", "port_taken", False),
    "right answers while gone": (api(process=replace(RUNS, state="gone", port_owner="nobody")), "dead", "process_gone", True),
    "right answers while gone, stranger": (api(process=replace(STRANGER, state="gone")), "dead", "port_taken", False),
    "right answers while stopped": (api(process=replace(RUNS, state="stopped"), beat=beat(2)), "zombie", "frozen", False),
    "right answers while stopped for long": (api(process=replace(RUNS, state="stopped"), beat=beat(61)), "zombie", "frozen", True),
    "right answers from another process": (api(other="process 9"), "broken", "other_process", False),
    "credits while stuck": (api(process=replace(RUNS, state="stuck"), answers=CREDITED), "hardware", "hardware_fault", False),
    "right answers while a thread is stuck": (api(process=replace(RUNS, state="stuck")), "degraded", "hardware_warns", False),
    "two results not finite": (api(first=says(corrupt=Corruption(9, 2))), "corrupt", "nonfinite", True),
    "one result not finite": (api(first=says(corrupt=Corruption(9, 1, "same"))), "healthy", "answers_right", False),
    "fingerprint differs": (api(first=says(corrupt=Corruption(0, 0, "differs", "layer 3"))), "corrupt", "fingerprint_differs", True),
    "fingerprint pending": (api(first=says(corrupt=Corruption(0, 0, "pending"))), "healthy", "answers_right", False),
    "corrupt and wrong": (api(first=says(corrupt=Corruption(0, 0, "differs")), answers=(Answer("text", "wrong", 1, 200),)), "corrupt", "fingerprint_differs", True),
    "a stranger says corrupt": (api(process=STRANGER, first=says(corrupt=Corruption(9, 9))), "dead", "port_taken", False),
    "an old file says corrupt": (api(process=CLOSED, first=HealthReply("refused"), answers=(), beat=beat(90, 90, report=SelfReport(corrupt=Corruption(9, 9)))), "dead", "port_closed", True),
    "reference differs": (api(first=says(corrupt=Corruption(reference="differs", reference_detail="argmax"))), "degraded", "reference_differs", False),
    "the card fell off the bus, by its event": (api(first=NO_HTTP, answers=SILENT, last=NO_HTTP, beat=beat(report=SelfReport(card_events=(CardEvent("xid", 79),)))), "hardware", "hardware_fault", False),
    "fatal event but it answers": (api(first=says(card_events=(CardEvent("xid", 79),))), "degraded", "hardware_warns", False),
    "fatal event of yesterday": (api(first=says(card_events=(CardEvent("xid", 79, 0, 90000.0),))), "healthy", "answers_right", False),
    "an application's events": (api(first=says(card_events=tuple(CardEvent("xid", code) for code in (13, 31, 43, 45, 68, 109)))), "healthy", "answers_right", False),
    "uncorrectable memory error": (api(first=says(card_events=(CardEvent("ecc", 2),))), "degraded", "hardware_warns", False),
    "corrected memory error": (api(first=says(card_events=(CardEvent("ecc", 1),))), "healthy", "answers_right", False),
    "users fail": (api(traffic=Traffic(30, {"engine": 29}, 60.0, 29, 1)), "degraded", "users_fail", False),
    "users fail and it stays": (api(traffic=Traffic(30, {"engine": 29}, 60.0, 29, 3)), "broken", "users_fail", True),
    "users fail at their own schemas": (api(traffic=Traffic(30, {"grammar": 29, "engine": 1}, 60.0, 29, 9)), "degraded", "users_fail", False),
    "users fail at requests that are too large": (api(traffic=Traffic(30, {"out_of_memory": 29, "memory": 1}, 60.0, 29, 9)), "degraded", "users_fail", False),
    "users fail for want of memory": (api(traffic=Traffic(30, {"out_of_memory": 9, "memory": 20}, 60.0, 29, 3)), "broken", "users_fail", True),
    "few users fail": (api(traffic=Traffic(98, {"engine": 4}, 60.0, 4, 0)), "healthy", "answers_right", False),
    "two of two fail": (api(traffic=Traffic(0, {"engine": 2}, 60.0, 2, 0)), "healthy", "answers_right", False),
    "users fail while it is busy": (api(**FULL_AND_MOVING, traffic=Traffic(30, {"engine": 29}, 60.0, 29, 1)), "degraded", "users_fail", False),
    "users fail and the question fails": (api(answers=(Answer("text", "cut", 1, 200, detail="no end"),), last=IDLE, traffic=Traffic(30, {"engine": 29}, 60.0, 29, 1)), "broken", "text_cut", True),
    "another probe token, once": (api(unproven_runs=1), "healthy", "answers_right", False),
    "another probe token": (api(unproven_runs=2), "degraded", "probe_token_differs", False),
    "loop blocked for a minute": (zombie(61), "zombie", "loop_stands_still", True),
    "loop blocked a moment": (zombie(30), "zombie", "loop_stands_still", False),
    "stopped by a signal": (api(process=replace(RUNS, state="stopped"), beat=beat(61), first=NO_HTTP, answers=SILENT, last=NO_HTTP), "zombie", "frozen", True),
    "an engine that is silent": (api(process=Process(), beat=None, first=NO_HTTP, answers=SILENT, last=NO_HTTP), "zombie", "no_valid_reply", True),
    "an engine that sends nonsense": (NONSENSE, "broken", "no_valid_reply", True),
    "silent, beating, idle": (api(first=NO_HTTP, answers=SILENT, last=NO_HTTP), "zombie", "silent_but_beating", True),
    "silent for want of descriptors": (replace(zombie(61), process=replace(RUNS, open_files=63, open_files_limit=64)), "broken", "no_files_left", True),
    "silent with descriptors left": (replace(zombie(61), process=replace(RUNS, open_files=40, open_files_limit=64)), "zombie", "loop_stands_still", True),
    "many descriptors and it answers": (api(process=replace(RUNS, open_files=64, open_files_limit=64)), "healthy", "answers_right", False),
    "silent, beating, working": (api(first=NO_HTTP, answers=SILENT, last=NO_HTTP, beat=beat(pending=2)), "busy", "slow_http", False),
    "silent, but the file shows a hung step": (api(first=NO_HTTP, answers=SILENT, last=NO_HTTP, beat=beat(2, pending=2, no_progress_s=130)), "wedged", "no_progress", True),
    "hung step": (WEDGED, "wedged", "no_progress", True),
    "long step within its deadline": (api(first=busy(50), answers=SILENT, last=busy(60)), "busy", "busy", False),
    "past the deadline, but it moved": (api(first=busy(130, 70), answers=SILENT, last=busy(121, 71)), "busy", "busy", False),
    "queue full and moving": (api(first=busy(1, 70), answers=FULL, last=busy(1, 90)), "busy", "busy", False),
    "question lost by an idle engine": (api(answers=SILENT, last=IDLE), "broken", "lost_question", True),
    "one wrong answer": (api(answers=WRONG, last=IDLE), "healthy", "answers_mostly_right", False),
    "fewer right answers": (api(answers=WRONG, last=IDLE, accuracy=FALLEN), "broken", "accuracy_fell", True),
    "fewer right answers lately": (api(accuracy=FALLEN), "broken", "accuracy_fell", True),
    "fewer right answers, and a hung step": (replace(WEDGED, accuracy=FALLEN), "wedged", "no_progress", True),
    "no baseline": (api(answers=UNJUDGED), "healthy", "answers", False),
    "never right": (api(answers=UNJUDGED, accuracy=AccuracyEvidence(blind=True, pictures_asked=20)), "degraded", "never_right", False),
    "pictures fail": (api(answers=(RIGHT[0], Answer("picture", "rejected", 1, 500, detail="boom")), last=IDLE), "broken", "picture_rejected", True),
    "stream without end": (api(answers=(Answer("text", "cut", 1, 200, detail="no end"),), last=IDLE), "broken", "text_cut", True),
    "refused as a mistake": (api(answers=(Answer("text", "rejected", 1, 400, detail="bad"),), last=IDLE), "broken", "text_rejected", False),
    "wrong key": (api(answers=(Answer("text", "rejected", 1, 401),), last=IDLE), "broken", "key_refused", False),
    "draining": (api(first=HealthReply("answered", 0, 503, "draining"), answers=()), "degraded", "draining", False),
    "draining a moment": (api(first=HealthReply("answered", 0, 503, "draining"), answers=(), draining_s=69.0), "degraded", "draining", False),
    "draining for ever": (api(first=HealthReply("answered", 0, 503, "draining"), answers=(), draining_s=71.0), "broken", "drains_without_end", True),
    "one user fails at own schemas": (api(first=says(failed_callers={"grammar": 1}), traffic=Traffic(90, {"grammar": 20}, 60.0, 20, 9)), "healthy", "answers_right", False),
    "one user fails mostly at own schemas": (api(first=says(failed_callers={"grammar": 1}), traffic=Traffic(20, {"grammar": 20}, 60.0, 20, 9)), "degraded", "users_fail", False),
    "several users pass their deadlines": (api(first=says(failed_callers={"deadline": 2}), traffic=Traffic(90, {"deadline": 20}, 60.0, 20, 9)), "degraded", "users_fail", False),
    "one user meets errors of the engine": (api(first=says(failed_callers={"engine": 1}), traffic=Traffic(90, {"engine": 20}, 60.0, 20, 3)), "broken", "users_fail", True),
    "fatal GPU error": (api(first=NO_HTTP, answers=SILENT, last=NO_HTTP, hardware=("GPU 0: XID 79",)), "hardware", "hardware_fault", False),
    "GPU error but it answers": (api(hardware=("GPU 0: XID 79",)), "degraded", "hardware_warns", False),
    "uninterruptible": (api(process=replace(RUNS, state="stuck"), first=NO_HTTP, answers=SILENT, last=NO_HTTP), "hardware", "hardware_fault", False),
    "in a debugger": (api(process=replace(RUNS, state="traced"), first=NO_HTTP, answers=SILENT, last=NO_HTTP), "unknown", "held_by_debugger", False),
    "blind checker": (replace(GONE, blind="no loopback"), "unknown", "checker_blind", False),
}  # fmt: skip


def test_a_server_that_does_not_count_its_work_is_not_called_idle() -> None:
    uncounted = replace(IDLE, pending=None, detail="no metrics at /metrics (HTTP 401)")
    verdict = judge_api(api(answers=SILENT, last=uncounted), LIMITS)

    assert verdict.rule == "lost_question" and "idle" not in verdict.en and "空闲" not in verdict.zh
    assert "HTTP 401" in verdict.en and "HTTP 401" in verdict.zh


@pytest.mark.parametrize(("estimate_s", "stalled_s", "word"), [(30, 100, "busy"), (30, 130, "wedged"), (600, 500, "busy"), (600, 610, "wedged")])
@pytest.mark.parametrize("phase", ["vision", "prefill", "decode"])
def test_the_engines_estimate_raises_the_limit_and_never_lowers_it(phase, estimate_s, stalled_s, word) -> None:
    reply = busy(stalled_s, deadline_s=estimate_s, phase=phase)

    verdict = judge_api(api(first=reply, answers=SILENT, last=reply), LIMITS)

    assert verdict.word == word
    assert phase in verdict.en or word == "busy"


@pytest.mark.parametrize("name", CASES)
def test_the_rule_that_decides(name: str) -> None:
    seen, word, rule, cure = CASES[name]

    verdict = judge_api(seen, LIMITS)

    assert (verdict.word, verdict.rule, verdict.cure) == (word, rule, cure)


@pytest.mark.parametrize("name", CASES)
def test_every_verdict_explains_itself_in_both_languages(name: str) -> None:
    verdict = judge_api(CASES[name][0], LIMITS)

    assert verdict.word in WORDS
    assert verdict.en.endswith((".", "error")) and len(verdict.en) > 20
    assert any("\u4e00" <= char <= "\u9fff" for char in verdict.zh)
    assert not verdict.cure or verdict.threshold, "a verdict that may restart must show its threshold"
    assert not (verdict.cure and verdict.word in SERVING)


@pytest.mark.parametrize("name", CASES)
def test_evidence_survives_json(name: str) -> None:
    seen = CASES[name][0]

    assert judge_api(ApiEvidence.from_dict(seen.to_dict()), LIMITS) == judge_api(seen, LIMITS)


def test_what_the_verdict_knows_is_in_its_facts() -> None:
    seen = api(first=says(card_events=(CardEvent("xid", 31, 1, 4.0),)), no_credit="its proof is wrong", traffic=Traffic(9, {"engine": 1}))

    facts = judge_api(seen, LIMITS).facts

    assert facts["card_events"] == ["GPU 1: XID 31 4 s ago"] and facts["no_credit"] == "its proof is wrong"
    assert facts["users"] == {"answered": 9, "failed": {"engine": 1}}


def test_one_error_of_a_card_is_named_once() -> None:
    seen = api(hardware=("GPU 0: XID 79 5 s ago",), first=says(card_events=(CardEvent("xid", 79, 0, 6.0), CardEvent("xid", 79, 1, 6.0))))

    assert judge_api(seen, LIMITS).facts["faults"] == ["GPU 0: XID 79 5 s ago", "GPU 1: XID 79 6 s ago"]


def test_an_oom_kill_is_named() -> None:
    seen = replace(GONE, process=replace(GONE.process, oom_killed=True))

    assert "killed it for memory" in judge_api(seen, LIMITS).en


GOOD = PageReply("answered", 0.1, 200)
GOOD_PAGE = PageEvidence("http://x", Process("runs", 5, 900.0, "ours"), GOOD, PageReply("answered", 0.1, 101), GOOD)
PAGES = {
    "all good": ({}, "healthy", False),
    "no script route": ({"script": PageReply("answered", 0, 404)}, "healthy", False),
    "script broken": ({"script": PageReply("answered", 0, 503, "NameError")}, "broken", True),
    "websocket refused": ({"websocket": PageReply("answered", 0, 403, "HTTP 403 instead of 101")}, "broken", True),
    "token refused": ({"websocket": PageReply("answered", 0, 403), "token": PageReply("answered", 0, 401)}, "broken", False),
    "websocket refused, token right": ({"websocket": PageReply("answered", 0, 403), "token": PageReply("answered", 0, 200)}, "broken", True),
    "open to everybody": ({"tokenless": PageReply("answered", 0, 200)}, "degraded", False),
    "closed without its token": ({"tokenless": PageReply("answered", 0, 401)}, "healthy", False),
    "front broken": ({"front": PageReply("answered", 0, 502)}, "degraded", False),
    "silent": ({"health": PageReply("silent")}, "zombie", True),
    "gone": ({"process": Process("gone", 5)}, "dead", True),
    "port stolen": ({"process": Process("gone", 5, None, "stranger", "pid 9")}, "dead", False),
    "not started": ({"process": Process(), "health": PageReply("refused")}, "dead", False),
    "blind": ({"blind": "no loopback", "health": PageReply("silent")}, "unknown", False),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page(name: str) -> None:
    changes, word, cure = PAGES[name]

    verdict = judge_page(replace(GOOD_PAGE, **changes), LIMITS)

    assert (verdict.word, verdict.cure) == (word, cure)


UP = ApiEvidence("http://127.0.0.1:8080", first=HealthReply("answered", status=200))
REJECTED = replace(UP, answers=(Answer("text", "rejected", status=401),))
DOWN = replace(UP, first=HealthReply("refused"))
LOADING = replace(UP, first=HealthReply("answered", status=503, state="loading"))
CONTACTS = {
    "ok": (ApiContact("ok", 200), UP, "page_answers", ""),
    "an older page": (None, UP, "page_answers", ""),
    "loading": (ApiContact("loading", 503), LOADING, "page_answers", ""),
    "key refused": (ApiContact("refused", 401, "127.0.0.1:8080"), UP, "page_key_refused", "./start.sh --restart web."),
    "both keys refused": (ApiContact("refused", 401, "127.0.0.1:8080"), REJECTED, "page_key_refused", "./start.sh --restart."),
    "elsewhere": (ApiContact("unreachable", 0, "127.0.0.1:9"), UP, "page_cannot_reach_api", "no answer), while http://127.0.0.1:8080"),
    "a stranger there": (ApiContact("unreachable", 404, "127.0.0.1:9"), UP, "page_cannot_reach_api", "127.0.0.1:9 (HTTP 404)"),
    "the API is down": (ApiContact("unreachable", 0, "127.0.0.1:8080"), DOWN, "page_answers", ""),
    "the API loads": (ApiContact("unreachable", 0, "127.0.0.1:8080"), LOADING, "page_answers", ""),
}


@pytest.mark.parametrize("name", CONTACTS)
def test_a_page_that_cannot_ask_its_api_is_broken_and_not_restarted(name: str) -> None:
    contact, api, rule, says = CONTACTS[name]

    verdict = judge_page(replace(GOOD_PAGE, api_contact=contact), LIMITS, api)

    assert (verdict.rule, verdict.cure, verdict.serving) == (rule, False, rule == "page_answers")
    assert says in verdict.en
    assert verdict.serving or (contact.address in verdict.zh and "./start.sh --restart" in verdict.zh)


def test_a_page_that_fails_itself_is_told_first() -> None:
    page = replace(GOOD_PAGE, script=PageReply("answered", 0, 503, "NameError"), api_contact=ApiContact("refused", 401))

    assert judge_page(page, LIMITS, UP).rule == "page_script"


def test_an_engines_broken_reply_is_named_and_no_heartbeat_is_missed():
    verdict = judge_api(NONSENSE, LIMITS)

    assert "BadStatusLine: SSH-2.0" in verdict.en and "BadStatusLine: SSH-2.0" in verdict.zh
    assert "heartbeat" not in verdict.en and "心跳" not in verdict.zh
