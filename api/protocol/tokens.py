"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from pydantic import Field

from api.errors import invalid
from api.protocol.messages import Message, Tool
from api.protocol.schemas import TemplateOptions
from api.protocol.validation import Strict, check, parse_object

MAX_TOKENS = 1_000_000


class TokenizeRequest(Strict):
    """Either plain text, or a conversation as the chat template renders it; pictures count one token each."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool = False


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises the 400 error that names the first field that is wrong."""
    wanted = check(TokenizeRequest, parse_object(body))
    if (wanted.prompt is None) == (wanted.messages is None):
        raise invalid("`prompt` or `messages` must be given, and not both.", "prompt")
    return wanted


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS)


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises the 400 error that names the first field that is wrong."""
    return check(DetokenizeRequest, parse_object(body))
