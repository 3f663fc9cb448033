"""The engine behind this API: which one it is, whether it answers and moves, and the questions that it works on.

It has the surface of `api.engine.engine.Engine` that the routes, the metrics and the heartbeat use. Its state is `loading`
for as long as the engine cannot be asked, with the reason, and then idle or busy by the questions under way. It makes a
step with every event of an answer and whenever a token counter of the engine moves. Everything but `stats`, `drain` and
what only reads is called in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from api.behind.answer import AnswerReader, failed_with
from api.behind.engine_client import EngineClient, Reply, not_begun
from api.behind.kinds import OWNERS, TRAITS, Kind
from api.engine.command import Action, CommandFailed
from api.engine.loaded_model import AnswerLimits, Capacity, SamplingDefaults
from api.engine.pace import PaceCounters
from api.engine.request import Event, Failed, Failure
from api.engine.scheduler import queue_for
from api.engine.stats import Phase, State, Stats
from api.errors import ServingError, failed, internal, not_accepting
from settings import Settings

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
COUNT_EVERY_S = 5.0  # the engine's counters, while questions are under way
IDENTIFY_EVERY_S = 30.0  # the engine may have been restarted with another model
LIMIT_S = 5.0
SILENT_S = 30.0  # an engine that accepts connections and does not answer for so long gets no more questions
UNKNOWN_CONTEXT = 32_768  # where neither the engine nor GLM_CONTEXT_TOKENS says it
UNKNOWN_SLOTS = 256
COUNTERS = ("generation_tokens", "prompt_tokens", "tokens_predicted", "gen_throughput", "iteration_tokens")
GLM_NAME = "GLM-4.6V-Flash-WEB"


@dataclass(frozen=True)
class EngineModel:
    """What the engine behind says of its model. `starts_thinking`: its template opens the thought."""

    id: str
    kind: Kind
    context_tokens: int
    slots: int = UNKNOWN_SLOTS
    starts_thinking: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    capacity: Capacity | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    answer: AnswerLimits = field(default_factory=AnswerLimits)


@dataclass(eq=False)
class _Question:
    task: asyncio.Task[None]
    fail: Callable[[ServingError | Failed], None]
    asked_at: float
    reader: AnswerReader
    writing: bool = False


class NotReady(Exception):
    """Why the engine cannot be asked."""


class RemoteEngine:
    def __init__(self, settings: Settings) -> None:
        key = settings.engine_key.get_secret_value() if settings.engine_key else ""
        self.client = EngineClient(settings.engine_base_url, key)
        self.pace = PaceCounters()
        self.after_delivery: Callable[[], None] = lambda: None
        self._settings = settings
        self._model: EngineModel | None = None
        self._reason: str | None = "it has not been asked yet"
        self._progress = 0.0
        self._looks = 0  # answers of any kind
        self._steps = 0
        self._last_step_at: float | None = None
        self._counters: dict[str, float] = {}
        self._answered_at = time.monotonic()
        self._since = time.monotonic()
        self._draining = False
        self._questions: dict[str, _Question] = {}
        self._waited_s = 0.0  # with questions under way and no movement, also across questions whose clients left
        self._looked_at = time.monotonic()
        self._empty = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.Task[None] | None = None

    # As of an engine of this process.

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.client.open()
        self._watching = asyncio.create_task(self._watch())

    @property
    def model(self) -> EngineModel | None:
        return self._model

    @property
    def steps(self) -> int:
        return self._steps

    def slots(self) -> int:
        return self._settings.slots or (self._model.slots if self._model else UNKNOWN_SLOTS)

    def queue_size(self) -> int:
        return self._settings.queue_size or queue_for(self.slots())

    def position(self, request_id: str) -> int | None:
        """Where it stands in the engine's queue is not known."""
        return 0 if request_id in self._questions else None

    def abort(self, request_id: str) -> None:
        """Closes the connection on which the engine writes the answer, by which it notices."""
        question = self._questions.get(request_id)
        if question is not None:
            question.task.cancel()

    def in_flight(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        return [
            {"id": name, "age_s": round(now - question.asked_at, 3), "phase": "decode" if question.writing else "waiting", "tokens": question.reader.tokens}
            for name, question in tuple(self._questions.items())
        ]

    def guard_report(self) -> dict[str, Any]:
        """The engine is another process, whose numbers are not seen here."""
        return {
            "nonfinite_total": 0, "nonfinite_recent": 0, "fingerprint": "off", "fingerprint_stage": "", "fingerprint_age_s": None,
            "reference": "off", "reference_detail": "",
        }  # fmt: skip

    def command(self, action: Action, timeout_s: float) -> float:
        raise CommandFailed("the engine behind cannot be told to from here")

    def behind(self) -> dict[str, Any]:
        model = self._model
        return {
            "url": self._settings.engine_url,
            "kind": model.kind if model else None,
            "reason": self._reason,
            "unanswered_s": round(self._waited_s, 1),
            "silent_s": round(time.monotonic() - self._answered_at, 1),
        }

    def drain(self, deadline_s: float) -> bool:
        """Called in a thread of its own: takes no more questions and waits for the rest; those that miss the deadline fail."""
        self._draining = True
        with self._empty:
            finished = self._empty.wait_for(lambda: not self._questions, deadline_s)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all)
        return finished

    def stop(self, timeout_s: float) -> None:
        """Called in the event loop."""
        self._draining = True
        self._end_all()
        if self._watching is not None:
            self._watching.cancel()

    def _end_all(self) -> None:
        for question in tuple(self._questions.values()):
            question.fail(Failed(Failure.SHUTDOWN, "The server is shutting down."))
            question.task.cancel()
        self.after_delivery()

    def stats(self) -> Stats:
        questions = tuple(self._questions.values())
        writing = sum(question.writing for question in questions)
        now = time.monotonic()
        state = self._state(len(questions))
        phase: Phase = "loading" if state == "loading" else "decode" if writing else "prefill" if questions else "idle"
        return Stats(
            state=state,
            progress=1.0 if self._reason is None else self._progress,
            phase=phase,
            running=writing,
            waiting=len(questions) - writing,
            steps=self._steps,
            last_step_age_s=None if self._last_step_at is None else now - self._last_step_at,
            last_step_s=None,
            reason=None if self._reason is None else f"the engine behind at {self._settings.engine_url} is not ready: {self._reason}",
            phase_age_s=now - self._since,
            slots=self.slots(),
            load_reports=self._looks,
        )

    def _state(self, questions: int) -> State:
        if self._draining:
            return "draining"
        if self._reason is not None:
            return "loading"
        return "busy" if questions else "idle"

    # Questions.

    async def ask(
        self, name: str, path: str, body: dict[str, Any], reader: AnswerReader, deliver: Callable[[Event], None], deadline_s: float
    ) -> None:
        """Ask, and return once the engine has accepted the question; its answer comes through `deliver`, in the event loop.

        Raises ServingError for a refusal: then nothing is delivered.
        """
        self.check_accepting()
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def fail(error: ServingError | Failed) -> None:
            if accepted.done():
                deliver(error if isinstance(error, Failed) else failed_with(error))
            else:
                accepted.set_exception(failed(error.kind, error.message) if isinstance(error, Failed) else error)

        task = asyncio.create_task(self._answer(name, path, body, reader, deliver, fail, accepted, deadline_s))
        self._questions[name] = _Question(task, fail, time.monotonic(), reader)
        try:
            await accepted
        except BaseException:
            task.cancel()
            raise

    def check_accepting(self) -> None:
        """Raises the 503 error with the reason."""
        stats = self.stats()
        if stats.state in ("loading", "draining"):
            raise not_accepting(stats.state, stats.progress, stats.reason)

    async def _answer(
        self, name: str, path: str, body: dict[str, Any], reader: AnswerReader, deliver: Callable[[Event], None],
        fail: Callable[[ServingError | Failed], None], accepted: asyncio.Future[None], deadline_s: float,
    ) -> None:  # fmt: skip
        try:
            async with asyncio.timeout(deadline_s), self.client.stream(path, body) as events:
                model = self._model
                if model is None or not TRAITS[model.kind].opens_at_once:
                    _accept(accepted)
                async for event in events:
                    delta = reader.read(event)
                    _accept(accepted)
                    self._moved()
                    if delta is not None:
                        self._questions[name].writing = True
                        deliver(delta)
                        self.after_delivery()
                deliver(reader.done())
        except ServingError as error:
            # As long as nothing has been written, asking again is safe.
            fail(not_begun(error.message) if error.code == "engine_cut_off" and not reader.tokens else error)
        except TimeoutError:
            fail(Failed(Failure.DEADLINE, f"The answer took longer than {deadline_s:g} s."))
        except Exception:
            logger.exception("event=engine_answer_unreadable request=%s", name)
            fail(internal())
        finally:
            self._questions.pop(name, None)
            with self._empty:
                self._empty.notify_all()
            self.after_delivery()

    def _moved(self) -> None:
        self._steps += 1
        self._waited_s = 0.0
        self._last_step_at = time.monotonic()

    # Watching the engine.

    async def _watch(self) -> None:
        identified_at = counted_at = 0.0
        while True:
            now = time.monotonic()
            try:
                if self._reason is not None or self._model is None or now - identified_at >= IDENTIFY_EVERY_S:
                    await self._identify()
                    identified_at = now
                else:
                    self._judge(await self.client.get("/health", LIMIT_S))
                self._is_ready()
                if self._questions and now - counted_at >= COUNT_EVERY_S:
                    counted_at = now
                    await self._count()
            except NotReady as error:
                self._is_not_ready(str(error))
            except Exception:
                logger.exception("event=engine_not_understood")
                self._is_not_ready("its answers are not understood; the log has the details")
            await asyncio.sleep(LOOK_EVERY_S)
            now = time.monotonic()
            if self._questions:
                self._waited_s += now - self._looked_at
            self._looked_at = now

    def _is_ready(self) -> None:
        if self._reason is not None and self._model is not None:
            self._reason, self._since = None, time.monotonic()
            logger.info("event=engine_ready url=%s kind=%s model=%s context_tokens=%d", self.client.url, self._model.kind, self._model.id, self._model.context_tokens)

    def _is_not_ready(self, reason: str) -> None:
        if reason != self._reason:
            logger.warning("event=engine_not_ready url=%s reason=%r", self.client.url, reason)
        if self._reason is None:
            self._since = time.monotonic()
        self._reason = reason

    def _judge(self, reply: Reply) -> None:
        """Raises NotReady. A slow answer of /health is no reason: an engine that computes answers late."""
        if reply.status:
            self._answered_at = time.monotonic()
            self._looks += 1
        if reply.status in (401, 403):
            raise NotReady("it refuses GLM_ENGINE_KEY")
        if reply.status == 503:
            self._progress = float(reply.get("progress") or 0.0) if isinstance(reply.get("progress"), int | float) else 0.0
            error = reply.get("error")
            said = reply.get("reason") or reply.get("state") or (error.get("message") if isinstance(error, dict) else "")
            raise NotReady(f"it answers HTTP 503{f' ({str(said)[:200]})' if said else ''}")
        silent_s = time.monotonic() - self._answered_at
        if not reply.status and (reply.refused or self._model is None or silent_s > SILENT_S):
            raise NotReady(reply.problem if reply.refused or silent_s <= SILENT_S else f"it has not answered for {silent_s:.0f} s")

    async def _identify(self) -> None:
        """Asks for the model, and whatever else is known of this kind. Raises NotReady."""
        self._judge(await self.client.get("/health", LIMIT_S))
        reply = await self.client.get("/v1/models", LIMIT_S)
        self._judge(reply)
        if not reply.status:
            if self._reason is not None:
                raise NotReady(reply.problem)
            return  # slow: what was known still holds
        listed = reply.get("data")
        if reply.status != 200 or not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
            raise NotReady(f"GET /v1/models answers HTTP {reply.status} without a model: is GLM_ENGINE_URL its address without /v1?")
        card = listed[0]
        kind = await self._kind_of(card)
        before = self._model
        if before is not None and (before.id, before.kind) == (str(card.get("id")), kind) and self._reason is None:
            return
        self._model = await self._model_of(card, kind)

    async def _kind_of(self, card: dict[str, Any]) -> Kind:
        if self._settings.engine_kind != "auto":
            return self._settings.engine_kind
        if (owner := OWNERS.get(str(card.get("owned_by")))) is not None:
            return owner
        if (await self.client.get("/info", LIMIT_S)).get("name") == GLM_NAME:
            return "glm"
        if (await self.client.get("/props", LIMIT_S)).get("default_generation_settings"):
            return "llama.cpp"
        if (await self.client.get("/get_server_info", LIMIT_S)).status == 200:
            return "sglang"
        return "vllm" if (await self.client.get("/version", LIMIT_S)).get("version") else "other"

    async def _model_of(self, card: dict[str, Any], kind: Kind) -> EngineModel:
        name, context = str(card.get("id")), card.get("max_model_len")
        facts: dict[str, Any] = {"engine": {"kind": kind, "url": self._settings.engine_url}}
        slots, thinks = UNKNOWN_SLOTS, False
        defaults, answer = SamplingDefaults(), AnswerLimits()
        if kind == "glm":
            told = (await self.client.get("/info", LIMIT_S)).body
            told = told if isinstance(told, dict) else {}
            ours = ("name", "version", "model", "context_tokens", "limits", "generation", "health_baseline")
            facts = {**{key: value for key, value in told.items() if key not in ours}, "engine": {**facts["engine"], "version": told.get("version")}}
            limits = told.get("limits") or {}
            answer = AnswerLimits(limits.get("default_max_tokens", answer.plain), limits.get("default_max_tokens_thinking", answer.thinking))
            defaults = SamplingDefaults(**(told.get("generation") or {}))
        elif kind == "llama.cpp":
            props = await self.client.get("/props", LIMIT_S)
            generation = props.get("default_generation_settings") or {}
            context = generation.get("n_ctx") or context or (card.get("meta") or {}).get("n_ctx_train")
            slots = props.get("total_slots") or slots
            rendered = await self.client.post("/apply-template", {"messages": [{"role": "user", "content": "a"}]}, LIMIT_S)
            thinks = str(rendered.get("prompt") or "").rstrip().endswith("<think>")
        elif kind == "vllm":
            facts["engine"]["version"] = (await self.client.get("/version", LIMIT_S)).get("version")
            asked = {"model": name, "messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
            written = (await self.client.post("/tokenize", asked, LIMIT_S)).get("token_strs") or []
            thinks = "".join(map(str, written)).replace("Ċ", "\n").rstrip().endswith("<think>")
        if not isinstance(context, int) or context <= 0:
            context = self._settings.context_tokens or UNKNOWN_CONTEXT
        return EngineModel(name, kind, context, slots, thinks, facts, None, defaults, answer)

    async def _count(self) -> None:
        """The engine moves too where a counter of its tokens does, as while it reads a long prompt."""
        if self._model is None or not TRAITS[self._model.kind].metrics:
            return
        reply = await self.client.get("/metrics", LIMIT_S)
        if reply.status != 200:
            return
        try:
            counters = {
                f"{sample.name} {sorted(sample.labels.items())}": sample.value
                for family in text_string_to_metric_families(reply.text)
                for sample in family.samples
                if any(word in sample.name for word in COUNTERS)
            }
        except ValueError:
            return
        if counters and counters != self._counters:
            if self._counters:
                self._moved()
            self._counters = counters


def _accept(accepted: asyncio.Future[None]) -> None:
    if not accepted.done():
        accepted.set_result(None)


