"""One streamed chat completion, with the arrival time of every chunk of text."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 900.0


@dataclass
class Sample:
    started: float
    moments: list[float] = field(default_factory=list)  # arrival of each chunk of text
    text: str = ""
    tokens: int = 0  # of the server's usage, else the number of chunks
    prompt_tokens: int = 0
    ended: float = 0.0
    error: str | None = None
    turn: int = 0

    @property
    def ttft_s(self) -> float:
        return self.moments[0] - self.started

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens; a chunk may have several."""
        return (self.moments[-1] - self.moments[0]) / max(self.tokens - 1, 1)


@dataclass(frozen=True)
class Address:
    url: str  # root of the server, without /v1
    model: str | None = None
    key: str = "none"
    headers: dict[str, str] = field(default_factory=dict)

    def client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}", **self.headers}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=TIMEOUT_S, limits=limits)


async def ask(
    client: httpx.AsyncClient,
    address: Address,
    messages: list[dict[str, Any]],
    tokens: int,
    sample: Sample | None = None,
) -> Sample:
    """Never raises for a failure of the server; `Sample.error` holds it. A given sample is filled while the answer streams."""
    sample = sample or Sample(time.perf_counter())
    body = {
        "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if address.model:
        body["model"] = address.model
    try:
        try:
            await _stream(client, body, sample)
        except (httpx.RemoteProtocolError, httpx.ReadError):
            if sample.moments:
                raise
            await _stream(client, body, sample)  # the server closed a kept connection, as llama.cpp's does
    except httpx.HTTPError as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.ended = time.perf_counter()
    sample.tokens = sample.tokens or len(sample.moments)
    if not sample.moments and not sample.error:
        sample.error = "no text"
    return sample


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], sample: Sample) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            sample.error = f"{response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                _read(json.loads(line[6:]), sample)


def _read(event: dict[str, Any], sample: Sample) -> None:
    if "error" in event:
        sample.error = str(event["error"])
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content")
        if text:
            sample.moments.append(time.perf_counter())
            sample.text += text
    if usage := event.get("usage"):
        sample.tokens, sample.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
