"""How a wire format says what a job has to say; here that of chat completions."""

from __future__ import annotations

from typing import Any, Protocol

from api.errors import ServingError
from api.protocol.completion import Chunk, Completion

Said = tuple[str | None, Any]  # an event's name and data; a string is sent as it is


class Words(Protocol):
    """One for each request. A whole answer is said too, to nobody, so that both ways say the same."""

    def opening(self) -> list[Said]: ...

    def say(self, chunk: Chunk) -> list[Said]: ...

    def closing(self) -> list[Said]: ...

    def failed(self, error: ServingError) -> Said: ...

    def body(self) -> dict[str, Any]:
        """The answer in one piece, after `closing`."""


class ChatWords:
    def __init__(self, completion: Completion, include_usage: bool) -> None:
        self._completion = completion
        self._include_usage = include_usage

    def opening(self) -> list[Said]:
        return [(None, chunk) for chunk in self._completion.opening()]

    def say(self, chunk: Chunk) -> list[Said]:
        return [(None, chunk)]

    def closing(self) -> list[Said]:
        usage: list[Said] = [(None, self._completion.usage_chunk())] if self._include_usage else []
        return [*usage, (None, "[DONE]")]

    def failed(self, error: ServingError) -> Said:
        return None, error.body()

    def body(self) -> dict[str, Any]:
        return self._completion.body()
