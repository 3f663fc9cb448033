"""Nobody gets in without the key, on any route, but for /health."""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute
from served import KEY

from api.auth import OPEN_PATHS
from api.server import refuse_open_door
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
            raise AssertionError(f"a route that this test does not understand: {route!r}")


def test_only_health_is_open() -> None:
    assert {"/health"} == OPEN_PATHS


PATHS = ["/", "/docs", "/openapi.json", "/redoc", "/nothing", "/health/", "/health/x", "//health"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_do_not_exist_need_the_key_too(path: str, serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]

    assert served.client.get(path).status_code == 401


@pytest.mark.parametrize("headers", WRONG)
def test_a_wrong_key_is_refused_in_the_shape_of_openai(headers: dict[str, str], serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]

    answer = served.client.get("/v1/models", headers=headers)

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {KEY}"}, {"x-api-key": KEY}])
def test_the_key_is_taken_from_either_header(headers: dict[str, str], serve) -> None:
    served = serve()
    del served.client.headers["Authorization"]

    assert served.client.get("/v1/models", headers=headers).status_code == 200


def test_websockets_are_refused(serve) -> None:
    from starlette.websockets import WebSocketDisconnect

    served = serve()
    with pytest.raises(WebSocketDisconnect), served.client.websocket_connect("/v1/chat/completions"):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_without_a_key_only_this_machine_is_served(host: str) -> None:
    with pytest.raises(SettingsError, match="GLM_API_KEY is not set"):
        refuse_open_door(Settings(api_host=host, api_key=None))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_may_be_served_without_a_key(host: str) -> None:
    refuse_open_door(Settings(api_host=host, api_key=None))


def test_with_a_key_any_address_may_be_served() -> None:
    refuse_open_door(Settings(api_host="0.0.0.0", api_key=KEY))
