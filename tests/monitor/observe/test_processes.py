"""What the kernel tells about a process."""

from __future__ import annotations

import os
import resource

from monitor.observe.processes import open_files


def test_open_files_are_counted_against_the_limit() -> None:
    before, limit = open_files(os.getpid())
    with open(os.devnull):
        after, _ = open_files(os.getpid())

    assert before is not None and after == before + 1
    assert limit in (resource.getrlimit(resource.RLIMIT_NOFILE)[0], None)


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    assert open_files(2**22 + 1) == (None, None)
