"""create_app: routes, middleware, error shapes, and the engine's life around them."""

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
from api.engine.engine import Engine
from api.errors import ServingError, unknown_route, wrong_method
from api.health.faults import Faults
from api.health.heartbeat import Heartbeat
from api.health.metrics import Metrics
from api.http.auth import KeyMiddleware, KeyRing
from api.http.linger import LingerMiddleware
from api.http.middleware import RequestMiddleware
from api.images.fetch import Fetcher
from api.requests.admission import Admission
from api.routes import chat, models, ops, tokens
from api.state import Pools, Services
from settings import Settings

logger = logging.getLogger(__name__)


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    heartbeat = Heartbeat(engine, settings.log_dir, settings.stall_s, settings.check_silent_s)
    pools = Pools()
    admission = Admission(settings, lambda: engine.stats().slots)
    metrics = Metrics(engine, admission, heartbeat)
    keys = KeyRing.of(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        heartbeat.start()
        haunting = asyncio.create_task(Faults(settings.log_dir).haunt_loop()) if settings.test_faults else None
        yield
        if haunting is not None:
            haunting.cancel()
        engine.stop(timeout_s=1.0)
        heartbeat.stop()
        pools.close()

    # FastAPI's own documentation routes know nothing of bodies that the routes parse themselves; /openapi.json does.
    # A path with a slash too many is told so: after a redirect some clients send a POST as a GET.
    app = FastAPI(
        title="GLM-4.6V-Flash-WEB", version=__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False
    )
    app.state.services = Services(settings, engine, admission, metrics, Fetcher.of(settings), pools, heartbeat)
    for routes in (chat, tokens, models, ops):
        app.include_router(routes.router)
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The last one added is the outermost: a refused request gets its id and its log line too, before the lingering.
    app.add_middleware(KeyMiddleware, keys=keys)
    if origins := [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]:
        # Before the key: a browser asks without one whether it may send one.
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestMiddleware, metrics=metrics)
    app.add_middleware(LingerMiddleware)
    return app


async def _serving_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServingError)
    request.state.log.setdefault("error", error.code)
    if error.status in (429, 503) and "failure" not in request.state.log:
        request.app.state.services.metrics.rejected(str(error.code), request.state.caller.probe)
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the router itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    shaped = unknown_route(request.method, request.url.path)
    if error.status_code != 404:
        shaped = wrong_method(request.method, request.url.path, (error.headers or {}).get("Allow", "another method"))
    return JSONResponse(shaped.body(), shaped.status, error.headers)
