"""What counts as other code and other settings than those of the start."""

from __future__ import annotations

import time

import pytest

from deploy.identity import ROOT, SOURCES, identity
from settings import Settings


@pytest.fixture
def tree(tmp_path):
    for name, text in {
        "api/server.py": "print(settings.queue_size, settings.api_key)", "web/server.py": "print(settings.chat_days)",
        "models/weights.bin": "1234", "api/README.md": "words", "settings.py": "class Settings: ...",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def codes(tree) -> dict[str, str]:
    return {part: identity(tree, part, Settings())["code"] for part in SOURCES}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("api/server.py", {"api"}),
        ("api/new.py", {"api"}),
        ("web/server.py", {"web"}),
        ("models/weights.bin", {"api", "web"}),
        ("settings.py", {"api", "web", "engine"}),
        ("requirements.txt", {"api", "web", "engine"}),
        ("deploy/engine.py", {"engine"}),
        ("api/README.md", set()),
        ("api/__pycache__/server.pyc", set()),
        ("logs/api.log", set()),
    ],
)
def test_a_change_concerns_the_parts_that_run_the_file(tree, name, changed):
    before = codes(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("5678")
    after = codes(tree)

    assert {part for part in SOURCES if after[part] != before[part]} == changed


def test_settings_are_those_that_are_set_and_named_in_the_source(tree):
    settings = Settings(queue_size=5, chat_days=3, alerts_per_hour=2, api_key="secret")

    assert set(identity(tree, "api", settings)["settings"]) == {"queue_size", "api_key"}
    assert set(identity(tree, "web", settings)["settings"]) == {"chat_days"}
    assert "secret" not in str(identity(tree, "api", settings))


def test_it_is_cheap_for_the_real_project():
    spent_s = []
    for _ in range(5):
        began = time.process_time()
        identity(ROOT, "api", Settings())
        spent_s.append(time.process_time() - began)

    assert min(spent_s) < 0.05
