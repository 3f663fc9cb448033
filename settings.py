"""Every setting of the bundle, read once from `GLM_*` variables and the project's `.env`.

The API server, the page, the checker and the shell scripts all read their settings here. It imports no other part of the
bundle. An unknown name or an invalid value stops the program with a message that lists what is allowed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parent
ENV_FILE = ROOT / ".env"
PREFIX = "GLM_"
SECRETS = (
    "API_KEY", "API_KEYS", "WEB_TOKEN", "OPERATOR_TOKEN", "PROBE_TOKEN", "DINGTALK_URL", "DINGTALK_SECRET", "FEISHU_URL",
    "FEISHU_SECRET", "WECOM_URL",
    "WEBHOOK_URL", "WEBHOOK_SECRET", "SLACK_URL", "SMTP_URL", "PING_URL", "PUSHGATEWAY_URL", "ELASTICSEARCH_URL",
)  # fmt: skip


class SettingsError(ValueError):
    """An invalid setting; the message has its name, its value and what is allowed."""


class Settings(BaseSettings):
    """Units are in the names: `_s` seconds, `_mib`, `_bytes`, `_pixels`, `_tokens`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
    )

    # The model and where it runs.
    model: str = Field(
        "auto", description="hub id, folder, or `auto`: GLM-4.6V-Flash if the GPU can hold it, otherwise the demo"
    )
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(
        0, ge=0, le=1024, description="torch CPU threads; 0: one for a tiny model, otherwise all cores but one, which is left to HTTP"
    )
    context_tokens: int = Field(
        0, ge=0, description="longest prompt plus answer; 0: what the model allows, at most 8192"
    )

    # The engine.
    slots: int = Field(0, ge=0, le=1024, description="requests computed at once; 0: chosen for the device")
    kv_cache_bytes: int = Field(0, ge=0, description="memory of the KV cache; 0: a share of the free memory")
    prefill_chunk_tokens: int = Field(512, ge=16, description="longest part of a prompt computed in one step")
    picture_cache_bytes: int = Field(256 * 2**20, ge=0, description="memory of the encoder cache")

    kernels: Literal["auto", "torch"] = Field(
        "auto", description="`auto`: compiled kernels on a CPU with AVX512_BF16; `torch`: none"
    )

    # The API.
    api_host: str = "0.0.0.0"
    api_port: int = Field(8080, ge=1, le=65535)
    api_key: SecretStr | None = None
    api_keys: SecretStr | None = Field(None, description="more keys, as name:key or name:sha256:digest, comma-separated")
    probe_token: SecretStr | None = Field(None, description="marks health probes, which never queue behind users")
    key_requests_per_minute: int = Field(0, ge=0, description="requests per minute of one key; 0: no limit")
    key_concurrency: int = Field(0, ge=0, description="requests of one key at a time; 0: no limit")
    cors_origins: str = Field("", description="allowed CORS origins, comma-separated; empty: none")
    queue_tokens: int = Field(262_144, ge=1, description="tokens of prompts and answers of all requests in progress")
    request_timeout_s: float = Field(600.0, gt=0, description="from entering the queue to the last token")
    fetch_images: bool = Field(False, description="fetch images at http(s) URLs of public addresses")
    fetch_hosts: str = Field("", description="the only hosts to fetch from, comma-separated; empty: any public host")
    fetch_timeout_s: float = Field(10.0, gt=0, le=60)
    loop_window: int = Field(256, ge=0, le=4096, description="an answer ends when this many tokens repeat one pattern; 0: never")
    log_level: Literal["debug", "info", "warning"] = "info"
    queue_size: int = Field(32, ge=1, description="requests that may wait; further ones get 503")
    max_images: int = Field(8, ge=0, description="images in one request")
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="width times height, read from the header before decoding"
    )
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    default_max_tokens: int = Field(1024, ge=1, description="answer length if a request has no limit")
    drain_s: float = Field(10.0, ge=0, description="how long running answers may continue after SIGTERM")

    # The page.
    web_host: str = "0.0.0.0"
    web_port: int = Field(8081, ge=1, le=65535)
    web_token: SecretStr | None = None
    operator_token: SecretStr | None = Field(None, description="enables the console's actions; without it there are none")
    chat_days: int = Field(90, ge=1, description="chats unused for this many days are deleted")
    api_url: str = Field(
        "", description="URL of the API for the page and the checker; empty: `api_port` on this machine"
    )

    # The checker: its probes, and what confirms a verdict.
    probe_timeout_s: float = Field(10.0, gt=0, description="time limit of a probe question")
    probe_credit_s: float = Field(60.0, ge=0, description="a younger answer to a user replaces the probe question; 0: always ask")
    check_period_s: float = Field(60.0, ge=1, description="how often health_check.py runs")
    check_budget_s: float = Field(45.0, ge=5, description="a run that takes longer is killed")
    check_silent_s: float = Field(300.0, ge=1, description="without a run for this long the checker is reported as silent")
    confirm_runs: int = Field(2, ge=1, description="consecutive runs that must agree before a restart")
    stall_s: float = Field(120.0, ge=1, description="pending work without a step for this long is a hang, unless the engine expects a longer step")
    beat_limit_s: float = Field(60.0, ge=1, description="an event loop without a heartbeat for this long is blocked")
    start_deadline_s: float = Field(300.0, ge=1, description="loading may make no progress at all for this long")
    failure_share_limit: float = Field(0.05, ge=0, le=1, description="share of users' requests that may fail without a cause for concern")
    failure_count_limit: int = Field(3, ge=1, description="fewer failures than this are never a cause for concern, whatever their share")
    stable_s: float = Field(600.0, ge=0, description="an incident closes after this long without trouble")
    engine_url: str = Field("", description="another OpenAI-compatible server to check instead of the API")
    front_url: str = Field("", description="URL of the page through the reverse proxy, probed as well")

    # The cure.
    cure: Literal["restart", "shadow", "off"] = "restart"
    restarts_per_hour: int = Field(3, ge=0)
    restarts_per_day: int = Field(6, ge=0)
    nightly_restart: str = Field("off", description="`off`, `auto` (quietest hour of the history) or an hour such as `4`")
    test_faults: bool = Field(False, description="enables fault injection for the drill; never in production")

    # Limits that warn and never restart.
    gpu_load_limit_percent: float = Field(0.0, ge=0, description="0: the load of the card is no reason to warn")
    gpu_memory_limit_mib: float = Field(0.0, ge=0, description="0: use gpu_memory_limit_percent instead")
    gpu_memory_limit_percent: float = Field(95.0, gt=0, le=100)
    cpu_limit_percent: float = Field(70.0, gt=0)
    memory_limit_percent: float = Field(80.0, gt=0)
    disk_free_limit_mib: float = Field(1024.0, ge=0)
    limit_window_s: float = Field(600.0, ge=0, description="a limit must be exceeded on average over this time")

    # Alerts. URLs may hold tokens, so each is a secret.
    dingtalk_url: SecretStr | None = None
    dingtalk_secret: SecretStr | None = None
    feishu_url: SecretStr | None = None
    feishu_secret: SecretStr | None = None
    wecom_url: SecretStr | None = None
    webhook_url: SecretStr | None = None
    webhook_secret: SecretStr | None = None
    slack_url: SecretStr | None = None
    smtp_url: SecretStr | None = None
    ping_url: SecretStr | None = None
    pushgateway_url: SecretStr | None = None
    elasticsearch_url: SecretStr | None = None
    alert_language: Literal["en", "zh", "both"] = "both"
    alerts_per_hour: int = Field(20, ge=1, description="messages per channel and hour; the others wait")
    quiet_hours: str = Field("", description="such as `23:00-07:00`: warnings wait until the end; other alerts do not")
    timezone: str = Field("", description="of quiet hours and the nightly restart; empty: the machine's")

    # Runtime state.
    log_dir: Path = ROOT / "logs"
    start_timeout_s: float = Field(120.0, gt=0, description="how long start.sh waits for the processes to answer")

    @field_validator("log_dir")
    @classmethod
    def _below_the_project(cls, value: Path) -> Path:
        return ROOT / value  # relative to the project, not to the working directory; an absolute path is unchanged

    @field_validator("quiet_hours")
    @classmethod
    def _two_times(cls, value: str) -> str:
        if value and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", value):
            raise ValueError("must look like 23:00-07:00")
        return value

    @field_validator("nightly_restart")
    @classmethod
    def _off_auto_or_hour(cls, value: str) -> str:
        if value not in ("off", "auto") and not (value.isdigit() and int(value) < 24):
            raise ValueError("must be off, auto or an hour from 0 to 23")
        return value

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            return value and ZoneInfo(value).key
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError("must be a name such as Asia/Shanghai") from None

    @property
    def api_base_url(self) -> str:
        """URL of the API from this machine, without a trailing slash."""
        return (self.api_url or f"http://127.0.0.1:{self.api_port}").rstrip("/")


def load(**overrides: object) -> Settings:
    """Reads the settings; keyword arguments override the environment. Raises SettingsError with one line per problem."""
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
    """`python settings.py NAME...` prints values for a shell script; without names it only validates."""
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
