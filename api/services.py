"""What a running server consists of, handed to every route."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic

from starlette.requests import Request

from api.admission import Admission
from api.engine.engine import Engine
from api.engine.model import Model
from api.errors import not_accepting
from api.heartbeat import Heartbeat
from settings import Settings

PREPROCESS_THREADS = 2


@dataclass(frozen=True)
class Services:
    settings: Settings
    engine: Engine
    admission: Admission
    pool: ThreadPoolExecutor
    heartbeat: Heartbeat
    started_at: float = field(default_factory=monotonic)

    def model(self) -> Model:
        """The model, or the 503 error that says why there is none."""
        if self.engine.model is None:
            stats = self.engine.stats()
            raise not_accepting(stats.state, stats.progress, stats.reason)
        return self.engine.model


def services(request: Request) -> Services:
    return request.app.state.services
