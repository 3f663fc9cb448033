"""One line per event on standard output: time, level, then key=value.

Prompts, pictures and keys are never given to it.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if not message.startswith("event="):  # a library's line
            message = f"event=log logger={record.name} message={json.dumps(message, ensure_ascii=False)}"
        line = f"{stamp} level={record.levelname.lower()} {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(level: str = "info") -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpcore", "urllib3", "PIL", "filelock", "torch", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def line(event: str, **values: object) -> str:
    """`event=request status=200 path=/info`; values with spaces or quotes are quoted, None is left out."""
    return " ".join([f"event={event}", *(f"{k}={_shown(v)}" for k, v in values.items() if v is not None)])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    plain = text.isprintable() and text and not any(c in text for c in ' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)
