"""Removes the secrets of the settings from text for logs, evidence bundles, alerts and the store."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from settings import SECRETS, Settings

HIDDEN = "***"
TOKENS_IN_URLS = re.compile(r"((?:access_token|key|token|secret|password|sign)=)[^&\s\"']+", re.IGNORECASE)


def secrets_of(settings: Settings) -> list[str]:
    """The secrets, longest first, because one may contain another."""
    values = set()
    for name in SECRETS:
        value = getattr(settings, name.lower(), None)
        if value is not None:
            text = value.get_secret_value()
            values.add(text)
            parts = urlsplit(text)
            if parts.scheme and parts.netloc:
                values |= {part for part in (parts.password, parts.path.strip("/"), parts.query) if part and len(part) >= 8}
    return sorted((value for value in values if len(value) >= 4), key=len, reverse=True)


def redact(text: str, settings: Settings) -> str:
    for value in secrets_of(settings):
        text = text.replace(value, HIDDEN)
    return TOKENS_IN_URLS.sub(rf"\g<1>{HIDDEN}", text)
