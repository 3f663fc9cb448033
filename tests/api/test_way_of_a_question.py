"""How many of the API's modules one streamed image question passes, by the functions that run while it is answered."""

from __future__ import annotations

import gc
import re
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from served import KEY, Served, image_part, sse_data, text_part, wait_for

from api.engine.config import EngineConfig
from api.engine.engine import Engine
from api.engine.loading.loader import load
from settings import Settings

ROOT = Path(__file__).resolve().parents[2]
# A module that is added to the way of every question needs a reason to raise these.
ABOVE_THE_ENGINE, IN_THE_ENGINE = 22, 20


class Tracer:
    """Collects the files of all Python functions that are called in any thread, between `start` and `stop`.

    Made before the threads that it is to see. What runs for other reasons, beside every request, is left out.
    """

    BACKGROUND = ("heartbeat",)  # threads
    BEATS = ("_beat",)  # of the event loop

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self._on = False
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if self._on and event == "call" and threading.current_thread().name not in self.BACKGROUND:
            self.codes.add(frame.f_code)

    def start(self) -> None:
        gc.collect()
        gc.disable()  # a finalizer of something that an earlier test left behind would count
        self._on = True

    def stop(self) -> None:
        self._on = False
        gc.enable()
        threading.setprofile(None)
        sys.setprofile(None)

    def modules(self) -> set[str]:
        paths = {Path(code.co_filename) for code in self.codes if code.co_name not in self.BEATS}
        return {str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT / "api")}


def test_a_streamed_image_question_passes_few_modules(tmp_path: Path) -> None:
    tracer = Tracer()
    config = EngineConfig(root=ROOT, model="models/shapes", device="cpu", kernels="torch", threads=1, slots=2)
    settings = Settings(api_key=KEY, log_dir=tmp_path)
    served = Served(settings, None, Engine(lambda progress: load(config, progress), settings.queue_size))
    try:
        with served.client:
            wait_for(lambda: served.engine.stats().state == "idle")
            wait_for(lambda: (served.engine._guard.due_in_s() or 0) > 1)  # it has looked at the model
            tracer.start()
            question = [image_part("red", (112, 112)), text_part("Where is the red circle?")]
            answered = served.chat(question, stream=True, stream_options={"include_usage": True})
            tracer.stop()
    finally:
        tracer.stop()

    events = sse_data(answered.text)
    assert answered.status_code == 200 and events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] > 0
    passed = tracer.modules()
    engine = {path for path in passed if path.startswith("api/engine/")}
    print(*sorted(passed - engine), "", *sorted(engine), sep="\n")
    assert {"api/routes/chat.py", "api/images/decode.py", "api/engine/scheduler.py"} <= passed, "the tracer sees nothing"
    named = set(re.findall(r"`(api/[a-z_/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert passed <= named, "docs/architecture.md describes the way"
    assert len(passed - engine) <= ABOVE_THE_ENGINE and len(engine) <= IN_THE_ENGINE
