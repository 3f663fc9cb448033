"""What the driver reports about the cards: XID errors and memory errors, by NVML's event sets.

They reach the API in containers too, where the kernel's log cannot be read. A thread of its own waits for them; without
NVML, without a card or with a driver that is lost there are no events, and a wait that never returns keeps nothing else
from working or ending.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

WAIT_MS = 5000
RETRY_S = 60.0  # after the driver has failed
KEPT = 50
KEEP_S = 24 * 3600.0


@dataclass(frozen=True)
class CardEvent:
    """`code`: the number of an XID error; for memory errors 1 if corrected, 2 if not."""

    kind: str  # xid, ecc
    code: int
    card: int
    at: float  # time.monotonic()


class CardEvents:
    """`cards`: the numbers of those that this process computes on, as in GLM_GPUS; empty: all."""

    def __init__(self, cards: str = "") -> None:
        self._cards = {int(card) for card in cards.split(",") if card}
        self._events: deque[CardEvent] = deque(maxlen=KEPT)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="card-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns at once: a thread that hangs in the driver is left behind, a daemon."""
        self._end.set()

    def recent(self) -> list[dict[str, Any]]:
        """The events of the last day, the newest first; `age_s` in seconds."""
        now = time.monotonic()
        return [
            {"kind": event.kind, "code": event.code, "card": event.card, "age_s": round(now - event.at, 1)}
            for event in reversed(tuple(self._events))
            if now - event.at <= KEEP_S
        ]

    def _watch(self) -> None:
        try:
            nvml = importlib.import_module("pynvml")
        except Exception:  # not installed, or it cannot be loaded
            return
        while not self._end.is_set():
            try:
                nvml.nvmlInit()
            except nvml.NVMLError:  # no driver: it is not going to appear while the server runs
                return
            try:
                self._wait(nvml)
            except Exception as error:  # the driver is lost or reset; NVMLError and what a damaged library raises
                logger.warning("event=card_events_lost error=%s", type(error).__name__)
            self._end.wait(RETRY_S)

    def _wait(self, nvml: Any) -> None:
        """Record events until the end or an error of the driver."""
        events = nvml.nvmlEventSetCreate()
        try:
            cards = self._register(nvml, events)
            while cards and not self._end.is_set():
                try:
                    self._record(nvml, nvml.nvmlEventSetWait_v2(events, WAIT_MS), cards)
                except nvml.NVMLError_Timeout:
                    continue
        finally:
            nvml.nvmlEventSetFree(events)

    def _register(self, nvml: Any, events: Any) -> dict[str, int]:
        """Number of each card by its UUID; empty if no card reports events."""
        wanted = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeSingleBitEccError
        wanted |= nvml.nvmlEventTypeDoubleBitEccError
        cards = {}
        for number in range(nvml.nvmlDeviceGetCount()):
            if self._cards and number not in self._cards:  # of another replica
                continue
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            try:
                supported = nvml.nvmlDeviceGetSupportedEventTypes(handle) & wanted
                if supported:
                    nvml.nvmlDeviceRegisterEvents(handle, supported, events)
                    cards[str(nvml.nvmlDeviceGetUUID(handle))] = number
            except nvml.NVMLError:  # this card (MIG, vGPU) reports none
                continue
        return cards

    def _record(self, nvml: Any, event: Any, cards: dict[str, int]) -> None:
        card = cards.get(str(nvml.nvmlDeviceGetUUID(event.device)), -1)
        if event.eventType == nvml.nvmlEventTypeXidCriticalError:
            found = CardEvent("xid", int(event.eventData), card, time.monotonic())
        else:
            code = 2 if event.eventType == nvml.nvmlEventTypeDoubleBitEccError else 1
            found = CardEvent("ecc", code, card, time.monotonic())
        self._events.append(found)
        logger.error("event=card_event kind=%s code=%d card=%d", found.kind, found.code, found.card)
