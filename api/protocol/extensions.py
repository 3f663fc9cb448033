"""The fields of a chat request that other wire formats take over under the same names."""

from __future__ import annotations

from typing import Any

from api.protocol.vendor_words import SYNONYMS

# What the formats of OpenAI's responses and of Anthropic's messages do not have.
SAMPLING = (
    "min_tokens", "ignore_eos", "loop_window", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "cache_salt", "stop", "stop_token_ids", "include_stop_str_in_output",
    "skip_special_tokens", "do_sample", "regex", "choice", "grammar", "structured_outputs", "guided_json", "json_schema",
    "repeat_last_n", *SYNONYMS,
)  # fmt: skip
REASONING = ("chat_template_kwargs", "thinking_token_budget", "reasoning_effort", "enable_thinking")


def take(data: dict[str, Any], names: tuple[str, ...], own: Any = ()) -> dict[str, Any]:
    """Removes from a request the fields of chat requests that its format does not have itself, and returns them."""
    return {name: data.pop(name) for name in names if name in data and name not in own}
