"""The workloads: A text, B one new image, C four turns about one image."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bench.checkpoint import IMAGE_SIDE, words
from bench.client import Address, Sample, ask

ANSWER_TOKENS = 64
WORDS = tuple(words())
Content = list[dict[str, Any]]  # of one message


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    question_words: int
    image: bool
    turns: int = 1


WORKLOADS = {
    "A": Workload("A", "text, 64 words", 64, image=False),
    "B": Workload("B", f"one new image of {IMAGE_SIDE}x{IMAGE_SIDE}", 16, image=True),
    "C": Workload("C", "four turns about one image", 16, image=True, turns=4),
}


def image_url(rng: random.Random, side: int = IMAGE_SIDE) -> str:
    """A data URL of a random coarse pattern."""
    small = Image.frombytes("RGB", (12, 12), rng.randbytes(12 * 12 * 3))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(rng: random.Random, count: int) -> str:
    return "".join(f" {rng.choice(WORDS)}" for _ in range(count))


def turns(workload: Workload, seed: str) -> list[Content]:
    """The user's message of each turn. Call it before the clock starts: drawing takes time of the server's cores."""
    rng = random.Random(seed)
    messages: list[Content] = []
    for turn in range(workload.turns):
        text = {"type": "text", "text": question(rng, workload.question_words)}
        if turn == 0 and workload.image:
            messages.append([{"type": "image_url", "image_url": {"url": image_url(rng)}}, text])
        else:
            messages.append([text])
    return messages


async def converse(
    client: Any, address: Address, conversation: list[Content], tokens: int = ANSWER_TOKENS
) -> list[Sample]:
    """One conversation, turn by turn; a failed turn ends it."""
    messages: list[dict[str, Any]] = []
    samples = []
    for turn, content in enumerate(conversation, start=1):
        messages.append({"role": "user", "content": content})
        sample = await ask(client, address, messages, tokens)
        sample.turn = turn
        samples.append(sample)
        if sample.error:
            break
        messages.append({"role": "assistant", "content": sample.text})
    return samples


async def drive(
    address: Address, workload: Workload, parallel: int, conversations: int, seed: str, tokens: int = ANSWER_TOKENS
) -> list[Sample]:
    """Run conversations, `parallel` at a time: when one ends, the next begins."""
    pending = iter([turns(workload, f"{seed} {number}") for number in range(conversations)])
    samples: list[Sample] = []

    async with address.client() as client:

        async def worker() -> None:
            for conversation in pending:
                samples.extend(await converse(client, address, conversation, tokens))

        await asyncio.gather(*(worker() for _ in range(parallel)))
    return samples
