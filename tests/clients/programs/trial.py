"""What every client is asked to do, and how it reports: one line of JSON, feature to "yes" or what went wrong.

Runs in the environment of the clients: only the standard library here, and nothing of this project.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL = os.environ["GLM_URL"]
BASE_URL = f"{URL}/v1"
KEY = os.environ["GLM_KEY"]
MODEL = os.environ["GLM_MODEL"]
NO_MODEL = "no-such-model"

PICTURE = base64.b64encode(Path(os.environ["GLM_PICTURE"]).read_bytes()).decode()
DATA_URL = f"data:image/png;base64,{PICTURE}"
QUESTION = "What color is the star?"
SECOND = "How many shapes are there?"
TOOL = "count_objects"
TOOL_TEXT = "Count the objects of one color and shape."
# The demo model knows no free strings, so its words are given.
TOOL_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "color": {"type": "string", "enum": ["red", "blue", "green"]},
        "shape": {"type": "string", "enum": ["circle", "star", "square"]},
    },
    "required": ["color", "shape"],
    "additionalProperties": False,
}
TOOL_QUESTION = "How many red circles are there? Use the tool."
TOOL_RESULT = "2"
ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue", "green"]}, "large": {"type": "boolean"}},
    "required": ["color", "large"],
    "additionalProperties": False,
}
ENDLESS = {"ignore_eos": True}  # an answer that is still being written when the client goes
ABORT_S = 10.0


def blue(text: str | None) -> None:
    assert text and "blue" in text, f"the star is blue. Given: {text!r}"


def many(pieces: list[Any]) -> None:
    assert len(pieces) > 1, f"a stream comes in pieces. Given: {pieces!r}"


def counted(arguments: Any) -> None:
    """The arguments of a call of the tool, as text or object."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    for name, shape in TOOL_SCHEMA["properties"].items():
        assert given[name] in shape["enum"], f"arguments that fit their schema. Given: {given!r}"


def seen(value: Any) -> None:
    """An answer in the form of ANSWER_SCHEMA, as text or object."""
    given = json.loads(value) if isinstance(value, str) else value
    assert given["color"] in ("red", "blue", "green") and isinstance(given["large"], bool), f"Given: {given!r}"


def says_which_model(error: Exception) -> None:
    assert NO_MODEL in str(error), f"the error names the model. Given: {error!r}"


def running() -> float:
    request = urllib.request.Request(f"{URL}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    text = urllib.request.urlopen(request, timeout=30).read().decode()
    names = ("glm_num_requests_running", "glm_num_requests_waiting")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(names))


def comes_to_rest() -> None:
    """The server ends the work for a client that has gone. Each client has a server's slots to itself."""
    deadline = time.monotonic() + ABORT_S
    while (left := running()) > 0:
        assert time.monotonic() < deadline, f"{left:g} requests still run {ABORT_S:g} s after the client has gone"
        time.sleep(0.05)


def report(**features: Callable[[], None]) -> None:
    """Try each feature; `second_turn` is shown as "second turn"."""
    results = {}
    for name, trial in features.items():
        began = time.monotonic()
        try:
            trial()
            results[name.replace("_", " ")] = "yes"
        except Exception as error:
            traceback.print_exc()
            results[name.replace("_", " ")] = f"{type(error).__name__}: {error}"[:400]
        print(f"{name}: {time.monotonic() - began:.2f} s", file=sys.stderr)
    print(json.dumps(results))
