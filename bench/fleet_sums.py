"""python -m bench.fleet_sums: the arithmetic for a fleet of cards: requests, pictures, network, caches, upgrades, metrics, cost.

Nothing is measured here. Every input is a constant below with where it is from; an assumption says so.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from bench.fleet import H200, TRAFFIC

# The traffic of bench/fleet.py, an assumption.
CHAT = TRAFFIC
UTILISATION = 0.6  # assumption: of a card's time, so that chance and one card in a hundred less leave no queues
ROWS = 32  # assumption: answers that a card decodes together at that load; it decides the step

PICTURE_BYTES = 300_000  # assumption: a JPEG of 1 megapixel, which has about 1,000 image tokens
BASE64 = 4 / 3
EVENT_BYTES = 250  # assumption: a streamed token as an event; several in one take less
KV_TOKEN_BYTES = 40 * 1024  # 40 layers, 2 heads of 128 for keys and for values, 2 bytes
WEIGHT_BYTES = 20.6e9  # bf16

SCRAPE_S, PICKER_SCRAPE_S = 15, 1.0  # deploy/prometheus/prometheus.yml; deploy/kubernetes/pool.yaml
PICKER_DEFAULT_SCRAPE_S = 0.05  # --refresh-metrics-interval of llm-d's endpoint picker

WAVE = 0.05  # assumption: of the replicas that an upgrade replaces at a time
DRAIN_S, LOAD_S = 45, 60  # terminationGracePeriodSeconds of the pods; assumption: from the start to /readyz, weights on a local disk

INTERRUPTIONS, INTERRUPTED_DAYS, INTERRUPTED_CARDS = 419, 54, 16_384  # unexpected ones in Meta's training of Llama 3, arXiv:2407.21783
CARD_W = 700  # an H200 SXM, by NVIDIA's system description for MLPerf Inference 4.1; hosts and cooling come on top
USD_A_CARD_HOUR = 3.99  # list price of an H200 SXM, hyperstack.cloud/gpu-pricing as of 2026-08-26


@dataclass(frozen=True)
class Line:
    what: str
    value: str
    origin: str


@dataclass(frozen=True)
class Load:
    """What a card spends on an average chat, in seconds of its time."""

    prompts_s: float
    answers_s: float

    @property
    def chats_per_s(self) -> float:
        return UTILISATION / (self.prompts_s + self.answers_s)


def load(cached: bool) -> Load:
    """`cached`: later turns find all that came before."""
    prompts_s = 0.0
    for turn in range(CHAT.turns):
        history = turn * (CHAT.question_tokens + CHAT.answer_tokens)
        new = CHAT.question_tokens + (1 if cached and turn else CHAT.opening_tokens + history)  # the last token of an answer is never there
        prompts_s += H200.times.prefill(new, picture=not (cached and turn))
    return Load(prompts_s, CHAT.turns * CHAT.answer_tokens * H200.times.step(ROWS) / ROWS)


def random_hits(replicas: int) -> float:
    """The part of later turns that find their chat under random routing, nothing ever being evicted."""
    turns = range(1, CHAT.turns)
    return sum(1 - (1 - 1 / replicas) ** seen for seen in turns) / len(turns)


def lines(cards: int) -> list[Line]:
    kept, lost = load(cached=True), load(cached=False)
    chats = cards * kept.chats_per_s
    requests = chats * CHAT.turns
    answer_s = CHAT.answer_tokens * H200.times.step(ROWS)
    chat_s = CHAT.turns * answer_s + (CHAT.turns - 1) * CHAT.pause_s
    open_chats = chats * chat_s
    tokens_a_chat = CHAT.opening_tokens + CHAT.turns * (CHAT.question_tokens + CHAT.answer_tokens)
    waves = round(1 / WAVE)
    upgrade_s = waves * (DRAIN_S + LOAD_S)
    lost_turns = 2 * open_chats / (chats * (CHAT.turns - 1) * upgrade_s)  # of later turns: a chat misses when its replica goes and when it is back
    dollars = cards * USD_A_CARD_HOUR
    tokens_out = requests * CHAT.answer_tokens
    return [
        Line("a card's time for a chat, cached / not", f"{_ms(kept)} / {_ms(lost)}", "H200 in [performance.md](performance.md#on-a-card), fitted"),
        Line("requests a second, cached", f"{requests:,.0f}", f"at {UTILISATION:.0%} of the time"),
        Line("cards for the same without caches", f"{cards * kept.chats_per_s / lost.chats_per_s:,.0f}", "the two times above"),
        Line("new pictures a second", f"{chats:,.0f}", "one a chat"),
        Line("tokens out a second", f"{tokens_out:,.0f}", f"{CHAT.answer_tokens} an answer"),
        Line("answers under way", f"{requests * answer_s:,.0f}", f"{ROWS} rows: {H200.times.step(ROWS) * 1e3:.2f} ms a token"),
        Line("network in", _gbit(requests * PICTURE_BYTES * BASE64), f"each turn sends its picture again: {PICTURE_BYTES / 1e3:.0f} kB in base64"),
        Line("network in, pictures sent once", _gbit(chats * PICTURE_BYTES * BASE64), "not in OpenAI's protocol; by URL the replicas fetch instead"),
        Line("network out", _gbit(tokens_out * EVENT_BYTES), f"{EVENT_BYTES} bytes a token"),
        Line("chats at a time", f"{open_chats:,.0f}", f"{chat_s:.0f} s each"),
        Line("KV cache that they fill", f"{open_chats * tokens_a_chat / cards / H200.cache_tokens:.1%}", f"{tokens_a_chat:,} tokens each, {H200.cache_tokens:,} a card"),
        Line("its size in all", f"{cards * H200.cache_tokens * KV_TOKEN_BYTES / 1e12:,.0f} TB", "40 KiB a token"),
        Line("later turns found, random routing", f"{random_hits(cards):.2%}", "mean of 1 - (1 - 1/N)^k over the turns"),
        Line("later turns found, hash, during an upgrade", f"{1 - lost_turns:.1%}", "every chat on a replica misses once when it goes and once when it is back"),
        Line("an upgrade", f"{upgrade_s / 60:.0f} min", f"{waves} waves of {DRAIN_S} + {LOAD_S} s"),
        Line("weights read in a wave", f"{cards * WAVE * WEIGHT_BYTES / 1e12:.2f} TB, {_gbit(cards * WAVE * WEIGHT_BYTES / LOAD_S)}", "from a shared disk; 20.6 GB each"),
        Line("cards or hosts that fail", f"{INTERRUPTIONS / INTERRUPTED_DAYS / INTERRUPTED_CARDS * cards:.2f} a day", "419 in 54 days on 16,384 H100, [arXiv:2407.21783](https://arxiv.org/abs/2407.21783)"),
        Line("scrapes of `/metrics` a second: Prometheus / picker / picker's default", f"{cards / SCRAPE_S:,.0f} / {cards / PICKER_SCRAPE_S:,.0f} / {cards / PICKER_DEFAULT_SCRAPE_S:,.0f}", f"each {SCRAPE_S} s / {PICKER_SCRAPE_S:g} s / 50 ms"),
        Line("power of the cards", f"{cards * CARD_W / 1e6:.2f} MW", "700 W each by [MLPerf](https://github.com/mlcommons/inference_results_v4.1/blob/main/closed/NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json), hosts and cooling on top"),
        Line("cost an hour", f"${dollars:,.0f}", "list price $3.99 of an H200 an hour, [Hyperstack](https://www.hyperstack.cloud/gpu-pricing), 2026-08-26"),
        Line("cost of 1,000 chats, cached / not", f"${dollars / chats / 3.6:.3f} / ${cards * USD_A_CARD_HOUR / (cards * lost.chats_per_s) / 3.6:.3f}", "the same"),
        Line("cost of a million tokens out, cached", f"${dollars / tokens_out / 3600 * 1e6:.3f}", "the same, prompts included"),
    ]  # fmt: skip


def _ms(load: Load) -> str:
    return f"{(load.prompts_s + load.answers_s) * 1e3:.0f} ms"


def _gbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:,.1f} Gbit/s"


def table(cards: int) -> str:
    return "\n".join(["| | | from |", "| --- | ---: | --- |", *(f"| {line.what} | {line.value} | {line.origin} |" for line in lines(cards))])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet_sums", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=1000)
    print(table(parser.parse_args(words).cards))


if __name__ == "__main__":
    main()
