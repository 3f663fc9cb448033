"""The settings file: what is wrong with it is said in one sentence each, and a typo does not stop what runs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import settings
from settings import SettingsError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("GLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLM_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr(settings, "ENV_FILE", tmp_path / ".env")
    monkeypatch.setattr(settings, "_kept", None)
    return tmp_path / ".env"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GLM_API_PORT=8123\nGLM_API_KEY='abc\n", "line 2: GLM_API_KEY: a quote is not closed"),
        (b"GLM_API_KEY='abc\nGLM_WEB_TOKEN='x'\n", "line 1: GLM_API_KEY: a quote is not closed"),
        (b'GLM_API_KEY="abc\nGLM_WEB_TOKEN="x"\n', "line 1: GLM_API_KEY: a quote is not closed"),
        (b"\n\nGLM_API_PORT 8123\n", "line 3: GLM_API_PORT"),
        (b"GLM_API_PORT\n", "line 1: GLM_API_PORT: there is no `=`"),
        (b"GLM_API_PORT=80a\n", "GLM_API_PORT: Input should be a valid integer"),
        (b"GLM_CONTEXT_TOKENS=2\n", "GLM_CONTEXT_TOKENS: must be 0 or >= 64"),
        (b"GLM_KV_CACHE_BYTES=1\n", "must be 0 or >= 1048576"),
        ("GLM_API_KEY=schlüssel\n".encode(), "GLM_API_KEY: must be of ASCII letters, digits and signs, because it travels in an HTTP header. Character 5: U+00FC. Given: ***"),
        ("GLM_PROBE_TOKEN=密钥\n".encode(), "GLM_PROBE_TOKEN: must be of ASCII letters"),
        ("GLM_API_KEYS=ann:plain,ben:clé\n".encode(), "Character 3 (of ben): U+00E9. Given: ***"),
        (b"GLM_API_KEY='tab\tin it'\n", "Character 4: U+0009"),
        (b"GLM_API_KEY='ends with '\n", "Character 10: a space at its end"),
        (b"GLM_API_KEYS=bob\n", "GLM_API_KEYS: each entry must be name:key"),
        (b"GLM_API_KEYS=bob:sha256:zz\n", "GLM_API_KEYS: sha256: must be followed by the 64 hex digits"),
        (b"GLM_API_KEY=mk\nGLM_METRICS_KEY=mk\n", "GLM_METRICS_KEY: must differ from every other key"),
        (b"\nGLM_WEB_PORT=8124\nglm_api_key=abc\n", "line 3: glm_api_key: names are in upper case. Write GLM_API_KEY"),
        (b"Glm_drain_s=3\n", "line 1: Glm_drain_s: names are in upper case. Write GLM_DRAIN_S"),
        (b"GLM_ELASTICSEARCH_URL=127.0.0.1:9200\n", "GLM_ELASTICSEARCH_URL: must look like https://user:password@host:9200/index. Given: ***"),
        (b"GLM_SMTP_URL=smtp.example.com\n", "GLM_SMTP_URL: must look like smtps://user:password@host:465/?from=a@b.c&to=d@e.f"),
        (b"GLM_SMTP_URL=smtps://mail.example:465/\n", "GLM_SMTP_URL: must look like"),
        (b"GLM_API_URL=localhost:8080\n", "GLM_API_URL: must look like http://HOST[:PORT][/PATH]"),
        (b"GLM_PING_URL=https://ping.example:port/\n", "GLM_PING_URL: must look like"),
        (b"GLM_API_PROT=8123\n", "Did you mean GLM_API_PORT?"),
        (b"GLM_ENV_FILE=other\n", "belongs in the environment"),
        ("GLM_API_PORT=8123\n".encode("utf-16"), "UTF-16. Save it as UTF-8"),
        ("GLM_API_PORT=8123\n".encode("utf-16-le"), "UTF-16. Save it as UTF-8"),
        (b"GLM_API_PORT=8123\n# caf\xe9\n", "line 2: not UTF-8 (byte 0xe9)"),
        (b"#" * (settings.ENV_LIMIT_BYTES + 1), "has more than 1048576 bytes"),
    ],
)
def test_one_sentence_says_what_is_wrong_and_where(env: Path, data: bytes, sentence: str) -> None:
    env.write_bytes(data)

    with pytest.raises(SettingsError) as raised:
        settings.load()

    assert sentence in str(raised.value)
    assert "abc" not in str(raised.value), "a secret"
    assert "Value error" not in str(raised.value)


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(env: Path) -> None:
    env.write_bytes(b"\xef\xbb\xbfGLM_API_PORT=8123\r\nGLM_WEB_PORT='8124'\r\n")

    assert (settings.load().api_port, settings.load().web_port) == (8123, 8124)


def test_a_folder_and_a_pipe_in_the_place_of_the_file_are_named(env: Path) -> None:
    env.mkdir()
    with pytest.raises(SettingsError, match=r"is a folder|is not a file"):
        settings.load()
    env.rmdir()
    os.mkfifo(env)
    with pytest.raises(SettingsError, match="is not a file"):
        settings.load()


def test_a_file_of_another_user_is_named_with_what_to_run(env: Path) -> None:
    env.write_text("GLM_API_PORT=8123\n")
    env.chmod(0o000)
    for folder in (env.parent, *env.parent.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import settings; os.seteuid(65534); settings.ENV_FILE = settings.Path({str(env)!r}); settings.load()"

    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False)

    assert "may not be read by nobody. Run: chown nobody" in done.stderr


def test_the_variable_names_another_file(env: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.env"
    other.write_text("GLM_API_PORT=8123\n")
    command = [sys.executable, "-B", str(ROOT / "settings.py"), "api_port"]

    found = subprocess.run(command, env={**os.environ, "GLM_ENV_FILE": str(other)}, capture_output=True, text=True, check=False)
    gone = subprocess.run(command, env={**os.environ, "GLM_ENV_FILE": "nowhere.env"}, capture_output=True, text=True, check=False)

    assert found.stdout == "8123\n"
    assert gone.returncode == 1 and "does not exist" in gone.stderr


def test_a_typo_leaves_the_last_good_settings_in_force(env: Path, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("k'\\ey\n")
    env.write_text(f"GLM_API_PORT=8123\nGLM_API_KEY_FILE={secret}\nGLM_SLACK_URL='http://x/${{HOME}}'\n")
    settings.keep_last_good()
    before = settings.load()
    secret.unlink()
    env.write_text("GLM_API_PORT=8123\nGLM_WEB_PROT=1\n")

    found, problem = settings.load_or_last_good()

    assert found == before and "Did you mean GLM_WEB_PORT?" in problem
    copy = settings.last_good_path()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    child = subprocess.run(
        [sys.executable, "-B", str(ROOT / "settings.py"), "api_port", "api_key"],
        env={**os.environ, **settings.environment_for_children()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.stdout == "8123\nk'\\ey\n"
    with pytest.raises(SettingsError):
        settings.keep_last_good()
    env.write_text("GLM_API_PORT=8124\n")
    assert settings.load_or_last_good()[1] == "" and settings.environment_for_children() == {}


def test_a_file_that_is_gone_leaves_the_last_good_settings_in_force(env: Path) -> None:
    assert settings.load_or_last_good()[1] == "", "there was never a file"
    env.write_text("GLM_API_PORT=8123\n")
    settings.keep_last_good()
    env.unlink()

    found, problem = settings.load_or_last_good()

    assert found.api_port == 8123 and "is gone. Restore it" in problem


def test_an_invalid_file_still_says_where_the_copy_is(env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLM_LOG_DIR")
    env.write_text(f"GLM_LOG_DIR={tmp_path / 'elsewhere'}\nGLM_API_PORT=8123\n")
    settings.keep_last_good()
    env.write_text(f"GLM_LOG_DIR={tmp_path / 'elsewhere'}\nGLM_API_PORT='8124\n")

    assert settings.load_or_last_good()[0].api_port == 8123


def test_the_copy_is_written_only_if_it_changes(env: Path) -> None:
    env.write_text("GLM_API_PORT=8123\n")
    settings.keep_last_good()
    first = settings.last_good_path().stat().st_ino
    settings.keep_last_good()
    assert settings.last_good_path().stat().st_ino == first
    env.write_text("GLM_API_PORT=8124\n")
    settings.keep_last_good()
    assert settings.last_good_path().stat().st_ino != first


def test_what_was_kept_does_not_change_with_the_file(env: Path) -> None:
    env.write_text("GLM_API_PORT=8123\n")
    settings.keep(settings.load())
    env.write_text("GLM_API_PORT=x\n")

    assert settings.kept().api_port == 8123


def test_a_pipe_in_place_of_a_secret_is_named_and_does_not_hold_the_start(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "key")
    monkeypatch.setenv("GLM_API_KEY_FILE", str(tmp_path / "key"))

    with pytest.raises(SettingsError, match=r"GLM_API_KEY_FILE: .*key is not a file"):
        settings.load()
