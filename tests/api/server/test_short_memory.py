"""A server that is short of memory says how many users it has failed: exactly as many as have seen an error."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from served import chat_body, image_part, text_part
from server_process import Server

PAGE_BYTES = resource.getpagesize()


def test_failures_for_want_of_memory_are_counted_as_users_see_them(start) -> None:
    # Large pieces of memory are asked of the kernel each time, and not found in what an earlier one has left.
    server: Server = start(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_=str(2**20))
    small, large = (chat_body([image_part("red", (side, side)), text_part("hi")]) for side in (56, 1700))
    assert server.post(small).status_code == 200
    held = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0]) * PAGE_BYTES
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, (held + 4 * 2**20, resource.RLIM_INFINITY))

    with ThreadPoolExecutor(2) as users:
        answers = list(users.map(server.post, [large, small] * 6))

    statuses = [answer.status_code for answer in answers]
    failed, answered = statuses.count(500), statuses.count(200)
    assert failed and answered and failed + answered == 12, statuses
    # A lack of memory shows as other errors too: a thread that cannot be started, for example.
    seen = ({"text": 0, "picture": 1 + answered}, failed)
    server.until(lambda health: _totals(health["outcomes"]) == seen, limit_s=10)


def _totals(outcomes: dict[str, dict[str, int]]) -> tuple[dict[str, int], int]:
    return outcomes["answered"], sum(outcomes["failed"].values())
