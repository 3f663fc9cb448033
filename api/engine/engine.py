"""The engine: one thread owns the model; other threads use submit, abort, drain and stats.

Owns the life of a request from submit to its last event, and the engine's state. Knows nothing of HTTP. No lock is held
while the model computes, so every public call except drain and stop returns at once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

from api.engine.command import Action, Command, Commands
from api.engine.encoder_cache import EncoderCache
from api.engine.guard import Guard
from api.engine.kv_cache import BlockTable, KvCache
from api.engine.loaded_model import Flight, LoadError, Model, OverlappingRunner, SampledToken
from api.engine.pace import PaceCounters
from api.engine.request import Done, Event, Failed, Failure, ImageInput, Request
from api.engine.scheduler import Batch, EncodeTask, Scheduler, queue_for
from api.engine.sequence import Sequence, make_sequence
from api.engine.stats import Download, Phase, State, Stats
from api.engine.text.output import GrammarViolation, OutputState
from api.engine.token_budget import TokenBudget

logger = logging.getLogger(__name__)

WARM_UP_DEADLINE_S = 600.0
CHECK_EVERY_S = 10.0  # integrity check while idle
FINGERPRINT_DEADLINE_S = 120.0
PATCHES_WAIT_S = 0.1  # in a step with nothing else to do, so that deadlines are noticed


class NotAccepting(Exception):
    """The engine accepts no requests in its current `state`."""

    def __init__(self, state: State, reason: str | None = None) -> None:
        super().__init__(reason or f"the engine is {state}")
        self.state = state


class Progress(Protocol):
    """`download`: what a download has reached, asked for whenever someone wants to know."""

    def __call__(self, fraction: float, download: Callable[[], Download] | None = None) -> None: ...


@dataclass(frozen=True)
class _Ahead:
    """A step of decoding sequences that was queued before the tokens of the one before it were known."""

    sequences: tuple[Sequence, ...]
    tables: tuple[BlockTable | None, ...]  # theirs when it was queued: one that has ended since has it no more
    flight: Flight


class Engine:
    """`load` runs in the engine thread and returns the model; it reports its progress from 0 to 1. Raises LoadError.
    `queue_size` 0: chosen by the model's slots."""

    def __init__(self, load: Callable[[Progress], Model], queue_size: int) -> None:
        self.pace = PaceCounters()
        # Called after events have been delivered, once for all of a step, in the thread that delivered them.
        self.after_delivery: Callable[[], None] = lambda: None
        self._load = load
        self._queue_size = queue_size
        self._scheduler = Scheduler(queue_size or queue_for(1), 1, KvCache(0, 1), EncoderCache(0))  # until the model is loaded
        self._wake = threading.Condition()  # guards the scheduler and the two flags below
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._model: Model | None = None
        self._image_token_id = -1
        self._budget = TokenBudget()
        self._reason: str | None = None  # set once, when the engine dies
        self._progress = 0.0
        self._load_reports = 0
        self._download: Callable[[], Download] | None = None
        self._phase: tuple[Phase, float, float | None] = ("loading", time.monotonic(), None)
        self._steps = 0
        self._last_step_at: float | None = None
        self._last_step_s: float | None = None
        self._checked_at = 0.0
        self._encoded_last_step = False
        self._unprepared = False  # whether the runner has something to prepare while nothing is to do
        self._guard = Guard()
        self._ahead: _Ahead | None = None  # the next step, if the device computes it already
        self._may_admit = False  # whether something has changed since nobody else could be admitted
        self._commands = Commands(self._wake)
        self._unreadable: list[tuple[ImageInput, Exception]] = []  # whose patches could not be made again; guarded by _wake

    # Called from any thread.

    def start(self) -> None:
        self._thread.start()

    @property
    def model(self) -> Model | None:
        """The model once it is loaded."""
        return self._model

    @property
    def steps(self) -> int:
        """Steps completed so far."""
        return self._steps

    def slots(self) -> int:
        """Requests that can run at once."""
        return self._scheduler.slots

    def queue_size(self) -> int:
        """Requests that may wait."""
        return self._scheduler.queue_size

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> None:
        """Queue a request. `deliver` is called with each event, the last of which is Done or Failed: in the engine
        thread, or in the thread that calls drain or stop. It must return at once.

        Raises NotAccepting, QueueFull, or ValueError for a prompt that does not match its images or exceeds the
        context. No event is delivered for a request that is refused.
        """
        self.check_accepting()
        model = self._model
        assert model is not None
        if len(request.prompt_ids) >= model.context_tokens:
            raise ValueError(f"the prompt must be < {model.context_tokens} tokens. Given: {len(request.prompt_ids)}")
        sequence = make_sequence(request, deliver, self._image_token_id)
        sequence.output = OutputState(request, model.vocabulary, model.end_ids, model.context_tokens)
        with self._wake:
            self.check_accepting()
            self._scheduler.add(sequence)
            self._may_admit = True
            self._wake.notify_all()

    def check_accepting(self) -> None:
        state = self.stats().state
        if state in ("loading", "draining", "dead"):
            raise NotAccepting(state, self._reason)

    def abort(self, request_id: str) -> None:
        """End a request before its next step. Unknown and finished requests are ignored."""
        with self._wake:
            sequence = self._scheduler.find(request_id)
            if sequence is not None:
                sequence.aborted = True
                self._wake.notify_all()

    def position(self, request_id: str) -> int | None:
        """0 while the request runs, its position in the queue (from 1) while it waits, None if it is unknown."""
        with self._wake:
            return self._scheduler.position(request_id)

    def in_flight(self) -> list[dict[str, Any]]:
        """The progress of each request, without its content. Takes no lock, because it is called when the engine hangs."""
        now = time.monotonic()
        return [sequence.facts(now) for sequence in self._scheduler.sequences()]

    def behind(self) -> None:
        """There is none: the engine is this one."""

    def guard_report(self) -> dict[str, Any]:
        """The keys of `corrupt` in /health: what shows that the model or the machine computes wrongly."""
        return self._guard.report()

    def command(self, action: Action, timeout_s: float) -> float:
        """Have the engine thread do `action` between two steps; returns the seconds that it took.

        Raises NotAccepting, or CommandFailed if it cannot be done or is not done within `timeout_s`.
        """
        self.check_accepting()
        return self._commands.give(action, timeout_s)

    def drain(self, deadline_s: float) -> bool:
        """Accept no more requests and wait for the rest; those that miss the deadline fail. True if all finished."""
        with self._wake:
            self._draining = True
            finished = self._wake.wait_for(lambda: not self._scheduler.has_work, timeout=deadline_s)
            left = self._scheduler.sequences()
            for sequence in left:
                sequence.aborted = True  # the engine thread frees what they hold, unless it hangs
            self._wake.notify_all()
        for sequence in left:
            self._deliver_last(sequence, Failed(Failure.SHUTDOWN, "The server is shutting down."))
        self.after_delivery()
        return finished

    def stop(self, timeout_s: float) -> None:
        """Fail the remaining requests and end the thread. A thread that hangs in the model is left behind: a daemon."""
        self.drain(0)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def stats(self) -> Stats:
        # Attributes are read without the lock: a count may be one step old.
        now = time.monotonic()
        last = self._last_step_at
        phase, since, deadline_s = self._phase
        scheduler, download = self._scheduler, self._download
        running, waiting = scheduler.running, scheduler.waiting
        return Stats(
            state=self._state(running + waiting),
            progress=self._progress,
            phase=phase,
            running=running,
            waiting=waiting,
            steps=self._steps,
            last_step_age_s=None if last is None else now - last,
            last_step_s=self._last_step_s,
            reason=self._reason,
            phase_age_s=now - since,
            phase_deadline_s=deadline_s,
            slots=scheduler.slots,
            kv_used_tokens=scheduler.kv.used_tokens,
            kv_total_tokens=scheduler.kv.total_tokens,
            prefix_cache_hits=scheduler.kv.hit_tokens,
            prefix_cache_queries=scheduler.kv.queried_tokens,
            encoder_cache_hits=scheduler.encoder_cache.hits,
            encoder_cache_queries=scheduler.encoder_cache.queries,
            preemptions=scheduler.preemptions,
            load_reports=self._load_reports,
            download=download() if download is not None and self._reason is None else None,
        )

    def _state(self, requests: int) -> State:
        if self._reason is not None:
            return "dead"
        if self._draining:
            return "draining"
        if self._model is None:
            return "loading"
        return "busy" if requests else "idle"

    # The engine thread.

    def _run(self) -> None:
        try:
            self._set_up()
            while self._wait_for_work():
                self._obey()
                self._step()
            self._commands.refuse("the server is shutting down")
            self._drop_ahead()
            if self._model is not None:
                self._model.runner.close()
        except BaseException as error:  # whatever ends this thread must show in /health
            self._die(error)

    def _set_up(self) -> None:
        started = time.monotonic()
        model = self._load(self._report)
        self._enter("warm-up", WARM_UP_DEADLINE_S)
        model.runner.warm_up()
        capacity = model.capacity
        self._image_token_id = model.vocabulary.special[model.image_token]
        self._budget = TokenBudget(capacity.chunk_tokens, model.runner.free_rows)
        if model.runner.overlaps:
            for cost in cast(OverlappingRunner, model.runner).costs:
                self._budget.record_batch(*cost)
        self._scheduler = Scheduler(
            self._queue_size or queue_for(capacity.slots),
            capacity.slots,
            KvCache(capacity.pages, capacity.page_tokens),
            EncoderCache(capacity.encoder_cache_bytes),
            model.runner.packing,
        )
        self._enter("idle")
        self._guard.watch(model.integrity)
        self._progress, self._download, self._model, self._unprepared = 1.0, None, model, True
        logger.info("event=engine_ready model=%s load_s=%.1f", model.id, time.monotonic() - started)

    def _report(self, fraction: float, download: Callable[[], Download] | None = None) -> None:
        self._progress, self._download = max(self._progress, min(fraction, 1.0)), download
        self._load_reports += 1

    def _enter(self, phase: Phase, deadline_s: float | None = None) -> None:
        self._phase = (phase, time.monotonic(), deadline_s)

    def _wait_for_work(self) -> bool:
        if not self._scheduler.has_work:
            self._drop_ahead()
        while True:
            with self._wake:
                if not self._scheduler.has_work:
                    self._enter("draining" if self._draining else "idle")
                    self._wake.notify_all()  # a thread may wait in drain()
                    self._check_integrity()
                timeout_s = 0.0 if self._unprepared else self._guard.due_in_s()
                self._wake.wait_for(self._has_something_to_do, timeout=timeout_s)
                if self._stopping or self._scheduler.has_work:
                    return not self._stopping
            self._obey()
            if self._unprepared and self._model is not None:
                self._enter("warm-up", WARM_UP_DEADLINE_S)
                self._unprepared = self._model.runner.prepare_next()
            else:
                self._look_for_damage()

    def _look_for_damage(self) -> None:
        self._enter("check", FINGERPRINT_DEADLINE_S)
        try:
            self._guard.look(self._has_something_to_do)
        except Exception as error:  # too little memory, for example, must not end the serving
            assert self._model is not None
            if self._model.runner.failure(error) == "device":
                raise
            logger.error("event=check_failed", exc_info=error)
            self._guard.postpone()

    def _has_something_to_do(self) -> bool:
        return self._scheduler.has_work or self._stopping or bool(self._commands.waiting)

    def _obey(self) -> None:
        """Carry out the commands whose time has come."""
        if self._commands.waiting:
            self._drop_ahead()
        for command in self._commands.waiting:
            if command.action == "reload-weights" and not self._is_clear(command):
                continue
            if not self._commands.take(command):  # whoever gave it no longer waits
                continue
            began = time.monotonic()
            error = self._carry_out(command.action)
            command.finish(time.monotonic() - began, error)
            logger.info("event=command action=%s error=%s", command.action, json.dumps(error))

    def _is_clear(self, command: Command) -> bool:
        """Whether no request runs, so that weights may change. Those that run past the command's deadline fail."""
        if self._scheduler.running and time.monotonic() > command.deadline:
            failed = Failed(Failure.RELOAD, "The model is being loaded again.")
            for sequence in self._scheduler.running_sequences():
                self._close(sequence, failed, keep=False)
            self.after_delivery()
        return not self._scheduler.running

    def _carry_out(self, action: Action) -> str | None:
        """Returns why it could not be done. Raises if the model is no longer usable."""
        integrity = self._model.integrity if self._model else None
        if action == "drop-caches":
            with self._wake:
                self._scheduler.drop_caches()
            if integrity is not None:
                integrity.drop_caches()
            self._guard.cured()
            return None
        if integrity is None:
            return f"{action}: this model cannot do it"
        if action == "reload-weights":
            self._enter("warm-up", WARM_UP_DEADLINE_S)
            try:
                integrity.reload()
            except LoadError as error:
                return str(error)
            with self._wake:
                self._scheduler.drop_caches()
            self._guard.cured()
            self._guard.look_again()
            self._unprepared = True
        self._enter("check", FINGERPRINT_DEADLINE_S)
        self._guard.take_fingerprint()
        return None

    def _check_integrity(self) -> None:
        """Nothing runs, so every page and slot must be free or cached. If not, start again with empty caches."""
        if time.monotonic() - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = time.monotonic()
        try:
            self._scheduler.check()
        except AssertionError as error:
            logger.error("event=integrity_lost reason=%s", json.dumps(str(error)))
            old = self._scheduler
            kv = KvCache(old.kv.pages, old.kv.page_tokens)
            self._scheduler = Scheduler(old.queue_size, old.slots, kv, EncoderCache(old.encoder_cache.budget_bytes), old.packing)

    def _step(self) -> None:
        """End aborted and overdue requests, admit, encode a slice of images, compute one batch, deliver its tokens."""
        began = time.monotonic()
        self._drop_ended(began)
        if self._ahead is None:
            self._admit()
            self._read_patches()
            task = self._next_encode_task()
            spent_s = self._encode(task) if task else 0.0
            if not self._compute(spent_s) and task is None:
                self._wait_for_patches()
        else:
            self._finish(self._ahead)
        self.after_delivery()
        self._steps += 1
        self._last_step_at = time.monotonic()
        self._last_step_s = self._last_step_at - began

    def _drop_ended(self, now: float) -> None:
        with self._wake:
            ended = self._scheduler.ended(now)
        for sequence in ended:
            if sequence.aborted:
                self._close(sequence, Failed(Failure.ABORTED, "The request was aborted."))
            else:
                limit = sequence.request.deadline_s
                self._close(sequence, Failed(Failure.DEADLINE, f"The request took longer than its {limit:g} s."))
        if ended:
            self.after_delivery()

    def _admit(self) -> None:
        if any(command.action == "reload-weights" for command in self._commands.waiting):
            return  # those that wait are computed with the new weights
        with self._wake:
            self._may_admit = False
            started = self._scheduler.admit()
        self._clear_pages()
        for sequence in started:
            sequence.started_at = sequence.started_at or time.monotonic()
            try:
                assert self._model is not None and sequence.block_table is not None
                self._model.runner.copy_pages([sequence.block_table.copy] if sequence.block_table.copy else [])
                self._model.runner.begin(sequence)
            except Exception as error:
                self._give_up((sequence,), "begin", error)

    def _clear_pages(self) -> None:
        """Pages whose last content may not have been finite are cleared before they are used again."""
        pages = self._scheduler.kv.to_clear
        if pages:
            assert self._model is not None
            self._model.runner.clear_pages(pages)
            pages.clear()

    def _read_patches(self) -> None:
        """Have the patches of images made that must be encoded though they were released, or not decoded at all."""
        with self._wake:
            unreadable, self._unreadable = self._unreadable, []
        for image, error in unreadable:
            with self._wake:
                users = self._scheduler.users_of(image)
            self._give_up(tuple(users), "patches", error)
        with self._wake:
            images = self._scheduler.images_to_read()
        for image in images:
            assert image.read is not None
            try:
                image.read(partial(self._take_patches, image))
            except RuntimeError as error:  # the threads that read have ended
                self._take_patches(image, error)

    def _take_patches(self, image: ImageInput, result: Any) -> None:
        """Called in the thread that has read them."""
        with self._wake:
            image.reading = False
            if isinstance(result, Exception):
                self._unreadable.append((image, result))
            else:
                image.patches = result
            self._wake.notify_all()

    def _wait_for_patches(self) -> None:
        """With nothing else to do, instead of asking for them again and again."""
        self._enter("vision", self._budget.encode_deadline_s())  # each time anew: threads that are slow do not make it stuck
        with self._wake:
            if self._scheduler.reading and not (self._stopping or self._commands.waiting):
                self._wake.wait(PATCHES_WAIT_S)

    def _next_encode_task(self) -> EncodeTask | None:
        """Images and prompts alternate: a step with both would delay the decoding requests twice."""
        task = self._scheduler.next_encode_task()
        if self._encoded_last_step and self._scheduler.has_prompt:
            task = None
        self._encoded_last_step = task is not None
        return task

    def _encode(self, task: EncodeTask) -> float:
        """Encode images for as long as the decoding requests can wait; returns the seconds it took."""
        assert self._model is not None
        runner = self._model.runner
        self._enter("vision", self._budget.encode_deadline_s())
        began = time.monotonic()
        try:
            features = runner.encode(task, self._budget.slice_s(self._scheduler.decoding))
        except Exception as error:  # it must not end the requests that wait for other images
            with self._wake:
                waiting = self._scheduler.encode_failed(task)
            self._give_up(tuple(waiting), "vision", error)
            return 0.0
        took_s = task.slice_s if runner.overlaps else time.monotonic() - began
        self._budget.record_slice(took_s)
        task.spent_s += took_s
        for sequence in self._scheduler.waiting_for(task):
            sequence.vision_s += took_s
        if features is not None:
            self.pace.encoded(task.patches, task.spent_s)
            with self._wake:
                self._scheduler.encode_done(task, features, [runner.size_bytes(each) for each in features])
        return took_s

    def _compute(self, spent_s: float) -> bool:
        """Whether there was something to compute."""
        with self._wake:
            decoding = self._scheduler.decoding
            batch = self._scheduler.batch(self._budget.chunk_tokens(decoding, spent_s))
        self._clear_pages()
        if not batch.sequences:
            if spent_s and self._model is not None and self._model.runner.overlaps:
                cast(OverlappingRunner, self._model.runner).wait_for_slices()
            return False
        deadline_s = self._budget.deadline_s(decoding, batch.chunk_tokens)
        self._enter("prefill" if batch.chunks else "decode", deadline_s)
        took_s = self._forward(batch)
        if took_s is not None:
            self._record(len(batch.decode), batch.chunk_tokens, took_s)
        return True

    def _record(self, decoding: int, chunk_tokens: int, took_s: float) -> None:
        self._budget.record_batch(decoding, chunk_tokens, took_s)
        self.pace.computed(decoding, chunk_tokens, took_s)

    def _forward(self, batch: Batch) -> float | None:
        """Compute a batch. If it fails, compute its halves, down to the request that cannot be computed.

        Returns the seconds it took if it succeeded as a whole, so that they say something about a batch of its size.
        """
        assert self._model is not None
        sequences = batch.sampled
        if not batch.sequences:
            return None
        if len(batch.sequences) > self._budget.max_rows and (halves := batch.halves(cut_chunks=False)):
            took = [self._forward(_without_ended(half)) for half in halves]
            return None if None in took else sum(seconds for seconds in took if seconds)
        try:
            sampled, took_s = self._sample(batch)
        except Exception as error:  # one request must not end the others
            kind = self._model.runner.failure(error)
            halves = batch.halves(cut_chunks=kind == "memory") if kind != "device" else ()
            if kind == "memory":
                self._budget.ran_out_of_memory(len(batch.sequences), batch.chunk_tokens)
            if not halves:
                self._give_up(batch.sequences, "compute", error)
            for half in halves:
                self._forward(_without_ended(half))  # the first may have ended a sequence of the second
            return None
        with self._wake:
            self._scheduler.computed(batch)
        for sequence, token in zip(sequences, sampled, strict=True):
            self._accept(sequence, token)
        return took_s

    def _sample(self, batch: Batch) -> tuple[list[SampledToken], float]:
        """The tokens of a batch, and the seconds they took. Where the device can, it goes on with the next step while
        the host deals with these."""
        assert self._model is not None
        runner = self._model.runner
        if not runner.overlaps:
            began = time.monotonic()
            sampled = runner.compute(batch)
            return sampled, time.monotonic() - began
        runner = cast(OverlappingRunner, runner)
        flight = runner.launch(batch)
        if not batch.chunks:
            self._go_ahead(batch.decode, flight)
        try:
            return runner.collect(flight), flight.seconds
        except Exception:
            self._drop_ahead()
            raise

    # Steps ahead: the device begins the next one before the host knows the tokens of this one. A sequence that turns
    # out to have ended is computed once for nothing; its pages may be used by others then, because those come later.

    def _go_ahead(self, decoding: tuple[Sequence, ...], flight: Flight) -> None:
        """Queue the step after `flight`, unless there is other work than decoding these."""
        assert self._model is not None
        self._ahead = None
        runner, scheduler = cast(OverlappingRunner, self._model.runner), self._scheduler
        with self._wake:
            others = scheduler.running > len(decoding) or (self._may_admit and scheduler.has_slot)
            if others or self._commands.waiting or self._stopping:
                return
            going = tuple(s for s in decoding if s.output.remaining > 1)  # one token is on its way
            if not going or not scheduler.make_room_ahead(going):
                return
        self._clear_pages()
        following = runner.launch_next(flight, going)
        if following is not None:
            self._ahead = _Ahead(going, tuple(s.block_table for s in going), following)

    def _finish(self, ahead: _Ahead) -> None:
        """Take the tokens of a step that was queued ahead, once the next one is queued."""
        assert self._model is not None
        runner = cast(OverlappingRunner, self._model.runner)
        self._enter("decode", self._budget.deadline_s(len(ahead.sequences), 0))
        try:
            alive = self._alive(ahead)
            self._go_ahead(alive, ahead.flight)
            sampled = runner.collect(ahead.flight)
        except Exception as error:
            self._ahead = None
            self._give_up(self._alive(ahead), "compute", error)
            return
        tokens = dict(zip(ahead.sequences, sampled, strict=True))
        with self._wake:
            self._scheduler.computed(Batch(alive))
        for sequence in alive:
            self._accept(sequence, tokens[sequence])
        self._record(len(ahead.sequences), 0, ahead.flight.seconds)

    def _alive(self, ahead: _Ahead) -> tuple[Sequence, ...]:
        pairs = zip(ahead.sequences, ahead.tables, strict=True)
        return tuple(sequence for sequence, table in pairs if table is not None and sequence.block_table is table)

    def _drop_ahead(self) -> None:
        """Forget the tokens of a step that was queued ahead: it is computed again."""
        if self._ahead is not None:
            assert self._model is not None
            cast(OverlappingRunner, self._model.runner).settle(self._ahead.flight)
            self._ahead = None

    def _accept(self, sequence: Sequence, sampled: SampledToken) -> None:
        """Append one new token and deliver its text, and Done if it was the last."""
        if not sampled.finite:
            self._end_nonfinite(sequence)
            return
        if sequence.aborted or sequence.closed:
            return
        sequence.first_token_at = sequence.first_token_at or time.monotonic()
        try:
            text, reason = sequence.take(sampled.token, sampled.logprob)
        except Exception as error:  # a grammar is third-party code
            self._give_up((sequence,), "answer", error)
            return
        if text or reason:
            sequence.deliver(sequence.delta(text))
        if reason:
            self._close(sequence, sequence.done(reason))

    def _give_up(self, sequences: tuple[Sequence, ...], work: str, error: Exception) -> None:
        """Fail the requests that cannot be computed. Raises the error again if the device is lost."""
        assert self._model is not None
        ids = ",".join(s.request.id for s in sequences)
        if isinstance(error, GrammarViolation):  # of a caller's schema: no fault to be traced
            logger.info("event=grammar_failed engine_requests=%s reason=%s", ids, json.dumps(str(error)))
        else:
            logger.error("event=step_failed engine_requests=%s work=%s", ids, work, exc_info=error)
        kind = self._model.runner.failure(error)
        if kind == "device":
            raise error
        failed = Failed(Failure.ENGINE, f"The model failed on this request: {type(error).__name__}.")
        if isinstance(error, GrammarViolation):
            failed = Failed(Failure.GRAMMAR, str(error))
        elif kind == "memory":
            failed = Failed(Failure.MEMORY, "There is not enough memory for this request.")
        for sequence in sequences:
            self._close(sequence, failed, keep=False)
        self.after_delivery()

    def _end_nonfinite(self, sequence: Sequence) -> None:
        """Fail a request whose logits are not finite, and let nothing that it computed reach another."""
        self._guard.nonfinite(time.monotonic())
        logger.error("event=nonfinite_logits engine_requests=%s tokens=%d", sequence.request.id, len(sequence.keys))
        with self._wake:
            self._scheduler.distrust(sequence)
        failed = Failed(Failure.NONFINITE, "The model computed numbers that are not finite for this request.")
        self._close(sequence, failed, keep=False)

    def _close(self, sequence: Sequence, event: Done | Failed, keep: bool = True) -> None:
        """Free the slot and pages of a request, then deliver its last event."""
        with self._wake:
            self._scheduler.remove(sequence, keep)
            self._may_admit = True
            self._wake.notify_all()
        self._deliver_last(sequence, event)

    def _die(self, error: BaseException) -> None:
        expected = isinstance(error, LoadError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        logger.error("event=engine_dead reason=%s", json.dumps(reason), exc_info=None if expected else error)
        with self._wake:
            self._reason = reason
            self._enter("dead")
            left = self._scheduler.sequences()
        self._commands.refuse(reason)
        for sequence in left:
            self._close(sequence, Failed(Failure.DEAD, "The model has failed and must be restarted."))
        self.after_delivery()

    # Called from any thread.

    def _deliver_last(self, sequence: Sequence, event: Done | Failed) -> None:
        """Deliver the last event of a request, unless another thread has done so."""
        with self._wake:
            if sequence.closed:
                return
            sequence.closed = True
        sequence.deliver(event)


def _without_ended(batch: Batch) -> Batch:
    decode = tuple(sequence for sequence in batch.decode if sequence.slot is not None)
    return Batch(decode, tuple(chunk for chunk in batch.chunks if chunk.sequence.slot is not None))
