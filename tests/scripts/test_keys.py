"""The secrets that the first start creates."""

from __future__ import annotations

import re


def read_env(project) -> dict[str, str]:
    lines = (project.root / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_first_start_writes_random_secrets_for_the_owner_only_and_prints_them_once(project):
    first = project.run("./start.sh")
    made = read_env(project)
    second = project.run("./start.sh")

    assert set(made) == {"GLM_API_KEY", "GLM_WEB_TOKEN", "GLM_PROBE_TOKEN"}
    assert all(len(value) >= 32 for value in made.values()) and len(set(made.values())) == 3
    assert (project.root / ".env").stat().st_mode & 0o777 == 0o600
    assert first.stdout.count(f"GLM_API_KEY={made['GLM_API_KEY']}") == 1
    assert f"/?token={made['GLM_WEB_TOKEN']}" in first.stdout
    assert made["GLM_API_KEY"] not in second.stdout
    assert read_env(project) == made


def test_other_lines_of_the_file_stay(project):
    (project.root / ".env").write_text("# my notes\nGLM_MAX_IMAGES=3\nGLM_API_KEY=\nexport GLM_HUB=modelscope")

    project.run("./start.sh")

    text = (project.root / ".env").read_text()
    pattern = r"# my notes\nGLM_MAX_IMAGES=3\nGLM_API_KEY=\S{32,}\nexport GLM_HUB=modelscope\nGLM_WEB_TOKEN=\S{32,}\nGLM_PROBE_TOKEN=\S{32,}\n"
    assert re.fullmatch(pattern, text)
    assert (project.root / ".env").stat().st_mode & 0o777 == 0o600


def test_secrets_given_by_environment_or_file_are_not_written(project):
    (project.root / "token.txt").write_text("a-token-from-a-file\n")

    started = project.run(
        "./start.sh", GLM_API_KEY="given", GLM_WEB_TOKEN_FILE=str(project.root / "token.txt"), GLM_PROBE_TOKEN="mark"
    )

    assert started.returncode == 0, started.stderr
    assert not (project.root / ".env").exists()
    assert "/?token=a-token-from-a-file" in started.stdout


def test_a_file_readable_by_others_gets_mode_0600(project):
    (project.root / ".env").write_text("GLM_API_KEY=one\nGLM_WEB_TOKEN=two\nGLM_PROBE_TOKEN=three\n")
    (project.root / ".env").chmod(0o644)

    started = project.run("./start.sh")

    assert "0600" in started.stdout
    assert (project.root / ".env").stat().st_mode & 0o777 == 0o600


def test_no_key_is_created_for_an_api_on_another_machine(project):
    project.run("./start.sh web", GLM_API_URL="http://127.0.0.1:1")

    assert set(read_env(project)) == {"GLM_WEB_TOKEN"}
