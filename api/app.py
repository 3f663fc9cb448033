"""create_app: assembles routes, middleware and error handlers; the engine starts and stops with the application,
unless it is one behind it, which goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from api import __version__
from api.behind.handlers import BehindHandlers
from api.behind.remote_engine import RemoteEngine
from api.engine.engine import Engine
from api.errors import ServingError, error_body, unknown_route, wrong_method
from api.health.card_events import CardEvents
from api.health.fault_injection import FaultInjection
from api.health.heartbeat import Heartbeat
from api.health.metrics import Metrics
from api.health.outcomes import Outcomes
from api.health.vllm_metrics import VllmCollector
from api.health.watchdog import Watchdog
from api.http.auth import KeyMiddleware, KeyRing
from api.http.connection import LingerMiddleware
from api.http.logging import RequestMiddleware
from api.http.outcome import OutcomeMiddleware
from api.images.fetch import Fetcher
from api.requests.admission import Admission
from api.requests.handler import Post, RequestHandlers
from api.requests.prompt import PromptBuilder
from api.requests.sampling_params import Grammars
from api.routes import chat, completions, control, messages, models, ops, responses, tokens
from api.state import ServerState
from settings import Settings

logger = logging.getLogger(__name__)


def create_app(settings: Settings, engine: Engine | RemoteEngine, watchdog: Watchdog | None = None) -> FastAPI:
    """`engine` must not have been started yet. Raises SettingsError for API keys that do not parse."""
    admission = Admission(settings, engine.slots)
    metrics = Metrics(engine, admission.load, lambda: heartbeat.pulse.loop_lag_s)
    if settings.metrics_names == "vllm":
        metrics.registry.register(VllmCollector(engine))
    outcomes, card_events = Outcomes(), CardEvents(settings.gpus)
    heartbeat = Heartbeat(
        engine, settings.log_dir, settings.stall_s, settings.check_silent_s, outcomes, card_events, watchdog
    )
    prompts, grammars = PromptBuilder(settings, Fetcher.of(settings)), Grammars()
    handlers: RequestHandlers | BehindHandlers
    if isinstance(engine, RemoteEngine):
        handlers = BehindHandlers(settings, engine, metrics, prompts, Post(metrics))
    else:
        handlers = RequestHandlers(settings, engine, metrics, prompts, grammars, Post(metrics))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        heartbeat.start()
        card_events.start()
        faults = asyncio.create_task(FaultInjection(settings.log_dir).watch_loop()) if settings.test_faults else None
        yield
        if faults is not None:
            faults.cancel()
        engine.stop(timeout_s=1.0)
        if isinstance(engine, RemoteEngine):
            await engine.client.close()
        heartbeat.stop()
        card_events.stop()
        prompts.close()
        grammars.close()

    # FastAPI's own document lacks the bodies that the routes parse themselves; /openapi.json has them.
    # A trailing slash is a 404 and not a redirect: some clients follow the redirect of a POST with a GET.
    app = FastAPI(
        title="GLM-4.6V-Flash-WEB", version=__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False
    )
    app.state.server = ServerState(
        settings, engine, admission, metrics, heartbeat, prompts, handlers, outcomes, card_events
    )
    for routes in (chat, completions, responses, messages, tokens, models, ops, control):
        app.include_router(routes.router)
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The middleware added last is the outermost, so that refused requests get an id and a log line too.
    app.add_middleware(KeyMiddleware, keys=KeyRing.of(settings))
    if origins := [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]:
        # Outside of authentication: a browser sends its preflight request without one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-glm-ignored", "x-glm-cache-key", "retry-after"],
        )
    app.add_middleware(OutcomeMiddleware, outcomes=outcomes)
    app.add_middleware(RequestMiddleware, count=metrics.http, heartbeat=heartbeat)
    app.add_middleware(LingerMiddleware)
    return app


async def _serving_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServingError)
    request.state.log.setdefault("error", error.code)
    if error.status in (429, 503) and "failure" not in request.state.log:
        request.app.state.server.metrics.rejected(str(error.code), not request.state.caller.is_user)
    return JSONResponse(error_body(error, request.url.path), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Errors of the router itself: an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    refusal = unknown_route(request.method, request.url.path)
    if error.status_code != 404:
        refusal = wrong_method(request.method, request.url.path, (error.headers or {}).get("Allow", "another method"))
    return JSONResponse(error_body(refusal, request.url.path), refusal.status, error.headers)
