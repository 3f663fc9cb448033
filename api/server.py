"""python -m api.server: settings, engine, app, uvicorn, signals.

Exit codes: 0 after draining, 1 if the port cannot be bound, 2 for invalid settings, 70 if the device was lost while
serving (a CUDA error, for example): only a new process can use it again.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import logging
import os
import resource
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from api import __version__
from api.app import create_app
from api.behind.remote_engine import RemoteEngine
from api.engine import process
from api.engine.config import EngineConfig
from api.engine.engine import Engine, Progress
from api.engine.loaded_model import Model
from api.health.fault_injection import FaultInjection
from api.health.heartbeat import READY, Heartbeat
from api.health.watchdog import Watchdog
from api.http import logging as logs
from api.http.auth import KeyRing
from api.http.connection import Connection
from settings import ROOT, Settings, SettingsError, export_hub_variables, load

logger = logging.getLogger(__name__)

CLOSE_S = 5  # after draining, for the last bytes to be sent
# Of an idle connection: longer than the clients' own limits (httpx 5 s, aiohttp 15 s), so that they close it and no
# request is sent into a connection that is being closed.
KEEP_ALIVE_S = 20
OPEN_FILES = 65_536  # connections and files at once, where the hard limit allows it
# Connections that asyncio accepts at a time. Out of descriptors it tries, and reports, so many in a row (Python 3.11).
BACKLOG = 512
REPORT_S = 10.0
DEVICE_LOST = 70
ERROR_GRACE_S = 2.0  # for the error to reach the waiting clients


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m api.server", description="The model server.")
    parser.add_argument("--host", help="address to listen on; overrides GLM_API_HOST")
    parser.add_argument("--port", type=int, help="port to listen on; overrides GLM_API_PORT")
    parser.add_argument("--model", help="hub id, folder, or auto; overrides GLM_MODEL")
    parser.add_argument("--weights", help="auto, bf16, fp8 or nf4; overrides GLM_WEIGHTS")
    parser.add_argument("--plan", action="store_true", help="print what the model takes on this card, and end")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="with --plan: for a card of this memory, like 12GiB")
    parser.add_argument("--gpu", metavar="NAME", help='with --plan: for a card of this name, like "RTX 4090"')
    options = parser.parse_args(arguments)
    if (options.gpu_memory or options.gpu) and not options.plan:
        parser.error("--gpu-memory and --gpu need --plan")
    process.configure()
    try:
        settings = load(
            api_host=options.host, api_port=options.port, model=options.model, weights=options.weights
        )
        if options.plan:
            from api.engine.loading.plan_command import print_plan

            return print_plan(engine_config(settings), options.gpu_memory, options.gpu)
        check_bind_address(settings)
        export_hub_variables()
        if settings.test_faults and FaultInjection(settings.log_dir).active()[0] == "crash-start":
            return 1
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2

    if settings.engine_url:
        return serve(settings, RemoteEngine(settings))
    return serve(settings, new_engine(settings))


def new_engine(settings: Settings) -> Engine:
    """An engine that will load the model of the settings, with the faults of the drill where they are enabled."""
    config = engine_config(settings)

    def load_model(progress: Progress) -> Model:
        # torch takes seconds to import; the port is open before that.
        from api.engine.loading.loader import load as load_checkpoint

        if not settings.test_faults:
            model = load_checkpoint(config, progress)
            process.freeze_objects()
            return model
        faults = FaultInjection(settings.log_dir)
        faults.at_start(progress)
        return faults.wrap(load_checkpoint(config, progress))

    return Engine(load_model, settings.queue_size)


def engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        model=settings.model,
        root=ROOT,
        hub=settings.hub,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        context_tokens=settings.context_tokens,
        slots=settings.slots,
        kv_cache_bytes=settings.kv_cache_bytes,
        encoder_cache_bytes=settings.picture_cache_bytes,
        weights=settings.weights,
        max_picture_tokens=settings.max_picture_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        kernels=settings.kernels,
        check_reference=True,
    )


def serve(settings: Settings, engine: Engine | RemoteEngine) -> int:
    """Serve until a signal or a lost device; returns the exit code. Call in the main thread."""
    logs.set_up(settings.log_level)
    allow_open_files()
    watchdog = Watchdog.from_environment(settings.stall_s, settings.start_deadline_s)
    app = create_app(settings, engine, watchdog)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        http=Connection,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        headers=[("Keep-Alive", f"timeout={KEEP_ALIVE_S}")],
        timeout_graceful_shutdown=CLOSE_S,
    )
    try:
        listener = bind(config)
    except SystemExit:  # uvicorn has logged why, but not where
        logger.error(logs.line("cannot_listen", host=settings.api_host, port=settings.api_port))
        return 1
    facts = {"version": __version__, "host": settings.api_host, "port": settings.api_port, "model": settings.model}
    if settings.engine_url:
        facts["model"] = f"behind {settings.engine_url}"
    logger.info(logs.line("start", **facts, key="set" if KeyRing.of(settings) else "none"))
    server = DrainingServer(config, engine, settings, app.state.server.heartbeat, watchdog)
    server.run(sockets=[listener])
    code = DEVICE_LOST if server.lost else 0
    logger.info(logs.line("stopped", code=code))
    return code


def bind(config: uvicorn.Config) -> socket.socket:
    """The listening socket. Its connections inherit TCP_NODELAY.

    asyncio sets it only on sockets that are made for TCP by name, which uvicorn's are not. Without it the second segment of
    an answer waits for the client's delayed acknowledgement of the first: 40 ms on every kept connection.
    """
    listener = config.bind_socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def allow_open_files() -> None:
    """Raises the soft limit on open files, which a shell often sets to 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_bind_address(settings: Settings) -> None:
    """Raises SettingsError if other machines could connect without a key."""
    if not KeyRing.of(settings) and not _is_loopback(settings.api_host):
        raise SettingsError(
            f"GLM_API_KEY is not set, and GLM_API_HOST={settings.api_host} can be reached from other machines. "
            "Set GLM_API_KEY in the environment or in .env (start.sh makes one), "
            "or listen on this machine only: --host 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT the port stays open, /health reports `draining`, and running answers may finish.

    Routers take some seconds to notice: for the delay of the settings, requests that they still send are taken.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine | RemoteEngine, settings: Settings, heartbeat: Heartbeat, watchdog: Watchdog) -> None:
        super().__init__(config)
        self._watchdog = watchdog
        self._engine = engine
        self._heartbeat = heartbeat
        self._drain_s = settings.drain_s
        self._delay_s = settings.drain_delay_s
        self._drain = threading.Thread(target=self._drain_then_exit, name="drain", daemon=True)
        self.lost = False
        self._reported_at = -REPORT_S
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._report)
        await super().startup(sockets)
        self._watchdog.listens()

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error that nobody awaits. One of accepting connections is repeated for as long as it lasts."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
            return
        Connection.close_oldest()
        if loop.time() - self._reported_at >= REPORT_S:
            self._reported_at = loop.time()
            logger.error(logs.line("no_files_left", limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain.ident is None:
            if self._heartbeat.state(self._engine.stats()) not in READY:
                self._delay_s = 0.0  # no router sends requests to it
            self._heartbeat.leave()
            logger.info(logs.line("drain", signal=sig, delay_s=self._delay_s or None, deadline_s=self._drain_s))
            self._drain.start()
        else:  # a second signal ends the process at once
            self.should_exit = self.force_exit = True

    def _watch(self) -> None:
        """End the process once the engine dies after loading; if loading failed, it stays up to report the reason."""
        while self._engine.stats().state != "dead" or self._engine.model is None:
            if self.should_exit:
                return
            time.sleep(0.2)
        self.lost = True
        logger.error(logs.line("device_lost", code=DEVICE_LOST, reason=self._engine.stats().reason))
        time.sleep(ERROR_GRACE_S)
        self.should_exit = True
        time.sleep(CLOSE_S + ERROR_GRACE_S)
        os._exit(DEVICE_LOST)  # the event loop hangs as well

    def _drain_then_exit(self) -> None:
        time.sleep(self._delay_s)
        finished = self._engine.drain(self._drain_s)
        logger.info(logs.line("drained", finished=finished))
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
