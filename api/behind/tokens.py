"""Tokens where the tokenizer is the engine's: passed on to it if it has the route, refused by name if it has none."""

from __future__ import annotations

from typing import Any

from api.behind.answer import AnswerReader
from api.behind.engine_client import Reply, cut_off, error_of, unreachable
from api.behind.kinds import NAMES, TRAITS
from api.behind.pictures import guarded
from api.behind.question import bodies, messages_for
from api.behind.remote_engine import EngineModel, RemoteEngine
from api.errors import ServingError, invalid
from api.protocol.schemas import ChatRequest, DetokenizeRequest, ImagePart, TokenizeRequest
from api.requests.admission import Permit
from api.requests.handler import loaded_model
from api.requests.prompt import PromptBuilder
from settings import Settings

LIMIT_S = 30.0


async def tokenize(request: TokenizeRequest, engine: RemoteEngine) -> dict[str, Any]:
    """The answer of POST /tokenize. Raises ServingError."""
    model = loaded_model(engine)
    path = _tokenizer_of(model, "/tokenize")
    if any(isinstance(message.content, list) and any(isinstance(p, ImagePart) for p in message.content) for message in request.messages or []):
        raise invalid("`messages`: the tokens of pictures are counted by POST /v1/responses/input_tokens.", "messages", "unsupported_value")
    if request.messages is not None and model.kind not in ("vllm", "glm"):
        raise invalid(f"`messages` cannot be tokenized by the engine behind ({NAMES[model.kind]}); send a `prompt`.", "messages", "unsupported_parameter")
    if request.return_token_strs and model.kind not in ("vllm", "glm"):
        raise invalid(f"`return_token_strs` is not honoured by the engine behind ({NAMES[model.kind]}).", "return_token_strs", "unsupported_parameter")
    body: dict[str, Any] = {"model": model.id, "return_token_strs": True} if request.return_token_strs else {"model": model.id}
    if request.prompt is not None:
        body |= {"content" if model.kind == "llama.cpp" else "prompt": request.prompt, "add_special_tokens": False}
    else:
        body["messages"] = messages_for(request.messages or [], (), model.kind)
        if request.tools:
            body["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        if request.chat_template_kwargs is not None:
            body["chat_template_kwargs"] = request.chat_template_kwargs.model_dump(exclude_none=True)
    reply = _answered(await engine.client.post(path, body, LIMIT_S), "/tokenize")
    tokens = reply.get("tokens") or []
    out = {"tokens": tokens, "count": len(tokens), "max_model_len": model.context_tokens}
    return {**out, "token_strs": reply.get("token_strs")} if request.return_token_strs else out


async def detokenize(request: DetokenizeRequest, engine: RemoteEngine) -> dict[str, Any]:
    """The answer of POST /detokenize. Raises ServingError."""
    model = loaded_model(engine)
    _tokenizer_of(model, "/detokenize")
    reply = _answered(await engine.client.post("/detokenize", {"model": model.id, "tokens": request.tokens}, LIMIT_S), "/detokenize")
    return {"prompt": next((text for name in ("prompt", "content", "text") if isinstance(text := reply.get(name), str)), "")}


async def count(chat: ChatRequest, engine: RemoteEngine, prompts: PromptBuilder, settings: Settings, permit: Permit) -> int:
    """The tokens of a prompt, its pictures included: the engine is asked for an answer of one token, and counts it.

    Raises ServingError.
    """
    model = loaded_model(engine)
    pictures = await guarded(chat, prompts, settings, permit.caller, permit)
    salt = f"{permit.caller.name}:{chat.cache_salt or ''}"
    path, asked = bodies(chat, model.kind, model.id, model.context_tokens, [picture.url for picture in pictures], salt, 1)
    counted: list[int] = []
    reader = AnswerReader(True, counted.append)
    async with engine.client.stream(path, asked[0]) as events:
        async for event in events:
            reader.read(event)
    if not counted or not counted[-1]:
        raise cut_off("it does not count the tokens of a prompt")
    return counted[-1]


def _tokenizer_of(model: EngineModel, route: str) -> str:
    path = TRAITS[model.kind].tokenize
    if not path:
        raise _without(route)
    return path


def _answered(reply: Reply, route: str) -> Reply:
    if not reply.status:
        raise unreachable(reply.problem)
    if reply.status in (404, 405, 501):
        raise _without(route)
    if reply.status != 200:
        raise error_of(reply.body, reply.status)
    return reply


def _without(route: str) -> ServingError:
    message = f"{route} needs the tokenizer, which is the engine's, and the engine behind has no such route."
    return ServingError(404, message, "invalid_request_error", "unsupported_by_engine")
