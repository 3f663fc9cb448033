"""/health reports the state without waiting for anything, /info and /v1/models what is served."""

from __future__ import annotations

import threading
from dataclasses import replace

from fake_model import fake_model
from served import chat_body, wait_for

from api.engine.loaded_model import LoadError

WAIT_S = 30.0


def test_an_idle_server_is_healthy(serve) -> None:
    answer = serve().client.get("/health")

    body = answer.json()
    assert answer.status_code == 200
    assert (body["state"], body["progress"], body["model"]) == ("idle", 1.0, "fake")
    assert (body["running"], body["waiting"], body["steps"]) == (0, 0, 0)
    assert body["last_step_age_s"] is None and body["reason"] is None and body["uptime_s"] >= 0


def test_health_answers_while_a_step_hangs(serve) -> None:
    served = serve()
    asking = threading.Thread(target=lambda: served.chat("HANG"))
    asking.start()
    assert served.runner.hanging.wait(WAIT_S)

    answer = served.client.get("/health")

    assert answer.status_code == 200
    assert (answer.json()["state"], answer.json()["running"], answer.json()["phase"]) == ("busy", 1, "prefill")
    served.runner.release.set()
    asking.join(WAIT_S)


def test_a_loading_server_reports_its_progress_and_when_to_retry(serve) -> None:
    go, begun = threading.Event(), threading.Event()

    def load(progress):
        progress(0.25)
        begun.set()
        go.wait(WAIT_S)
        return fake_model()

    served = serve(load=load)
    assert begun.wait(WAIT_S)
    health = served.client.get("/health")
    assert statuses(served) == [200, 503, 503, 503, 503, 503]
    others = [served.chat(), served.client.get("/v1/models"), served.client.get("/info")]
    go.set()

    assert health.status_code == 503 and int(health.headers["Retry-After"]) > 0
    assert (health.json()["state"], health.json()["progress"]) == ("loading", 0.25)
    for answer in others:
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
        assert "loading (25%)" in answer.json()["error"]["message"]


def test_a_server_whose_model_cannot_be_loaded_reports_why_and_keeps_answering(serve) -> None:
    def load(progress):
        raise LoadError("models/x: there is no chat template.")

    served = serve(load=load)
    wait_for(lambda: served.engine.stats().state != "loading")

    health, chat = served.client.get("/health"), served.chat()
    assert (health.status_code, health.json()["state"]) == (503, "dead")
    assert health.json()["reason"] == "models/x: there is no chat template."
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "dead")


def test_a_draining_server_reports_it(serve) -> None:
    served = serve()
    served.engine.drain(0)

    health, chat = served.client.get("/health"), served.chat()

    assert (health.status_code, health.json()["state"]) == (503, "draining")
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "draining")


PROBED = ("/livez", "/readyz", "/health", "/ping", "/v1/models", "/v1/models/fake")


def statuses(served) -> list[int]:
    return [served.client.get(path).status_code for path in PROBED]


def test_ready_is_what_health_says_and_has_its_body(serve) -> None:
    served = serve(probe_token="pt")

    for path in ("/health", "/readyz"):
        body = served.client.get(path, params={"nonce": "ab" * 16}).json()
        assert body["state"] == "idle" and body["proof"]
        assert served.client.head(path).status_code == 200
    assert served.client.get("/livez").json() == {"state": "idle"} and served.client.head("/livez").status_code == 200


def test_a_server_that_leaves_is_alive_not_ready_and_still_answers(serve) -> None:
    served = serve()
    served.app.state.server.heartbeat.leave()

    assert statuses(served) == [200, 503, 503, 503, 200, 200]
    assert served.client.get("/health").json()["state"] == "draining"
    assert served.chat().status_code == 200

    served.engine.drain(0)

    assert statuses(served) == [200, 503, 503, 503, 200, 200]
    assert served.chat().status_code == 503


def test_a_stalled_server_is_neither_alive_nor_ready_and_lists_no_model(serve) -> None:
    served = serve()
    asking = threading.Thread(target=lambda: served.chat("HANG"))
    asking.start()
    assert served.runner.hanging.wait(WAIT_S)
    assert statuses(served) == [200] * 6, "busy is not dead"
    heartbeat = served.app.state.server.heartbeat
    heartbeat._take_pulse = lambda stats: replace(heartbeat._pulse, no_progress_s=130.0)

    wait_for(lambda: served.client.get("/livez").json() == {"state": "stalled"})

    assert statuses(served) == [503] * 6
    assert all(int(served.client.get(path).headers["Retry-After"]) > 0 for path in PROBED)
    heartbeat.leave()
    assert served.client.get("/livez").status_code == 503, "a stop does not hide that it hangs"
    served.runner.release.set()
    asking.join(WAIT_S)


def test_a_dead_server_is_neither_alive_nor_ready_and_lists_no_model(serve) -> None:
    served = serve()
    served.chat("CRASH")

    assert statuses(served) == [503] * 6
    assert served.client.get("/livez").json() == {"state": "dead"}
    assert served.client.get("/v1/models").json()["error"]["code"] == "dead"


def test_info_has_limits_and_facts_and_no_secret(serve) -> None:
    answer = serve(max_images=3).client.get("/info")

    body = answer.json()
    assert body["limits"]["max_images"] == 3
    assert body["context_tokens"] == 4096 and body["class"] == "FakeModel" and body["demo"] is False
    assert body["generation"]["temperature"] == 0.0
    assert "sk-test" not in answer.text


def test_the_model_is_listed(serve) -> None:
    client = serve().client

    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake"]
    assert client.get("/v1/models/fake").json()["object"] == "model"
    missing = client.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")
    assert "'org/other'" in missing.json()["error"]["message"]


def test_an_unknown_route_and_a_wrong_method_are_refused_in_openais_format(serve) -> None:
    client = serve().client

    unknown, wrong = client.get("/v1/nothing"), client.get("/v1/chat/completions")

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.json()["error"]["message"] == "/v1/chat/completions takes POST. Given: GET"
    for path in ("/v1/chat/completions/", "/health/"):  # no redirect: a POST would come back as a GET
        assert client.post(path, json={}, follow_redirects=False).status_code == 404


def test_every_answer_has_a_request_id_and_a_clients_own_is_used(serve) -> None:
    client = serve().client

    assert len(client.get("/health").headers["x-request-id"]) == 32
    assert client.get("/info", headers={"x-request-id": "probe-7"}).headers["x-request-id"] == "probe-7"
    forged = client.get("/info", headers={"x-request-id": "a b\tlevel=info"})
    assert len(forged.headers["x-request-id"]) == 32
    assert client.get("/info", headers={"Authorization": ""}).headers["x-request-id"]


def test_one_line_per_request_is_logged_without_its_content(serve, caplog) -> None:
    caplog.set_level("INFO")
    served = serve()

    answer = served.client.post("/v1/chat/completions", json=chat_body("a secret"), headers={"x-request-id": "r-1"})
    served.client.get("/health")

    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("event=request ")]
    assert len(lines) == 1
    for part in ("request=r-1", "status=200", "path=/v1/chat/completions", "finish=stop", "prompt_tokens=", "queue_s="):
        assert part in lines[0]
    assert "secret" in answer.text
    assert not any("secret" in r.getMessage() or "sk-test" in r.getMessage() for r in caplog.records)
