"""The OpenAPI document is true: whatever is sent, there is no 500 and no status that it does not list."""

from __future__ import annotations

import warnings

import schemathesis
from fake_model import fake_model
from hypothesis import HealthCheck, settings
from schemathesis import checks
from served import KEY, Served, wait_for
from starlette.types import Receive, Scope, Send

from api.engine.engine import Engine
from api.http.auth import OPEN_PATHS
from api.protocol.schemas import ChatRequest
from api.routes.openapi import document
from settings import Settings


def served() -> Served:
    """One server for all examples; short answers, so that many fit."""
    options = Settings(api_key=KEY, default_max_tokens=4, queue_size=64, key_requests_per_minute=0)
    model = fake_model(context_tokens=512)
    made = Served(options, model, Engine(lambda progress: model, options.queue_size))
    made.client.__enter__()
    wait_for(lambda: made.engine.stats().state != "loading")
    return made


SERVED = served()
HEADERS = {"Authorization": f"Bearer {KEY}"}
DOCUMENT = SERVED.client.get("/openapi.json").json()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)


async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """Each call creates a client of its own, whose lifespan would start the engine again."""
    if scope["type"] != "lifespan":
        await SERVED.app(scope, receive, send)
        return
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


SCHEMA.app = without_lifespan
CHECKS = (
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
)


def teardown_module() -> None:
    SERVED.client.__exit__(None, None, None)


def test_every_route_is_in_the_document_with_its_statuses() -> None:
    paths = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}

    assert {("post", "/v1/chat/completions"), ("post", "/tokenize"), ("get", "/metrics"), ("get", "/health")} <= paths
    for method, path in paths - {("get", path) for path in OPEN_PATHS}:
        assert {"200", "401", "500"} <= set(DOCUMENT["paths"][path][method]["responses"]), path
    assert DOCUMENT["security"] == [{"key": []}] and DOCUMENT["paths"]["/health"]["get"]["security"] == []


def test_the_document_is_made_without_a_warning() -> None:
    SERVED.app.openapi_schema = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert document(SERVED.app) == DOCUMENT


def test_every_field_is_in_the_document() -> None:
    properties = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]

    assert set(ChatRequest.model_fields) < set(properties) and "user" in properties


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_response_conforms_to_the_document(case: schemathesis.Case) -> None:
    case.call_and_validate(headers=HEADERS, checks=CHECKS)


def test_the_server_still_answers_afterwards() -> None:
    answer = SERVED.chat("hello", max_tokens=40)

    assert answer.json()["choices"][0]["message"]["content"] == "I see 0 pictures. hello"
    assert SERVED.app.state.server.admission.active == SERVED.app.state.server.admission.tokens == 0
