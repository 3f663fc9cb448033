"""The clients that are tried, what each can do, and the table of it in docs/clients.md: `python tests/clients/table.py`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
_TABLE = re.compile(r"(<!-- clients: .*? -->\n).*?(<!-- end of clients -->)", re.DOTALL)
FEATURES = ("picture", "stream", "tools", "schema", "error", "abort", "second turn")


@dataclass(frozen=True)
class Client:
    """`program`: the file in programs/ and its arguments. `package` names it in the list of what is installed."""

    title: str
    package: str
    wire: str
    program: tuple[str, ...]
    features: tuple[str, ...] = FEATURES
    more: tuple[str, ...] = ()  # what only this client can


CLIENTS = (
    Client("openai (Python)", "openai", "/v1/chat/completions", ("openai_chat.py",)),
    Client("openai (Python)", "openai", "/v1/responses", ("openai_responses.py",)),
    Client(
        "openai (Python)", "openai", "/v1/completions", ("openai_completions.py",),
        features=("stream", "schema", "error", "abort"), more=("text",),
    ),
    Client("openai (Node)", "node:openai", "/v1/chat/completions", ("openai_node.mjs",)),
    Client("anthropic", "anthropic", "/v1/messages", ("anthropic_messages.py",)),
    Client("zai-sdk", "zai-sdk", "/v1/chat/completions", ("zhipu.py",)),
    Client(
        "litellm", "litellm", "/v1/chat/completions, /v1/responses", ("litellm_calls.py",), more=("anthropic bridge",)
    ),
    Client("langchain-openai", "langchain-openai", "/v1/chat/completions", ("langchain.py",)),
    Client(
        "llama-index (OpenAILike)", "llama-index-llms-openai-like", "/v1/chat/completions, /v1/completions",
        ("llama_index_calls.py",), more=("text",),
    ),
    Client("pydantic-ai", "pydantic-ai-slim", "/v1/chat/completions", ("pydantic_ai_agent.py",)),
    Client("instructor", "instructor", "/v1/chat/completions", ("instructor_calls.py",)),
    Client("openai-agents", "openai-agents", "/v1/responses, /v1/chat/completions", ("openai_agents.py",)),
    Client("huggingface_hub", "huggingface-hub", "/v1/chat/completions", ("huggingface.py",)),
    Client("AI SDK (openai-compatible)", "node:ai", "/v1/chat/completions", ("ai_sdk.mjs",)),
    Client("AI SDK (anthropic)", "node:@ai-sdk/anthropic", "/v1/messages", ("ai_sdk.mjs", "anthropic")),
)  # fmt: skip


def table() -> str:
    rows = [
        f"| Client | Version | Route | {' | '.join(FEATURES)} | more |",
        f"| --- | --- | --- | {'--- | ' * (len(FEATURES) + 1)}".rstrip(),
    ]
    for client in CLIENTS:
        marks = " | ".join("yes" if feature in client.features else "" for feature in FEATURES)
        wires = ", ".join(f"`{wire}`" for wire in client.wire.split(", "))
        rows.append(f"| {client.title} | {_version(client.package)} | {wires} | {marks} | {', '.join(client.more)} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    return _TABLE.sub(lambda match: f"{match[1]}{table()}{match[2]}", page)


def _version(package: str) -> str:
    kind, _, name = package.rpartition(":")
    if kind == "node":
        return json.loads((HERE / "package.json").read_text())["dependencies"][name]
    [version] = re.findall(rf"^{re.escape(name)}==(\S+)", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    return version


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
