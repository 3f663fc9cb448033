"""Slow against its own past: a lasting change is told, a spike or another load is not."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace

import pytest
from traces import IDLE, RIGHT, RUNS, api

from monitor.judge import pace
from monitor.judge.evidence import Answer, HealthReply, Identity, Moment, Observation, Process, SelfReport
from monitor.judge.pace import NEEDED, Pace
from monitor.judge.verdict import Verdict

HEALTHY = Verdict("api", "healthy", "answers_right", "It answered.", "已回答。")
DECODE_S = {"1": 0.010, "2": 0.012, "3-4": 0.015, "5-8": 0.02, "9-16": 0.03, "17-": 0.05}


@dataclass
class Service:
    """An engine's counters. `factor`: how many times longer everything takes than it should."""

    rng: random.Random = field(default_factory=lambda: random.Random(1))
    pace: Pace = field(default_factory=Pace)
    wall: float = 1_800_000_000.0
    pid: int = 100
    steps: int = 0
    decode: dict[str, list[float]] = field(default_factory=dict)
    prefill: list[float] = field(default_factory=lambda: [0, 0.0])
    recipe: str = "model shapes, dtype float32"

    def work(self, rows: str, steps: int, factor: float = 1.0, tokens: int = 300, chunk: int = 300) -> None:
        noise = self.rng.lognormvariate(0.0, 0.15)
        done = self.decode.setdefault(rows, [0, 0.0])
        done[0] += steps
        done[1] += steps * DECODE_S[rows] * factor * noise
        self.prefill[0] += tokens
        self.prefill[1] += (tokens * 0.0004 + tokens / chunk * 0.02) * factor * noise
        self.steps += steps + max(1, tokens // chunk)

    def run(self, verdict: Verdict = HEALTHY, machine: dict | None = None, gpu: dict | None = None, after_s: float = 60.0) -> Verdict:
        self.wall += after_s
        counters = {"decode": {rows: list(done) for rows, done in self.decode.items()}, "prefill": list(self.prefill), "vision": [0, 0.0]}
        report = SelfReport(identity=Identity(self.pid, 7, "boot"), pace=json.loads(json.dumps(counters)))
        seen = api(first=replace(IDLE, steps=self.steps, report=report))
        machine = {"name": "a machine", **(machine or {})}
        return pace.judge(self.pace, Observation(Moment(self.wall, self.wall), seen, None, machine, gpu or {}), verdict, self.recipe)

    def idle(self, runs: int, factor: float = 1.0, **more) -> list[Verdict]:
        """Runs in which only the checker's own question is answered."""
        verdicts = []
        for _ in range(runs):
            self.work("1", 12, factor)
            verdicts.append(self.run(**more))
        return verdicts


@pytest.fixture
def service() -> Service:
    used_to_it = Service()
    assert {verdict.word for verdict in used_to_it.idle(100)} == {"healthy"}
    return used_to_it


def first_slow(verdicts: list[Verdict]) -> int | None:
    return next((number for number, verdict in enumerate(verdicts, 1) if verdict.rule == "slower_than_before"), None)


def test_a_fortieth_of_the_processor_is_told_in_the_third_run_with_both_figures(service):
    quota = {"quota_cores": 0.02, "throttled_percent": 98.0}

    verdicts = service.idle(4, 40.0, machine=quota)

    assert first_slow(verdicts) == 3
    told = verdicts[-1]
    assert (told.word, told.cure) == ("degraded", False), "no restart makes a processor faster"
    assert 30 < told.facts["times"] < 55 and 8 < told.facts["usual_ms"] < 12 and 300 < told.facts["ms"] < 550
    assert "ms a token" in told.en and "the processor quota of 0.02 cores stopped it in 98 % of the periods" in told.en
    assert "处理器配额为 0.02 核" in told.zh and "毫秒" in told.zh
    assert "3 runs in a row" in told.threshold


def test_a_busy_verdict_of_a_slow_service_says_slow(service):
    busy = replace(HEALTHY, word="busy", rule="busy")

    assert first_slow(service.idle(4, 40.0, verdict=busy)) == 3


def test_spikes_of_a_minute_are_no_alarm_and_are_not_learned_as_normal(service):
    """Two runs see a spike that crosses a run."""
    for _ in range(200):
        verdicts = service.idle(2, service.rng.uniform(2.0, 5.0)) + service.idle(8)
        assert first_slow(verdicts) is None

    assert first_slow(service.idle(6, 40.0)) == 3
    assert 0.008 < sorted(service.pace.pasts[service.pace.key].seconds["decode, 1 rows"])[pace.KEPT // 2] < 0.013


@pytest.mark.parametrize("seed", range(3))
def test_a_day_on_a_noisy_machine_raises_no_alarm(seed):
    """Each minute has a chance of one in twenty to begin a spike of a minute; users come and go; the API restarts at noon."""
    service, rng = Service(random.Random(seed)), random.Random(seed)
    alarms, spike = 0, 0
    for minute in range(1440):
        if minute % 1440 == 720:
            service.pid, service.decode, service.prefill, service.steps = service.pid + 1, {}, [0, 0.0], 0
        spike = 2 if spike == 0 and rng.random() < 0.05 else max(0, spike - 1)
        factor = rng.uniform(2.0, 5.0) if spike else 1.0
        for rows in rng.sample(sorted(DECODE_S), rng.randrange(3)) if minute % 1440 > 480 else []:
            service.work(rows, rng.randrange(20, 2000), factor, rng.randrange(0, 20_000), rng.choice([40, 120, 512]))
        service.work("1", 12, factor)
        alarms += service.run().word == "degraded"

    assert alarms == 0
    assert first_slow(service.idle(5, 40.0)) == 3, "and the machine's own noise does not hide a lasting change"


def test_more_users_are_not_slowness(service):
    """A step of 17 rows takes five times as long as one of a single row, on a machine that is as fast as ever."""
    verdicts = []
    for _ in range(60):
        service.work("17-", 900, tokens=40_000, chunk=512)
        verdicts.append(service.run())

    assert first_slow(verdicts) is None


def test_short_prompts_after_long_ones_are_not_slowness(service):
    for _ in range(60):
        service.work("5-8", 400, tokens=50_000, chunk=512)
        service.run()
    verdicts = []
    for _ in range(60):
        service.work("5-8", 40, tokens=40, chunk=4)
        verdicts.append(service.run())

    assert first_slow(verdicts) is None


def test_what_is_judged_slow_is_never_learned_and_ends_with_two_fast_runs(service):
    assert all(verdict.word == "degraded" for verdict in service.idle(2000, 6.0)[2:])

    assert [verdict.word for verdict in service.idle(3)] == ["degraded", "healthy", "healthy"]


def test_a_load_without_a_past_does_not_end_a_slowness_and_is_not_learned(service):
    assert service.idle(3, 40.0)[-1].rule == "slower_than_before"

    service.work("5-8", 12, 40.0, tokens=0)
    verdict = service.run()

    assert verdict.rule == "slower_than_before" and "5-8" not in str(list(service.pace.pasts.values())[-1].seconds)


def test_a_creeping_change_is_measured_against_the_days_before():
    service = Service()
    verdicts = []
    for minute in range(3 * 1440):
        verdicts += service.idle(1, 1 + 5 * minute / (3 * 1440))

    assert first_slow(verdicts) is not None


def test_the_past_survives_a_restart_of_the_api_and_of_the_checker(service):
    service.pace = Pace.from_dict(json.loads(json.dumps(service.pace.to_dict())))
    service.pid, service.decode, service.prefill, service.steps = 200, {}, [0, 0.0], 0
    service.run()  # the first run of a process has nothing to subtract

    assert first_slow(service.idle(4, 10.0)) == 3


@pytest.mark.parametrize("change", [{"recipe": "model shapes, dtype nf4"}, {"recipe": "another model, dtype float32"}])
def test_another_model_or_recipe_begins_anew(service, change):
    for name, value in change.items():
        setattr(service, name, value)

    assert first_slow(service.idle(NEEDED + 20, 8.0)) is None


def test_a_slowness_ends_with_the_recipe_that_was_slow(service):
    assert service.idle(4, 40.0)[-1].word == "degraded"
    service.recipe, service.pid, service.decode, service.prefill = "model shapes, dtype nf4", 200, {}, [0, 0.0]

    assert service.run().word == "healthy", "nothing was measured yet, and the other recipe is gone"


def test_another_machine_begins_anew(service):
    assert first_slow(service.idle(NEEDED + 20, 8.0, machine={"name": "a slower machine"})) is None


def test_nothing_is_judged_before_there_is_a_past():
    service = Service()
    service.idle(5)

    assert first_slow(service.idle(14, 40.0)) is None


def test_a_run_with_another_verdict_teaches_nothing(service):
    before = service.pace.to_dict()
    service.idle(5, 40.0, verdict=replace(HEALTHY, word="broken", rule="picture_wrong"))

    assert service.pace.to_dict()["pasts"] == before["pasts"]


def test_an_operator_takes_the_pace_of_today_as_the_new_normal(service):
    assert not pace.forget(service.pace)
    service.idle(5, 8.0)

    assert pace.forget(service.pace)
    assert {verdict.word for verdict in service.idle(100, 8.0)} == {"healthy"}


CARD = {"index": 0, "uuid": "GPU-1", "pcie_width": 16, "throttle_reasons": [], "throttle_hardware": False, "processes": [RUNS.pid]}
CAUSES = {
    "steal": ({"steal_percent": 40.0}, {}, "the host gives 40 % of the processor to others", "宿主机"),
    "overload": ({"process": {"waits_for_processor": 0.97}, "cpu_percent": 100.0, "load_per_core": 9.0}, {}, "other work has the processor", "其他任务"),
    "memory": ({"memory_pressure_percent": 35.0}, {}, "memory is short: tasks waited for it 35 %", "内存紧张"),
    "swap": ({"process": {"swapped_mib": 900.0}}, {}, "900 MiB of it are swapped out", "换出"),
    "heat": ({}, {"throttle_reasons": ["heat (hardware)"], "throttle_hardware": True, "clock_mhz": 300, "clock_max_mhz": 1980}, "GPU 0 runs at 300 of 1980 MHz (heat (hardware))", "降频"),
    "power": ({}, {"throttle_reasons": ["power cap"], "load_percent": 99, "clock_mhz": 400, "clock_max_mhz": 1980}, "400 of 1980 MHz (power cap)", "降频"),
    "lanes": ({}, {"pcie_width": 4}, "GPU 0 has 4 PCIe lanes and had 16", "PCIe"),
    "neighbour": ({}, {"processes": [RUNS.pid, 99]}, "GPU 0 is shared with process 99", "其他进程"),
    "none": ({}, {}, "none seen in the processor, the memory and the card", "均未见异常"),
    "host pids": ({}, {"processes": [31337]}, "none seen", "均未见异常"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named(name):
    machine, card, en, zh = CAUSES[name]
    service = Service()
    service.idle(60, gpu={"gpus": [CARD]})

    told = service.idle(3, 6.0, machine=machine, gpu={"gpus": [{**CARD, **card}]})[-1]

    assert en in told.en and zh in told.zh


def external(seconds: float, pending: int) -> Observation:
    answers = tuple(replace(answer, seconds=seconds) for answer in RIGHT)
    seen = api(process=Process(), beat=None, first=HealthReply("answered", 0.01, 200, "idle", steps=1, pending=pending), answers=answers)
    return Observation(Moment(external.wall, external.wall), seen, None, {"name": "here", "steal_percent": 90.0}, {})


def test_a_server_without_counters_is_judged_by_its_questions_at_like_load():
    kept, rng, verdicts = Pace(), random.Random(3), []
    external.wall = 1_800_000_000.0
    for number in range(90):
        pending = 20 if number % 2 else 0
        external.wall += 60
        seconds = (6.0 if pending else 0.4) * rng.uniform(0.8, 1.3) * (1 if number < 84 else 12)
        verdicts.append(pace.judge(kept, external(seconds, pending), HEALTHY, "http://engine"))

    assert first_slow(verdicts) == 87
    assert "ms for a question" in verdicts[-1].en and "steal" not in verdicts[-1].en, "it may run on another machine"


def test_a_credited_answer_is_no_measurement():
    credit = Observation(Moment(1.0, 1.0), api(answers=(Answer("text", "credited"),)), None, {}, {})
    kept = Pace()
    for _ in range(50):
        pace.judge(kept, credit, HEALTHY, "m")

    assert kept.pasts["m on this machine"].seconds == {}
