"""Which set of replicas may be started, and how it is kept in `.env`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import settings
from deploy import plain_settings, replicas
from settings import REPLICA_VARIABLE, Settings, SettingsError


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("GLM_")]:
        monkeypatch.delenv(name)
    file = tmp_path / ".env"
    file.write_text(f"# mine\nGLM_LOG_DIR={tmp_path / 'logs'}\n")
    monkeypatch.setattr(settings, "ENV_FILE", file)
    monkeypatch.setattr(replicas, "ENV_FILE", file)
    monkeypatch.setattr(replicas, "nginx", lambda: "/usr/sbin/nginx")
    return file


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("GLM_GPUS=0,x", "GLM_GPUS: must be numbers of cards, such as 0,1,2,3. Given: '0,x'"),
        ("GLM_GPUS=0,1,0", "GLM_GPUS: must name each card once. Given: '0,1,0'"),
        ("GLM_GPUS=0,1\nGLM_REPLICAS=3", "GLM_REPLICAS: must be 2, or not be set, because there is a replica for each card of GLM_GPUS=0,1. Given: 3"),
        ("GLM_GPUS=0,1\nGLM_DEVICE=cpu", "GLM_GPUS: must be empty with GLM_DEVICE=cpu. Given: '0,1'"),
        ("GLM_REPLICAS=0", "GLM_REPLICAS: Input should be greater than or equal to 1. Given: '0'"),
        ("GLM_REPLICAS=2\nGLM_API_URL=http://other:1", "GLM_API_URL: must be empty with GLM_REPLICAS=2"),
        ("GLM_REPLICAS=2\nGLM_ENGINE_URL=http://other:1", "GLM_ENGINE_URL: must be empty with GLM_REPLICAS=2"),
        ("GLM_REPLICAS=2\nGLM_WEB_PORT=8091", "GLM_WEB_PORT: must not be from 8090 to 8091, which are the ports of the replicas (GLM_REPLICAS=2). Given: 8091"),
        ("GLM_REPLICAS=2\nGLM_API_PORT=65525", "GLM_API_PORT: must be <= 65524 with GLM_REPLICAS=2"),
    ],
)
def test_contradictions_are_refused_by_name(env: Path, lines: str, sentence: str) -> None:
    env.write_text(f"{lines}\n")

    with pytest.raises(SettingsError) as refused:
        settings.load()

    assert sentence in str(refused.value)


def test_a_replica_has_the_settings_of_one_api(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env.write_text("GLM_GPUS=2, 5\nGLM_API_PORT=9000\n")
    whole = settings.load()
    monkeypatch.setenv(REPLICA_VARIABLE, "1")

    one = settings.load()

    assert (whole.replica_count, whole.replica, whole.api_port) == (2, None, 9000)
    assert (one.replica_count, one.replica, one.gpus, one.api_port, one.api_host) == (1, 1, "5", 9011, "127.0.0.1")
    assert one.log_dir == whole.log_dir / "replicas" / "1"
    assert one == whole.for_replica(1)


def test_the_flags_are_kept_beside_the_other_lines(env: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = env.read_text()

    assert replicas.main(["keep", "replicas=3"]) == 0
    assert env.read_text() == f"{text}GLM_REPLICAS=3\n"
    assert f"Written to {env}: GLM_REPLICAS=3" in capsys.readouterr().out
    assert replicas.main(["keep", "gpus=0,1"]) == 0
    assert env.read_text() == f"{text}GLM_GPUS=0,1\n"
    assert replicas.main(["keep", "gpus=0,1", "replicas=2"]) == 0
    assert env.read_text() == f"{text}GLM_GPUS=0,1\n"
    assert replicas.main(["keep", "replicas=1"]) == 0
    assert env.read_text() == f"{text}GLM_REPLICAS=1\n"
    assert env.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("given", "variables", "sentence"),
    [
        (["gpus=0,1", "replicas=3"], {}, "GLM_REPLICAS: must be 2"),
        (["gpus=0,zero"], {}, "GLM_GPUS: must be numbers of cards"),
        (["replicas=2"], {"GLM_REPLICAS": "4"}, "--replicas 2: GLM_REPLICAS is '4' in the environment, which wins over"),
        (["replicas=2"], {"GLM_GPUS": "0,1"}, "--replicas: GLM_GPUS is set in the environment, which wins over"),
    ],
)
def test_flags_that_cannot_be_kept_change_nothing(
    env: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], variables: dict[str, str], sentence: str
) -> None:
    text = env.read_text()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert replicas.main(["keep", *given]) == 2

    assert sentence in capsys.readouterr().err
    assert env.read_text() == text


def test_without_nginx_several_replicas_are_refused_with_what_to_install(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "nginx", lambda: "")

    assert "apt-get install nginx" in replicas.why_not(Settings(replicas=2))
    assert replicas.why_not(Settings(log_dir=env.parent / "logs")) == ""


def test_stop_sh_knows_the_set_from_settings_that_are_invalid(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_ENV_FILE", str(env))
    env.write_text("GLM_GPUS=0,1,2\nGLM_NO_SUCH=1\n")
    assert plain_settings.unchecked(env.parent).replicas == 3
    env.write_text("GLM_REPLICAS=2\n")
    assert plain_settings.unchecked(env.parent).replicas == 2
    env.write_text("")
    assert plain_settings.unchecked(env.parent).replicas == 1


def test_one_api_on_a_chosen_card_is_no_replica(env: Path) -> None:
    env.write_text("GLM_GPUS=3\n")

    assert settings.load().replica_count == 1
