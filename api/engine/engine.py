"""One thread owns the model; everyone else talks to it through submit, abort, drain and stats.

Owns the life of a request from submit to its last event, and the engine's state. Knows nothing of
HTTP. No lock is held while the model computes, so every public call returns at once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from api.engine.detokenizer import Detokenizer
from api.engine.model import LoadError, Model
from api.engine.request import Delta, Done, Event, Failed, Failure, FinishReason, Request, Sequence
from api.engine.scheduler import Scheduler, Step

logger = logging.getLogger(__name__)

State = Literal["loading", "idle", "busy", "draining", "dead"]
Phase = Literal["loading", "warm-up", "idle", "vision", "prefill", "decode", "draining", "dead"]


class NotAccepting(Exception):
    """The engine takes no requests now; `state` says why."""

    def __init__(self, state: State, reason: str | None = None) -> None:
        super().__init__(reason or f"the engine is {state}")
        self.state = state


class Progress(Protocol):
    def __call__(self, fraction: float) -> None: ...


@dataclass(frozen=True)
class Stats:
    state: State
    progress: float
    phase: Phase
    running: int
    waiting: int
    steps: int
    last_step_age_s: float | None
    last_step_s: float | None
    reason: str | None
    phase_age_s: float = 0.0
    phase_deadline_s: float | None = None  # longest this phase may take; None: no limit
    slots: int = 1
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    prefix_hits: int = 0  # prompt tokens found in the prefix cache
    prefix_queries: int = 0  # prompt tokens looked up
    picture_hits: int = 0
    picture_queries: int = 0
    preemptions: int = 0


class Engine:
    """`load` runs in the engine thread and returns the model; it reports its progress from 0 to 1."""

    def __init__(self, load: Callable[[Progress], Model], queue_size: int) -> None:
        self._load = load
        self._scheduler = Scheduler(queue_size)
        self._wake = threading.Condition()  # guards the scheduler and the two flags below
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._model: Model | None = None
        self._reason: str | None = None  # set once, when the engine dies
        self._progress = 0.0
        self._phase: Phase = "loading"
        self._steps = 0
        self._last_step_at: float | None = None
        self._last_step_s: float | None = None

    # Called from any thread.

    def start(self) -> None:
        self._thread.start()

    @property
    def model(self) -> Model | None:
        """The model once it is loaded."""
        return self._model

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
        """Queue a request. `deliver` is called in the engine thread, last with Done or Failed.

        Raises NotAccepting or QueueFull, and then delivers nothing.
        """
        with self._wake:
            self.check_accepting()
            self._scheduler.add(Sequence(request, deliver))
            self._wake.notify_all()

    def check_accepting(self) -> None:
        state = self.stats().state
        if state in ("loading", "draining", "dead"):
            raise NotAccepting(state, self._reason)

    def abort(self, request_id: str) -> None:
        """End a request before its next step. Unknown and finished requests are no mistake."""
        with self._wake:
            sequence = self._scheduler.find(request_id)
            if sequence is not None:
                sequence.aborted = True
                self._wake.notify_all()

    def position(self, request_id: str) -> int | None:
        """0 while the request runs, its place in the queue while it waits."""
        with self._wake:
            return self._scheduler.position(request_id)

    def drain(self, deadline_s: float) -> bool:
        """Take nothing new, let the rest finish; what runs past the deadline fails. True if all finished."""
        with self._wake:
            self._draining = True
            finished = self._wake.wait_for(lambda: not self._scheduler.has_work, timeout=deadline_s)
            left = self._scheduler.sequences()
        for sequence in left:
            self._close(sequence, Failed(Failure.SHUTDOWN, "The server is shutting down."))
        return finished

    def stop(self, timeout_s: float) -> None:
        """Fail what is left and end the thread. One that hangs in the model stays behind; it is a daemon."""
        self.drain(0)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def stats(self) -> Stats:
        # Single attributes are read without the lock: a count that is one step old does no harm.
        now = time.monotonic()
        last = self._last_step_at
        running, waiting = self._scheduler.running, self._scheduler.waiting
        return Stats(
            state=self._state(running + waiting),
            progress=self._progress,
            phase=self._phase,
            running=running,
            waiting=waiting,
            steps=self._steps,
            last_step_age_s=None if last is None else now - last,
            last_step_s=self._last_step_s,
            reason=self._reason,
        )

    def _state(self, requests: int) -> State:
        if self._reason is not None:
            return "dead"
        if self._draining:
            return "draining"
        if self._model is None:
            return "loading"
        return "busy" if requests else "idle"

    # Called in the engine thread only.

    def _run(self) -> None:
        try:
            started = time.monotonic()
            self._model = self._load(self._report)
            self._progress, self._phase = 1.0, "idle"
            logger.info("event=engine_ready model=%s load_s=%.1f", self._model.id, time.monotonic() - started)
            while self._wait_for_work():
                self._step()
        except BaseException as error:  # the last guard: whatever ends this thread must show in /health
            self._die(error)

    def _report(self, fraction: float) -> None:
        self._progress = max(self._progress, min(fraction, 1.0))

    def _wait_for_work(self) -> bool:
        with self._wake:
            if not self._scheduler.has_work:
                self._phase = "idle"
                self._wake.notify_all()  # somebody may be draining
            self._wake.wait_for(lambda: self._scheduler.has_work or self._stopping)
            return not self._stopping

    def _step(self) -> None:
        """Drop what was aborted, choose the next work, do it, hand out the results."""
        with self._wake:
            aborted = self._scheduler.aborted()
        for sequence in aborted:
            self._close(sequence, Failed(Failure.ABORTED, "The request was aborted."))
        with self._wake:
            step = self._scheduler.schedule()
        if step is None:
            return
        began = time.monotonic()
        self._phase = step.work
        try:
            self._compute(step)
        except Exception as error:  # one request's mistake must not end the others
            self._fail(step, error)
        self._steps += 1
        self._last_step_at = time.monotonic()
        self._last_step_s = self._last_step_at - began

    def _compute(self, step: Step) -> None:
        assert self._model is not None
        runner = self._model.runner
        first = step.sequences[0]
        first.started_at = first.started_at or time.monotonic()
        if step.work == "vision":
            runner.encode_picture(first)
            first.pictures_encoded += 1
        elif step.work == "prefill":
            token = runner.prefill(first)
            first.first_token_at = time.monotonic()
            self._accept(first, token)
        else:
            for sequence, token in zip(step.sequences, runner.decode(step.sequences), strict=True):
                self._accept(sequence, token)

    def _accept(self, sequence: Sequence, token: int) -> None:
        """Take one new token: deliver its text, and the end if this was the last."""
        assert self._model is not None
        if sequence.aborted or sequence.closed:
            return  # nobody waits for it any more
        sampling = sequence.request.sampling
        if sequence.text is None:
            sequence.text = Detokenizer(sampling.stop, sampling.stop_skips)
        sequence.output_ids.append(token)
        sequence.undelivered_tokens += 1
        ends = token in self._model.end_ids
        text = "" if ends else sequence.text.feed(self._model.vocabulary.token_bytes(token))
        reason: FinishReason | None = None
        if ends or sequence.text.stopped:
            reason = FinishReason.STOP
        elif len(sequence.output_ids) >= min(sampling.max_tokens, self._room(sequence)):
            reason = FinishReason.LENGTH
        if reason:
            text += sequence.text.finish()
        if text or reason:
            sequence.deliver(Delta(text, sequence.undelivered_tokens))
            sequence.undelivered_tokens = 0
        if reason:
            self._close(sequence, sequence.done(reason))

    def _room(self, sequence: Sequence) -> int:
        assert self._model is not None
        return self._model.context_tokens - len(sequence.request.prompt_ids)

    def _fail(self, step: Step, error: Exception) -> None:
        assert self._model is not None
        ids = ",".join(s.request.id for s in step.sequences)
        logger.exception("event=step_failed engine_requests=%s work=%s", ids, step.work)
        if self._model.runner.is_fatal(error):
            raise error
        for sequence in step.sequences:
            self._close(sequence, Failed(Failure.ENGINE, f"The model failed on this request: {type(error).__name__}."))

    def _die(self, error: BaseException) -> None:
        expected = isinstance(error, LoadError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        logger.error("event=engine_dead reason=%s", json.dumps(reason), exc_info=None if expected else error)
        with self._wake:
            self._reason = reason
            self._phase = "dead"
            left = self._scheduler.sequences()
        for sequence in left:
            self._close(sequence, Failed(Failure.DEAD, "The model has failed and must be restarted."))

    # Called from any thread.

    def _close(self, sequence: Sequence, event: Done | Failed) -> None:
        """Deliver the last event of a request, once, and forget the request."""
        with self._wake:
            if sequence.closed:
                return
            sequence.closed = True
            self._scheduler.remove(sequence)
            self._wake.notify_all()
        sequence.deliver(event)
