"""What a running server consists of, handed to every route."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic

from starlette.requests import Request

from api.engine.engine import Engine
from api.engine.loaded_model import Model
from api.engine.text.grammar import GrammarCompiler
from api.errors import not_accepting
from api.health.heartbeat import Heartbeat
from api.health.metrics import Metrics
from api.http.auth import Caller
from api.images.fetch import Fetcher
from api.requests.admission import Admission
from settings import Settings

PREPROCESS_THREADS = 2
FETCH_THREADS = 8  # they wait for strangers, not for the processor
GRAMMAR_THREADS = 2


class Pools:
    """Threads for what must not run on the event loop; apart, so that a slow stranger delays no picture at hand."""

    def __init__(self) -> None:
        self._preprocess = ThreadPoolExecutor(PREPROCESS_THREADS, thread_name_prefix="preprocess")
        self._probe = ThreadPoolExecutor(1, thread_name_prefix="probe")  # it never queues behind users
        self.fetch = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self.grammar = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")

    def preprocess(self, caller: Caller) -> ThreadPoolExecutor:
        return self._probe if caller.probe else self._preprocess

    def close(self) -> None:
        for pool in (self._preprocess, self._probe, self.fetch, self.grammar):
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Services:
    settings: Settings
    engine: Engine
    admission: Admission
    metrics: Metrics
    fetcher: Fetcher
    pools: Pools
    heartbeat: Heartbeat
    started_at: float = field(default_factory=monotonic)
    _compiler: GrammarCompiler | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def model(self) -> Model:
        """The model, or the 503 error that says why there is none."""
        if self.engine.model is None:
            stats = self.engine.stats()
            raise not_accepting(stats.state, stats.progress, stats.reason)
        return self.engine.model

    def grammars(self) -> GrammarCompiler:
        model = self.model()
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(model.vocabulary, model.end_ids)
            return self._compiler


def services(request: Request) -> Services:
    return request.app.state.services


def caller(request: Request) -> Caller:
    return request.state.caller
