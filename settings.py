"""Every setting of the bundle, read once from `GLM_*` variables and the project's `.env`.

The API server, the page, the checker and the shell scripts read the same names through this one
module, so a value means the same everywhere. It imports no part of the bundle. A name that does
not exist or a value that does not fit stops the program with a message that says what is allowed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parent
ENV_FILE = ROOT / ".env"
PREFIX = "GLM_"
SECRETS = ("API_KEY", "WEB_TOKEN")


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


class Settings(BaseSettings):
    """One frozen object. Units are in the names: `_s` seconds, `_bytes`, `_pixels`, `_tokens`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=ENV_FILE, env_file_encoding="utf-8", frozen=True, extra="ignore",
        env_ignore_empty=True,
    )

    # The model and where it runs.
    model: str = Field("auto", description="hub id, folder, or `auto`: GLM-4.6V-Flash if the GPU can hold it, else the demo")
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(0, ge=0, le=1024, description="torch CPU threads; 0 takes all of two cores, else leaves one to HTTP")
    context_tokens: int = Field(0, ge=0, description="longest prompt plus answer; 0 takes what the model allows, at most 8192")

    # The engine.
    slots: int = Field(0, ge=0, le=1024, description="requests computed at once; 0 chooses for the device")
    kv_cache_bytes: int = Field(0, ge=0, description="memory for keys and values; 0 takes a part of what is free")
    prefill_chunk_tokens: int = Field(512, ge=16, description="longest part of a prompt computed in one step")
    picture_cache_bytes: int = Field(256 * 2**20, ge=0, description="memory for encoded pictures that may be asked about again")

    # The API.
    api_host: str = "0.0.0.0"
    api_port: int = Field(8080, ge=1, le=65535)
    api_key: SecretStr | None = None
    queue_size: int = Field(32, ge=1, description="requests that may wait; one more gets 503")
    max_images: int = Field(8, ge=0, description="pictures in one request")
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    max_image_pixels: int = Field(50_000_000, ge=1, description="width times height, read from the header before decoding")
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    default_max_tokens: int = Field(1024, ge=1, description="answer length when a request names none")
    drain_s: float = Field(10.0, ge=0, description="on SIGTERM, how long running answers may finish")

    # The page.
    web_host: str = "0.0.0.0"
    web_port: int = Field(8081, ge=1, le=65535)
    web_token: SecretStr | None = None
    api_url: str = Field("", description="where the page and the checker find the API; empty means this machine's `api_port`")

    # The checker.
    probe_timeout_s: float = Field(10.0, gt=0, description="time limit of the real question asked by health_check.py")

    # Runtime state.
    log_dir: Path = ROOT / "logs"
    start_timeout_s: float = Field(120.0, gt=0, description="how long start.sh waits for each process to answer")

    @field_validator("log_dir")
    @classmethod
    def _below_the_project(cls, value: Path) -> Path:
        return ROOT / value  # the same folder for a cron job as for a shell; an absolute path stays as it is

    @property
    def api_base_url(self) -> str:
        """Root of the API as seen from this machine, without a trailing slash."""
        return (self.api_url or f"http://127.0.0.1:{self.api_port}").rstrip("/")


def load(**overrides: object) -> Settings:
    """Read the settings; keyword arguments (from a command line) win over the environment.

    Raises SettingsError with one line per problem.
    """
    given = _given_names()
    _refuse_unknown(given)
    values: dict[str, Any] = {
        name.lower(): _read_secret_file(name, given) for name in SECRETS if f"{PREFIX}{name}_FILE" in given
    }
    values |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem) for problem in error.errors())) from None


def _given_names() -> dict[str, str]:
    from_file = {k: v or "" for k, v in dotenv_values(ENV_FILE).items()} if ENV_FILE.is_file() else {}
    given = {**from_file, **os.environ}
    return {name: value for name, value in given.items() if name.startswith(PREFIX)}


def _refuse_unknown(given: dict[str, str]) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{PREFIX}{name}_FILE" for name in SECRETS}
    unknown = sorted(set(given) - known)
    if not unknown:
        return
    lines = []
    for name in unknown:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        lines.append(f"{name}: no such setting.{hint}")
    lines.append("Settings that exist: " + ", ".join(sorted(known)))
    raise SettingsError("\n".join(lines))


def _read_secret_file(name: str, given: dict[str, str]) -> str:
    path = Path(given[f"{PREFIX}{name}_FILE"])
    try:
        value = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{PREFIX}{name}_FILE: cannot read {path}: {error.strerror}") from None
    if not value:
        raise SettingsError(f"{PREFIX}{name}_FILE: {path} is empty")
    return value


def _explain(problem: Mapping[str, Any]) -> str:
    field = str(problem["loc"][0]) if problem["loc"] else "settings"
    shown = "***" if field.upper() in SECRETS else repr(problem.get("input"))
    return f"{PREFIX}{field.upper()}: {problem['msg']}. Given: {shown}"


def main() -> int:
    """`python settings.py NAME`: print one value for a shell script; without a name, check them all."""
    try:
        settings = load()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for name in sys.argv[1:]:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        print("" if value is None else value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
