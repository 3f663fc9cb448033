"""The simulated fleet: the same by its seed, as theory says in its limiting cases, and as docs/fleet.md publishes it."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which

import httpx
import pytest
from nginx_process import AROUND
from ports import free_port

from bench import fleet, fleet_sums, fleet_trial
from bench.fleet_chats import Chat, Traffic, Turn
from bench.fleet_replica import STRETCH, PrefixCache, Replica, Times
from bench.fleet_routers import Hash, LeastConnections, Random, Router
from bench.fleet_simulation import TRIES, Fleet, Result

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
INSTANT = Times(prompt=1e-6, token=0.0, picture=0.0, steps=((1, 1e-6),))


def simulate(router: Router, replicas: int, chats: list[Chat], times: Times = INSTANT, cache: int | None = None, slots: int = 64, queue: int = 1000) -> Result:
    return Fleet([Replica(times, slots, queue, PrefixCache(cache)) for _ in range(replicas)], router).run(chats)


def chats(count: int, turns: int, opening: int = 1000) -> list[Chat]:
    """One after the other, so that nobody waits."""
    rng = random.Random(7)
    turn = Turn(0.001, 10, 10)
    return [Chat(f"{rng.getrandbits(64):016x}", float(number), opening, (turn,) * turns) for number in range(count)]


def test_the_same_seed_gives_the_same_figures_and_another_seed_others() -> None:
    case = fleet.Case(10, "random", 20.0)
    once, again, other = fleet.run(case, 1), fleet.run(case, 1), fleet.run(case, 2)

    assert once == again
    assert once.wholes != other.wholes and once.requests > 1000


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (4, 0.7), (16, 0.8)])
def test_a_replica_of_some_slots_waits_as_an_m_m_c_queue(servers: int, load: float) -> None:
    mean_s, count = 1.0, 60_000
    rng = random.Random(11)
    now, coming = 0.0, []
    for number in range(count):
        now += rng.expovariate(servers * load / mean_s)
        # A step of 1 ms, whatever the rows, makes an exponential number of tokens an exponential time.
        coming.append(Chat(str(number), now, 0, (Turn(0.0, 1, 1 + round(rng.expovariate(1e-3 / mean_s))),)))
    times = Times(prompt=1e-9, token=0.0, picture=0.0, steps=((1, 1e-3),))

    result = simulate(Random(1, rng), 1, coming, times, slots=servers, queue=count)

    waiting = sum(result.firsts) / count
    offered = servers * load
    blocked = offered**servers / math.factorial(servers) / (1 - load)
    erlang_c = blocked / (sum(offered**k / math.factorial(k) for k in range(servers)) + blocked)
    assert result.requests == count
    assert waiting == pytest.approx(erlang_c * mean_s / (servers * (1 - load)), rel=0.12)


@pytest.mark.parametrize("replicas", [2, 5, 50])
def test_random_routing_finds_a_second_turn_on_one_of_all_replicas(replicas: int) -> None:
    result = simulate(Random(replicas, random.Random(3)), replicas, chats(20_000, 2))

    assert result.turn_hits == pytest.approx(1 / replicas, abs=4 * math.sqrt(1 / replicas / 20_000))


def test_random_routing_finds_later_turns_as_the_sums_say() -> None:
    result = simulate(Random(4, random.Random(3)), 4, chats(10_000, fleet.TRAFFIC.turns))

    assert result.turn_hits == pytest.approx(fleet_sums.random_hits(4), abs=0.01)


def test_a_hash_finds_every_later_turn_and_all_its_tokens_but_the_question() -> None:
    result = simulate(Hash([f"10.0.0.{number}:8080" for number in range(20)]), 20, chats(500, 4))

    assert result.turn_hits == 1.0
    prompts = [1010 + 20 * turn for turn in range(4)]  # an opening, a question; each turn adds a question and an answer
    assert result.prompt_tokens == 500 * sum(prompts)
    assert result.cached_tokens == 500 * sum(prompt - 11 for prompt in prompts[1:])  # the last token of an answer is not there


def test_a_cache_forgets_the_chat_that_was_used_longest_ago() -> None:
    cache = PrefixCache(300)
    assert [cache.use(chat, 100, 1) for chat in "abc"] == [0, 0, 0]
    assert cache.use("a", 100, 1) == 99, "at least one token is computed"
    assert cache.use("d", 100, 1) == 0
    assert [cache.use(chat, 120, 1) for chat in "ad"] == [100, 100], "b went, not a"
    assert cache.use("c", 100, 1) == 0, "what the others grew by is not there for it"


def test_an_answer_that_the_next_prompt_spells_in_another_way_is_not_found() -> None:
    cache = PrefixCache(None, unspelled_tokens=9)
    assert cache.use("a", 100, 13) == 0
    assert cache.use("a", 130, 13) == 112 - 9


def test_a_cache_for_half_of_the_chats_in_turn_finds_nothing_and_for_all_of_them_everything() -> None:
    pause = Turn(100.0, 10, 10)
    together = [Chat(str(number), number * 1.0, 100, (pause, pause)) for number in range(40)]  # all ask before the first asks again

    assert simulate(Random(1, random.Random(0)), 1, together, cache=20 * 120).turn_hits == 0.0
    assert simulate(Random(1, random.Random(0)), 1, together, cache=40 * 140).turn_hits == 1.0


def test_answers_share_the_engine_and_a_prompt_slows_them_by_no_more_than_the_limit() -> None:
    times = Times(prompt=0.2, token=0.0, picture=0.0, steps=((1, 0.01), (2, 0.02)))
    first, second = Chat("a", 0.0, 0, (Turn(0, 1, 101),)), Chat("b", 0.5, 0, (Turn(0, 1, 101),))

    result = simulate(Random(1, random.Random(0)), 1, [first, second], times)

    assert result.firsts[0] == pytest.approx(0.2)  # both end in the order of their beginning
    prompt_s = 0.2 / (1 - 1 / STRETCH)
    assert result.firsts[1] == pytest.approx(prompt_s)
    tokens = 0.3 / 0.01 + prompt_s / (0.01 * STRETCH)  # of the first answer, before the second begins
    assert result.wholes[0] == pytest.approx(0.5 + prompt_s + (100 - tokens) * 0.02)


def test_replicas_that_share_a_machine_are_slower_together() -> None:
    times = Times(prompt=1.0, token=0.0, picture=0.0, steps=((1, 1e-6),))
    replicas = [Replica(times, 1, 1, PrefixCache(None)) for _ in range(2)]
    coming = [Chat("a", 0.0, 0, (Turn(0, 1, 1),)), Chat("b", 0.5, 0, (Turn(0, 1, 1),))]

    result = Fleet(replicas, LeastConnections(2, random.Random(0)), shared_speed=lambda busy: 0.5 if busy > 1 else 1.0).run(coming)

    # Alone for 0.5 s, together until the first has its second half after 1 s, and the other its second half alone.
    assert list(result.wholes) == pytest.approx([1.5, 1.5])


def test_a_full_replica_sends_to_the_next_and_two_refusals_are_the_end() -> None:
    times = Times(prompt=1.0, token=0.0, picture=0.0, steps=((1, 1e-6),))
    coming = [Chat("same", number * 0.01, 0, (Turn(0, 1, 1),)) for number in range(5)]

    result = simulate(Hash(["a:1", "b:1", "c:1"]), 3, coming, times, slots=1, queue=0)

    assert int(re.search(r"proxy_next_upstream_tries (\d+);", SCALING)[1]) == TRIES  # type: ignore[index]
    assert (result.requests, result.refused) == (2, 3)
    assert sorted(result.of_replica) == [0, 1, 1]


def test_what_is_asked_in_the_time_that_counts_is_counted_and_answered_after_it() -> None:
    times = Times(prompt=1.0, token=0.0, picture=0.0, steps=((1, 1e-6),))
    coming = [Chat(str(number), number * 4.0, 0, (Turn(0, 1, 1), Turn(0.5, 1, 1))) for number in range(10)]
    replica = Replica(times, 4, 0, PrefixCache(None))

    result = Fleet([replica], Random(1, random.Random(0)), since_s=4.0, until_s=6.0).run(coming)

    # The second chat's questions, at 4.0 and 5.5 s; the last of them is answered at 6.5 s.
    assert list(result.wholes) == pytest.approx([1.0, 1.0])
    assert (result.later, result.of_replica) == (1, [2])


def test_least_connections_takes_one_of_the_emptiest() -> None:
    router = LeastConnections(3, random.Random(5))
    for replica in (0, 0, 1, 2):
        router.began(replica)
    router.ended(0)
    router.ended(0)
    assert {router.choose("x", ()) for _ in range(20)} == {0}
    assert {router.choose("x", (0,)) for _ in range(40)} == {1, 2}
    assert router.choose("x", (0, 1, 2)) is None


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """nginx in front of five servers of its own with the hash of docs/scaling.md: its URL, the servers, and those that refuse."""
    port, ports = free_port(), [free_port() for _ in range(5)]
    servers, full = [f"127.0.0.1:{each}" for each in ports], [f"127.0.0.1:{each}" for each in ports[:2]]
    (line,) = re.findall(r"^ *(hash .*;)$", SCALING, re.MULTILINE)
    (retry,) = re.findall(r"^ *(proxy_next_upstream .*;)$", SCALING, re.MULTILINE)
    assert line == fleet_trial.LINES["hash"]
    upstream = "".join(f"server {server} max_fails=0; " for server in servers)
    answers = "".join(
        f"server {{ listen {server}; location / {{ return {503 if server in full else 200} {server}; }} }}\n" for server in servers
    )
    (tmp_path / "glm.conf").write_text(
        f"access_log off; map $http_x_session_id $glm_place {{ default $http_x_session_id; }} upstream five {{ {line} {upstream} }}\n"
        f"{answers} server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://five; {retry} }} }}\n"
    )
    (tmp_path / "nginx.conf").write_text(AROUND.format(folder=tmp_path))
    command = [which("nginx") or "/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", "daemon off;"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            httpx.get(url, timeout=5)
            break
        except httpx.TransportError:
            assert process.poll() is None, (tmp_path / "around.log").read_text()
    yield url, servers, full
    process.terminate()
    process.wait(60)


def test_the_hash_is_that_of_nginx_also_after_a_refusal(ring: tuple[str, list[str], list[str]]) -> None:
    url, servers, full = ring
    router, rng = Hash(servers), random.Random(8)
    moved = 0
    with httpx.Client() as client:
        for _ in range(200):
            session = f"{rng.getrandbits(64):016x}"
            tried: list[int] = []
            while servers[home := router.choose(session, tried)] in full:  # type: ignore[call-overload]
                tried.append(home)  # type: ignore[arg-type]
            moved += bool(tried)
            assert client.get(url, headers={"x-session-id": session}).text == servers[home], session  # type: ignore[call-overload]
    assert 30 < moved < 170


def test_the_times_are_those_of_the_card_in_the_published_table() -> None:
    (row,) = re.findall(r"^\| H200, bf16 \| (.*)", PERFORMANCE, re.MULTILINE)
    steps, _, tokens_s, firsts, _ = [cell.strip(" ms|") for cell in row.split(" | ")]
    times = fleet.H200.times

    assert [round(seconds * 1e3, 2) for _, seconds in fleet.STEPS_S] == [float(each) for each in steps.split(" / ")]
    assert [rows for rows, _ in fleet.STEPS_S] == [1, 4, 16, 64]
    assert 64 / times.step(64) == pytest.approx(float(tokens_s.replace(",", "")), rel=0.01)
    fitted = [times.prefill(fleet.TEXT[0], False), times.prefill(fleet.SMALL_PICTURE[0], True), times.prefill(fleet.LARGE_PICTURE[0], True)]
    assert [seconds * 1e3 for seconds in fitted] == pytest.approx([float(each) for each in firsts.split(" / ")])


def test_the_time_of_a_picture_among_streams_is_near_the_one_that_was_measured_on_the_card() -> None:
    """Twelve pictures of 576 image tokens, one after the other, into 16 streams: no figure from which the times were fitted."""
    found = re.search(r"576 image tokens.*?wait ([\d.]+) ms.*?(\d+) ms in the\s+worst of a hundred.*?comes after (\d+) ms", PERFORMANCE, re.DOTALL)
    assert found
    replica = Replica(fleet.H200.times, 64, 0, PrefixCache(None))
    streams = [Chat(f"stream {number}", 0.001 * number, 0, (Turn(0, 64, 4000),)) for number in range(16)]
    pictures = [Chat(f"picture {number}", 2.0 + 0.15 * number, 24 + 576, (Turn(0, 0, 8),)) for number in range(12)]

    result = Fleet([replica], Random(1, random.Random(0)), since_s=1.0).run([*streams, *pictures])

    first_ms, gap_ms = result.first_s(0.5) * 1e3, STRETCH * fleet.H200.times.step(16) * 1e3
    assert f"{first_ms:.0f} ms instead of {found[3]}" in PAGE and f"{gap_ms:.0f} ms instead of {found[2]}" in PAGE
    assert (first_ms, gap_ms) == (pytest.approx(float(found[3]), rel=0.3), pytest.approx(float(found[2]), rel=0.3))


def test_the_card_is_the_one_of_the_memory_plan() -> None:
    from api.engine.loading.memory_plan import BY_MEMORY
    from api.engine.scheduler import queue_for

    plans = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    assert f"| H200 141 GB | bf16 | {fleet.H200.cache_tokens:,} |" in plans
    assert f"| RTX 3090 24 GB | bf16 | {fleet.SMALL_CACHE_TOKENS:,} |" in plans
    assert (fleet.H200.slots, fleet.H200.queue) == (BY_MEMORY[-1].slots, queue_for(BY_MEMORY[-1].slots))


def test_the_stretch_is_the_engines() -> None:
    from api.engine.token_budget import MAX_STEP_STRETCH

    assert STRETCH == MAX_STEP_STRETCH


# Larger fleets take minutes; bench/fleet.py computes their rows in the same way.
RECOMPUTED = [case for case in (*fleet.CASES, *fleet.SMALL_CACHE, *fleet.STRAGGLERS) if case.replicas <= 20]


@pytest.mark.parametrize("case", RECOMPUTED, ids=lambda case: f"{case.replicas}-{case.routing}-{case.slow}-{case.card.cache_tokens}")
def test_the_published_row_is_what_the_command_prints(case: fleet.Case) -> None:
    assert fleet.row(case, fleet.run(case, 46)) in PAGE


def test_the_published_table_has_every_row() -> None:
    published = re.findall(r"^\| (\d+) \| (random|least connections|hash) \|", PAGE, re.MULTILINE)  # in this order on the page
    assert published == [(str(case.replicas), case.routing) for case in (*fleet.CASES, *fleet.SMALL_CACHE, *fleet.STRAGGLERS)]
    assert PAGE.count(fleet.HEAD) == 3


def test_the_published_sums_are_what_the_command_prints() -> None:
    assert fleet_sums.table(1000) in PAGE


def test_the_published_trial_is_what_its_results_give() -> None:
    assert fleet_trial.report(fleet_trial.RESULTS) in PAGE
    assert fleet_trial.times(fleet_trial.RESULTS) in PAGE


def test_the_trial_agrees_with_the_simulation_on_what_is_found() -> None:
    rows = [line.split(" | ") for line in fleet_trial.report(fleet_trial.RESULTS).splitlines() if "| difference |" in line]
    assert len(rows) == 3
    for row in rows:  # of some 300 later turns chance alone moves a rate by 2.7 points
        assert abs(float(row[2].split()[0])) < 4 and abs(float(row[3].split()[0])) < 6, row


def test_the_trial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fleet_trial, "TRAFFIC", replace(fleet_trial.TRAFFIC, turns=2, pause_s=0.1))
    monkeypatch.setattr(fleet_trial, "PLAYED_S", 6.0)
    monkeypatch.setattr(fleet_trial, "_ports", lambda port: (free_port(), [free_port(), free_port()]))

    fleet_trial.main(["--rounds", "1", "--results", str(tmp_path / "trial.json")])

    found = json.loads((tmp_path / "trial.json").read_text())
    by_routing = {each["routing"]: [fleet_trial.Answer(*answer) for answer in each["answers"]] for each in found["plays"]}
    measured = found["measured"][0]
    assert set(by_routing) == set(fleet.ROUTINGS)
    later = [answer for answer in by_routing["hash"] if answer.turn == 2]
    assert later and all(answer.cached_tokens >= measured["opening_tokens"] for answer in later)
    assert measured["token"] > 0 and measured["steps"][0][1] > 0
    assert "| hash | measured | " in capsys.readouterr().out


def test_traffic_is_what_it_says() -> None:
    drawn = list(Traffic(50.0, 3, 2.0, 100, 10, 20).chats(5, 100.0))

    assert len(drawn) == pytest.approx(5000, rel=0.06)
    pauses = [turn.pause_s for chat in drawn for turn in chat.turns[1:]]
    assert sum(pauses) / len(pauses) == pytest.approx(2.0, rel=0.05)
    answers = [turn.answer_tokens for chat in drawn for turn in chat.turns]
    assert (min(answers), max(answers)) == (10, 30) and sum(answers) / len(answers) == pytest.approx(20, rel=0.05)
    assert all(chat.turns[0].pause_s == 0 for chat in drawn) and len({chat.name for chat in drawn}) == len(drawn)
