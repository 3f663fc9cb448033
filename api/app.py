"""create_app: routes, middleware, error shapes, and the engine's life around them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from api import __version__
from api.admission import Admission
from api.auth import KeyMiddleware
from api.engine.engine import Engine
from api.errors import ServingError, unknown_route
from api.faults import Faults
from api.heartbeat import Heartbeat
from api.middleware import RequestMiddleware
from api.routes import chat, models, ops
from api.services import PREPROCESS_THREADS, Services
from settings import Settings

logger = logging.getLogger(__name__)


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    heartbeat = Heartbeat(engine, settings.log_dir, settings.stall_s, settings.check_silent_s)
    pool = ThreadPoolExecutor(PREPROCESS_THREADS, thread_name_prefix="preprocess")

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
        pool.shutdown(wait=False, cancel_futures=True)

    # No documentation routes: they would describe a body that the routes parse themselves.
    app = FastAPI(title="GLM-4.6V-Flash-WEB", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.services = Services(settings, engine, Admission(settings.queue_size), pool, heartbeat)
    for routes in (chat, models, ops):
        app.include_router(routes.router)
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The last one added is the outermost: a refused request gets its id and its log line too.
    app.add_middleware(KeyMiddleware, key=settings.api_key.get_secret_value() if settings.api_key else None)
    app.add_middleware(RequestMiddleware)
    return app


async def _serving_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServingError)
    request.state.log.setdefault("error", error.code)
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What the router itself refuses: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    shaped = unknown_route(request.method, request.url.path)
    if error.status_code != 404:
        shaped = ServingError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.",
                              "invalid_request_error", "method_not_allowed")  # fmt: skip
    return JSONResponse(shaped.body(), shaped.status, error.headers)
