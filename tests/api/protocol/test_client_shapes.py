"""Requests as known clients send them: each is honoured, or named as ignored, or refused by name; none is dropped silently.

The shapes were seen on the wire, or made after a client's documentation or source.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from served import image_part

from api.protocol.fields import IgnoredFields
from api.protocol.schemas import parse_chat

USER = {"role": "user", "content": "hello"}
URL = image_part()["image_url"]["url"]
BARE = URL.partition(",")[2]
TEXT = {"type": "text", "text": "hello"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "1"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}

HONOURED: list[str] = []


def ignored(*names: str) -> list[str]:
    return list(names)


def refused(param: str) -> str:
    return param


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [TEXT, fields]}]}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": "hi", **fields}, USER]}


def call(**fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": None, "tool_calls": [{**CALL, **fields}]}
    return {"messages": [USER, message, RESULT], "tools": [TOOL]}


def arguments(given: Any) -> dict[str, Any]:
    return call(function={"name": "f", "arguments": given})


# Who sends it, what, and what becomes of it.
SHAPES: list[tuple[str, dict[str, Any], list[str] | str]] = [
    # Zhipu's own SDK, and agents that speak its API.
    ("zai thinking off", {"thinking": {"type": "disabled"}}, HONOURED),
    ("zai thinking on", {"thinking": {"type": "enabled"}}, HONOURED),
    ("zai thinking kept", {"thinking": {"type": "enabled", "clear_thinking": False}}, ignored("thinking.clear_thinking")),
    ("zai do_sample", {"do_sample": True}, HONOURED),
    ("zai do_sample off", {"do_sample": False}, HONOURED),
    ("zai request_id", {"request_id": "abc"}, HONOURED),
    ("zai user_id", {"user_id": "u1"}, ignored("user_id")),
    ("zai tool_stream", {"tool_stream": True}, ignored("tool_stream")),
    ("zai watermark", {"watermark_enabled": False}, ignored("watermark_enabled")),
    ("zai watermark on", {"watermark_enabled": True}, refused("watermark_enabled")),
    ("zai word check", {"sensitive_word_check": {"type": "ALL"}}, refused("sensitive_word_check")),
    ("zai word check off", {"sensitive_word_check": {"type": "ALL", "status": "DISABLE"}}, ignored("sensitive_word_check")),
    ("zai bare base64", part(type="image_url", image_url={"url": BARE}), HONOURED),
    ("zai http image", part(type="image_url", image_url={"url": "https://a.example/x.png"}),
     refused("messages[0].content[1].image_url.url")),
    ("zai web search", {"tools": [{"type": "web_search", "web_search": {"enable": True}}]}, refused("tools[0].type")),
    ("zai web search off", {"tools": [{"type": "web_search", "web_search": {"enable": False}}]}, ignored("tools[]")),
    # Qwen, SiliconFlow, Dify, Cherry, LobeChat.
    ("qwen thinking", {"enable_thinking": False}, HONOURED),
    ("qwen budget", {"thinking_budget": 512}, HONOURED),
    ("qwen template", {"chat_template_kwargs": {"enable_thinking": False}}, HONOURED),
    ("deepseek template", {"chat_template_kwargs": {"thinking": True}}, HONOURED),
    ("qwen search", {"enable_search": False}, ignored("enable_search")),
    ("qwen search on", {"enable_search": True}, refused("enable_search")),
    ("qwen high resolution", {"vl_high_resolution_images": True}, refused("vl_high_resolution_images")),
    ("qwen pixels", part(**image_part(), max_pixels=1000), refused("messages[0].content[1].max_pixels")),
    # vLLM and SGLang.
    ("vllm special", {"skip_special_tokens": False}, HONOURED),
    ("vllm special on", {"skip_special_tokens": True}, HONOURED),
    ("vllm spaces", {"spaces_between_special_tokens": False}, ignored("spaces_between_special_tokens")),
    ("vllm include stop", {"include_stop_str_in_output": False}, HONOURED),
    ("vllm stop ids", {"stop_token_ids": [5]}, HONOURED),
    ("vllm no stop ids", {"stop_token_ids": []}, HONOURED),
    ("vllm unknown stop id", {"stop_token_ids": [151336]}, refused("stop_token_ids")),  # the fake model's are fewer
    ("vllm continue", {"continue_final_message": False}, HONOURED),
    ("vllm generation prompt", {"add_generation_prompt": True}, HONOURED),
    ("vllm add special", {"add_special_tokens": False}, ignored("add_special_tokens")),
    ("vllm add special on", {"add_special_tokens": True}, refused("add_special_tokens")),
    ("vllm beam", {"use_beam_search": False}, ignored("use_beam_search")),
    ("vllm beam on", {"use_beam_search": True}, refused("use_beam_search")),
    ("vllm priority", {"priority": 0}, ignored("priority")),
    ("vllm reasoning", {"include_reasoning": True}, HONOURED),
    ("vllm guided json", {"guided_json": SCHEMA}, HONOURED),
    ("vllm guided choice", {"guided_choice": ["a", "b"]}, HONOURED),
    ("vllm guided regex", {"guided_regex": "a+"}, HONOURED),
    ("vllm guided grammar", {"guided_grammar": 'root ::= "a"'}, HONOURED),
    ("vllm guided backend", {"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, ignored("guided_decoding_backend")),
    ("vllm structured choice", {"structured_outputs": {"choice": ["a", "b"]}}, HONOURED),
    ("vllm structured json", {"structured_outputs": {"json": SCHEMA}}, HONOURED),
    ("vllm structured grammar", {"structured_outputs": {"grammar": "start: \"a\""}}, HONOURED),
    ("vllm processor", {"mm_processor_kwargs": {}}, ignored("mm_processor_kwargs")),
    ("vllm processor set", {"mm_processor_kwargs": {"min_pixels": 4}}, refused("mm_processor_kwargs")),
    ("vllm ids as tokens", {"return_tokens_as_token_ids": False}, ignored("return_tokens_as_token_ids")),
    ("vllm detokenize", {"detokenize": True}, ignored("detokenize")),
    ("vllm detokenize off", {"detokenize": False}, refused("detokenize")),
    ("vllm bad words", {"bad_words": []}, ignored("bad_words")),
    ("vllm bad words set", {"bad_words": ["x"]}, refused("bad_words")),
    ("vllm allowed tokens", {"allowed_token_ids": [1]}, refused("allowed_token_ids")),
    ("vllm logits processors", {"logits_processors": ["x"]}, refused("logits_processors")),
    ("vllm chat template", {"chat_template": "{{ x }}"}, refused("chat_template")),
    ("vllm bench", {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, HONOURED),
    ("vllm thinking budget", {"thinking_token_budget": 5}, HONOURED),
    ("sglang separate", {"separate_reasoning": True}, HONOURED),
    ("sglang regex", {"regex": "a+"}, HONOURED),
    ("sglang ebnf", {"ebnf": 'root ::= "a" | "b"'}, HONOURED),
    ("sglang trim", {"no_stop_trim": False}, HONOURED),
    ("sglang lora", {"lora_path": "x"}, refused("lora_path")),
    ("sglang logit processor", {"custom_logit_processor": "x"}, refused("custom_logit_processor")),
    # llama.cpp's page and clients, LM Studio.
    ("llama progress", {"return_progress": True}, ignored("return_progress")),
    ("llama reasoning", {"reasoning_format": "auto"}, HONOURED),
    ("llama dynatemp", {"dynatemp_range": 0, "dynatemp_exponent": 1}, ignored("dynatemp_range", "dynatemp_exponent")),
    ("llama dynatemp on", {"dynatemp_range": 0.5}, refused("dynatemp_range")),
    ("llama xtc", {"xtc_probability": 0, "xtc_threshold": 0.1}, ignored("xtc_probability", "xtc_threshold")),
    ("llama xtc on", {"xtc_probability": 0.2}, refused("xtc_probability")),
    ("llama typical", {"typ_p": 1}, ignored("typ_p")),
    ("llama repeat", {"repeat_last_n": 64, "repeat_penalty": 1}, ignored("repeat_last_n")),
    ("llama repeat on", {"repeat_penalty": 1.1}, HONOURED),
    ("llama dry", {"dry_multiplier": 0, "dry_base": 1.75}, ignored("dry_multiplier", "dry_base")),
    ("llama samplers", {"samplers": ["top_k"]}, ignored("samplers")),
    ("llama sampler string", {"samplers": "top_k;typ_p;top_p;min_p;temperature"}, ignored("samplers")),
    ("llama timings", {"timings_per_token": True}, ignored("timings_per_token")),
    ("llama cache", {"cache_prompt": True, "id_slot": -1}, ignored("cache_prompt", "id_slot")),
    ("llama n_predict", {"n_predict": -1}, HONOURED),
    ("llama backend", {"backend_sampling": False}, ignored("backend_sampling")),
    ("llama mirostat", {"mirostat": 2}, refused("mirostat")),
    ("llama schema", {"response_format": {"type": "json_object", "schema": SCHEMA}}, HONOURED),
    ("llama grammar", {"grammar": 'root ::= "yes" | "no"'}, HONOURED),
    ("lm studio", {"max_tokens": -1}, HONOURED),
    ("no limit", {"max_tokens": 0}, ignored("max_tokens")),
    # OpenAI's clients.
    ("five stops", {"stop": ["a", "b", "c", "d", "e"]}, HONOURED),
    ("empty stop", {"stop": ""}, ignored("stop")),
    ("options without stream", {"stream_options": {"include_usage": True}}, ignored("stream_options")),
    ("options and no stream", {"stream": False, "stream_options": {"include_usage": True}}, ignored("stream_options")),
    ("null in options", {"stream": True, "stream_options": {"include_usage": None}}, ignored("stream_options.include_usage")),
    ("effort auto", {"reasoning_effort": "auto"}, HONOURED),
    ("effort max", {"reasoning_effort": "max"}, HONOURED),
    ("extra body", {"extra_body": {}}, ignored("extra_body")),
    ("hot", {"temperature": 2.5}, HONOURED),
    ("verbosity", {"verbosity": "medium"}, HONOURED),
    ("verbosity low", {"verbosity": "low"}, HONOURED),
    ("no functions", {"functions": []}, HONOURED),
    ("functions", {"functions": [FUNCTION]}, HONOURED),
    ("function_call auto", {"function_call": "auto"}, HONOURED),
    ("function_call none", {"function_call": "none"}, HONOURED),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}, ignored("prediction")),
    ("audio answers", {"modalities": ["text", "audio"]}, refused("modalities")),
    ("audio voice", {"audio": {"voice": "alloy"}}, refused("audio")),
    ("web search options", {"web_search_options": {"search_context_size": "low"}}, refused("web_search_options")),
    ("moderation", {"moderation": {"mode": "strict"}}, refused("moderation")),
    ("everything null", dict.fromkeys(("stop", "tools", "user", "logit_bias", "response_format", "seed", "audio"), None),
     ignored("user", "audio")),
    ("both limits", {"max_tokens": 9, "max_completion_tokens": 8}, ignored("max_tokens")),
    ("huggingface schema", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": SCHEMA, "strict": None, "description": None}, "value": None}}, ignored("response_format.value")),
    ("strict schema", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {**SCHEMA, "additionalProperties": False}, "strict": True}}}, HONOURED),
    ("logprobs off", {"logprobs": False, "top_logprobs": 0}, HONOURED),
    ("store", {"store": False, "metadata": {}, "service_tier": "auto"}, ignored("store", "metadata", "service_tier")),
    # OpenRouter's.
    ("openrouter effort", {"reasoning": {"effort": "low"}}, HONOURED),
    ("openrouter budget", {"reasoning": {"max_tokens": 64, "exclude": True}}, HONOURED),
    ("openrouter off", {"reasoning": {"enabled": False}}, HONOURED),
    ("openrouter provider", {"provider": {"order": ["x"]}}, ignored("provider")),
    ("openrouter transforms", {"transforms": []}, ignored("transforms")),
    ("openrouter transforms on", {"transforms": ["middle-out"]}, refused("transforms")),
    ("openrouter usage", {"usage": {"include": True}}, ignored("usage")),
    ("openrouter usage streamed", {"usage": {"include": True}, "stream": True}, HONOURED),
    ("openrouter models", {"models": ["a"], "route": "fallback"}, ignored("models", "route")),
    ("openrouter plugins", {"plugins": []}, ignored("plugins")),
    ("openrouter plugins on", {"plugins": [{"id": "web"}]}, refused("plugins")),
    ("openrouter details", assistant(reasoning_details=[{"type": "reasoning.text", "text": "x"}]),
     ignored("messages[].reasoning_details")),
    # Open WebUI.
    *((f"webui {name}", {name: value}, ignored(name)) for name, value in (
        ("session_id", "x"), ("chat_id", "y"), ("id", "z"), ("background_tasks", {"title_generation": True}),
        ("features", {"web_search": False}), ("variables", {"{{USER_NAME}}": "a"}), ("model_item", {"id": "m"}),
        ("tool_ids", []), ("files", []), ("options", {}), ("params", {}), ("keep_alive", "5m"), ("tool_servers", []))),
    ("webui features on", {"features": {"web_search": True}}, refused("features")),
    ("webui a file", {"files": [{"id": "1"}]}, refused("files")),
    ("ollama options", {"options": {"num_ctx": 4096}}, refused("options")),
    ("ollama think", {"think": False}, HONOURED),
    ("ollama images", {"messages": [{**USER, "images": [BARE]}]}, refused("messages[0].images")),
    # Mistral, Copilot, text-generation-inference.
    ("mistral seed", {"random_seed": 1}, HONOURED),
    ("mistral safe", {"safe_prompt": False}, ignored("safe_prompt")),
    ("mistral safe on", {"safe_prompt": True}, refused("safe_prompt")),
    ("mistral mode", {"prompt_mode": "reasoning"}, HONOURED),
    ("mistral prefix", assistant(prefix=True), refused("messages[1].prefix")),
    ("mistral no prefix", assistant(prefix=False), ignored("messages[].prefix")),
    ("copilot", {"intent": False, "snippy": {"enabled": False}}, ignored("intent", "snippy")),
    ("tgi details", {"details": True}, ignored("details")),
    ("tgi stop", {"stop_sequences": []}, ignored("stop_sequences")),
    ("tgi length", {"max_new_tokens": 8}, HONOURED),
    ("tgi json", {"response_format": {"type": "json", "value": SCHEMA}}, HONOURED),
    ("tgi truncate", {"truncate": 100}, refused("truncate")),
    ("cache hint", {"cache_control": {"type": "ephemeral"}}, ignored("cache_control")),
    # Messages.
    ("notes on a message", {"messages": [{**USER, "id": "m", "timestamp": 5}]}, ignored("messages[].id", "messages[].timestamp")),
    ("cached part", part(**TEXT, cache_control={"type": "ephemeral"}), ignored("messages[].content[].cache_control")),
    ("cached image", part(**image_part(), cache_control={"type": "ephemeral"}), ignored("messages[].content[].cache_control")),
    ("image url string", part(type="image_url", image_url=URL), HONOURED),
    ("image url null detail", part(type="image_url", image_url={"url": URL, "detail": None}), HONOURED),
    ("image", part(type="image", image=URL), HONOURED),
    ("image with url", part(type="image", url=URL), HONOURED),
    ("image of anthropic", part(type="image", source={"type": "base64", "media_type": "image/png", "data": BARE}), HONOURED),
    ("input_image", part(type="input_image", image_url=URL), HONOURED),
    ("input_text", part(type="input_text", text="more"), HONOURED),
    ("strings as parts", {"messages": [{"role": "user", "content": ["look", TEXT]}]}, HONOURED),
    ("text without a type", part(text="more"), HONOURED),
    ("image without a type", part(image_url={"url": URL}), HONOURED),
    ("response format without a type", {"response_format": {}}, refused("response_format")),
    ("pdf", part(type="file", file={"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}),
     refused("messages[0].content[1]")),
    ("video", part(type="video_url", video_url={"url": "data:video/mp4;base64,AAAA"}), refused("messages[0].content[1]")),
    ("audio", part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"}), refused("messages[0].content[1]")),
    ("no content", {"messages": [{"role": "user", "content": None}]}, HONOURED),
    ("empty content", {"messages": [{"role": "user", "content": []}]}, HONOURED),
    ("silent assistant", assistant(content=None), HONOURED),
    ("object arguments", arguments({}), HONOURED),
    ("empty arguments", arguments(""), HONOURED),
    ("null arguments", arguments(None), HONOURED),
    ("gemini thought", call(extra_content={"google": {"thought_signature": "x"}}), ignored("messages[].tool_calls[].extra_content")),
    ("empty result", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "content": None}]}, HONOURED),
    ("named result", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "name": "f"}]},
     ignored("messages[].name")),
    ("function role", {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                                    {"role": "function", "name": "f", "content": "1"}]}, ignored("messages[].name")),
    ("parsed message", assistant(parsed={"a": 1}), ignored("messages[].parsed")),
    ("parsed null", assistant(parsed=None, refusal=None, annotations=[], audio=None), ignored("messages[].parsed")),
    ("parsed arguments", call(function={"name": "f", "arguments": "{}", "parsed_arguments": {}}),
     ignored("messages[].tool_calls[].function.parsed_arguments")),
    ("litellm turn", assistant(provider_specific_fields={"reasoning": "x"}), ignored("messages[].provider_specific_fields")),
    ("litellm call", call(caller={"type": "direct"}, provider_specific_fields={"a": 1}),
     ignored("messages[].tool_calls[].caller", "messages[].tool_calls[].provider_specific_fields")),
    ("phase", assistant(phase="final"), ignored("messages[].phase")),
    ("mistral thoughts", assistant(content=[{"type": "thinking", "thinking": [TEXT]}, TEXT]),
     ignored("messages[].reasoning_content")),
    ("own answer", assistant(reasoning="r", reasoning_content="r", boxes=[{"bbox_2d": [1, 2, 3, 4]}]),
     ignored("messages[].reasoning_content", "messages[].reasoning")),
    ("unknown role", {"messages": [{"role": "bot", "content": "x"}]}, refused("messages[0].role")),
    # Tools.
    ("cached tool", {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]}, ignored("tools[].cache_control")),
    ("eager tool", {"tools": [{**TOOL, "eager_input_streaming": True, "defer_loading": False}]},
     ignored("tools[].eager_input_streaming", "tools[].defer_loading")),
    ("long tool name", {"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, HONOURED),
    ("200 tools", {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(200)]}, HONOURED),
    ("custom tool", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, refused("tools[0].type")),
    ("flat tool", {"tools": [{"type": "function", **FUNCTION}]}, HONOURED),
    ("tool of mcp", {"tools": [{"type": "function", "function": {**FUNCTION, "annotations": {"readOnlyHint": True}}}]},
     ignored("tools[].function.annotations")),
    ("no tools", {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, HONOURED),
    ("required without tools", {"tool_choice": "required"}, refused("tool_choice")),
    ("any", {"tools": [TOOL], "tool_choice": "any"}, HONOURED),
    ("allowed tools", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}}}, HONOURED),
    ("flat choice", {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, HONOURED),
    ("choice without a name", {"tools": [TOOL], "tool_choice": {"type": "function"}}, refused("tool_choice.function")),
    # Made up: what nobody knows is refused, unless it asks for nothing.
    ("made up", {"made_up": 1}, refused("made_up")),
    ("made up in a list", {"made_up": {"a": [None, False]}}, refused("made_up")),
    ("made up and off", {"made_up": {"a": {"b": False}}}, ignored("made_up")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "outcome"), SHAPES, ids=[name for name, _, _ in SHAPES])
def test_a_clients_request(name: str, fields: dict[str, Any], outcome: list[str] | str, serve) -> None:
    body = {"messages": [USER], **fields}

    answer = serve(default_max_tokens=8, context_tokens=16_384).client.post("/v1/chat/completions", json=body)

    if isinstance(outcome, str):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == outcome
        return
    # The fake model follows no grammar, so that an answer of a given form fails once it is written.
    written = answer.status_code == 200
    assert written or "The schema of the answer cannot be enforced" in answer.text, answer.text
    names = IgnoredFields()
    parse_chat(json.dumps(body).encode(), names)
    assert names.names == outcome
    assert not written or answer.headers.get("x-glm-ignored", "") == ", ".join(outcome)


def test_there_are_no_two_shapes_of_one_name() -> None:
    names = sorted(name for name, _, _ in SHAPES)
    assert [a for a, b in itertools.pairwise(names) if a == b] == []
