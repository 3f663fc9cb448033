"""Starts the real server around the fake model, for tests that need a real socket and real signals.

Settings come from the environment; `FAKE_TOKEN_S` is the time that a token takes, `FAKE_ANSWER` the text of every answer.
"""

from __future__ import annotations

import os
import sys

from fake_model import echo, fake_model

import settings
from api.engine.engine import Engine
from api.server import serve


def main() -> int:
    loaded = settings.load()
    token_s = float(os.environ.get("FAKE_TOKEN_S", "0"))
    given = os.environ.get("FAKE_ANSWER")
    answer = (lambda prompt, images: given) if given is not None else echo
    return serve(loaded, Engine(lambda progress: fake_model(answer, token_s=token_s), loaded.queue_size))


if __name__ == "__main__":
    sys.exit(main())
