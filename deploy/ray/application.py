"""The API as an application of Ray Serve: `build` describes it, and a `Replica` is one API with one engine.

Serve brings the HTTP proxies, the scaling and the replacing of replicas. What a replica answers, and when only a new process
helps it, is the API's own. Needs ray[serve] (requirements-ray.txt), and this folder and its settings on every machine.
"""

import asyncio
import logging
import os
import shutil
import threading
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.app import create_app
from api.engine import process
from api.engine.engine import Engine
from api.health.heartbeat import LOST
from api.http import logging as logs
from api.server import DEVICE_LOST, ERROR_GRACE_S, allow_open_files, check_bind_address, new_engine
from api.state import ServerState
from log_output import LineFormatter
from settings import Settings, SettingsError, export_hub_variables, load

logger = logging.getLogger(__name__)

FOLDER = "ray"  # in the log folder: a folder for each replica of this machine
KEPT = 20  # of these folders, the newest
LOG_BYTES, LOG_FILES = 32 * 2**20, 3  # of each replica
POLL_S = 0.2
# Of check_health. It reads counters only, so it is asked often; it takes long only where the event loop is blocked.
CHECK_EVERY_S = 2.0
ALL = 1000  # replicas that a request may go to
STOP_S = 10.0  # after the last answer, for the process to end


class Arguments(BaseModel):
    """`args` in serve.yaml."""

    model_config = ConfigDict(extra="forbid")

    gpus: float = Field(1, ge=0, description="GPUs of each replica; 0: it computes on the CPU")
    cpus: float = Field(1, ge=0, description="CPUs that Ray reserves for each replica")


def build(arguments: Arguments) -> Any:
    """The application, for `import_path` in serve.yaml. Raises SettingsError for settings that no replica could start with.

    Nobody waits for a replica that is scaled away, so its answers have as long as the settings let an answer take.
    """
    settings = load()
    if settings.engine_url:
        raise SettingsError("GLM_ENGINE_URL: must be empty under Ray Serve, whose replicas have an engine each. Given: a URL")
    check_bind_address(settings)
    return serve.deployment(
        Replica,
        name=Replica.__name__,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        health_check_period_s=CHECK_EVERY_S,
        health_check_timeout_s=settings.beat_limit_s,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=settings.request_timeout_s + STOP_S,
        request_router_config=RequestRouterConfig(
            request_router_class="deploy.ray.session_router:SessionRouter",
            request_router_kwargs={"num_fallback_replicas": ALL},
        ),
    ).bind()


def build_api() -> FastAPI:
    """The API of one replica, in the replica's process. Raises SettingsError."""
    process.configure()
    settings = settings_of_replica(serve.get_replica_context().replica_id.unique_id)
    check_bind_address(settings)
    export_hub_variables()
    allow_open_files()
    log_into(settings.log_dir / "api.log", settings.log_level)
    app = create_app(settings, new_engine(settings))
    app.add_middleware(OneRequestId)
    return app


def settings_of_replica(name: str) -> Settings:
    """The settings of this machine, with a log folder of this replica's own. The oldest folders are removed. Raises SettingsError."""
    settings = load()
    folders = settings.log_dir / FOLDER
    folder = folders / name
    folder.mkdir(parents=True, exist_ok=True)
    # A replica that runs writes its heartbeat each second, so its folder is among the newest.
    for old in sorted(folders.iterdir(), key=_changed_at)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return settings.model_copy(update={"log_dir": folder})


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another replica has removed it
        return 0.0


def log_into(file: Path, level: str) -> None:
    """Ray collects what its workers print; the lines of the requests stay in the replica's folder."""
    handler = RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    handler.setFormatter(LineFormatter())
    logs.set_up(level)
    logging.getLogger().handlers[:] = [handler]


class OneRequestId:
    """Leaves x-request-id to Serve's proxy, which adds it to every answer: the one that it has given the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without if scope["type"] == "http" else send)


@serve.ingress(build_api)
class Replica:
    """One API with one engine, in a process of its own. Ray Serve calls its methods."""

    app: FastAPI  # what build_api has returned
    _lost = ""

    async def check_health(self) -> None:
        """Raises RuntimeError by the rule of /livez: where only a new process helps, and never for being slow or busy.

        Serve asks for the first time before it sends requests, and is answered once the model is loaded.
        """
        server: ServerState = self.app.state.server
        while (stats := server.engine.stats()).state == "loading":
            await asyncio.sleep(POLL_S)
        state = server.heartbeat.state(stats)
        if state in LOST and not self._lost:
            self._lost = f"the engine is {state}: {stats.reason or f'no progress for {server.heartbeat.pulse.no_progress_s} s'}"
            logger.error(logs.line("replica_lost", state=state, reason=self._lost))
            threading.Thread(target=end_process, args=(server.engine,), name="end", daemon=True).start()
        if self._lost:
            raise RuntimeError(self._lost)


def end_process(engine: Engine) -> None:
    """Every request gets its error, then the process ends at once, since an engine that hangs would hold an orderly end up."""
    engine.drain(0)
    time.sleep(ERROR_GRACE_S)
    os._exit(DEVICE_LOST)
