"""The parts of a running server: created by `app`, read by the routes, unknown to everything below them."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from api.behind.handlers import BehindHandlers
from api.engine.serving import ServingEngine
from api.health.card_events import CardEvents
from api.health.heartbeat import Heartbeat
from api.health.metrics import Metrics
from api.health.outcomes import Outcomes
from api.requests.admission import Admission
from api.requests.handler import RequestHandlers
from api.requests.prompt import PromptBuilder
from settings import Settings


@dataclass(frozen=True)
class ServerState:
    settings: Settings
    engine: ServingEngine
    admission: Admission
    metrics: Metrics
    heartbeat: Heartbeat
    prompts: PromptBuilder
    handlers: RequestHandlers | BehindHandlers
    outcomes: Outcomes
    card_events: CardEvents
    started_at: float = field(default_factory=monotonic)
