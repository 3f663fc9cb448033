"""The console's behaviour without a browser: Streamlit's own test driver, and a store written by the checker."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import streamlit as st
from app_driver import shown_text
from console_record import HEALTHY, WEDGED, incident_of, record
from ports import free_port
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash
from web_fake_api import FakeApi

from monitor.store.store import Store
from monitor.tell.alerts import queue
from settings import Settings
from web.console import operator_token
from web.console.operator_token import FORGOTTEN_S, FREE_TRIES, FREE_TRIES_OF_ALL, LONGEST_WAIT_OF_ALL_S, OperatorTokens
from web.console.page import format_duration, percent_rounded_down
from web.i18n.strings import Texts

APP = Path(__file__).resolve().parents[3] / "web" / "app.py"
OPERATOR = "the-operator-s-token"

OpenConsole = Callable[..., AppTest]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def open_console(fake_api: FakeApi, own_settings: None, monkeypatch: pytest.MonkeyPatch) -> OpenConsole:
    def open_it(language: str = "en", **settings: str) -> AppTest:
        st.cache_data.clear()
        for name, value in {"GLM_API_URL": fake_api.url, **settings}.items():
            monkeypatch.setenv(name, value)
        page = AppTest.from_file(str(APP), default_timeout=60)
        page.session_state["language"] = language
        page.run()
        page._page_hash = calc_hash("console")  # switch_page of the driver supports only pages that are files
        return page.run()

    return open_it


def figure(page: AppTest, label: str) -> str:
    return next(metric.value for metric in page.metric if metric.label == label)


def test_before_the_first_check_the_console_says_what_to_do(open_console: OpenConsole) -> None:
    page = open_console()

    assert not page.exception
    assert page.info[0].value == "No data: nothing has checked this service yet."
    assert "health_check.py install" in page.info[1].value


def test_a_healthy_service_is_summed_up_in_one_sentence_and_figures(open_console: OpenConsole, logs: Path) -> None:
    record(logs, time.time(), 2, lambda age: HEALTHY)

    page = open_console()

    assert not page.exception
    assert page.success[0].value.startswith("Operational since ")
    assert "glm-shapes-demo · NVIDIA L40S · bfloat16 · 8,192 tokens of context · 16 answers at once" in shown_text(page).replace("\\", "")
    assert figure(page, "Up, 24 h") == "100 %"
    assert figure(page, "GPU memory") == "20.5 GiB"
    assert figure(page, "Failed checks, 1 h") == "0"
    assert "None in the last 30 days." in shown_text(page)


def test_an_outage_shows_its_reason_its_incident_and_its_timeline(open_console: OpenConsole, logs: Path) -> None:
    now = time.time()
    record(logs, now, 2, lambda age: WEDGED if age < 600 else HEALTHY)
    with closing(Store.open(logs)) as store, store.transaction():
        store.put_incident(incident_of(now, 600, None))
        store.add_action(now - 60, "api", "restart", "checker", "failed", "the port is taken", "api-20261122-0310")
        alert = {"kind": "fire", "severity": "page", "incident": "api-20261122-0310", "en": "wedged", "zh": "卡死"}
        queue(store, [alert], Settings(webhook_url="http://127.0.0.1:9/secret", slack_url="http://127.0.0.1:9/x"), now)
        store.execute("UPDATE outbox SET sent_at = ? WHERE channel = 'webhook'", now - 30)

    page = open_console()

    assert page.error[0].value.startswith("Down since ")
    assert "Model server: wedged" in shown_text(page)
    assert "引擎 140 秒没有进展" in shown_text(page)
    assert "the port is taken" in shown_text(page)
    assert "alert sent: webhook" in shown_text(page)
    assert "alert not delivered yet: slack" in shown_text(page)
    assert "/secret" not in shown_text(page)
    assert any("open for" in expander.label for expander in page.expander)
    assert int(figure(page, "Failed checks, 1 h")) == 10


def test_a_checker_that_stopped_means_no_data(open_console: OpenConsole, logs: Path) -> None:
    record(logs, time.time() - 600, 2, lambda age: HEALTHY)

    page = open_console()

    assert not page.success
    assert "No data: the last check was 10 min" in page.info[0].value


def test_history_is_shown_while_the_api_is_down(open_console: OpenConsole, logs: Path) -> None:
    record(logs, time.time(), 2, lambda age: HEALTHY)

    page = open_console(GLM_API_URL=f"http://127.0.0.1:{free_port()}")

    assert not page.exception
    assert "The model server does not answer right now" in shown_text(page)
    assert figure(page, "Up, 24 h") == "100 %"


def test_the_console_is_available_in_chinese(open_console: OpenConsole, logs: Path) -> None:
    record(logs, time.time(), 2, lambda age: WEDGED)

    page = open_console(language="zh")

    assert "故障" in page.error[0].value
    assert "引擎 140 秒没有进展" in shown_text(page)


def test_the_log_is_filtered_and_shown_verbatim(open_console: OpenConsole, logs: Path) -> None:
    logs.mkdir()
    (logs / "api.log").write_text("INFO a <b>x</b> ![i](http://x/y)\nDEBUG hidden\nERROR request=r7 boom\n")

    page = open_console()
    assert page.code[-1].value == "INFO a <b>x</b> ![i](http://x/y)\nERROR request=r7 boom"

    page.text_input(key="log-search").set_value("r7").run()

    assert page.code[-1].value == "ERROR request=r7 boom"


def test_settings_are_listed_without_their_secrets(open_console: OpenConsole) -> None:
    page = open_console(GLM_API_KEY="very-secret", GLM_QUEUE_SIZE="7")

    text = shown_text(page).replace("\\", "")
    assert "`GLM_QUEUE_SIZE` | 7 | changed" in text
    assert "`GLM_API_KEY` | •••" in text
    assert "very-secret" not in text


def test_without_an_operator_token_there_are_no_actions(open_console: OpenConsole) -> None:
    page = open_console()

    assert "Actions" not in [heading.value for heading in page.subheader]
    assert not [button for button in page.button if str(button.key).startswith("act-")]


def test_only_the_right_token_unlocks_the_actions(open_console: OpenConsole) -> None:
    page = open_console(GLM_OPERATOR_TOKEN=OPERATOR)
    assert not [button for button in page.button if str(button.key).startswith("act-")]

    page.text_input[0].set_value("guess")
    page = next(button for button in page.button if button.label == "Unlock").click().run()
    assert "not right" in page.error[0].value

    page.text_input[0].set_value(OPERATOR)
    page = next(button for button in page.button if button.label == "Unlock").click().run()
    assert page.button(key="act-restart_api").label == "Restart the model server"
    assert OPERATOR not in str(page.session_state._state.filtered_state)


def test_wrong_tokens_slow_every_session_and_are_audited(open_console: OpenConsole, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_token, "OF_ALL_SESSIONS", OperatorTokens())
    monkeypatch.setattr(type(st.context), "ip_address", "203.0.113.9")  # the driver has no connection

    def shown_after(page: AppTest, entered: str) -> str:
        page.text_input[0].set_value(entered)
        page = next(button for button in page.button if button.label == "Unlock").click().run()
        return str(page.error[0].value) if page.error else ""

    guesser = open_console(GLM_OPERATOR_TOKEN=OPERATOR)
    for n in range(FREE_TRIES):
        assert "not right" in shown_after(guesser, f"guess-{n}")

    assert "not compared; try again in" in shown_after(open_console(GLM_OPERATOR_TOKEN=OPERATOR), OPERATOR)
    with closing(Store.read_only(logs)) as store:
        tries = [action for action in store.actions() if action["kind"] == "unlock"]
    assert [(each["actor"], each["outcome"]) for each in tries] == [("console: 203.0.113.9", "refused")] * FREE_TRIES
    assert "guess" not in str(tries)


def test_waits_grow_by_address_and_over_all_addresses_and_end(tmp_path: Path) -> None:
    tokens = OperatorTokens()

    def tries(address: str, now: float, entered: str = "wrong") -> tuple[bool, float]:
        return tokens.try_token(entered, OPERATOR, address, tmp_path, now)

    assert [tries("a", 100.0)[1] for _ in range(FREE_TRIES + 1)] == [0.0] * FREE_TRIES + [2.0]
    assert tries("a", 100.0, OPERATOR) == (False, 2.0), "a right one is no exception, or it could be guessed"
    assert tries("b", 100.0, OPERATOR) == (True, 0.0), "another address need not wait"
    assert tries("a", 102.0)[1] == 0.0 and tries("a", 102.0)[1] == 4.0
    for n in range(FREE_TRIES_OF_ALL):
        tries(f"c{n}", 103.0)
    assert 0 < tries("d", 103.0, OPERATOR)[1] <= LONGEST_WAIT_OF_ALL_S
    assert tries("a", 103.0 + FORGOTTEN_S + 1, OPERATOR) == (True, 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7800, "2 h 10 min"), (86400, "1 d"), (86460, "1 d")]
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds, Texts("en")) == text


@pytest.mark.parametrize(("share", "text"), [(1.0, "100"), (0.99996, "99.99"), (0.5, "50"), (0.0, "0"), (0.999, "99.9")])
def test_uptime_is_never_rounded_up(share: float, text: str) -> None:
    assert percent_rounded_down(share) == text


def test_speed_cache_and_automatic_settings_with_their_reasons_are_shown(
    open_console: OpenConsole, logs: Path
) -> None:
    record(logs, time.time(), 2, lambda age: HEALTHY)

    page = open_console()

    assert figure(page, "Answer speed") == "40 t/s"
    assert figure(page, "KV cache used") == "25 %"
    assert "| slots | 16 | the choice for cpu |" in shown_text(page).replace("\\", "")
    assert "| 69,632 | 255 MiB: enough for 8 full contexts |" in shown_text(page).replace("\\", "")
    assert "| attention | off: 2.1 ms, 1.9 ms without |" in shown_text(page).replace("\\", "")
