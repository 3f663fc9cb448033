"""POST /tokenize and /detokenize: text to the model's tokens and back."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from api import prompt as prompts
from api.body import read_body, while_connected
from api.engine.model import Model
from api.errors import invalid, unknown_model
from api.openapi import DETOKENIZE, TOKENIZE
from api.services import Services, services
from api.tokens_schema import DetokenizeRequest, TokenizeRequest
from api.validation import Checked, check, parse_object

router = APIRouter()


@router.post("/tokenize", **TOKENIZE)
async def tokenize(request: Request) -> dict[str, Any]:
    server = services(request)
    model, wanted = await _read(request, server, TokenizeRequest)
    work = asyncio.get_running_loop().run_in_executor(server.pools.preprocess, _ids, wanted, model, server)
    ids = await while_connected(request, work)
    body: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context_tokens}
    if wanted.return_token_strs:
        body["token_strs"] = [model.vocabulary.token_bytes(token).decode(errors="replace") for token in ids]
    return body


@router.post("/detokenize", **DETOKENIZE)
async def detokenize(request: Request) -> dict[str, Any]:
    server = services(request)
    model, wanted = await _read(request, server, DetokenizeRequest)
    for place, token in enumerate(wanted.tokens):
        if token < 0 or token >= 2**31 or not model.vocabulary.has(token):
            raise invalid(f"`tokens[{place}]`: the model has no token {token}.", f"tokens[{place}]")
    return {"prompt": b"".join(map(model.vocabulary.token_bytes, wanted.tokens)).decode(errors="replace")}


async def _read(request: Request, server: Services, kind: type[Checked]) -> tuple[Model, Checked]:
    body = await read_body(request, server.settings.max_body_bytes, server.admission)
    model = server.model()
    wanted = check(kind, parse_object(body))
    asked = getattr(wanted, "model", None)
    if asked is not None and asked != model.id:
        raise unknown_model(asked, model.id)
    return model, wanted


def _ids(wanted: TokenizeRequest, model: Model, server: Services) -> list[int]:
    """Special tokens in a plain text are text here as everywhere."""
    if wanted.prompt is not None:
        return model.vocabulary.encode(model.vocabulary.protect(wanted.prompt))
    assert wanted.messages is not None
    return prompts.rendered_ids(wanted.messages, wanted.tools or [], _thinks(wanted), model)


def _thinks(wanted: TokenizeRequest) -> bool:
    options = wanted.chat_template_kwargs
    return options is None or options.enable_thinking is not False
