"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from api.messages import Message, Tool
from api.schemas import TemplateOptions
from api.validation import Strict

MAX_TOKENS = 1_000_000


class TokenizeRequest(Strict):
    """Either plain text, or a conversation as the chat template renders it; pictures count one token each."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "must be given, or `messages`, and not both")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS)
