"""Events of the cards that this process uses (XID, ECC)."""

from __future__ import annotations

from typing import Any


class CardEvents:
    def recent(self) -> list[dict[str, Any]]:
        """Of each: `kind` (xid or ecc), `code`, `card` and `age_s`. Any thread may call it."""
        return []
