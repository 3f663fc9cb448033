"""The clients that people have, as they are installed from their registries, against the real server and the demo model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(Path(__file__).parent), str(ROOT / "tests" / "api")]

from ports import free_port  # noqa: E402
from served import KEY  # noqa: E402
from server_process import WAIT_S, Server  # noqa: E402
from table import CLIENTS, PAGE, Client, with_table  # noqa: E402

ENVIRONMENT = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"
CLIENT_S = 180.0  # of one client; some take 5 s to be imported on an idle machine
MODEL = "glm-shapes-demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (ENVIRONMENT / "installed").exists():
        pytest.skip("the clients are not installed: tests/clients/install.sh PYTHON")
    command = [sys.executable, "-m", "api.server", "--model", "models/shapes"]
    made = Server(free_port(), tmp_path_factory.mktemp("clients") / "api.log", command, GLM_SLOTS="4")
    made.until(lambda health: health["state"] == "idle", 300)
    yield made
    made.process.kill()
    made.process.wait(WAIT_S)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: " ".join(client.program))
def test_a_client_does_all_that_it_can(client: Client, server: Server, tmp_path: Path) -> None:
    name, *arguments = client.program
    # Node looks for packages in the folders above a program.
    folder = ENVIRONMENT / "node" if name.endswith(".mjs") else PROGRAMS
    if folder != PROGRAMS:
        for program in PROGRAMS.glob("*.mjs"):
            shutil.copy(program, folder)
    interpreter = ENVIRONMENT / "bin" / ("python" if name.endswith(".py") else "node")
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ}
    done = subprocess.run(
        [interpreter, folder / name, *arguments], cwd=tmp_path, text=True, capture_output=True, timeout=CLIENT_S,
        env={
            **kept, "HOME": str(tmp_path), "GLM_URL": server.url, "GLM_KEY": KEY,
            "GLM_MODEL": MODEL, "GLM_PICTURE": str(ROOT / "web" / "samples" / "shapes.png"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask the internet for prices
        },
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == dict.fromkeys((*client.features, *client.more), "yes"), done.stderr[-4000:]


def test_the_published_table_is_what_is_tried_here() -> None:
    page = PAGE.read_text("utf-8")

    assert with_table(page) == page, "run python tests/clients/table.py"
