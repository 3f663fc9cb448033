"""Parts of the page that are checked every few seconds, without ever leaving the input box locked."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st


def repeat(every_s: float | None, content: Callable[[bool], None] | None = None) -> None:
    """Call `content(False)` now and `content(True)` every `every_s` seconds, between the runs of the script.

    Call it in every run and at the same place, with None when there is nothing to check. Streamlit's input box unlocks
    when the browser sees that a full run has ended. A timed call that was requested before then is made right after
    it, and a slow browser that receives both ends at once sees the second one only: the box would stay locked. With the
    place kept, such a late call arrives here and starts one more full run, whose end nothing can hide.
    """
    timed = False

    @st.fragment(run_every=every_s)
    def call() -> None:
        nonlocal timed
        if content is not None:
            content(timed)
        elif timed:
            st.rerun()
        timed = True

    call()
