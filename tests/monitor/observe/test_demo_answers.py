"""The real server with the demo model answers the probe's questions: those kinds that it surely knows."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from monitor.observe.api_probe import Prober, model_key
from monitor.observe.health_probe import get_health
from monitor.observe.question import PICTURE_KINDS, draw

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, logs = free_port(), tmp_path_factory.mktemp("logs")
    no_settings = logs / "empty.env"  # not those of whoever runs the tests
    no_settings.touch()
    given = {
        "GLM_API_PORT": str(port), "GLM_API_HOST": "127.0.0.1", "GLM_MODEL": "models/shapes", "GLM_DEVICE": "cpu",
        "GLM_LOG_DIR": str(logs), "GLM_PROBE_TOKEN": "a-token-of-the-test",
        "GLM_ENV_FILE": str(no_settings),
    }  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("GLM_")} | given
    with (logs / "api.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "api.server"], cwd=ROOT, env=env, stdout=log, stderr=log)
    found, ends_at = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
    while get_health(found, 2.0).state != "idle":
        assert time.monotonic() < ends_at and server.poll() is None, (logs / "api.log").read_text()[-2000:]
        time.sleep(0.2)
    yield found
    server.terminate()
    server.wait(30)


@pytest.mark.parametrize("kind", [*PICTURE_KINDS, "absent"])
def test_the_demo_answers_surely(url: str, kind: str) -> None:
    prober = Prober(url, "", "a-token-of-the-test", random.Random(kind))
    answers = [prober._ask(draw(kind, random.Random(f"{kind} {number}")), WAIT_S) for number in range(6)]

    rights = [dict(answer.tries)[kind] for answer in answers]
    assert sum(rights) >= 5, [(answer.expected, answer.text) for answer in answers]


def test_the_key_of_the_baseline_names_model_revision_and_recipe(url: str) -> None:
    key = model_key(url, "", 5.0)

    assert key is not None and (key["model"], key["recipe"]) == ("glm-shapes-demo", "cpu/float32")
    assert len(key["revision"]) == 16
