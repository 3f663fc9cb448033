"""The lists that must agree with each other: settings and their documentation, imports and requirements."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Literal, get_args, get_origin

import settings_table
import yaml
from dotenv import dotenv_values
from pydantic import SecretStr

from api.http.auth import OPEN_PATHS
from deploy.packages import pins
from settings import ROOT, SECRETS, Settings

EXAMPLE = ROOT / ".env.example"
OWN = ("api", "web", "monitor", "deploy", "models", "settings", "cgroup", "log_output")


def documented() -> dict[str, str]:
    return dict(re.findall(r"^#(GLM_[A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))


def test_every_setting_is_documented_and_nothing_else_is():
    assert set(documented()) == {f"GLM_{name.upper()}" for name in Settings.model_fields}


def test_documented_defaults_are_the_real_ones():
    for name, field in Settings.model_fields.items():
        shown = documented()[f"GLM_{name.upper()}"]
        default = field.default
        if isinstance(default, Path):
            default = default.relative_to(ROOT)
        assert shown == ("" if default is None else str(default)), name


def test_the_page_of_settings_is_the_one_that_settings_py_makes():
    assert settings_table.PAGE.read_text() == settings_table.page(), "run: python tests/settings_table.py"
    named = [name for _, _, names in settings_table.sections() for name in names]
    assert sorted(named) == sorted(Settings.model_fields)


def test_the_example_names_every_value_of_a_choice():
    text = EXAMPLE.read_text()
    for name, field in Settings.model_fields.items():
        if get_origin(field.annotation) is Literal:
            about = re.search(rf"((?:^#.*\n)+)#GLM_{name.upper()}=", text, re.MULTILINE)
            assert about and all(re.search(rf"\b{value}\b", about[1]) for value in get_args(field.annotation)), name


def test_example_with_every_line_in_force_is_accepted(tmp_path):
    everything = re.sub(r"^#(GLM_)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    (tmp_path / "env").write_text(everything)

    settings = Settings(_env_file=tmp_path / "env")

    assert len(dotenv_values(tmp_path / "env")) == len(Settings.model_fields)
    assert settings.api_port == 8080


def test_secrets_name_their_file_form():
    for name in SECRETS:
        assert f"GLM_{name}_FILE" in EXAMPLE.read_text()
        assert Settings.model_fields[name.lower()].annotation == SecretStr | None


def test_the_page_about_security_says_what_every_secret_is_for():
    page = (ROOT / "docs" / "security.md").read_text()
    assert [name for name in SECRETS if f"`GLM_{name}`" not in page] == []
    assert all(f"`{path}`" in page for path in OPEN_PATHS)


def test_every_requirement_is_pinned_exactly():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]

    for line in lines:
        assert not line or line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?==[0-9][0-9.]*", line), (
            line
        )


def test_one_list_serves_every_way_of_installing():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    dockerfile = (ROOT / "Dockerfile").read_text()

    assert conda["name"] == "glm-env"
    assert conda["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}], "no package of its own"
    assert "choose_python requirements.txt" in dockerfile
    assert "install_missing requirements-quantized.txt" in dockerfile
    assert "pip install" not in dockerfile, "no package of its own"
    assert "choose_python requirements.txt" in (ROOT / "start.sh").read_text()
    assert pins(ROOT / "requirements.txt").items() <= pins(ROOT / "requirements-test.txt").items()


def test_the_image_has_the_cuda_of_torch():
    # Another torch: look up which CUDA its wheels are built with (nvidia-cuda-runtime among its dependencies).
    cuda = re.search(r"^ARG BASE=nvidia/cuda:(\d+\.\d+)\.\d+-base-", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    assert cuda and {pins(ROOT / "requirements.txt")["torch"]: cuda[1]} == {"2.13.0": "13.0"}


def test_every_import_of_the_running_code_is_in_the_requirements():
    lists = ("requirements.txt", "requirements-quantized.txt", "requirements-ray.txt")
    listed = {normal(name) for each in lists for name in pins(ROOT / each)}
    providers = packages_distributions()
    missing = set()
    for path in runtime_files():
        for module in imported_modules(path) - set(sys.stdlib_module_names) - set(OWN) - {"__future__"}:
            if not listed & {normal(name) for name in providers.get(module, [module])}:
                missing.add((module, str(path.relative_to(ROOT))))

    assert not missing


def runtime_files() -> list[Path]:
    packages = [
        path for folder in ("api", "web", "monitor", "deploy", "models") for path in (ROOT / folder).rglob("*.py")
    ]
    return [*packages, ROOT / "cgroup.py", ROOT / "log_output.py", ROOT / "settings.py", ROOT / "health_check.py"]


def imported_modules(path: Path) -> set[str]:
    """Top-level names of absolute imports. pydantic pins its core itself; modelscope is optional; Triton comes with CUDA
    builds of torch."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found - {"modelscope", "pydantic_core", "triton"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
