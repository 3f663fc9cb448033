"""Starts the real server around the fake model, for tests that need a real socket and real signals.

Settings come from the environment; `FAKE_TOKEN_S` is the time one token takes.
"""

from __future__ import annotations

import os
import sys

import settings
from api.engine.engine import Engine
from api.engine.fake import fake_model
from api.server import serve


def main() -> int:
    loaded = settings.load()
    token_s = float(os.environ.get("FAKE_TOKEN_S", "0"))
    return serve(loaded, Engine(lambda progress: fake_model(token_s=token_s), loaded.queue_size))


if __name__ == "__main__":
    sys.exit(main())
