"""Who may use the console's actions: compares the operator token, slows down guessing, and records every try.

Wrong tokens are counted in the page's process, by the visitor's address and over all addresses, because a guesser opens as
many sessions as they like. Each try that is compared becomes a line of the log and an entry of the audit log. Knows
nothing of Streamlit.
"""

from __future__ import annotations

import hmac
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

from web.console import checker_store

FREE_TRIES = 5  # of one address
FREE_TRIES_OF_ALL = 20
LONGEST_WAIT_S = 60.0  # of one address: behind a proxy everybody may have the same
LONGEST_WAIT_OF_ALL_S = 8.0  # short, because it also keeps out whoever has the right token
FORGOTTEN_S = 900.0  # after the last wrong token
MAX_ADDRESSES = 10_000

log = logging.getLogger("web")


@dataclass
class WrongTries:
    """`last`: monotonic seconds."""

    count: int = 0
    last: float = 0.0

    def wait_s(self, free: int, longest_s: float, now: float) -> float:
        """How long the next try has to wait: twice as long after each wrong one."""
        if self.count < free or now - self.last > FORGOTTEN_S:
            return 0.0
        return max(self.last + min(2.0 ** min(self.count - free + 1, 16), longest_s) - now, 0.0)

    def add(self, now: float) -> None:
        self.count = 1 if now - self.last > FORGOTTEN_S else self.count + 1
        self.last = now


@dataclass
class OperatorTokens:
    """Thread-safe: one for all sessions of the process."""

    of_address: dict[str, WrongTries] = field(default_factory=dict)
    of_all: WrongTries = field(default_factory=WrongTries)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def try_token(self, entered: str, token: str, address: str, log_dir: Path, now: float) -> tuple[bool, float]:
        """(whether it is right, seconds to wait before it is compared at all). `now`: monotonic seconds."""
        with self.lock:
            wrong = self.of_address.setdefault(address, WrongTries())
            wait_s = max(
                wrong.wait_s(FREE_TRIES, LONGEST_WAIT_S, now),
                self.of_all.wait_s(FREE_TRIES_OF_ALL, LONGEST_WAIT_OF_ALL_S, now),
            )
            if wait_s > 0:
                return False, wait_s
            right = hmac.compare_digest(entered.strip().encode(), token.encode())
            if right:
                del self.of_address[address]
            else:
                wrong.add(now)
                self.of_all.add(now)
            self._forget(now)
        outcome, detail = ("done", "opened") if right else ("refused", f"wrong operator token, {wrong.count} from this address")
        level = logging.INFO if right else logging.WARNING
        log.log(level, "event=operator_token right=%s address=%s wrong=%d", right, address, wrong.count)
        try:
            checker_store.add_audit(log_dir, f"console: {address}", "unlock", outcome, detail)
        except checker_store.HistoryUnavailable as error:
            log.warning("event=operator_token_not_audited reason=%r", str(error))
        return right, 0.0

    def _forget(self, now: float) -> None:
        """The addresses without a recent wrong token, and if there are still too many, those that were there first."""
        if len(self.of_address) > MAX_ADDRESSES:
            recent = {address: tries for address, tries in self.of_address.items() if now - tries.last <= FORGOTTEN_S}
            self.of_address = dict(list(recent.items())[-MAX_ADDRESSES // 2 :])


OF_ALL_SESSIONS = OperatorTokens()
