"""Every route except /health requires a valid key."""

from __future__ import annotations

import hmac
import threading
from hashlib import sha256

import pytest
from fastapi.routing import APIRoute
from served import KEY, chat_body, image_part, text_part
from starlette.datastructures import Headers

from api.caller import Caller
from api.http.auth import OPEN_PATHS, KeyRing
from api.server import check_bind_address
from settings import Settings, SettingsError

WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer {KEY.upper()}"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": KEY},
    {"x-api-key": "wrong"},
]


def test_every_route_but_health_needs_the_key(serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]
    found = [(method, route.path) for route in walk(served.app.routes) for method in route.methods]

    assert ("POST", "/v1/chat/completions") in found and len(found) >= 5
    for method, path in found:
        expected = 200 if path in OPEN_PATHS else 401
        assert served.client.request(method, path).status_code == expected, path


def walk(routes):
    """All routes, also those of included routers."""
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        if isinstance(route, APIRoute):
            yield route
        elif inner:
            yield from walk(inner)
        else:
            raise AssertionError(f"a route that this test does not know: {route!r}")


def test_only_health_and_its_status_are_open() -> None:
    assert {"/health", "/livez", "/readyz", "/ping"} == OPEN_PATHS


PATHS = ["/", "/docs", "/openapi.json", "/redoc", "/nothing", "/health/", "/health/x", "//health"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_do_not_exist_need_the_key_too(path: str, serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]

    assert served.client.get(path).status_code == 401


@pytest.mark.parametrize("headers", WRONG)
def test_a_wrong_key_is_refused_in_openais_format(headers: dict[str, str], serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]

    answer = served.client.get("/v1/models", headers=headers)

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {KEY}"}, {"x-api-key": KEY}])
def test_the_key_is_accepted_in_either_header(headers: dict[str, str], serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]

    assert served.client.get("/v1/models", headers=headers).status_code == 200


SECOND = "sk-second-key"


def test_several_named_keys_are_accepted_and_only_their_names_are_logged(serve, caplog) -> None:
    caplog.set_level("INFO")
    hashed = sha256(SECOND.encode()).hexdigest()
    client = serve(api_keys=f"ann:sk-ann, ben:sha256:{hashed}").client

    for key, status in ((KEY, 200), ("sk-ann", 200), (SECOND, 200), ("sk-anna", 401), (hashed, 401), ("ann", 401)):
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status

    lines = [r.getMessage() for r in caplog.records if "path=/v1/models" in r.getMessage()]
    assert [word for line in lines for word in line.split() if word.startswith("key=")] == [
        "key=default", "key=ann", "key=ben",
    ]  # fmt: skip
    assert not any(secret in line for line in lines for secret in (KEY, "sk-ann", SECOND, hashed))


@pytest.mark.parametrize(
    ("listed", "message"),
    [("ann", "name:key"), ("a b:x", "name:key"), ("ann:", "name:key"), ("ann:x,ann:y", "'ann' is taken"),
     ("default:x", "'default' is taken"), ("ann:sha256:12", "64 hex digits"), ("ann:sha256:zz", "64 hex digits")],
)  # fmt: skip
def test_an_invalid_list_of_keys_stops_the_start(listed: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        KeyRing.of(Settings(api_key=KEY, api_keys=listed))

    assert KEY not in str(caught.value)


def test_the_digests_are_all_compared_in_constant_time(monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("api.http.auth.hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ring = KeyRing.of(Settings(api_key=KEY, api_keys="ann:sk-ann,ben:sk-ben"))

    ring.caller(Headers({"authorization": f"Bearer {KEY}"}))

    assert len(compared) >= 3 and all(len(a) == len(b) == 32 for a, b in compared)
    assert not any(KEY.encode() in part for pair in compared for part in pair)


def test_the_metrics_key_opens_the_metrics_and_nothing_else(serve) -> None:
    served = serve(metrics_key="mk", probe_token="pt", api_keys="metrics:sk-of-a-user")
    del served.client.headers["Authorization"]
    routes = [(method, route.path) for route in walk(served.app.routes) for method in route.methods if route.path not in OPEN_PATHS]

    for headers in ({"Authorization": "Bearer mk"}, {"x-api-key": "mk"}):
        opened = {path for method, path in routes if served.client.request(method, path, headers=headers).status_code != 401}
        assert opened == {"/metrics"}
    for path in ("//metrics", "/metrics/", "/v1/models"):
        assert served.client.get(path, headers={"Authorization": "Bearer mk"}).status_code == 401, path
    for wrong in ("mkx", "m", "", "MK"):
        assert served.client.get("/metrics", headers={"Authorization": f"Bearer {wrong}"}).status_code == 401
    for other in (KEY, "sk-of-a-user"):
        assert served.client.get("/metrics", headers={"Authorization": f"Bearer {other}"}).status_code == 200, "as before"


def test_the_metrics_key_may_be_a_digest_and_is_compared_in_constant_time(monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("api.http.auth.hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ring = KeyRing.of(Settings(api_key=KEY, metrics_key=f"sha256:{sha256(b'mk').hexdigest()}"))

    assert ring.opens_metrics(Headers({"authorization": "Bearer mk"})) and not ring.opens_metrics(Headers({"authorization": "Bearer mj"}))
    assert len(compared) == 2 and all(len(a) == len(b) == 32 for a, b in compared)
    with pytest.raises(SettingsError, match="GLM_METRICS_KEY: sha256: must be followed by the 64 hex digits"):
        KeyRing.of(Settings(api_key=KEY, metrics_key="sha256:12"))


@pytest.mark.parametrize("others", [{"api_key": "mk"}, {"probe_token": "mk"}, {"api_keys": "ann:mk"}])
def test_a_metrics_key_that_opens_more_stops_the_start(others) -> None:
    with pytest.raises(SettingsError, match="GLM_METRICS_KEY: must differ"):
        KeyRing.of(Settings(**{"api_key": KEY, "metrics_key": "mk", **others}))


def test_the_probe_token_marks_probes(serve) -> None:
    ring = KeyRing.of(Settings(api_key=KEY, probe_token="pt"))

    def caller(**headers: str) -> Caller | None:
        return ring.caller(Headers({k.replace("_", "-"): v for k, v in headers.items()}))

    assert caller(authorization="Bearer pt") == Caller("probe", True)
    assert caller(authorization=f"Bearer {KEY}", x_glm_probe="pt") == Caller("default", True)
    wrong = caller(authorization=f"Bearer {KEY}", x_glm_probe=KEY)
    assert wrong == Caller("default", False, claims_probe=True) and not wrong.is_user, "no privilege and no credit"
    assert caller(authorization=f"Bearer {KEY}") == Caller("default") and Caller("default").is_user
    assert caller(x_glm_probe="pt") is None


def test_a_probe_is_answered_while_users_fill_the_queue(serve) -> None:
    served = serve(queue_size=1, probe_token="pt")
    admission = served.app.state.server.admission
    users = [admission.admit(Caller("ann")) for _ in range(2)]

    refused = served.chat("hi")
    answered = served.client.post("/v1/chat/completions", json=chat_body("hi"), headers={"x-glm-probe": "pt"})

    assert (refused.status_code, answered.status_code) == (503, 200)
    for permit in users:
        permit.release()


def test_a_probe_with_an_image_is_answered_while_users_images_occupy_the_threads(serve) -> None:
    served = serve(probe_token="pt")
    users, done = served.app.state.server.prompts.pool(Caller("ann")), threading.Event()
    for _ in range(10):
        users.submit(done.wait, 60)

    question = chat_body([image_part(), text_part("hi")])
    answered = served.client.post("/v1/chat/completions", json=question, headers={"x-glm-probe": "pt"})

    assert answered.json()["choices"][0]["message"]["content"] == "I see 1 pictures. hi"
    assert users._work_queue.qsize() > 0  # the users are still waiting
    done.set()


def test_pages_of_other_origins_may_call_only_if_configured(serve) -> None:
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    closed, opened = serve().client, serve(cors_origins="https://page.example").client
    del closed.headers["Authorization"], opened.headers["Authorization"]

    assert "access-control-allow-origin" not in closed.options("/v1/chat/completions", headers=ask).headers
    allowed = opened.options("/v1/chat/completions", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-credentials" not in allowed.headers
    assert opened.options("/v1/models", headers={**ask, "Origin": "https://evil.example"}).status_code == 400
    assert opened.get("/v1/models", headers={"Origin": "https://page.example"}).status_code == 401


def test_websockets_are_refused(serve) -> None:
    from starlette.websockets import WebSocketDisconnect

    served = serve()
    with pytest.raises(WebSocketDisconnect), served.client.websocket_connect("/v1/chat/completions"):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_without_a_key_only_this_machine_is_served(host: str) -> None:
    with pytest.raises(SettingsError, match="GLM_API_KEY is not set"):
        check_bind_address(Settings(api_host=host, api_key=None))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_may_be_served_without_a_key(host: str) -> None:
    check_bind_address(Settings(api_host=host, api_key=None))


def test_with_a_key_any_address_may_be_served() -> None:
    check_bind_address(Settings(api_host="0.0.0.0", api_key=KEY))
