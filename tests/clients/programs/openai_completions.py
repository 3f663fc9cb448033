"""openai (Python), legacy text completions: a text goes on, so there are no pictures, tools and turns."""

from __future__ import annotations

import openai
from trial import (
    ANSWER_SCHEMA,
    BASE_URL,
    ENDLESS,
    KEY,
    MODEL,
    NO_MODEL,
    comes_to_rest,
    many,
    report,
    says_which_model,
    seen,
)

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
PROMPT = "The star is"


def text() -> None:
    answer = client.completions.create(model=MODEL, prompt=[PROMPT, "There are"], n=2, max_tokens=8, logprobs=2, temperature=1, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage
    for choice in answer.choices:
        assert choice.finish_reason in ("stop", "length") and choice.logprobs
        assert len(choice.logprobs.tokens or []) == len(choice.logprobs.text_offset or [])


def stream() -> None:
    fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**fields).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True) if chunk.choices]
    many(pieces)
    assert "".join(pieces) == whole, f"{pieces} {whole!r}"


def schema() -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "seen", "schema": ANSWER_SCHEMA}}
    seen(client.completions.create(model=MODEL, prompt="JSON:", max_tokens=60, extra_body={"response_format": format_}).choices[0].text)


def error() -> None:
    try:
        client.completions.create(model=NO_MODEL, prompt=PROMPT)
    except openai.NotFoundError as given:
        return says_which_model(given)
    raise AssertionError("no error")


def abort() -> None:
    events = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, max_tokens=4000, extra_body=ENDLESS)
    next(iter(events))
    events.close()
    comes_to_rest()


report(text=text, stream=stream, schema=schema, error=error, abort=abort)
