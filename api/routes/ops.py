"""GET /health, /livez, /readyz, /ping, /version, /info, /metrics and /openapi.json: state, facts, counters, the description of the API."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from time import monotonic
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api import __version__
from api.engine.stats import Stats
from api.errors import invalid, not_accepting
from api.health.baseline import read_baseline
from api.health.heartbeat import LOST, READY
from api.health.metrics import CONTENT_TYPE
from api.health.proof import sign
from api.requests.handler import loaded_model
from api.routes.openapi import DOCUMENT, HEALTH, INFO, LIVEZ, METRICS, PING, VERSION, document
from api.state import ServerState

router = APIRouter()
NONCE = re.compile(r"[0-9a-fA-F]{16,64}")


@router.get("/livez", **LIVEZ)
@router.head("/livez", include_in_schema=False)
async def livez(request: Request) -> JSONResponse:
    """Whether the process may go on: 503 only where nothing but a new one helps. One that loads or drains is left alone."""
    server: ServerState = request.app.state.server
    stats = server.engine.stats()
    state = server.heartbeat.state(stats)
    # A new process in front of an engine that hangs would stand in front of the same.
    if state not in LOST or (state == "stalled" and server.engine.behind() is not None):
        return JSONResponse({"state": state})
    return JSONResponse({"state": state}, 503, _when_to_retry(state, stats))


@router.get("/health", **HEALTH)
@router.get("/readyz", **HEALTH)
@router.head("/health", include_in_schema=False)
@router.head("/readyz", include_in_schema=False)
async def health(request: Request) -> JSONResponse:
    """Reads counters only, so it answers while the engine computes, hangs or is dead.

    Open to everyone, so it holds no secret. To a nonce it adds a proof that only the holder of the probe token can make.
    """
    nonce = request.query_params.get("nonce")
    if nonce is not None and not NONCE.fullmatch(nonce):
        raise invalid("`nonce` must have 16 to 64 hex digits.", "nonce")
    server: ServerState = request.app.state.server
    stats, model, heartbeat = server.engine.stats(), server.engine.model, server.heartbeat
    state, pulse = heartbeat.state(stats), heartbeat.pulse
    age = stats.last_step_age_s
    body: dict[str, Any] = {
        "state": state,
        "progress": round(stats.progress, 3),
        "model": model.id if model else server.settings.model,
        "demo": model.facts.get("demo", False) if model else None,
        "phase": stats.phase,
        "phase_age_s": round(stats.phase_age_s, 3),
        "phase_deadline_s": stats.phase_deadline_s,
        "no_progress_s": pulse.no_progress_s,
        "loop_lag_s": pulse.loop_lag_s,
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.steps,
        "last_step_age_s": None if age is None else round(age, 3),
        "uptime_s": round(monotonic() - server.started_at, 3),
        "reason": stats.reason,
        **heartbeat.report(stats),
        "checker": asdict(pulse.checker),
        "heartbeat_error": heartbeat.write_error,
    }
    if (behind := server.engine.behind()) is not None:
        body["engine"] = behind
    if stats.download is not None:
        body["download"] = asdict(stats.download)
    token = server.settings.probe_token
    if nonce is not None and token is not None:
        body["proof"] = sign(token.get_secret_value(), nonce, body)
    if state in READY:
        return JSONResponse(body)
    return JSONResponse(body, 503, _when_to_retry(state, stats))


@router.get("/ping", **PING)
@router.head("/ping", include_in_schema=False)
async def ping(request: Request) -> Response:
    """The status of /health without its body, for load balancers; open to everyone too."""
    server: ServerState = request.app.state.server
    stats = server.engine.stats()
    state = server.heartbeat.state(stats)
    if state in READY:
        return Response()
    return Response(status_code=503, headers=_when_to_retry(state, stats))


def _when_to_retry(state: str, stats: Stats) -> dict[str, str]:
    """The headers that a refused question would get in this state."""
    return not_accepting(state, stats.progress, stats.reason).headers()


@router.get("/version", **VERSION)
async def version(request: Request) -> dict[str, str]:
    return {"version": __version__}


@router.get("/info", **INFO)
async def info(request: Request) -> dict[str, Any]:
    server: ServerState = request.app.state.server
    model, settings = loaded_model(server.engine), server.settings
    limits = (
        "max_images", "max_image_bytes", "max_image_pixels", "max_body_bytes", "request_timeout_s", "key_requests_per_minute", "key_concurrency", "loop_window",
        "fetch_images", "fetch_timeout_s",
    )  # fmt: skip
    return {
        "name": "GLM-4.6V-Flash-WEB",
        "version": __version__,
        "model": model.id,
        **model.facts,
        "context_tokens": model.context_tokens,
        "limits": {name: getattr(settings, name) for name in limits}
        | {
            "queue_size": server.admission.queue_size,
            "queue_tokens": server.admission.queue_tokens,
            "queue_image_bytes": server.admission.queue_image_bytes,
            "default_max_tokens": settings.default_max_tokens or model.answer.plain,
            "default_max_tokens_thinking": settings.default_max_tokens or model.answer.thinking,
        },
        "generation": asdict(model.defaults),
        "health_baseline": await asyncio.to_thread(read_baseline, settings.log_dir),
    }


@router.get("/metrics", **METRICS)
async def metrics(request: Request) -> Response:
    server: ServerState = request.app.state.server
    return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/openapi.json", **DOCUMENT)
async def openapi_document(request: Request) -> dict[str, Any]:
    """Behind the key, as everything else."""
    return document(request.app)
